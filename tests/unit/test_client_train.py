"""One round of local training: reproducible by (seed, site, round), and what each setting does."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from client import train as train_module
from client.data.manifest import SPLITS, Example, ImageDataset, Manifest
from client.data.transforms import normalise
from client.site import Site
from client.site_config import SiteConfig
from client.train import TrainResult, add_proximal_gradient, batches, evaluate, learning_rate, train
from medmamba.model import MedMamba
from medmamba.weights import load_arrays, to_arrays
from strategies.errors import ConfigError, RefusalError
from strategies.evaluation import EvaluationSums
from strategies.records import Arrays
from strategies.run_config import RunConfig, TrainingSection

TINY = {
    "model.depths": "1,1",
    "model.dims": "8,16",
    "model.image-size": 16,
    "model.in-channels": 1,
    "training.batch-size": 4,
    "training.local-steps": 2,
    "training.learning-rate": 1e-2,
    "training.schedule": "constant",
    "num-server-rounds": 4,
}


def make_run(**changes) -> RunConfig:
    """``training__batch_size=2`` stands for ``training.batch-size``."""
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return RunConfig.parse({**TINY, **named})


def make_dataset(labels=(0, 1, 2, 0, 1, 2, 0, 1, 2), split="train", seed=0) -> ImageDataset:
    labels = list(labels)
    counts = {name: len(labels) if name == split else 3 for name in SPLITS}
    kinds = {name: labels if name == split else [0, 1, 2] for name in SPLITS}
    examples = tuple(
        Example(f"{name}-{i}", "made", i, kinds[name][i], f"{name}-{i}", "", name)
        for name in SPLITS
        for i in range(counts[name])
    )
    pixels = np.random.default_rng(seed).integers(0, 256, (len(examples), 16, 16), dtype=np.uint8)
    return ImageDataset(Manifest("made", ("a", "b", "c"), examples), pixels)


@pytest.fixture
def make_site(tmp_path):
    def _make(name: str = "A", dataset: ImageDataset | None = None) -> Site:
        config = SiteConfig.model_validate(
            {"site": name, "state-dir": str(tmp_path / name), "device": "cpu", "data": {}}
        )
        return Site(config, lambda: make_dataset() if dataset is None else dataset)

    return _make


def initial(run: RunConfig, seed: int = 1) -> Arrays:
    torch.manual_seed(seed)
    return to_arrays(MedMamba.from_name(run.model.size, **run.model.architecture))


def same(first: Arrays, second: Arrays) -> bool:
    assert first.keys() == second.keys()
    return all(np.array_equal(first[name], second[name]) for name in first)


def norm(update: Arrays) -> float:
    return math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in update.values()))


# --- learning rate and batches


def test_the_cosine_schedule_falls_from_full_to_almost_nothing_over_the_rounds():
    schedule = TrainingSection.model_validate({"learning-rate": 1.0, "schedule": "cosine"})
    rates = [learning_rate(schedule, server_round, 4) for server_round in (1, 2, 3, 4)]
    root = math.sqrt(0.5)
    np.testing.assert_allclose(rates, [1, (1 + root) / 2, 0.5, (1 - root) / 2], rtol=1e-12)


def test_a_constant_schedule_is_constant():
    schedule = TrainingSection.model_validate({"learning-rate": 0.3, "schedule": "constant"})
    assert {learning_rate(schedule, server_round, 9) for server_round in range(1, 10)} == {0.3}


def training(batch_size: int, local_epochs: int = 1, local_steps: int = 0) -> TrainingSection:
    return TrainingSection(
        batch_size=batch_size, local_epochs=local_epochs, local_steps=local_steps
    )


@settings(deadline=None)
@given(
    num_examples=st.integers(1, 200),
    batch_size=st.integers(1, 70),
    local_epochs=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_epoch_holds_every_example_once(num_examples, batch_size, local_epochs, seed):
    steps = [
        rows.tolist()
        for rows in batches(num_examples, training(batch_size, local_epochs), seed=seed)
    ]
    assert len(steps) % local_epochs == 0
    per_epoch = len(steps) // local_epochs
    for epoch in range(local_epochs):
        rows = [row for step in steps[epoch * per_epoch : (epoch + 1) * per_epoch] for row in step]
        assert sorted(rows) == list(range(num_examples))
    assert all(len(step) <= batch_size + 1 for step in steps)
    if num_examples > 1 and batch_size > 1:
        assert min(len(step) for step in steps) > 1


def test_a_trailing_single_example_joins_the_batch_before_it():
    assert [len(rows) for rows in batches(9, training(4), seed=0)] == [4, 5]
    assert [len(rows) for rows in batches(10, training(4), seed=0)] == [4, 4, 2]
    assert [len(rows) for rows in batches(1, training(4), seed=0)] == [1]


@settings(deadline=None)
@given(
    num_examples=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    local_steps=st.integers(1, 60),
    local_epochs=st.integers(1, 3),
)
def test_local_steps_are_honoured_exactly(num_examples, batch_size, local_steps, local_epochs):
    settings_ = training(batch_size, local_epochs, local_steps)
    steps = list(batches(num_examples, settings_, seed=1))
    assert len(steps) == local_steps
    # Whole passes all the same: no example comes twice before all came once.
    seen = list(itertools.chain.from_iterable(rows.tolist() for rows in steps))
    assert len(set(seen[:num_examples])) == min(num_examples, len(seen))


def test_the_order_follows_from_the_seed():
    orders = [
        [rows.tolist() for rows in batches(20, training(8, 2), seed=seed)] for seed in (3, 3, 4)
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0][:3] != orders[0][3:]  # shuffled again in the second epoch


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
    result = train(make_site(), run, 1, weights)
    assert result.update.keys() == weights.keys()
    assert same(before, weights)  # the received weights are left alone
    assert any(name.endswith("running_mean") for name in result.update)
    assert not any(name.endswith("num_batches_tracked") for name in result.update)
    for name, value in result.update.items():
        assert value.dtype == np.float32
        assert value.shape == weights[name].shape
    local = to_arrays(train_module._model(train_module._architecture(run), torch.device("cpu")))
    assert same(result.update, {name: local[name] - weights[name] for name in weights})


def test_the_result_says_what_was_done(make_site):
    run = make_run(training__local_steps=0, training__local_epochs=2, training__schedule="cosine")
    result = train(make_site(), run, 3, initial(run))
    assert isinstance(result, TrainResult)
    assert result.num_examples == 9
    assert result.num_steps == 2 * 2  # batches of 4 and 5
    assert result.learning_rate == pytest.approx(0.005)


@pytest.mark.parametrize("server_round", [1, 3])
def test_the_first_step_is_as_long_as_the_learning_rate(make_site, server_round):
    """AdamW's first step moves a weight by its rate, whatever the gradient."""
    run = make_run(training__local_steps=1, training__weight_decay=0.0, training__schedule="cosine")
    result = train(make_site(), run, server_round, initial(run))
    longest = max(float(np.abs(value).max()) for value in result.update.values())
    assert longest == pytest.approx(result.learning_rate, rel=1e-2)
    assert result.learning_rate == pytest.approx({1: 0.01, 3: 0.005}[server_round])


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


def is_exempt(name: str) -> bool:
    return ".norm" in name or "_norm" in name or name.endswith(("bias", "A_log", ".D"))


@pytest.mark.parametrize("kind", ["batch", "group"])
def test_weight_decay_moves_no_norm_no_bias_no_a_log_and_no_d(make_site, kind):
    """One step with and without decay: the gradients are the same, the difference is the decay."""
    updates = [
        train(
            make_site(),
            make_run(training__local_steps=1, training__weight_decay=decay, model__norm=kind),
            1,
            initial(make_run(model__norm=kind)),
        ).update
        for decay in (0.0, 0.5)
    ]
    moved = {name for name in updates[0] if not np.array_equal(updates[0][name], updates[1][name])}
    assert moved == {name for name in updates[0] if not is_exempt(name)}
    assert any(name.endswith("A_log") for name in updates[0])
    assert any(name.endswith(".D") for name in updates[0])


def test_the_optimiser_starts_anew_each_round(make_site):
    """Two rounds by one site equal two rounds by a site that restarted in between."""
    run = make_run()
    weights = initial(run)
    stayed = make_site()
    moved = {name: weights[name] + u for name, u in train(stayed, run, 1, weights).update.items()}
    second = train(stayed, run, 2, moved)
    train_module._model.cache_clear()
    assert same(second.update, train(make_site(), run, 2, moved).update)


# --- FedProx


def test_the_proximal_gradient_is_that_of_the_penalised_loss():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 2))
    model = model.double()
    anchor = [parameter.detach().clone() for parameter in model.parameters()]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    images, labels = torch.randn(5, 4).double(), torch.tensor([0, 1, 0, 1, 1])

    def loss() -> torch.Tensor:
        return functional.cross_entropy(model(images), labels)

    distance = sum(
        ((p - start) ** 2).sum() for p, start in zip(model.parameters(), anchor, strict=True)
    )
    expected = torch.autograd.grad(loss() + 0.7 / 2 * distance, list(model.parameters()))
    loss().backward()
    add_proximal_gradient(model, anchor, 0.7)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-12)


def test_a_parameter_without_a_gradient_stays_without_one():
    model = torch.nn.Linear(2, 1)
    add_proximal_gradient(model, [torch.zeros_like(p) for p in model.parameters()], 1.0)
    assert [parameter.grad for parameter in model.parameters()] == [None, None]


def test_fedprox_without_mu_is_fedavg_to_the_bit(make_site):
    average = make_run()
    proximal = make_run(strategy__name="fedprox", strategy__proximal_mu=0.0)
    weights = initial(average)
    first = train(make_site(), average, 1, weights)
    assert same(first.update, train(make_site(), proximal, 1, weights).update)


def test_a_larger_mu_keeps_the_update_smaller(make_site):
    norms = []
    for mu in (0.0, 1.0, 100.0):
        run = make_run(
            strategy__name="fedprox",
            strategy__proximal_mu=mu,
            training__local_steps=12,
            training__weight_decay=0.0,
        )
        norms.append(norm(train(make_site(), run, 1, initial(run)).update))
    assert norms[0] > norms[1] > norms[2] > 0


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


@pytest.mark.parametrize(
    "changes",
    [
        {"training__class_weights": "none"},
        {"training__class_weights": "inverse-frequency"},
        {"training__effective_number_beta": 0.5},
        {"training__focal_gamma": 2.0},
    ],
)
def test_each_setting_of_the_loss_reaches_it(make_site, changes):
    """The weights come from the site's own counts, so a skewed site shows every setting."""
    skewed = make_dataset(labels=[0] * 7 + [1, 2])
    still = {"training__learning_rate": 1e-12, "training__class_weights": "effective-number"}
    plain, changed = make_run(**still), make_run(**{**still, **changes})
    losses = [train(make_site(dataset=skewed), r, 1, initial(r)).loss for r in (plain, changed)]
    assert losses[0] != losses[1]


def test_a_loss_that_is_not_finite_is_refused(make_site):
    run = make_run()
    weights = initial(run)
    name = next(name for name in weights if name.startswith("head"))
    weights[name] = np.full_like(weights[name], np.nan)
    with pytest.raises(RefusalError, match="the loss is not finite") as error:
        train(make_site(), run, 1, weights)
    assert error.value.code == "loss-not-finite"


def test_augmentation_can_be_switched_off(make_site, monkeypatch):
    run = make_run(training__augment=True)
    weights = initial(run)
    augmented = train(make_site(), run, 1, weights)
    monkeypatch.setattr(train_module, "augment_batch", lambda *_: pytest.fail("augmented"))
    plain = train(make_site(), make_run(training__augment=False), 1, weights)
    assert not same(augmented.update, plain.update)


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
