"""The native kernel as operators of PyTorch: autograd, tracing and autocast.

    native_scan      the scan in the layout of mamba-ssm
    native_ss2d      the scan over an image along paths, channels last

Invariant: an operator computes in float32 on the CPU from any strides, and its result depends on
shapes and values alone, not on the number of threads or on the rest of the batch. Parameters of the
recurrence come with a leading batch dimension, and so do their gradients: with parameters expanded
from shared ones, autograd's own sum over the batch makes the usual gradient, and a hook before it
sees one gradient per example.

Only chunk-boundary states are kept for backward; the states between are computed again.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from torch import Tensor

from medmamba.config import ModelError
from medmamba.scan.native import library
from medmamba.scan.native.structs import ScanArguments, Ss2dArguments

# Tasks to aim at, and channels that a part of a task has at least. From shapes alone, so that the
# rounding of sums over channels is the same on any number of threads.
_TASKS, _CHANNELS_OF_A_PART = 16, 64

# What the functions of the kernel return, as in kernel.h.
_NO_MEMORY, _BAD_ORDER = 1, 2

_LIBRARY = torch.library.Library("medmamba", "FRAGMENT")
_LIBRARY.define(
    "native_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? delta_bias, bool delta_softplus, bool keep) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "native_scan_backward(Tensor grad_y, Tensor? grad_last_state, Tensor u, Tensor delta, "
    "Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, bool delta_softplus, "
    "Tensor boundaries) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "native_ss2d(Tensor x, Tensor projected, Tensor dt_weight, Tensor dt_bias, Tensor A, "
    "Tensor D, Tensor order, bool keep) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "native_ss2d_backward(Tensor grad_y, Tensor x, Tensor projected, Tensor dt_weight, "
    "Tensor dt_bias, Tensor A, Tensor D, Tensor order, Tensor boundaries) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


# The pool of threads does not survive a fork: a child that used it would wait for ever.
os.register_at_fork(after_in_child=_after_fork)


def _threads() -> int:
    return 1 if _forked else torch.get_num_threads()


def _run(function: Any, arguments: ctypes.Structure) -> None:
    outcome = function(ctypes.byref(arguments))
    if outcome == _NO_MEMORY:
        raise MemoryError("the native selective scan found no memory for its work space")
    if outcome == _BAD_ORDER:
        raise ModelError("order expected every path to visit every position once")


def _parts(tasks: int, channels: int) -> int:
    """Over how many parts of its channels a task is split: few tasks are split, many are not."""
    return max(1, min(_TASKS // tasks, channels // _CHANNELS_OF_A_PART))


def _per_example(parameter: Tensor) -> tuple[Tensor, int]:
    """Return a parameter (b, ...) in C order, and what lies between two examples, in floats."""
    if parameter.stride(0) == 0 and parameter.shape[0]:
        return parameter[0].contiguous(), 0
    parameter = parameter.contiguous()
    return parameter, parameter.stride(0)


def _new_boundaries(like: Tensor, shape: tuple[int, int, int, int, int]) -> Tensor:
    """Make room for the states between chunks; shape is (b, groups, channels of one, n, l)."""
    kernel = library.load()
    b, groups, channels, n, steps = shape
    blocks, chunks = -(-channels // kernel.width), -(-steps // kernel.chunk)
    return like.new_empty((b, groups, blocks, chunks, n, kernel.width))


def _scan_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> dict[str, Any]:
    """Return what forward and backward share; the tensors must stay alive as long as it does."""
    b, d, l = u.shape  # noqa: E741
    groups = next((matrix.shape[1] for matrix in (B, C) if matrix.dim() == 4), 1)
    given: dict[str, Any] = {
        "u": u.contiguous(),
        "delta": delta.contiguous(),
        "B": B.contiguous(),
        "C": C.contiguous(),
        "softplus": delta_softplus,
        "B_is_constant": B.dim() == 2,
        "C_is_constant": C.dim() == 2,
        "b": b,
        "d": d,
        "l": l,
        "g": groups,
        "n": A.shape[2],
        "parts": _parts(max(b, 1) * groups, d // groups),
        "threads": _threads(),
    }
    for name, parameter in {"A": A, "D": D, "delta_bias": delta_bias}.items():
        if parameter is not None:
            given[name], given[f"{name}_stride"] = _per_example(parameter)
    return given


def _scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    given = _scan_arguments(u, delta, A, B, C, D, delta_bias, delta_softplus)
    y, last_state, boundaries = _scan_outputs(
        u, delta, A, B, C, D, delta_bias, delta_softplus, keep
    )
    _run(
        library.load().scan_forward,
        ScanArguments(**given, y=y, last_state=last_state, boundaries=boundaries if keep else None),
    )
    return y, last_state, boundaries


def _scan_outputs(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    b, d, l = u.shape  # noqa: E741
    groups = next((matrix.shape[1] for matrix in (B, C) if matrix.dim() == 4), 1)
    n = A.shape[2]
    boundaries = _new_boundaries(u, (b, groups, d // groups, n, l)) if keep else u.new_empty(0)
    return u.new_empty((b, d, l)), u.new_empty((b, d, n)), boundaries


def _scan_backward(
    grad_y: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    boundaries: Tensor,
) -> tuple[Tensor, ...]:
    given = _scan_arguments(u, delta, A, B, C, D, delta_bias, delta_softplus)
    parts, (b, d, _) = given["parts"], u.shape
    n, empty = A.shape[2], u.new_empty(0)
    gradients = {
        "grad_u": u.new_empty(u.shape),
        "grad_delta": u.new_empty(u.shape),
        "grad_A": u.new_empty((b, d, n)),
        "grad_B": u.new_empty((b, d, n) if B.dim() == 2 else (parts, *B.shape)),
        "grad_C": u.new_empty((b, d, n) if C.dim() == 2 else (parts, *C.shape)),
        "grad_D": empty if D is None else u.new_empty((b, d)),
        "grad_delta_bias": empty if delta_bias is None else u.new_empty((b, d)),
    }
    _run(
        library.load().scan_backward,
        ScanArguments(
            **given,
            **gradients,
            grad_y=grad_y.contiguous(),
            grad_last_state=None if grad_last_state is None else grad_last_state.contiguous(),
            boundaries=boundaries,
        ),
    )
    for name in ("grad_B", "grad_C"):  # over parts, or over examples where constant
        whole = gradients[name]
        gradients[name] = whole[0] if len(whole) == 1 else whole.sum(0)
    return tuple(gradients.values())


def _scan_backward_outputs(
    grad_y: Tensor,
    grad_last_state: Tensor | None,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    boundaries: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(
        u.new_empty(0) if tensor is None else u.new_empty(tensor.shape)
        for tensor in (u, delta, A, B, C, D, delta_bias)
    )


def _scan_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _scan_gradient(
    ctx: Any, grad_y: Tensor | None, grad_last_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, boundaries = ctx.saved_tensors
    u = tensors[0]
    if grad_y is None:
        grad_y = torch.zeros_like(u)
    gradients = torch.ops.medmamba.native_scan_backward(
        grad_y, grad_last_state, *tensors, ctx.delta_softplus, boundaries
    )
    present = (
        None if tensor is None else gradient
        for tensor, gradient in zip(tensors, gradients, strict=True)
    )
    return (*present, None, None)


def _ss2d_arguments(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: Tensor,
) -> dict[str, Any]:
    b, l, d = x.shape  # noqa: E741
    given: dict[str, Any] = {
        "x": x.contiguous(),
        "projected": projected.contiguous(),
        "order": order.contiguous(),
        "b": b,
        "l": l,
        "d": d,
        "k": A.shape[1],
        "n": A.shape[3],
        "r": dt_weight.shape[3],
        "parts": _parts(max(b, 1), d),
        "threads": _threads(),
    }
    parameters = {"dt_weight": dt_weight, "dt_bias": dt_bias, "A": A, "D": D}
    for name, parameter in parameters.items():
        given[name], given[f"{name}_stride"] = _per_example(parameter)
    return given


def _ss2d(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    given = _ss2d_arguments(x, projected, dt_weight, dt_bias, A, D, order)
    y, boundaries = _ss2d_outputs(x, projected, dt_weight, dt_bias, A, D, order, keep)
    _run(
        library.load().ss2d_forward,
        Ss2dArguments(**given, y=y, boundaries=boundaries if keep else None),
    )
    return y, boundaries


def _ss2d_outputs(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: Tensor,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    b, l, d = x.shape  # noqa: E741
    _, k, _, n = A.shape
    boundaries = _new_boundaries(x, (b, k, d, n, l)) if keep else x.new_empty(0)
    return x.new_empty((b, l, d)), boundaries


def _ss2d_backward(
    grad_y: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: Tensor,
    boundaries: Tensor,
) -> tuple[Tensor, ...]:
    given = _ss2d_arguments(x, projected, dt_weight, dt_bias, A, D, order)
    parts = given["parts"]
    gradients = {
        "grad_x": x.new_empty(x.shape),
        "grad_projected": x.new_empty((parts, *projected.shape)),
        "grad_dt_weight": x.new_empty(dt_weight.shape),
        "grad_dt_bias": x.new_empty(dt_bias.shape),
        "grad_A": x.new_empty(A.shape),
        "grad_D": x.new_empty(D.shape),
    }
    _run(
        library.load().ss2d_backward,
        Ss2dArguments(**given, **gradients, grad_y=grad_y.contiguous(), boundaries=boundaries),
    )
    whole = gradients["grad_projected"]
    gradients["grad_projected"] = whole[0] if parts == 1 else whole.sum(0)
    return tuple(gradients.values())


def _ss2d_backward_outputs(
    grad_y: Tensor,
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: Tensor,
    boundaries: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(tensor.shape) for tensor in (x, projected, dt_weight, dt_bias, A, D))


def _ss2d_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the boundaries; y always has a gradient here


def _ss2d_gradient(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.medmamba.native_ss2d_backward(grad_y, *ctx.saved_tensors)
    return (*gradients, None, None)


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise NotImplementedError(
        "the native selective scan has no second derivative; the reference backend has"
    )


for _name, _implementation, _outputs in (
    ("native_scan", _scan, _scan_outputs),
    ("native_scan_backward", _scan_backward, _scan_backward_outputs),
    ("native_ss2d", _ss2d, _ss2d_outputs),
    ("native_ss2d_backward", _ss2d_backward, _ss2d_backward_outputs),
):
    _LIBRARY.impl(_name, _implementation, "CPU")
    torch.library.register_fake(f"medmamba::{_name}", _outputs, lib=_LIBRARY)
    torch.library.register_autocast(f"medmamba::{_name}", "cpu", torch.float32, lib=_LIBRARY)
torch.library.register_autograd(
    "medmamba::native_scan", _scan_gradient, setup_context=_scan_context, lib=_LIBRARY
)
torch.library.register_autograd(
    "medmamba::native_ss2d", _ss2d_gradient, setup_context=_ss2d_context, lib=_LIBRARY
)
for _name in ("native_scan_backward", "native_ss2d_backward"):
    torch.library.register_autograd(f"medmamba::{_name}", _no_second_derivative, lib=_LIBRARY)
