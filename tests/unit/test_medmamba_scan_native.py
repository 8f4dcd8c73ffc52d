"""The native scan is right to the last digits of float32."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes.native_scans import (
    BACKWARD,
    EXTREME,
    FORWARD,
    ORDINARY,
    assert_precise,
    differentiate,
    error,
    scan_inputs,
)
from medmamba.scan import native, selective_scan
from medmamba.scan.native import library

missing = native.unavailable()
pytestmark = pytest.mark.skipif(missing is not None, reason="the native scan kernel is not built")


shapes = st.fixed_dictionaries(
    {
        "b": st.integers(1, 3),
        "g": st.integers(1, 8),
        "channels": st.integers(1, 40),
        "l": st.one_of(st.integers(1, 70), st.sampled_from([31, 32, 33, 64]), st.integers(1, 5000)),
        "n": st.one_of(st.integers(1, 20), st.sampled_from([32, 64])),
        "constant": st.sets(st.sampled_from(["B", "C"])),
        "per_example": st.booleans(),
        "delta": st.sampled_from([ORDINARY, ORDINARY, *EXTREME]),
        "seed": st.integers(0, 2**31),
    }
)


def limited(shape):
    """Shapes whose float64 reference takes no minute."""
    size = shape["b"] * shape["g"] * shape["channels"] * shape["l"] * shape["n"]
    return size <= 4_000_000


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.filter_too_much])
@given(shapes.filter(limited), st.sampled_from(library.isas() or ("none",)), st.booleans())
def test_any_shape_is_as_precise_as_promised(shape, isa, gated):
    inputs = scan_inputs(**shape)
    if gated:
        inputs["z"] = torch.randn_like(inputs["u"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.ISA_VARIABLE, isa)
        assert_precise(inputs)


@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("delta", [ORDINARY, *EXTREME])
def test_five_thousand_steps_are_as_precise_as_promised(delta, isa, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    assert_precise(scan_inputs(1, 2, 9, 5000, 16, (), False, delta, seed=3))


def test_delta_may_come_without_softplus_bias_and_skip():
    inputs = scan_inputs(2, 2, 5, 40, 3, (), False, ORDINARY, seed=0)
    inputs = {"u": inputs["u"], "delta": inputs["delta"].abs(), "A": inputs["A"]} | {
        name: inputs[name] for name in ("B", "C")
    }
    assert_precise(inputs, softplus=False)


def test_a_gate_multiplies_the_output():
    inputs = scan_inputs(2, 1, 5, 40, 3, (), False, ORDINARY, seed=0)
    assert_precise(inputs | {"z": torch.randn(2, 5, 40)})


@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-45])
def test_zero_and_denormal_inputs_give_finite_answers(value):
    inputs = scan_inputs(1, 1, 5, 40, 3, (), False, ORDINARY, seed=0)
    inputs["u"] = torch.full_like(inputs["u"], value)
    assert_precise(inputs)
    inputs["B"] = torch.full_like(inputs["B"], value)
    assert_precise(inputs)


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "delta_bias"])
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("isa", library.isas())
def test_nan_in_gives_nan_out_where_the_reference_has_it(name, per_example, isa, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    inputs = scan_inputs(2, 2, 5, 40, 3, (), per_example, ORDINARY, seed=0)
    flat = inputs[name].view(-1)
    flat[flat.numel() // 2] = torch.nan
    expected = differentiate(inputs, torch.float64, "reference")
    got = differentiate(inputs, torch.float32, "native")
    for key, value in got.items():
        assert torch.equal(value.isnan(), expected[key].isnan()), key


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C"])
def test_infinities_end_where_they_do_in_the_reference(name, value):
    inputs = scan_inputs(1, 1, 5, 40, 3, (), False, ORDINARY, seed=0)
    inputs[name].view(-1)[17] = value
    expected = selective_scan(**inputs, delta_softplus=True, backend="reference")
    got = selective_scan(**inputs, delta_softplus=True, backend="native")
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(got[finite], expected[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [1e-6, 1e-4, 1e-3])
def test_a_state_that_hardly_decays_is_as_precise_as_float32_allows(rate):
    """1e-5 is out of reach where the rounding of exp(delta A) adds up over thousands of steps."""
    inputs = scan_inputs(1, 1, 5, 3000, 4, (), False, ORDINARY, seed=4)
    inputs["delta"] = torch.full_like(inputs["delta"], 0.5)
    inputs["A"] = -rate * torch.rand_like(inputs["A"])
    expected = differentiate(inputs, torch.float64, "reference")
    single = differentiate(inputs, torch.float32, "reference")
    got = differentiate(inputs, torch.float32, "native")
    for name, value in got.items():
        bound = max(FORWARD, 3 * error(single[name], expected[name]))
        assert error(value, expected[name]) <= bound, name


LOSSES = {
    "expanded": lambda y, state: y.sum() + state.sum(),
    "transposed": lambda y, state: (y.mT * torch.ones_like(y.mT)).sum() + (state.mT * 2).sum(),
    "the last state alone": lambda y, state: (state.mT * torch.ones_like(state.mT)).sum(),
    "y alone": lambda y, state: (y[..., ::2] * 3).sum(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_may_arrive_in_any_layout(loss):
    inputs = scan_inputs(2, 2, 40, 300, 5, (), False, ORDINARY, seed=1)
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "native")):
        tensors = {k: t.to(dtype).requires_grad_() for k, t in inputs.items()}
        y, state = selective_scan(
            **tensors, delta_softplus=True, return_last_state=True, backend=backend
        )
        results.append(
            torch.autograd.grad(loss(y, state), list(tensors.values()), materialize_grads=True)
        )
    for name, expected, got in zip(inputs, *results, strict=True):
        assert error(got, expected) <= BACKWARD, name
