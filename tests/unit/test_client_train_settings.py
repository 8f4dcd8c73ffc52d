"""What each setting of local training does: rate, batches, decay, loss, augmentation, FedProx."""

from __future__ import annotations

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from client import train as train_module
from client.train import (
    add_proximal_gradient,
    batches,
    check_scan_backend,
    learning_rate,
    train,
)
from fakes.training import initial, make_dataset, make_run, norm, same, site_in
from medmamba.config import ModelError
from strategies.errors import RefusalError
from strategies.run_config import TrainingSection


@pytest.fixture
def make_site(tmp_path):
    return partial(site_in, tmp_path)


# --- learning rate and batches


def test_the_cosine_schedule_falls_from_full_to_almost_nothing_over_the_rounds():
    schedule = TrainingSection.model_validate({"learning-rate": 1.0, "schedule": "cosine"})
    rates = [learning_rate(schedule, server_round, 4) for server_round in (1, 2, 3, 4)]
    root = math.sqrt(0.5)
    np.testing.assert_allclose(rates, [1, (1 + root) / 2, 0.5, (1 - root) / 2], rtol=1e-12)


def test_a_constant_schedule_is_constant():
    schedule = TrainingSection.model_validate({"learning-rate": 0.3, "schedule": "constant"})
    assert {learning_rate(schedule, server_round, 9) for server_round in range(1, 10)} == {0.3}


@pytest.mark.parametrize("server_round", [1, 3])
def test_the_first_step_is_as_long_as_the_learning_rate(make_site, server_round):
    """AdamW's first step moves a weight by its rate, whatever the gradient."""
    run = make_run(training__local_steps=1, training__weight_decay=0.0, training__schedule="cosine")
    result = train(make_site(), run, server_round, initial(run))
    longest = max(float(np.abs(value).max()) for value in result.update.values())
    assert longest == pytest.approx(result.learning_rate, rel=1e-2)
    assert result.learning_rate == pytest.approx({1: 0.01, 3: 0.005}[server_round])


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


# --- weight decay, loss and augmentation


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


def test_augmentation_can_be_switched_off(make_site, monkeypatch):
    run = make_run(training__augment=True)
    weights = initial(run)
    augmented = train(make_site(), run, 1, weights)
    monkeypatch.setattr(train_module, "augment_batch", lambda *_: pytest.fail("augmented"))
    plain = train(make_site(), make_run(training__augment=False), 1, weights)
    assert not same(augmented.update, plain.update)


def test_activation_checkpointing_gives_the_same_bits(make_site):
    plain, checkpointed = make_run(), make_run(training__activation_checkpointing=True)
    weights = initial(plain)
    first = train(make_site(), plain, 1, weights)
    second = train(make_site(), checkpointed, 1, weights)
    model = train_module._model_of(make_site(), checkpointed)
    assert all(stage.activation_checkpointing for stage in model.stages)
    assert same(first.update, second.update)


# --- what runs the scan


@pytest.mark.parametrize(("asked", "expected"), [("auto", None), ("reference", "reference")])
def test_the_runs_scan_backend_reaches_the_model(make_site, asked, expected):
    run = make_run(model__scan_backend=asked)
    check_scan_backend(make_site(), run)
    scans = [m for m in train_module._model_of(make_site(), run).modules() if hasattr(m, "A_log")]
    assert {scan.backend for scan in scans} == {expected}


def test_a_missing_scan_backend_is_refused_and_explained_in_the_log_alone(
    make_site, caplog, monkeypatch
):
    reason, remedy = "no CUDA device at /dev/nvidia0", "install a driver"
    run = make_run(model__scan_backend="mamba_ssm")

    def missing(device, backend):
        raise ModelError(f"backend={backend} cannot run here: {reason}", remedy)

    monkeypatch.setattr(train_module, "active_backend", missing)
    with pytest.raises(RefusalError) as error:
        check_scan_backend(make_site(), run)
    assert error.value.code == "scan-backend-missing"
    assert str(error.value) == "model.scan-backend=mamba_ssm cannot run at this site"
    assert caplog.messages == [
        f"site=A backend=mamba_ssm cannot run here: {reason}; {remedy}",
    ]


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
