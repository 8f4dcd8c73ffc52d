"""The native scan in the layout of mamba-ssm, as an operator of PyTorch: see ``ops``.

A, D and delta_bias have a leading b here, B and C are (d, n) or (b, g, n, l).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from medmamba.config import ModelError
from medmamba.scan.checks import check_scan
from medmamba.scan.native import library, ops
from medmamba.scan.native.structs import ScanArguments


class Inputs(NamedTuple):
    """Arguments of the operator, but for ``keep``; shapes as in ``medmamba.scan``."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool

    @property
    def groups(self) -> int:
        """Groups of channels that share B and C."""
        return next((matrix.shape[1] for matrix in (self.B, self.C) if matrix.dim() == 4), 1)

    def boundaries_shape(self) -> tuple[int, ...]:
        """Return the shape of the states that backward needs."""
        b, d, l = self.u.shape  # noqa: E741
        return ops.boundaries_shape(b, self.groups, d // self.groups, self.A.shape[2], l)

    def check(self) -> None:
        """Check what the kernel does not.

        Raises:
            ModelError: Names the argument.
        """
        u, delta, A, B, C, D, delta_bias, _ = self
        tensors: dict[str, Any] = {
            "u": u,
            "delta": delta,
            "A": A,
            "B": B,
            "C": C,
            "D": D,
            "delta_bias": delta_bias,
        }
        ops.check_float32(**tensors)
        check_scan(u, delta, A, B, C, D, None, delta_bias)
        for name, dims in {"A": 3, "D": 2, "delta_bias": 2}.items():
            tensor = tensors[name]
            if tensor is not None and tensor.dim() != dims:
                raise ModelError(f"{name}.shape={tuple(tensor.shape)} expected a leading b")
        for name in ("B", "C"):
            shape = tuple(tensors[name].shape)
            if len(shape) == 3 or (len(shape) == 4 and shape[1] != self.groups):
                raise ModelError(
                    f"{name}.shape={shape} expected (d, n), or (b, {self.groups}, n, l)"
                )

    def arguments(self, parts: int) -> dict[str, Any]:
        """Return what forward and backward give the kernel alike."""
        u, delta, A, B, C, D, delta_bias, softplus = self
        b, d, l = u.shape  # noqa: E741
        return {
            "u": u.contiguous(),
            "delta": delta.contiguous(),
            "B": B.contiguous(),
            "C": C.contiguous(),
            **ops.per_example(A=A, D=D, delta_bias=delta_bias),
            **{"b": b, "d": d, "l": l, "g": self.groups, "n": A.shape[2]},
            "softplus": softplus,
            "B_is_constant": B.dim() == 2,
            "C_is_constant": C.dim() == 2,
            "parts": parts,
            "threads": library.num_threads(),
        }


def _forward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, keep = given
    inputs = Inputs(*tensors)
    inputs.check()
    groups = inputs.groups
    parts = ops.forward_parts(inputs.u.shape[0] * groups, inputs.u.shape[1] // groups)
    arguments = inputs.arguments(parts)
    y, last_state, boundaries = _forward_outputs(*given)
    if keep:
        arguments["boundaries"] = boundaries
    ops.run(library.load().scan_forward, ScanArguments(**arguments, y=y, last_state=last_state))
    return y, last_state, boundaries


def _forward_outputs(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, keep = given
    inputs = Inputs(*tensors)
    (b, d, l), u = inputs.u.shape, inputs.u  # noqa: E741
    boundaries = u.new_empty(inputs.boundaries_shape() if keep else 0)
    return u.new_empty((b, d, l)), u.new_empty((b, d, inputs.A.shape[2])), boundaries


def _backward(grad_y: Tensor, grad_last_state: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
    *tensors, boundaries = given
    inputs = Inputs(*tensors)
    inputs.check()
    u, _, A, B, C, D, delta_bias, _ = inputs
    (b, d, _), n = u.shape, A.shape[2]
    parts = ops.backward_parts(d // inputs.groups)
    arguments = inputs.arguments(parts)
    ops.check_kept(boundaries, inputs.boundaries_shape())
    ops.check_float32(grad_y=grad_y, grad_last_state=grad_last_state)
    if grad_y.shape != u.shape:
        raise ModelError(f"grad_y.shape={tuple(grad_y.shape)} expected {tuple(u.shape)}")
    if grad_last_state is not None:
        if grad_last_state.shape != (b, d, n):
            raise ModelError(
                f"grad_last_state.shape={tuple(grad_last_state.shape)} expected {(b, d, n)}"
            )
        arguments["grad_last_state"] = grad_last_state.contiguous()
    gradients = {
        "grad_u": u.new_empty(u.shape),
        "grad_delta": u.new_empty(u.shape),
        "grad_A": u.new_empty((b, d, n)),
        "grad_B": u.new_empty((b, d, n) if B.dim() == 2 else (parts, *B.shape)),
        "grad_C": u.new_empty((b, d, n) if C.dim() == 2 else (parts, *C.shape)),
        "grad_D": u.new_empty(0 if D is None else (b, d)),
        "grad_delta_bias": u.new_empty(0 if delta_bias is None else (b, d)),
    }
    ops.run(
        library.load().scan_backward,
        ScanArguments(
            **arguments, **gradients, grad_y=grad_y.contiguous(), boundaries=boundaries.contiguous()
        ),
    )
    for name in ("grad_B", "grad_C"):  # over parts, or over examples where constant
        gradients[name] = ops.sum_of_parts(gradients[name])
    return tuple(gradients.values())


def _backward_outputs(grad_y: Tensor, _: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
    *tensors, _, _ = given
    return tuple(grad_y.new_empty(0 if tensor is None else tensor.shape) for tensor in tensors)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)  # no zeros for the boundaries


def _gradient(
    ctx: Any, grad_y: Tensor | None, grad_last_state: Tensor | None, _: Tensor | None
) -> tuple[Tensor | None, ...]:
    *tensors, boundaries = ctx.saved_tensors
    if boundaries.numel() == 0:  # traced without gradients, differentiated nevertheless
        boundaries = torch.ops.medmamba.native_scan(*tensors, ctx.delta_softplus, True)[2]
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    gradients = torch.ops.medmamba.native_scan_backward(
        grad_y, grad_last_state, *tensors, ctx.delta_softplus, boundaries
    )
    present = (
        None if tensor is None else gradient
        for tensor, gradient in zip(tensors, gradients, strict=True)
    )
    return (*present, None, None)


_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
    "bool delta_softplus"
)
ops.register(
    "native_scan",
    (
        f"({_INPUTS}, bool keep) -> (Tensor, Tensor, Tensor)",
        f"(Tensor grad_y, Tensor? grad_last_state, {_INPUTS}, Tensor boundaries) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    (_forward, _backward),
    (_forward_outputs, _backward_outputs),
    _gradient,
    _context,
)
