"""SS2D scans an image along four paths and keeps its raw parameters in one leaf."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from medmamba.config import ModelError
from medmamba.scan import active_backend, path_order, reference, selective_scan, ss2d_scan
from medmamba.scan.paths import each_path
from medmamba.ss2d import SS2D, DirectionalScan

sizes = st.integers(1, 6)


def projected_width(scan):
    k, _, rank = scan.dt_weight.shape
    return k * (rank + 2 * scan.A_log.shape[1])


def inputs_of(scan, b, height, width, dtype=torch.float32):
    x = torch.randn(b, height, width, scan.dt_weight.shape[1], dtype=dtype)
    return x, torch.randn(b, height, width, projected_width(scan), dtype=dtype)


def path_arguments(scan, x, projected, order=None):
    """Arguments of ss2d_scan, from those of the module."""
    order = path_order(*x.shape[1:3], x.device) if order is None else order
    k, d = scan.dt_weight.shape[:2]
    return (
        x.flatten(1, 2),
        projected.flatten(1, 2),
        scan.dt_weight,
        scan.dt_bias.view(k, d),
        -scan.A_log.exp().view(k, d, -1),
        scan.D.view(k, d),
        order,
    )


def test_paths_visit_pixels_along_rows_along_columns_and_back():
    assert path_order(2, 3, torch.device("cpu")).tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


@given(sizes, sizes)
def test_each_path_visits_every_pixel_once(height, width):
    order = path_order(height, width, torch.device("cpu"))
    assert (order.sort(dim=1).values == torch.arange(height * width)).all()


def test_each_path_is_one_selective_scan_over_its_own_order():
    torch.manual_seed(0)
    scan = DirectionalScan(d_inner=6, d_state=3, rank=2).double()
    x, projected = inputs_of(scan, 2, 3, 4, torch.float64)
    order = path_order(3, 4, x.device)
    per_path = each_path(reference.selective_scan, *path_arguments(scan, x, projected))
    for k in range(4):
        visited, own = order[k], slice(6 * k, 6 * (k + 1))
        dt, B, C = projected.view(2, 12, 4, 8)[:, visited, k].transpose(1, 2).split((2, 3, 3), 1)
        y = selective_scan(
            x.view(2, 12, 6)[:, visited].transpose(1, 2),
            scan.dt_weight[k] @ dt,
            -scan.A_log[own].exp(),
            B,
            C,
            scan.D[own],
            delta_bias=scan.dt_bias[own],
            delta_softplus=True,
        )
        torch.testing.assert_close(per_path[:, visited, k], y.transpose(1, 2))
    torch.testing.assert_close(scan(x, projected).flatten(1, 2), per_path.sum(2))


def test_gradients_along_paths_are_those_of_finite_differences():
    torch.manual_seed(0)
    scan = DirectionalScan(d_inner=2, d_state=2, rank=1).double()
    inputs = inputs_of(scan, 2, 2, 3, torch.float64)
    *tensors, order = path_arguments(scan, *inputs)
    tensors = [tensor.detach().requires_grad_() for tensor in tensors]
    assert torch.autograd.gradcheck(lambda *given: ss2d_scan(*given, order), tensors)


def test_a_new_path_is_a_new_table():
    """A volume of 2 x 3 x 4 scanned six ways, by nothing but its table."""
    torch.manual_seed(0)
    volume = torch.arange(24).view(2, 3, 4)
    three = [volume.permute(p).flatten() for p in ((0, 1, 2), (1, 2, 0), (2, 0, 1))]
    order = torch.stack(three + [path.flip(0) for path in three]).int()
    k, d, n, r = 6, 5, 3, 2
    x, projected = torch.randn(2, 24, d), torch.randn(2, 24, k * (r + 2 * n))
    parameters = (torch.randn(k, d, r), torch.randn(k, d), -torch.rand(k, d, n), torch.ones(k, d))
    y = ss2d_scan(x, projected, *parameters, order)
    expected = ss2d_scan(x, projected, *parameters, order, backend="reference")
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("index", "replacement", "message"),
    [
        (
            0,
            torch.zeros(2, 0, 6),
            r"x.shape=\(2, 0, 6\) expected \(b, l, d\) with l and d of at least 1",
        ),
        (1, torch.zeros(2, 12, 7), r"projected.shape=\(2, 12, 7\) expected \(2, 12, 32\) for k=4"),
        (
            2,
            torch.zeros(4, 5, 2),
            r"dt_weight.shape=\(4, 5, 2\) expected \(4, 6, 2\) or \(2, 4, 6, 2\)",
        ),
        (3, torch.zeros(24), r"dt_bias.shape=\(24,\) expected \(4, 6\)"),
        (4, torch.zeros(4, 6, 3, dtype=torch.int64), r"A.dtype=torch.int64 expected a real"),
        (5, torch.zeros(4, 6, device="meta"), r"D.device=meta expected cpu as the others have"),
        (
            6,
            torch.zeros(4, 12),
            r"order.shape=\(4, 12\) order.dtype=torch.float32 expected \(k, l\)",
        ),
        (6, torch.zeros(4, 11).int(), r"order.shape=\(4, 11\) .* with l=12 as in x, int32"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(index, replacement, message):
    scan = DirectionalScan(d_inner=6, d_state=3, rank=2)
    arguments = list(path_arguments(scan, *inputs_of(scan, 2, 3, 4)))
    arguments[index] = replacement
    with pytest.raises(ModelError, match=f"^{message}"):
        ss2d_scan(*arguments)


def test_observed_gradients_are_those_of_each_example_alone():
    """To the bit with the native kernel: differential privacy clips them one by one."""
    exact = active_backend() == "native"
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    torch.manual_seed(0)
    scan = DirectionalScan(d_inner=20, d_state=5, rank=2)
    x, projected = inputs_of(scan, 3, 4, 9)
    expected = {}
    for i in range(3):
        scan.zero_grad()
        scan(x[i : i + 1], projected[i : i + 1]).square().sum().backward()
        for name, parameter in scan.named_parameters():
            expected.setdefault(name, []).append(parameter.grad.clone())
    observed = {}
    scan.observe_gradient = observed.__setitem__
    scan.zero_grad()
    scan(x, projected).square().sum().backward()
    assert set(observed) == set(expected)
    for name, parameter in scan.named_parameters():
        alone = torch.stack(expected[name])
        torch.testing.assert_close(observed[name], alone, **tolerance)
        assert torch.equal(parameter.grad, observed[name].sum(0))
    with torch.no_grad():
        scan(x, projected)  # nothing to observe


def test_what_an_observer_returns_changes_nothing():
    torch.manual_seed(0)
    scan = DirectionalScan(d_inner=4, d_state=3, rank=1)
    x, projected = inputs_of(scan, 2, 3, 3)
    scan.observe_gradient = lambda name, gradient: gradient * 0
    scan(x, projected).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in scan.parameters())


def test_autocast_does_not_reach_the_scan():
    torch.manual_seed(0)
    scan = DirectionalScan(d_inner=8, d_state=4, rank=2)
    x, projected = inputs_of(scan, 2, 3, 5)
    expected = scan(x, projected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(scan(x, projected), expected)


def test_half_precision_inputs_are_scanned_in_float32():
    torch.manual_seed(0)
    scan = DirectionalScan(d_inner=8, d_state=4, rank=2)
    x, projected = (tensor.bfloat16() for tensor in inputs_of(scan, 2, 3, 5))
    out = scan(x, projected)
    expected = scan(x.float(), projected.float())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected.bfloat16())


def test_the_scan_starts_where_the_official_code_starts():
    torch.manual_seed(0)
    scan = DirectionalScan(d_inner=64, d_state=16, rank=4)
    expected_rows = torch.log(torch.arange(1.0, 17.0)).expand(256, 16)
    torch.testing.assert_close(scan.A_log, expected_rows, check_layout=False)
    assert torch.equal(scan.D, torch.ones(256))
    assert scan.dt_weight.shape == (4, 64, 4)
    assert 0.48 < scan.dt_weight.max() <= 0.5 == 4**-0.5
    assert -0.5 <= scan.dt_weight.min() < -0.48
    steps = functional.softplus(scan.dt_bias.detach()).log10()
    assert -3.0 - 1e-4 < steps.min() < -2.9
    assert -1.1 < steps.max() < -1.0 + 1e-4
    assert steps.mean() == pytest.approx(-2.0, abs=0.15)  # uniform in the logarithm


def test_x_proj_starts_uniform_as_a_torch_linear():
    torch.manual_seed(0)
    weight = SS2D(d_model=32, d_state=16).x_proj.weight
    assert weight.shape == (4 * (2 + 2 * 16), 64)
    assert 0.99 / math.sqrt(64) < weight.abs().max() <= 1 / math.sqrt(64)


def test_raw_parameters_live_in_a_leaf():
    module = SS2D(d_model=8, d_state=4)
    assert list(module.scan.children()) == []
    assert {name for name, _ in module.scan.named_parameters()} == {
        "dt_weight",
        "dt_bias",
        "A_log",
        "D",
    }
    assert list(module._parameters) == []
    biases = {name for name, _ in module.named_parameters() if name.endswith(".bias")}
    assert biases == {"depthwise.bias", "out_norm.bias"}


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 5), (4, 2)])
def test_any_grid_keeps_its_shape(height, width):
    x = torch.randn(2, height, width, 8)
    assert SS2D(d_model=8, d_state=4)(x).shape == x.shape


def test_an_example_does_not_depend_on_the_others():
    torch.manual_seed(0)
    module = SS2D(d_model=8, d_state=4).double()
    x = torch.randn(3, 4, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x)[1:2], module(x[1:2]))
