"""One round of local training and evaluation: set by (seed, site, round), fit for any site."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import pytest
import torch
from torch.nn import functional

from client import train as train_module
from client.data.transforms import normalise
from client.train import TrainResult, evaluate, train
from fakes.training import initial, make_dataset, make_run, norm, same, site_in
from medmamba.model import MedMamba
from medmamba.weights import load_arrays, to_arrays
from strategies.errors import ConfigError, RefusalError
from strategies.evaluation import EvaluationSums


@pytest.fixture
def make_site(tmp_path):
    return partial(site_in, tmp_path)


# --- one round


@pytest.mark.parametrize("augment", [True, False])
def test_seed_site_and_round_decide_the_update_to_the_bit(make_site, augment):
    run = make_run(training__augment=augment)
    weights = initial(run)
    first = train(make_site("A"), run, 2, weights)
    assert same(first.update, train(make_site("A"), run, 2, weights).update)
    others = [
        train(make_site("B"), run, 2, weights),
        train(make_site("A"), run, 3, weights),
        train(make_site("A"), make_run(training__augment=augment, seed=1), 2, weights),
    ]
    assert not any(same(first.update, other.update) for other in others)


def test_each_kind_of_draw_has_its_own_seed_from_run_site_and_round(make_site, monkeypatch):
    drawn: list[tuple[str | int, ...]] = []

    def spy(*names: str | int) -> int:
        drawn.append(names)
        return 1

    monkeypatch.setattr(train_module, "derive_seed", spy)
    run = make_run(seed=7)
    train(make_site("B"), run, 3, initial(run))
    assert {(names[0], *names[2:]) for names in drawn} == {(7, "B", 3)}
    assert sorted(names[1] for names in drawn) == ["augment", "order", "train"]


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_what_was_trained_before_in_the_process_does_not_matter(make_site, kind):
    run = make_run(model__norm=kind)
    weights = initial(run)
    train_module._model.cache_clear()
    alone = train(make_site("B"), run, 1, weights)
    train_module._model.cache_clear()
    train(make_site("A", make_dataset(seed=5)), run, 1, initial(run, seed=9))
    evaluate(make_site("A"), run, weights, "val")
    assert same(alone.update, train(make_site("B"), run, 1, weights).update)


def test_the_update_is_local_minus_global_for_every_travelling_array(make_site):
    run = make_run(model__norm="batch")
    weights = initial(run)
    before = {name: value.copy() for name, value in weights.items()}
    site = make_site()
    result = train(site, run, 1, weights)
    assert result.update.keys() == weights.keys()
    assert same(before, weights)  # the received weights are left alone
    assert any(name.endswith("running_mean") for name in result.update)
    assert not any(name.endswith("num_batches_tracked") for name in result.update)
    for name, value in result.update.items():
        assert value.dtype == np.float32
        assert value.shape == weights[name].shape
    local = to_arrays(train_module._model_of(site, run))
    assert same(result.update, {name: local[name] - weights[name] for name in weights})


def test_the_result_says_what_was_done(make_site):
    run = make_run(training__local_steps=0, training__local_epochs=2, training__schedule="cosine")
    result = train(make_site(), run, 3, initial(run))
    assert isinstance(result, TrainResult)
    assert result.num_examples == 9
    assert result.num_steps == 2 * 2  # batches of 4 and 5
    assert result.learning_rate == pytest.approx(0.005)


def test_the_reported_loss_is_the_mean_over_the_examples_seen(make_site):
    # With a rate too small to matter and nothing drawn, it is the loss of the global weights.
    run = make_run(
        training__learning_rate=1e-12,
        training__augment=False,
        training__local_steps=0,
        training__class_weights="none",
        model__drop_path=0.0,
    )
    weights = initial(run)
    site = make_site()
    split = site.split("train", run.model)
    model = MedMamba.from_name(run.model.size, **run.model.architecture)
    load_arrays(model, weights)
    with torch.no_grad():
        logits = model.eval()(normalise(split.images))
    expected = functional.cross_entropy(logits, split.labels).item()
    assert train(site, run, 1, weights).loss == pytest.approx(expected, rel=1e-5)


def test_the_optimiser_starts_anew_each_round(make_site):
    """Two rounds by one site equal two rounds by a site that restarted in between."""
    run = make_run()
    weights = initial(run)
    stayed = make_site()
    moved = {name: weights[name] + u for name, u in train(stayed, run, 1, weights).update.items()}
    second = train(stayed, run, 2, moved)
    train_module._model.cache_clear()
    assert same(second.update, train(make_site(), run, 2, moved).update)


# --- difficult sites


def test_a_site_without_training_examples_declines(make_site):
    empty = make_dataset(labels=())
    run = make_run()
    with pytest.raises(RefusalError, match="no training examples") as error:
        train(make_site(dataset=empty), run, 1, initial(run))
    assert error.value.code == "no-examples"


def test_one_example_trains_with_groups_and_declines_with_batches(make_site):
    single = make_dataset(labels=[1])
    run = make_run()
    result = train(make_site(dataset=single), run, 1, initial(run))
    assert result.num_examples == 1
    assert all(np.isfinite(value).all() for value in result.update.values())
    run = make_run(model__norm="batch")
    with pytest.raises(RefusalError) as error:
        train(make_site(dataset=single), run, 1, initial(run))
    assert error.value.code == "too-few-examples"


def test_batches_of_one_are_refused_by_name_where_batch_norm_cannot_take_them(make_site):
    """One image that reaches the last stage as one position has no variance."""

    def attempt() -> None:
        run = make_run(
            model__norm="batch",
            model__depths="1,1,1",
            model__dims="8,16,32",
            training__batch_size=1,
        )
        train(make_site(), run, 1, initial(run))

    with pytest.raises((ConfigError, RefusalError), match="batch-size=1"):
        attempt()


@pytest.mark.parametrize("kind", ["inverse-frequency", "effective-number"])
def test_a_site_with_one_class_trains(make_site, kind):
    run = make_run(training__class_weights=kind, training__focal_gamma=2.0)
    result = train(make_site(dataset=make_dataset(labels=[2] * 6)), run, 1, initial(run))
    assert math.isfinite(result.loss)
    assert all(np.isfinite(value).all() for value in result.update.values())
    assert norm(result.update) > 0


def test_a_loss_that_is_not_finite_is_refused(make_site):
    run = make_run()
    weights = initial(run)
    name = next(name for name in weights if name.startswith("head"))
    weights[name] = np.full_like(weights[name], np.nan)
    with pytest.raises(RefusalError, match="the loss is not finite") as error:
        train(make_site(), run, 1, weights)
    assert error.value.code == "loss-not-finite"


def test_weights_that_a_last_step_blew_up_never_leave_the_site(make_site, monkeypatch):
    """The loss was finite when it was looked at."""

    def blown_up(model):
        return {name: np.full_like(value, np.inf) for name, value in to_arrays(model).items()}

    monkeypatch.setattr(train_module, "to_arrays", blown_up)
    run = make_run()
    with pytest.raises(RefusalError, match="the weights are not finite") as error:
        train(make_site(), run, 1, initial(run))
    assert error.value.code == "loss-not-finite"


# --- work that must end


def aborting(site, after: int, monkeypatch):
    """Have somebody abort the work at a step; returns the steps that were begun."""
    steps: list[int] = []
    check = site.check_work

    def count():
        steps.append(len(steps) + 1)
        if len(steps) == after:
            site.abort("the node is leaving")
        check()

    monkeypatch.setattr(site, "check_work", count)
    return steps


@pytest.mark.parametrize("after", [1, 2, 5])
def test_training_that_is_aborted_ends_at_its_next_step(make_site, monkeypatch, after):
    run = make_run(training__local_steps=1_000_000)
    site = make_site()
    steps = aborting(site, after, monkeypatch)
    with pytest.raises(RefusalError, match=r"^the node is leaving$") as error:
        train(site, run, 1, initial(run))
    assert error.value.code == "stopped"
    assert steps == list(range(1, after + 1))


def test_evaluation_that_is_aborted_ends_at_its_next_part(make_site, monkeypatch):
    monkeypatch.setattr(train_module, "EVALUATION_BATCH", 2)
    run = make_run()
    site = make_site()
    steps = aborting(site, 2, monkeypatch)
    with pytest.raises(RefusalError, match=r"^the node is leaving$"):
        evaluate(site, run, initial(run), "train")
    assert steps == [1, 2]


def test_training_after_an_abort_is_as_if_nothing_had_been(make_site, monkeypatch):
    run = make_run()
    weights = initial(run)
    expected = train(make_site(), run, 1, weights)
    site = make_site()
    with monkeypatch.context() as patch:
        aborting(site, 2, patch)
        with pytest.raises(RefusalError):
            train(site, run, 1, weights)
    site.begin_work()
    assert same(train(site, run, 1, weights).update, expected.update)


# --- evaluation


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_evaluation_counts_what_the_model_says(make_site, kind):
    run = make_run(model__norm=kind)
    weights = initial(run, seed=4)
    site = make_site(dataset=make_dataset(split="val", labels=[0, 1, 2, 2, 1, 0, 0]))
    train(site, run, 1, weights)  # leaves the cached model with other weights, training
    sums = evaluate(site, run, weights, "val")
    model = MedMamba.from_name(run.model.size, **run.model.architecture)
    load_arrays(model, weights)
    split = site.split("val", run.model)
    with torch.no_grad():
        logits = model.eval()(normalise(split.images))
    assert sums == EvaluationSums.from_logits(logits.numpy(), split.labels.numpy())
    assert sums.num_examples == 7


def test_evaluation_in_parts_counts_every_example_once(make_site, monkeypatch):
    run = make_run()
    weights = initial(run)
    site = make_site()
    whole = evaluate(site, run, weights, "train")
    monkeypatch.setattr(train_module, "EVALUATION_BATCH", 4)
    parts = evaluate(site, run, weights, "train")
    assert parts.num_examples == whole.num_examples == 9
    assert np.array_equal(parts.confusion.sum(axis=1), whole.confusion.sum(axis=1))
    assert parts.loss_sum == pytest.approx(whole.loss_sum, rel=1e-5)


def test_an_empty_split_evaluates_to_nothing(make_site):
    run = make_run()
    site = make_site(dataset=make_dataset(split="val", labels=()))
    assert evaluate(site, run, initial(run), "val") == EvaluationSums.zeros(3)


def test_an_output_that_is_not_finite_is_refused(make_site):
    run = make_run()
    weights = {name: np.full_like(value, np.inf) for name, value in initial(run).items()}
    with pytest.raises(RefusalError) as error:
        evaluate(make_site(), run, weights, "val")
    assert error.value.code == "output-not-finite"
