"""A hospital's limits are checks: a run within them passes, any other is refused with a code."""

import pytest

from client.policy import check_order, check_run, check_steps
from client.site_config import SiteConfig
from fakes.orders import CODE, order
from strategies.enrolment import FederationPolicy
from strategies.errors import RefusalError
from strategies.orders import Order
from strategies.run_config import RunConfig

STATE = "/srv/hospital/secret-state"
OPEN = {"require-privacy": False, "require-encryption": False}


def site(task: str = "", **limits) -> SiteConfig:
    return SiteConfig.model_validate(
        {
            "site": "A",
            "state-dir": STATE,
            "task": task,
            "data": {"dataset": "phantom"},
            "limits": {**OPEN, **limits},
        }
    )


def refusal(site_config: SiteConfig, run: RunConfig) -> RefusalError:
    with pytest.raises(RefusalError) as error:
        check_run(site_config, run)
    return error.value


def order_refusal(site_config: SiteConfig, given: Order, **policy) -> RefusalError:
    with pytest.raises(RefusalError) as error:
        check_order(site_config, FederationPolicy(**policy), given)
    return error.value


# --- runs


def test_a_run_within_the_limits_passes():
    check_run(site(), RunConfig())


def test_a_site_that_says_nothing_demands_privacy_then_encryption():
    silent = SiteConfig.model_validate({"site": "A", "data": {}})
    assert refusal(silent, RunConfig()).code == "privacy-required"
    limits = silent.limits.model_copy(update={"require_privacy": False})
    silent = silent.model_copy(update={"limits": limits})
    assert refusal(silent, RunConfig()).code == "encryption-required"


def test_a_site_that_expects_classes_takes_part_in_runs_with_these_alone():
    expecting = site().model_copy(update={"task_classes": ("no", "yes, surely")})
    run = {"model.num-classes": 2, "classes": 'no,"yes, surely"'}
    check_run(expecting, RunConfig.parse(run))
    for classes in ("", '"yes, surely",no', "no,yes"):
        error = refusal(expecting, RunConfig.parse({**run, "classes": classes}))
        assert error.code == "other-classes"
        assert str(error) == f"classes={classes!r} are not the classes this site expects"


@pytest.mark.parametrize(
    ("limits", "run", "code", "text"),
    [
        ({}, {"dataset": "breastmnist"}, "other-dataset", "dataset='breastmnist' is not what"),
        ({"require-privacy": True}, {}, "privacy-required", "privacy.mode=off"),
        ({"require-encryption": True}, {}, "encryption-required", "encryption.mode=off"),
        (
            {"allowed-strategies": ["fedprox"]},
            {},
            "strategy-not-allowed",
            "strategy.name=fedavg",
        ),
        ({"allowed-sizes": ["nano"]}, {}, "size-not-allowed", "model.size=tiny"),
        (
            {},
            {"model.depths": "1,1", "model.dims": "8,16"},
            "size-not-allowed",
            "model.size=custom",
        ),
        (
            {"max-image-size": 63},
            {},
            "image-too-large",
            "model.image-size=64; limit 63",
        ),
        (
            {"max-positions": 63},
            {"model.image-size": 32, "model.patch-size": 4},
            "too-much-work",
            "model.image-size=32 with model.patch-size=4 has 64 positions; limit 63",
        ),
        (
            {"max-batch-size": 31},
            {"training.batch-size": 32},
            "too-much-work",
            "training.batch-size=32; limit 31",
        ),
        (
            {"max-local-epochs": 2},
            {"training.local-epochs": 3},
            "too-much-work",
            "training.local-epochs=3; limit 2",
        ),
        (
            {"max-local-steps": 5},
            {"training.local-steps": 6},
            "too-much-work",
            "training.local-steps=6; limit 5",
        ),
    ],
)
def test_each_rule_refuses_with_its_code_and_names_the_limit(limits, run, code, text):
    error = refusal(site(**limits), RunConfig.parse(run))
    assert error.code == code
    assert text in str(error)


@pytest.mark.parametrize(
    ("limits", "run"),
    [
        ({"allowed-strategies": ["fedprox"]}, {"strategy.name": "fedprox"}),
        ({"allowed-sizes": ["nano"]}, {"model.size": "nano"}),
        ({"allowed-sizes": ["custom"]}, {"model.depths": "1,1", "model.dims": "8,16"}),
        ({"max-image-size": 64}, {}),
        ({"max-local-epochs": 2}, {"training.local-epochs": 2}),
        ({"max-local-steps": 5}, {"training.local-steps": 5}),
    ],
)
def test_what_is_just_within_a_limit_passes(limits, run):
    check_run(site(**limits), RunConfig.parse(run))


def test_the_task_names_the_dataset_that_the_site_answers_to():
    renamed = site(task="breast-ultrasound")
    check_run(renamed, RunConfig.parse({"dataset": "breast-ultrasound"}))
    assert refusal(renamed, RunConfig()).code == "other-dataset"


def test_reasons_hold_nothing_of_the_site_but_the_limit():
    """They leave the site: no path, no other limit, no data source."""
    strict = site(
        "breast-ultrasound",
        **{"max-image-size": 17, "max-local-steps": 19, "allowed-strategies": ["fedprox"]},
    )
    run = {"dataset": "breast-ultrasound", "model.image-size": 64, "training.local-steps": 100}
    for changes in ({"dataset": "other"}, {}, {"strategy.name": "fedprox"}):
        text = str(refusal(strict, RunConfig.parse({**run, **changes})))
        assert "/" not in text
        assert "secret" not in text
        assert "19" not in text  # of the rule that was not reached


@pytest.mark.parametrize(
    ("epochs", "batch_size", "num_examples", "allowed"),
    [(2, 4, 20, True), (2, 4, 21, False), (10, 1, 1, True), (10, 1, 2, False), (3, 4, 0, True)],
)
def test_passes_over_the_data_are_steps_too(epochs, batch_size, num_examples, allowed):
    """With local-steps=0 a small batch makes one pass as long as one likes."""
    limited = site(**{"max-local-steps": 10})
    run = {"training.local-epochs": epochs, "training.batch-size": batch_size}
    parsed = RunConfig.parse({**run, "training.local-steps": 0})
    if allowed:
        check_steps(limited, parsed, num_examples)
        return
    with pytest.raises(RefusalError, match="takes too many steps here; limit 10") as error:
        check_steps(limited, parsed, num_examples)
    assert error.value.code == "too-much-work"
    assert f"={num_examples}" not in str(error.value)


@pytest.mark.parametrize(
    ("steps", "num_examples", "allowed"),
    [(10, 10**6, True), (4, 8, True), (5, 8, False), (6, 9, True), (7, 9, False), (2, 0, True)],
)
def test_steps_that_are_told_are_passes_too(steps, num_examples, allowed):
    """Many steps on few images learn them by heart."""
    limited = site(**{"max-local-epochs": 2})
    run = RunConfig.parse({"training.local-steps": steps, "training.batch-size": 4})
    if allowed:
        check_steps(limited, run, num_examples)
        return
    with pytest.raises(RefusalError, match="makes too many passes here; limit 2") as error:
        check_steps(limited, run, num_examples)
    assert error.value.code == "too-much-work"
    assert f"={num_examples}" not in str(error.value)


# --- orders


def test_an_order_within_the_limits_passes():
    check_order(site(), FederationPolicy(), order(sites="AB"))
    three = RunConfig.parse({"strategy.min-sites": 3})
    check_order(
        site(**{"min-cohort": 3}), FederationPolicy(min_cohort=3), order(three, sites="CAB")
    )
    check_order(site(**{"allowed-code": ["0" * 64, CODE]}), FederationPolicy(), order())


def test_an_order_that_does_not_name_the_site_is_refused():
    for sites in (("B", "C"), ("a", "B"), ("AB", "C")):
        assert order_refusal(site(), order(sites=sites)).code == "not-in-cohort"


def test_a_sum_of_fewer_updates_than_the_limit_is_refused_however_many_names_there_are():
    alone = order(RunConfig.parse({"strategy.min-sites": 1}), sites="ABC")
    error = order_refusal(site(**{"min-cohort": 2}), alone, min_cohort=1)
    assert (error.code, str(error)) == ("cohort-too-small", "strategy.min-sites=1; limit 2")


@pytest.mark.parametrize(
    ("own", "promised", "sites", "text"),
    [
        (2, 1, "A", "cohort=1; limit 2"),
        (1, 2, "A", "cohort=1; limit 2"),
        (4, 2, "ABC", "cohort=3; limit 4"),
        (2, 4, "ABC", "cohort=3; limit 4"),
        (3, 1, "ABBBBAA", "cohort=2; limit 3"),  # names that are there twice are one site
    ],
)
def test_a_cohort_below_the_sites_or_the_federations_limit_is_refused(own, promised, sites, text):
    error = order_refusal(site(**{"min-cohort": own}), order(sites=sites), min_cohort=promised)
    assert (error.code, str(error)) == ("cohort-too-small", text)


def test_a_site_that_says_nothing_is_never_the_only_one():
    silent = SiteConfig.model_validate({"site": "A", "data": {}})
    error = order_refusal(silent, order(sites="A"), min_cohort=1)
    assert error.code == "cohort-too-small"


def test_code_that_is_not_on_the_list_is_refused_and_named():
    limited = site(**{"allowed-code": ["0" * 64]})
    error = order_refusal(limited, order())
    assert (error.code, CODE in str(error)) == ("code-not-allowed", True)
    assert "0" * 64 not in str(error)
    check_order(site(**{"allowed-code": []}), FederationPolicy(), order())


def test_a_run_may_not_let_sites_claim_more_than_the_federation_promised():
    """A claimed million outweighs every honest site in the mean."""
    run = RunConfig.parse({"strategy.max-num-examples": 1001})
    error = order_refusal(site(), order(run), max_num_examples=1000)
    assert (error.code, str(error)) == (
        "cap-too-large",
        "strategy.max-num-examples=1001; the federation promised 1000",
    )
    check_order(site(), FederationPolicy(max_num_examples=1001), order(run))
