"""The loss weighs classes, and one example's gradient does not depend on who shares its batch."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from client.loss import class_weights, reweighted_loss

KINDS = ("none", "inverse-frequency", "effective-number")

counts_of_sites = st.lists(st.integers(0, 100_000), min_size=2, max_size=8).map(
    lambda values: np.array(values, dtype=np.int64)
)


def logits_and_labels(b: int, c: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn((b, c), generator=generator)
    return logits, torch.randint(0, c, (b,), generator=generator)


def test_inverse_frequency_gives_every_class_the_same_total_weight():
    # 60 examples in two classes: each class must weigh 30 in all.
    weights = class_weights(np.array([10, 50]), "inverse-frequency")
    np.testing.assert_allclose(weights, [30 / 10, 30 / 50], rtol=1e-6)


def test_effective_number_by_hand():
    # beta 0.9: E(1) = 1, E(2) = 1.9; raw weights 1 and 1 / 1.9 over 1 and 2 examples.
    weights = class_weights(np.array([1, 2]), "effective-number", beta=0.9)
    scale = 3 / (1 * 1 + 2 / 1.9)
    np.testing.assert_allclose(weights, [scale, scale / 1.9], rtol=1e-6)


@pytest.mark.parametrize(("beta", "like"), [(0.0, "none"), (1 - 1e-9, "inverse-frequency")])
def test_effective_number_lies_between_no_weights_and_inverse_frequency(beta, like):
    counts = np.array([3, 40, 7])
    np.testing.assert_allclose(
        class_weights(counts, "effective-number", beta=beta), class_weights(counts, like), rtol=1e-5
    )


def test_kind_none_weighs_every_class_one():
    assert class_weights(np.array([1, 90, 0]), "none").tolist() == [1.0, 1.0, 1.0]


@settings(deadline=None)
@given(counts=counts_of_sites, kind=st.sampled_from(KINDS), beta=st.floats(0, 0.9999))
def test_weights_are_positive_and_average_one_over_the_examples(counts, kind, beta):
    weights = class_weights(counts, kind, beta=beta)
    assert weights.dtype == np.float32
    assert weights.shape == counts.shape
    assert np.isfinite(weights).all()
    assert (weights > 0).all()
    if counts.sum():
        assert (weights.astype(np.float64) * counts).sum() / counts.sum() == pytest.approx(1)


@settings(deadline=None)
@given(counts=counts_of_sites, kind=st.sampled_from(KINDS[1:]))
def test_rarer_classes_never_weigh_less(counts, kind):
    weights = class_weights(counts, kind)[np.argsort(counts)]
    assert (np.diff(weights) <= 1e-6 * weights[:-1]).all()


def test_a_site_with_one_class_has_an_ordinary_loss_on_it():
    weights = class_weights(np.array([0, 25, 0]), "inverse-frequency")
    assert weights[1] == 1
    assert np.isfinite(weights).all()


def test_the_loss_is_the_weighted_sum_over_the_expected_batch_size():
    logits, labels = logits_and_labels(5)
    weights = torch.tensor([0.5, 2.0, 1.5])
    rows = [-torch.log_softmax(logits[i].double(), 0)[labels[i]].item() for i in range(5)]
    expected = sum(weights[labels[i]].item() * rows[i] for i in range(5)) / 8
    loss = reweighted_loss(logits, labels, weights, expected_batch_size=8)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_is_never_divided_by_the_sum_of_weights():
    logits, labels = logits_and_labels(6)
    weights = torch.tensor([0.3, 1.1, 2.0])
    once = reweighted_loss(logits, labels, weights, expected_batch_size=4)
    assert reweighted_loss(logits, labels, 2 * weights, expected_batch_size=4) == 2 * once
    assert reweighted_loss(logits, labels, weights, expected_batch_size=8) == once / 2


@pytest.mark.parametrize("focal_gamma", [0.0, 2.0])
def test_an_added_example_leaves_the_gradients_of_the_others_alone(focal_gamma):
    """To the bit, at the logits and at every parameter: what per-example clipping relies on."""
    weights = torch.tensor([0.4, 1.0, 3.0])
    generator = torch.Generator().manual_seed(3)
    features = torch.randn((9, 5), generator=generator)  # (b, f)
    labels = torch.arange(9) % 3
    start = torch.randn((5, 3), generator=generator)  # (f, c)

    def gradients(b: int) -> tuple[torch.Tensor, torch.Tensor]:
        # One copy of the parameter per example keeps their contributions apart.
        parameter = start.expand(b, 5, 3).clone().requires_grad_()  # (b, f, c)
        logits = (features[:b, :, None] * parameter).sum(dim=1)  # (b, c)
        logits.retain_grad()
        loss = reweighted_loss(
            logits, labels[:b], weights, expected_batch_size=8, focal_gamma=focal_gamma
        )
        loss.backward()
        assert logits.grad is not None
        assert parameter.grad is not None
        return logits.grad, parameter.grad

    full = gradients(9)
    for b in (1, 2, 8):
        for alone, together in zip(gradients(b), full, strict=True):
            assert torch.equal(alone, together[:b])


def test_focal_gamma_zero_is_cross_entropy_to_the_bit():
    logits, labels = logits_and_labels(16)
    weights = torch.ones(3)
    loss = reweighted_loss(logits, labels, weights, expected_batch_size=16, focal_gamma=0.0)
    plain = functional.cross_entropy(logits, labels, reduction="none").sum() / 16
    assert torch.equal(loss, plain)


@pytest.mark.parametrize("focal_gamma", [0.5, 1.0, 2.0])
def test_focal_loss_follows_its_formula(focal_gamma):
    logits, labels = logits_and_labels(7)
    weights = torch.tensor([1.0, 0.5, 2.0])
    p = torch.softmax(logits.double(), dim=1)[torch.arange(7), labels]  # (b,)
    expected = (weights[labels] * (1 - p) ** focal_gamma * -p.log()).sum().item() / 7
    loss = reweighted_loss(logits, labels, weights, expected_batch_size=7, focal_gamma=focal_gamma)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("focal_gamma", [0.0, 0.5, 1.0, 2.0])
def test_an_example_that_is_certain_has_a_finite_gradient(focal_gamma):
    logits = torch.tensor([[60.0, -60.0], [0.1, 0.0]], requires_grad=True)
    loss = reweighted_loss(
        logits,
        torch.tensor([0, 1]),
        torch.ones(2),
        expected_batch_size=2,
        focal_gamma=focal_gamma,
    )
    loss.backward()
    assert math.isfinite(loss.item())
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
