"""A hospital's limits are checks: a run within them passes, any other is refused with a code."""

import pytest

from client.policy import check_run
from client.site_config import SiteConfig
from strategies.errors import RefusalError
from strategies.records import Instruction, Task
from strategies.run_config import RunConfig

STATE = "/srv/hospital/secret-state"
OPEN = {"require-privacy": False, "require-encryption": False}


def site(task: str = "", **limits) -> SiteConfig:
    return SiteConfig.model_validate(
        {
            "site": "A",
            "federation": "lungs",
            "state-dir": STATE,
            "task": task,
            "data": {"dataset": "phantom"},
            "limits": {**OPEN, **limits},
        }
    )


def instruction(
    server_round: int = 1, task: Task = "train", federation: str = "lungs"
) -> Instruction:
    return Instruction(federation, "run", server_round, task, {})


def refusal(site_config: SiteConfig, run: RunConfig, asked: Instruction) -> RefusalError:
    with pytest.raises(RefusalError) as error:
        check_run(site_config, run, asked)
    return error.value


def test_a_run_within_the_limits_passes():
    check_run(site(), RunConfig(), instruction())


def test_a_site_that_says_nothing_demands_privacy_then_encryption():
    silent = SiteConfig.model_validate({"site": "A", "data": {}})
    asked = instruction(federation=silent.federation)
    assert refusal(silent, RunConfig(), asked).code == "privacy-required"
    limits = silent.limits.model_copy(update={"require_privacy": False})
    silent = silent.model_copy(update={"limits": limits})
    assert refusal(silent, RunConfig(), asked).code == "encryption-required"


@pytest.mark.parametrize(
    ("limits", "run", "asked", "code", "text"),
    [
        ({}, {}, {"federation": "hearts"}, "other-federation", "federation='hearts' is not this"),
        ({}, {"dataset": "breastmnist"}, {}, "other-dataset", "dataset='breastmnist' is not what"),
        ({"require-privacy": True}, {}, {}, "privacy-required", "privacy.mode=off"),
        ({"require-encryption": True}, {}, {}, "encryption-required", "encryption.mode=off"),
        (
            {"allowed-strategies": ["fedprox"]},
            {},
            {},
            "strategy-not-allowed",
            "strategy.name=fedavg",
        ),
        ({"allowed-sizes": ["nano"]}, {}, {}, "size-not-allowed", "model.size=tiny"),
        (
            {},
            {"model.depths": "1,1", "model.dims": "8,16"},
            {},
            "size-not-allowed",
            "model.size=custom",
        ),
        (
            {"max-image-size": 63},
            {},
            {},
            "image-too-large",
            "model.image-size=64; limit 63",
        ),
        (
            {"max-positions": 63},
            {"model.image-size": 32, "model.patch-size": 4},
            {},
            "too-much-work",
            "model.image-size=32 with model.patch-size=4 has 64 positions; limit 63",
        ),
        (
            {"max-batch-size": 31},
            {"training.batch-size": 32},
            {},
            "too-much-work",
            "training.batch-size=32; limit 31",
        ),
        (
            {"max-local-epochs": 2},
            {"training.local-epochs": 3},
            {},
            "too-much-work",
            "training.local-epochs=3; limit 2",
        ),
        (
            {"max-local-steps": 5},
            {"training.local-steps": 6},
            {},
            "too-much-work",
            "training.local-steps=6; limit 5",
        ),
        (
            {},
            {"num-server-rounds": 3},
            {"server_round": 4},
            "round-out-of-range",
            "server-round=4; num-server-rounds=3",
        ),
    ],
)
def test_each_rule_refuses_with_its_code_and_names_the_limit(limits, run, asked, code, text):
    error = refusal(site(**limits), RunConfig.parse(run), instruction(**asked))
    assert error.code == code
    assert text in str(error)


@pytest.mark.parametrize(
    ("limits", "run", "asked"),
    [
        ({"allowed-strategies": ["fedprox"]}, {"strategy.name": "fedprox"}, {}),
        ({"allowed-sizes": ["nano"]}, {"model.size": "nano"}, {}),
        ({"allowed-sizes": ["custom"]}, {"model.depths": "1,1", "model.dims": "8,16"}, {}),
        ({"max-image-size": 64}, {}, {}),
        ({"max-local-epochs": 2}, {"training.local-epochs": 2}, {}),
        ({"max-local-steps": 5}, {"training.local-steps": 5}, {}),
        ({}, {"num-server-rounds": 3}, {"server_round": 3}),
        ({}, {"num-server-rounds": 3}, {"server_round": 4, "task": "test"}),
    ],
)
def test_what_is_just_within_a_limit_passes(limits, run, asked):
    check_run(site(**limits), RunConfig.parse(run), instruction(**asked))


def test_the_task_names_the_dataset_that_the_site_answers_to():
    renamed = site(task="breast-ultrasound")
    check_run(renamed, RunConfig.parse({"dataset": "breast-ultrasound"}), instruction())
    assert refusal(renamed, RunConfig(), instruction()).code == "other-dataset"


def test_reasons_hold_nothing_of_the_site_but_the_limit():
    """They leave the site: no path, no other limit, no data source."""
    strict = site(
        "breast-ultrasound",
        **{"max-image-size": 17, "max-local-steps": 19, "allowed-strategies": ["fedprox"]},
    )
    run = {"dataset": "breast-ultrasound", "model.image-size": 64, "training.local-steps": 100}
    for changes in ({"dataset": "other"}, {}, {"strategy.name": "fedprox"}):
        text = str(refusal(strict, RunConfig.parse({**run, **changes}), instruction()))
        assert "/" not in text
        assert "secret" not in text
        assert "19" not in text  # of the rule that was not reached
