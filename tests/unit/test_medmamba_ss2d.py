"""SS2D scans an image along four paths and keeps its raw parameters in one leaf."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from medmamba.scan import selective_scan
from medmamba.ss2d import SS2D, DirectionalScan, from_paths, to_paths

sizes = st.integers(1, 6)


def projected_width(scan):
    k, _, rank = scan.dt_weight.shape
    return k * (rank + 2 * scan.A_log.shape[1])


def inputs_of(scan, b, height, width, dtype=torch.float32):
    x = torch.randn(b, height, width, scan.dt_weight.shape[1], dtype=dtype)
    return x, torch.randn(b, height, width, projected_width(scan), dtype=dtype)


def orders(height, width):
    """The number of the pixel that each path visits at each step (l, k)."""
    pixels = torch.arange(height * width).view(1, height, width, 1, 1)
    return to_paths(pixels.expand(-1, -1, -1, 4, -1))[0, :, :, 0]


def test_paths_visit_pixels_along_rows_along_columns_and_back():
    assert orders(height=2, width=3).T.tolist() == [
        [0, 1, 2, 3, 4, 5],
        [0, 3, 1, 4, 2, 5],
        [5, 4, 3, 2, 1, 0],
        [5, 2, 4, 1, 3, 0],
    ]


@given(st.integers(0, 3), sizes, sizes)
def test_pixels_come_back_from_their_paths(b, height, width):
    pixels = torch.randn(b, height, width, 4, 2)
    assert torch.equal(from_paths(to_paths(pixels), height, width), pixels)


def test_each_path_is_one_selective_scan_over_its_own_order():
    torch.manual_seed(0)
    scan = DirectionalScan(d_inner=6, d_state=3, rank=2).double()
    x, projected = inputs_of(scan, 2, 3, 4, torch.float64)
    per_path = scan.per_path(x, projected)
    for k in range(4):
        order, own = orders(height=3, width=4)[:, k], slice(6 * k, 6 * (k + 1))
        dt, B, C = projected.view(2, 12, 4, 8)[:, order, k].transpose(1, 2).split((2, 3, 3), 1)
        y = selective_scan(
            x.view(2, 12, 6)[:, order].transpose(1, 2),
            scan.dt_weight[k] @ dt,
            -scan.A_log[own].exp(),
            B,
            C,
            scan.D[own],
            delta_bias=scan.dt_bias[own],
            delta_softplus=True,
        )
        torch.testing.assert_close(per_path.flatten(1, 2)[:, order, k], y.transpose(1, 2))
    torch.testing.assert_close(scan(x, projected), per_path.sum(3))


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
