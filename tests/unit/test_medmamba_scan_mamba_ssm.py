"""The adapter to mamba-ssm keeps the kernel's contract; simulated: no CUDA kernel runs here.

A stand-in takes the place of the ``mamba_ssm`` module where it would be imported. It refuses what
the kernel refuses and computes with the reference, so these tests judge what the adapter hands over
and what it makes of the result, not the kernel.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medmamba.config import ModelError
from medmamba.scan import mamba_ssm, reference

OVER_TIME = ("u", "delta", "z")
PER_EXAMPLE = ("A", "D", "delta_bias")


class StandIn:
    """``selective_scan_fn`` with the checks of csrc/selective_scan/selective_scan.cpp.

    The CUDA kernel computes each channel by itself, so its bits do not depend on the neighbours;
    those of PyTorch's vectorised operations do. ``by_channel`` computes as the kernel does.
    """

    by_channel = False

    def __init__(self) -> None:
        self.calls: list[SimpleNamespace] = []

    def __call__(
        self, u, delta, A, B, C, D=None, z=None, delta_bias=None,
        delta_softplus=False, return_last_state=False,
    ):  # fmt: skip
        self.calls.append(SimpleNamespace(u=u, A=A, B=B, C=C, D=D))
        b, d, l = u.shape  # noqa: E741
        n = A.shape[1]
        assert u.dtype in (torch.float32, torch.bfloat16, torch.float16)
        assert 0 < d <= 65_535  # the second axis of the launch's grid
        assert 0 < n <= 256
        for x in (u, delta, z):
            if x is not None:
                assert (x.dtype, x.shape) == (u.dtype, u.shape)
                assert x.stride(-1) == 1 or l == 1
        assert (A.dtype, A.shape) == (torch.float32, (d, n))
        groups = B.shape[1] if B.dim() == 4 else 1  # of C too
        assert d % groups == 0
        for x in (B, C):
            if x.dim() == 2:
                assert (x.dtype, x.shape) == (torch.float32, (d, n))
            else:
                assert (x.dtype, x.shape) == (u.dtype, (b, groups, n, l))
                assert x.stride(-1) == 1 or l == 1
        for x in (D, delta_bias):
            if x is not None:
                assert (x.dtype, x.shape, x.stride(-1)) == (torch.float32, (d,), 1)
        if not self.by_channel:
            return reference.selective_scan(
                u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
            )

        def matrix(x, i, j):
            return x[j : j + 1] if x.dim() == 2 else x[i : i + 1, j // (d // x.shape[1])]

        def row(x, i, j):
            return None if x is None else x[i : i + 1, j : j + 1]

        def scan(i, j):
            vectors = [None if x is None else x[j : j + 1] for x in (D, delta_bias)]
            return reference.selective_scan(
                row(u, i, j), row(delta, i, j), A[j : j + 1], matrix(B, i, j), matrix(C, i, j),
                vectors[0], row(z, i, j), vectors[1], delta_softplus, return_last_state,
            )  # fmt: skip

        rows = [[scan(i, j) for j in range(d)] for i in range(b)]
        y, state = (torch.cat([torch.cat([x[k] for x in row], 1) for row in rows]) for k in (0, 1))
        return y, state


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    kernel = StandIn()
    module = ModuleType(mamba_ssm.INTERFACE)
    module.selective_scan_fn = kernel
    monkeypatch.setitem(sys.modules, mamba_ssm.INTERFACE, module)
    monkeypatch.setattr(mamba_ssm, "DEVICE", "cpu")
    return kernel


def make_inputs(
    b, d, l, n,  # noqa: E741
    groups=(None, None), constant=(), per_example=(), leave_out=(), dtype=torch.float32, seed=0,
) -> dict[str, Any]:  # fmt: skip
    """Arguments of a scan; ``groups`` of B and of C, None for (b, n, l)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def matrix(name, g):
        if name in constant:
            return normal(d, n)
        return normal(b, n, l) if g is None else normal(b, g, n, l)

    lead = {name: (b,) if name in per_example else () for name in PER_EXAMPLE}
    inputs = {
        "u": normal(b, d, l),
        "delta": normal(b, d, l),
        "A": -normal(*lead["A"], d, n).exp(),
        "B": matrix("B", groups[0]),
        "C": matrix("C", groups[1]),
        "D": normal(*lead["D"], d),
        "z": normal(b, d, l),
        "delta_bias": normal(*lead["delta_bias"], d),
    }
    return {name: x.to(dtype) for name, x in inputs.items() if name not in leave_out}


def one_example(inputs, i):
    """The same scan of example i alone, with parameters that have no batch."""

    def pick(name, x):
        if name in PER_EXAMPLE:
            return x[i] if x.dim() == (3 if name == "A" else 2) else x
        return x if x.dim() == 2 else x[i : i + 1]

    return {name: pick(name, x) for name, x in inputs.items()}


def with_gradients(scan, inputs, seed=0):
    """Output, last state, and the gradients of a weighted sum of the output."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, state = scan(**leaves, delta_softplus=True, return_last_state=True)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    gradients = torch.autograd.grad((y.float() * weight).sum(), list(leaves.values()))
    return y, state, dict(zip(leaves, gradients, strict=True)), weight


options = st.fixed_dictionaries(
    {
        "groups": st.tuples(*[st.sampled_from([None, 1, 2])] * 2),
        "constant": st.sets(st.sampled_from(["B", "C"])),
        "per_example": st.sets(st.sampled_from(PER_EXAMPLE)),
        "leave_out": st.sets(st.sampled_from(["D", "z", "delta_bias"])),
        "seed": st.integers(0, 2**31),
    }
)
shapes = st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 6), st.integers(1, 3))


@settings(deadline=None, max_examples=60)
@given(shapes, options, st.sampled_from([4, 12, 65_535]))
def test_every_kind_of_argument_keeps_the_contract(shape, option, limit):
    b, half, l, n = shape  # noqa: E741
    inputs = make_inputs(b, 2 * half, l, n, **option)
    with pytest.MonkeyPatch.context() as patch:
        kernel = StandIn()
        module = ModuleType(mamba_ssm.INTERFACE)
        module.selective_scan_fn = kernel
        patch.setitem(sys.modules, mamba_ssm.INTERFACE, module)
        patch.setattr(mamba_ssm, "DEVICE", "cpu")
        patch.setattr(mamba_ssm, "MAX_CHANNELS", max(limit, 2 * half))
        y, state, gradients, _ = with_gradients(mamba_ssm.selective_scan, inputs)
        expected = with_gradients(reference.selective_scan, inputs)
    assert all(call.u.shape[1] <= max(limit, 2 * half) for call in kernel.calls)
    torch.testing.assert_close(y, expected[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, expected[1], rtol=1e-5, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[2][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "option",
    [
        {},
        {"groups": (4, 4)},
        {"groups": (4, 1)},
        {"groups": (4, 4), "constant": ("C",)},
        {"groups": (4, 4), "constant": ("B",)},
        {"constant": ("B", "C")},
        {"groups": (2, 2), "leave_out": ("D", "delta_bias")},
    ],
)
@pytest.mark.parametrize("channels", [8, 16, 65_535])  # folds of one, two and all examples
def test_a_fold_is_a_loop_over_its_examples_to_the_bit(stand_in, monkeypatch, option, channels):
    monkeypatch.setattr(mamba_ssm, "MAX_CHANNELS", channels)
    stand_in.by_channel = True
    inputs = make_inputs(5, 8, 7, 3, per_example=PER_EXAMPLE, **option)
    y, state, gradients, weight = with_gradients(mamba_ssm.selective_scan, inputs)
    for i in range(5):
        alone = {k: x.detach().clone().requires_grad_() for k, x in one_example(inputs, i).items()}
        y_i, state_i = mamba_ssm.selective_scan(
            **alone, delta_softplus=True, return_last_state=True
        )
        assert torch.equal(y[i : i + 1], y_i)
        assert torch.equal(state[i : i + 1], state_i)
        (y_i * weight[i : i + 1]).sum().backward()
        for name, x in alone.items():
            if x.shape != inputs[name].shape:  # constant B and C belong to all examples
                got = gradients[name][i]
                assert torch.equal(got.reshape(x.shape), x.grad), name


def test_a_large_batch_takes_several_folds(stand_in):
    inputs = make_inputs(5, 30_000, 1, 1, per_example=("A",), leave_out=("z", "D", "delta_bias"))
    mamba_ssm.selective_scan(**inputs)
    assert [tuple(call.u.shape) for call in stand_in.calls] == [
        (1, 60_000, 1),
        (1, 60_000, 1),
        (1, 30_000, 1),
    ]


def test_shared_parameters_are_not_folded(stand_in):
    mamba_ssm.selective_scan(**make_inputs(5, 4, 6, 3, groups=(2, 2)))
    assert [tuple(call.u.shape) for call in stand_in.calls] == [(5, 4, 6)]


def test_an_expanded_parameter_has_a_gradient_for_each_example(stand_in):
    inputs = make_inputs(3, 4, 6, 2)
    A = inputs.pop("A").requires_grad_()
    seen = []
    expanded = A.expand(3, -1, -1)
    expanded.register_hook(seen.append)
    mamba_ssm.selective_scan(A=expanded, **inputs).sum().backward()
    assert seen[0].shape == (3, 4, 2)
    torch.testing.assert_close(seen[0].sum(0), A.grad)


def test_strides_and_dtypes_are_brought_to_the_contract(stand_in):
    inputs = make_inputs(2, 4, 6, 3, groups=(2, 2), dtype=torch.bfloat16)
    inputs = {name: torch.stack((x, x), -1)[..., 0] for name, x in inputs.items()}
    expected = reference.selective_scan(**inputs)
    assert torch.equal(mamba_ssm.selective_scan(**inputs), expected)
    assert stand_in.calls[-1].u.dtype == torch.bfloat16

    inputs["delta"] = inputs["delta"].float() * 1.0001  # has digits that bfloat16 has not
    y = mamba_ssm.selective_scan(**inputs)
    assert torch.equal(y, reference.selective_scan(**inputs))
    assert y.dtype == torch.bfloat16
    assert stand_in.calls[-1].u.dtype == torch.float32


def test_a_batch_may_be_empty(stand_in):
    inputs = make_inputs(0, 4, 6, 3, per_example=("A",))
    y, state = mamba_ssm.selective_scan(**inputs, return_last_state=True)
    assert (y.shape, state.shape) == ((0, 4, 6), (0, 4, 3))
    assert not stand_in.calls


def test_the_last_state_has_no_gradient_and_says_so(stand_in):
    inputs = make_inputs(1, 2, 3, 2)
    inputs["u"].requires_grad_()
    y, state = mamba_ssm.selective_scan(**inputs, return_last_state=True)
    y.sum().backward(retain_graph=True)
    with pytest.raises(ModelError, match=r"^last_state.requires_grad=True expected False: "):
        state.sum().backward()


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "D", "z"])
def test_double_precision_is_refused_by_name(stand_in, name):
    inputs = make_inputs(1, 2, 3, 2)
    inputs[name] = inputs[name].double()
    with pytest.raises(ModelError, match=rf"^{name}.dtype=torch.float64 expected float32, bf") as e:
        mamba_ssm.selective_scan(**inputs)
    assert e.value.hint == "the reference backend computes in float64"


def test_a_tensor_elsewhere_is_refused_by_name():
    with pytest.raises(ModelError, match=r"^u.device=cpu expected a CUDA device for the mamba_ssm"):
        mamba_ssm.selective_scan(**make_inputs(1, 2, 3, 2))


def test_sizes_beyond_the_kernel_are_refused(stand_in):
    with pytest.raises(ModelError, match=r"^A.shape=\(2, 257\) expected n of at most 256 for the"):
        mamba_ssm.selective_scan(**make_inputs(1, 2, 3, 257))
    with pytest.raises(ModelError, match=r"^u.shape=\(1, 65536, 1\) expected d of at most 65535 "):
        mamba_ssm.selective_scan(**make_inputs(1, 65_536, 1, 1))
    assert not stand_in.calls


def test_what_is_missing_is_told_one_thing_at_a_time(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert mamba_ssm.unavailable() == (
        "a CUDA device is missing",
        "choose another backend on this machine",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {}
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    reason, remedy = mamba_ssm.unavailable()
    assert reason == "selective_scan_cuda, the kernel of mamba-ssm, is not installed"
    assert remedy.startswith("docs/install.md has the commands")

    found["selective_scan_cuda"] = importlib.machinery.ModuleSpec("selective_scan_cuda", None)

    def broken(name):
        raise OSError("undefined symbol: _ZN3c10\nand more")

    monkeypatch.setattr(importlib, "import_module", broken)
    reason, _ = mamba_ssm.unavailable()
    assert reason == "mamba-ssm does not load: OSError: undefined symbol: _ZN3c10"


def test_with_device_and_package_nothing_is_missing(stand_in, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    assert mamba_ssm.unavailable() is None


def test_its_gradients_are_not_called_reproducible():
    assert mamba_ssm.REPRODUCIBLE is False
