"""The selective scan means what mamba-ssm's does, in linear time, on checked input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from medmamba.config import ModelError
from medmamba.scan import (
    BACKEND_VARIABLE,
    active_backend,
    backend_details,
    dispatch,
    selective_scan,
)

OPTIONAL = ("D", "z", "delta_bias")


def make_inputs(
    b,
    d,
    l,  # noqa: E741
    n,
    groups=None,
    constant=(),
    leave_out=(),
    dtype=torch.float64,
    seed=0,
) -> dict[str, Any]:
    """Arguments of a scan; groups None makes B and C (b, n, l)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    state = (b, n, l) if groups is None else (b, groups, n, l)
    inputs = {
        "u": normal(b, d, l),
        "delta": normal(b, d, l),
        "A": -normal(d, n).exp(),
        "B": normal(d, n) if "B" in constant else normal(*state),
        "C": normal(d, n) if "C" in constant else normal(*state),
        "D": normal(d),
        "z": normal(b, d, l),
        "delta_bias": normal(d),
    }
    return {name: tensor for name, tensor in inputs.items() if name not in leave_out}


def written_out(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """The definition, one number after the other."""
    b, d, l = u.shape  # noqa: E741
    n = A.shape[1]
    out, last = torch.zeros(b, d, l, dtype=u.dtype), torch.zeros(b, d, n, dtype=u.dtype)

    def entry(matrix, i, j, k, t):
        if matrix.dim() == 2:
            return matrix[j, k]
        if matrix.dim() == 3:
            return matrix[i, k, t]
        return matrix[i, j // (d // matrix.shape[1]), k, t]

    for i in range(b):
        for j in range(d):
            for t in range(l):
                step = delta[i, j, t] + (delta_bias[j] if delta_bias is not None else 0)
                step = torch.log1p(torch.exp(step)) if delta_softplus else step
                for k in range(n):
                    driven = step * u[i, j, t] * entry(B, i, j, k, t)
                    last[i, j, k] = torch.exp(step * A[j, k]) * last[i, j, k] + driven
                    out[i, j, t] += entry(C, i, j, k, t) * last[i, j, k]
                out[i, j, t] += D[j] * u[i, j, t] if D is not None else 0
                out[i, j, t] *= z[i, j, t] * torch.sigmoid(z[i, j, t]) if z is not None else 1
    return out, last


shapes = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5), st.integers(1, 3))
options = st.fixed_dictionaries(
    {
        "groups": st.sampled_from([None, 1, 2]),
        "constant": st.sets(st.sampled_from(["B", "C"])),
        "leave_out": st.sets(st.sampled_from(OPTIONAL)),
        "seed": st.integers(0, 2**31),
    }
)


@settings(deadline=None, max_examples=40)
@given(shapes, options, st.booleans())
def test_the_scan_is_its_definition(shape, option, softplus):
    b, half, l, n = shape  # noqa: E741
    inputs = make_inputs(b, 2 * half, l, n, **option)
    out, state = selective_scan(**inputs, delta_softplus=softplus, return_last_state=True)
    expected_out, expected_state = written_out(**inputs, delta_softplus=softplus)
    torch.testing.assert_close(out, expected_out, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-10, atol=1e-12)


@settings(deadline=None, max_examples=15)
@given(shapes, options, st.booleans())
def test_gradients_are_those_of_finite_differences(shape, option, softplus):
    b, half, l, n = shape  # noqa: E741
    inputs = make_inputs(b, 2 * half, l, n, **option)
    for name in {"delta", "delta_bias"} & inputs.keys():
        inputs[name] = inputs[name].abs()  # negative steps grow: no finite difference is exact
    names = list(inputs)

    def scan(*tensors):
        return selective_scan(
            **dict(zip(names, tensors, strict=True)),
            delta_softplus=softplus,
            return_last_state=True,
        )

    assert torch.autograd.gradcheck(scan, [t.requires_grad_() for t in inputs.values()])


def test_one_group_goes_with_several():
    inputs = make_inputs(2, 4, 5, 3, groups=2)
    inputs["C"] = inputs["C"][:, :1]
    expected, _ = written_out(**inputs)
    torch.testing.assert_close(selective_scan(**inputs), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scanned_in_float32(dtype):
    half = make_inputs(2, 4, 40, 3, groups=2, dtype=dtype)
    out, state = selective_scan(**half, delta_softplus=True, return_last_state=True)
    single: dict[str, Any] = {name: tensor.float() for name, tensor in half.items()}
    expected, expected_state = selective_scan(**single, delta_softplus=True, return_last_state=True)
    assert (out.dtype, state.dtype) == (dtype, torch.float32)
    assert torch.equal(out, expected.to(dtype))
    assert torch.equal(state, expected_state)


def test_double_precision_stays_double():
    out, state = selective_scan(**make_inputs(1, 2, 3, 2), return_last_state=True)
    assert (out.dtype, state.dtype) == (torch.float64, torch.float64)


def test_memory_layout_does_not_matter():
    inputs = make_inputs(2, 4, 6, 3, groups=2)
    expected = selective_scan(**inputs)
    apart: dict[str, Any] = {k: torch.stack((t, t), -1)[..., 0] for k, t in inputs.items()}
    apart["u"] = inputs["u"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not any(tensor.is_contiguous() for tensor in apart.values())
    torch.testing.assert_close(selective_scan(**apart), expected, rtol=1e-14, atol=1e-14)


def test_a_batch_may_be_empty():
    out = selective_scan(**make_inputs(0, 4, 6, 3, groups=2))
    assert out.shape == (0, 4, 6)


class CountElements(TorchDispatchMode):
    """Adds up the elements of everything that any operation returns."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            is_new = isinstance(tensor, torch.Tensor) and not func.is_view
            self.total += tensor.numel() if is_new else 0
        return result


def elements_of_a_step(l):  # noqa: E741
    inputs = make_inputs(2, 4, l, 3, groups=2)
    for tensor in inputs.values():
        tensor.requires_grad_()
    with CountElements() as count:
        selective_scan(**inputs, delta_softplus=True).sum().backward()
    return count.total


def test_forward_and_backward_are_linear_in_length():
    at_50, at_100, at_400 = (elements_of_a_step(length) for length in (50, 100, 400))
    assert at_400 - at_50 == 7 * (at_100 - at_50)


class Backend:
    """A backend that notes whether autocast was on, and returns u."""

    REPRODUCIBLE = True

    def __init__(self, missing: tuple[str, str] | None = None):
        self.missing, self.seen = missing, []

    def unavailable(self):
        return self.missing

    def selective_scan(self, u, *_):
        self.seen.append(torch.is_autocast_enabled("cpu"))
        return u


@pytest.fixture
def backends(monkeypatch):
    """Put backends in place of the modules; the rest stay."""
    real = dispatch._module

    def forget():
        dispatch._unavailable.cache_clear()
        dispatch._default.cache_clear()
        dispatch._logged.clear()

    def install(**fakes):
        forget()
        monkeypatch.setattr(dispatch, "_module", lambda name: fakes.get(name) or real(name))

    monkeypatch.delenv(BACKEND_VARIABLE, raising=False)
    yield install
    forget()


def test_autocast_never_reaches_a_backend(backends):
    spy = Backend()
    backends(native=spy)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        selective_scan(**make_inputs(1, 2, 3, 2), backend="native")
        assert torch.is_autocast_enabled("cpu")
    assert spy.seen == [False]


def test_a_forced_backend_that_cannot_run_says_how_to_get_it(backends, monkeypatch):
    backends(native=Backend(("the kernel is not built", "install gcc")))
    with pytest.raises(ModelError) as error:
        selective_scan(**make_inputs(1, 2, 3, 2), backend="native")
    assert str(error.value) == "backend=native cannot run here: the kernel is not built"
    assert error.value.hint == "install gcc"
    monkeypatch.setenv(BACKEND_VARIABLE, "native")
    with pytest.raises(ModelError, match=f"^{BACKEND_VARIABLE}=native cannot run here"):
        active_backend()


def test_what_runs_by_default_is_logged_once_with_the_reason(backends, caplog):
    backends(native=Backend(("the kernel is not built", "install gcc")))
    inputs = make_inputs(1, 2, 3, 2, dtype=torch.float32)
    for _ in range(3):
        selective_scan(**inputs)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert record.getMessage() == (
        "scan_backend=reference scan_reproducible=True device=cpu: slow, in plain PyTorch; "
        "native: the kernel is not built (install gcc)"
    )


def test_a_forced_backend_is_logged_once_too(backends, caplog):
    backends(native=Backend())
    caplog.set_level("INFO")
    for _ in range(3):
        active_backend("cpu", "native")
    (record,) = caplog.records
    assert record.getMessage() == "scan_backend=native scan_reproducible=True device=cpu"


@pytest.mark.parametrize(("name", "device"), [("native", "cuda"), ("mamba_ssm", "cpu")])
def test_a_backend_for_another_device_is_refused(name, device):
    with pytest.raises(ModelError, match=f"^backend={name} cannot run here: it does not run on"):
        active_backend(device, name)


def test_a_device_takes_its_best_backend_and_float64_the_reference(backends):
    missing = Backend(("not here", "get it"))
    backends(native=Backend(), mamba_ssm=missing, triton=Backend())
    assert active_backend("cpu") == "native"
    assert active_backend("cuda") == "triton"
    assert active_backend("cpu", dtype=torch.float64) == "reference"
    backends(native=Backend(), mamba_ssm=Backend(), triton=Backend())
    assert active_backend("cuda:1") == "mamba_ssm"
    backends(native=missing, mamba_ssm=missing, triton=missing)
    assert (active_backend("cpu"), active_backend("cuda")) == ("reference", "reference")
    assert active_backend("meta") == "reference"


def test_a_misspelt_backend_gets_the_nearest_one(monkeypatch):
    monkeypatch.setenv(BACKEND_VARIABLE, "refrence")
    with pytest.raises(ModelError) as error:
        selective_scan(**make_inputs(1, 2, 3, 2))
    assert str(error.value) == (
        "MEDMAMBA_SCAN_BACKEND=refrence expected one of reference, native, mamba_ssm, triton"
    )
    assert error.value.hint.startswith("did you mean reference? Or leave MEDMAMBA_SCAN_BACKEND")


def test_an_argument_wins_over_the_environment_which_wins_over_the_default(backends, monkeypatch):
    backends(native=Backend(), triton=Backend())
    monkeypatch.setenv(BACKEND_VARIABLE, "")
    assert active_backend() == "native"
    monkeypatch.setenv(BACKEND_VARIABLE, "triton")
    assert active_backend(torch.device("cpu")) == "triton"
    assert active_backend("cpu", backend="reference") == "reference"
    inputs = make_inputs(1, 2, 3, 2)
    assert selective_scan(**inputs) is inputs["u"]


def test_details_name_the_backend_and_whether_it_is_reproducible():
    assert backend_details("reference") == {"scan_backend": "reference", "scan_reproducible": True}


PER_EXAMPLE = ("A", "D", "delta_bias")


def test_parameters_per_example_are_those_of_each_example_alone():
    shared = make_inputs(3, 4, 6, 2, groups=2)
    own = {
        name: torch.stack([shared[name] * factor for factor in (1, 2, 3)]) for name in PER_EXAMPLE
    }
    together = selective_scan(**{**shared, **own}, delta_softplus=True)
    for i in range(3):
        alone = {k: t if k in PER_EXAMPLE else t[i : i + 1] for k, t in shared.items()}
        alone |= {name: own[name][i] for name in PER_EXAMPLE}
        got = selective_scan(**alone, delta_softplus=True)
        torch.testing.assert_close(got, together[i : i + 1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("u", (2, 4), r"u.shape=\(2, 4\) expected \(b, d, l\)"),
        ("u", (2, 4, 0), r"u.shape=\(2, 4, 0\) expected \(b, d, l\) with d and l of at least 1"),
        ("delta", (2, 1, 6), r"delta.shape=\(2, 1, 6\) expected \(2, 4, 6\) as u has"),
        ("A", (3, 4), r"A.shape=\(3, 4\) expected \(d, n\) or \(b, d, n\) with b=2, d=4"),
        ("A", (4,), r"A.shape=\(4,\) expected \(d, n\) or "),
        ("B", (2, 3, 7), r"B.shape=\(2, 3, 7\) expected \(4, 3\), \(2, 3, 6\) or \(b, g, n, l\)"),
        ("B", (2, 3, 3, 6), r"B.shape=\(2, 3, 3, 6\) expected .* with g a divisor of d=4"),
        ("C", (2, 0, 3, 6), r"C.shape=\(2, 0, 3, 6\) expected .* with g a divisor of d=4"),
        ("C", (1, 2, 3, 6), r"C.shape=\(1, 2, 3, 6\) expected "),
        ("C", (2, 4, 3, 6), r"B.shape=.* and C.shape=\(2, 4, 3, 6\) expected the same g in both"),
        ("D", (1,), r"D.shape=\(1,\) expected \(4,\) or \(2, 4\)"),
        ("z", (2, 6, 4), r"z.shape=\(2, 6, 4\) expected \(2, 4, 6\) as u has"),
        ("delta_bias", (4, 1), r"delta_bias.shape=\(4, 1\) expected \(4,\) or \(2, 4\)"),
    ],
)
def test_a_shape_that_does_not_fit_is_named(name, shape, message):
    inputs = make_inputs(2, 4, 6, 3, groups=2)
    inputs[name] = torch.zeros(shape)
    with pytest.raises(ModelError, match=f"^{message}"):
        selective_scan(**inputs)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64])
def test_a_matrix_that_is_not_real_is_refused(dtype):
    inputs = make_inputs(1, 2, 3, 2)
    inputs["A"] = inputs["A"].to(dtype)
    with pytest.raises(ModelError, match=rf"^A.dtype={dtype} expected a real floating-point dtype"):
        selective_scan(**inputs)
