"""The native scan along paths, and the same bytes however a scan is run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fakes.native_scans import (
    BACKWARD,
    FORWARD,
    ORDINARY,
    differentiate,
    differentiate_paths,
    error,
    scan_inputs,
    ss2d_inputs,
)
from medmamba import MedMamba
from medmamba.config import ModelError
from medmamba.scan import native, path_order, selective_scan, ss2d_scan

missing = native.unavailable()
pytestmark = pytest.mark.skipif(missing is not None, reason="the native scan kernel is not built")


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(1, 150),
    st.integers(1, 20), st.integers(1, 26),
)  # fmt: skip
def test_the_fused_scan_is_the_four_scans(b, height, width, d, n, r):
    inputs = ss2d_inputs(b, height, width, d, n, r)
    order = path_order(height, width, torch.device("cpu"))
    expected = differentiate_paths(inputs, order, torch.float64, "reference")
    got = differentiate_paths(inputs, order, torch.float32, "native")
    assert error(got[0], expected[0]) <= FORWARD
    for value, truth in zip(got[1:], expected[1:], strict=True):
        assert error(value, truth) <= BACKWARD


@pytest.mark.parametrize("loss", [torch.sum, lambda y: (y.mT * torch.ones_like(y.mT)).sum()])
def test_gradients_along_paths_may_arrive_in_any_layout(loss):
    inputs = ss2d_inputs(3, 12, 11, 90, 16, 3)
    order = path_order(12, 11, torch.device("cpu"))
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "native")):
        tensors = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        y = ss2d_scan(*tensors, order, backend=backend)
        results.append(torch.autograd.grad(loss(y), tensors))
    for expected, got in zip(*results, strict=True):
        assert error(got, expected) <= BACKWARD


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("index", range(6))
def test_what_is_no_number_spreads_along_paths_as_in_the_reference(index, value):
    inputs = ss2d_inputs(2, 4, 9, 18, 3, 2)
    flat = inputs[index].view(-1)
    flat[flat.numel() // 2] = value
    order = path_order(4, 9, torch.device("cpu"))
    expected = differentiate_paths(inputs, order, torch.float32, "reference")
    got = differentiate_paths(inputs, order, torch.float32, "native")
    for tensor, truth in zip(got, expected, strict=True):
        assert not (truth.isnan() & tensor.isfinite()).any()
    assert torch.equal(got[0].isfinite(), expected[0].isfinite())


def test_paths_take_half_precision_any_layout_and_no_example():
    inputs = ss2d_inputs(2, 4, 9, 18, 3, 2)
    order = path_order(4, 9, torch.device("cpu"))
    expected = ss2d_scan(*inputs, order, backend="native")
    apart = [torch.stack((tensor, tensor), -1)[..., 0] for tensor in inputs]
    table = torch.stack((order, order), -1)[..., 0]
    assert torch.equal(ss2d_scan(*apart, table, backend="native"), expected)
    half = [tensor.bfloat16() for tensor in inputs]
    rounded = ss2d_scan(*(tensor.float() for tensor in half), order, backend="native")
    y = ss2d_scan(*half, order, backend="native")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rounded.bfloat16())
    none = [inputs[0][:0], inputs[1][:0], *inputs[2:]]
    assert ss2d_scan(*none, order, backend="native").shape == (0, 36, 18)


@pytest.mark.parametrize("table", [[[0, 1, 1]], [[0, 1, 3]], [[-1, 0, 1]], [[0, 1, 2], [2, 2, 0]]])
def test_a_path_that_is_no_permutation_is_refused(table):
    order = torch.tensor(table, dtype=torch.int32)
    k, d, n, r = len(table), 5, 3, 2
    arguments = (
        torch.zeros(1, 3, d), torch.zeros(1, 3, k * (r + 2 * n)), torch.zeros(k, d, r),
        torch.zeros(k, d), torch.zeros(k, d, n), torch.zeros(k, d), order,
    )  # fmt: skip
    with pytest.raises(
        ModelError, match=r"^order\[[01]\]=\[.*\] expected every position from 0 to 2 once"
    ):
        ss2d_scan(*arguments, backend="native")


def everything(threads):
    """All outputs and gradients of both operators, at shapes that are split into parts too."""
    torch.set_num_threads(threads)
    results = []
    for b in (1, 3):
        results += differentiate(
            scan_inputs(b, 1, 200, 100, 16, (), False, ORDINARY, seed=5), torch.float32, "native"
        ).values()
        order = path_order(9, 8, torch.device("cpu"))
        results += differentiate_paths(
            ss2d_inputs(b, 9, 8, 200, 16, 6), order, torch.float32, "native"
        )
    return results


def test_any_number_of_threads_gives_the_same_bytes(threads):
    one = everything(1)
    for count in (2, 3, 7):
        for got, expected in zip(everything(count), one, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("d", [20, 400])
def test_an_example_gets_the_same_bytes_in_any_batch(d):
    """Outputs and all gradients, of 400 channels too, whose sums are taken in parts."""
    inputs = scan_inputs(5, 1, d, 50, 5, (), True, ORDINARY, seed=2)
    paths = ss2d_inputs(5, 5, 4, d, 5, 3)
    order = path_order(5, 4, torch.device("cpu"))
    weight = torch.randn(5, d, 50, generator=torch.Generator().manual_seed(3))

    def scan(chosen):
        tensors = {k: t[chosen].requires_grad_() for k, t in inputs.items()}
        y = selective_scan(**tensors, delta_softplus=True, backend="native")
        return y, *torch.autograd.grad((y * weight[chosen]).sum(), list(tensors.values()))

    def along(chosen):
        x, projected = (tensor[chosen].requires_grad_() for tensor in paths[:2])
        y = ss2d_scan(x, projected, *paths[2:], order, backend="native")
        return y, *torch.autograd.grad(y.square().sum(), (x, projected))

    for run in (scan, along):
        together = run(slice(None))
        for i in range(5):
            for got, expected in zip(run(slice(i, i + 1)), together, strict=True):
                assert torch.equal(got[0], expected[i])


@pytest.mark.parametrize("constant", [(), ("B",), ("C",), ("B", "C")])
def test_gradients_per_example_are_those_of_each_example_alone(constant):
    inputs = scan_inputs(3, 2, 20, 50, 5, constant, True, ORDINARY, seed=2)
    first = {k: t if k in constant else t[:1] for k, t in inputs.items()}
    tensors = {k: t.detach().requires_grad_() for k, t in inputs.items()}
    y = selective_scan(**tensors, delta_softplus=True, backend="native")
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    gradients = dict(
        zip(tensors, torch.autograd.grad((y * weight).sum(), list(tensors.values())), strict=True)
    )
    leaves = {k: t.detach().requires_grad_() for k, t in first.items()}
    y_first = selective_scan(**leaves, delta_softplus=True, backend="native")
    own = torch.autograd.grad((y_first * weight[:1]).sum(), list(leaves.values()))
    for (name, gradient), expected in zip(gradients.items(), own, strict=True):
        if name not in constant:
            assert torch.equal(gradient[:1], expected), name


def test_whole_model_logits_and_gradients_are_those_of_float64():
    torch.manual_seed(0)
    model = MedMamba.from_name("nano", num_classes=3, norm="group", drop_path=0.0)
    wide = MedMamba.from_name("nano", num_classes=3, norm="group", drop_path=0.0).double()
    wide.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    logits, truth = model(images), wide(images.double())
    assert error(logits.detach(), truth.detach()) <= FORWARD
    functional.cross_entropy(logits, labels).backward()
    functional.cross_entropy(truth, labels).backward()
    truths = dict(wide.named_parameters())
    # A convolution's bias in front of a normalisation has no gradient but rounding.
    floor = 1e-3 * max(truth.grad.abs().max() for truth in truths.values())
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, truths[name].grad, floor) <= BACKWARD, name
