"""The native scan along paths, channels last, as an operator of PyTorch: see ``ops``.

dt_weight, dt_bias, A and D have a leading b here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from medmamba.config import ModelError
from medmamba.scan.checks import check_ss2d
from medmamba.scan.native import library, ops
from medmamba.scan.native.structs import Ss2dArguments


class Inputs(NamedTuple):
    """Arguments of the operator, but for ``keep``; shapes as in ``medmamba.scan``."""

    x: Tensor
    projected: Tensor
    dt_weight: Tensor
    dt_bias: Tensor
    A: Tensor
    D: Tensor
    order: Tensor

    def boundaries_shape(self) -> tuple[int, ...]:
        """Return the shape of the states that backward needs."""
        b, l, d = self.x.shape  # noqa: E741
        _, k, _, n = self.A.shape
        return ops.boundaries_shape(b, k, d, n, l)

    def check(self) -> None:
        """Check what the kernel does not.

        Raises:
            ModelError: Names the argument.
        """
        x, projected, dt_weight, dt_bias, A, D, _ = self
        ops.check_float32(x=x, projected=projected, dt_weight=dt_weight, dt_bias=dt_bias, A=A, D=D)
        check_ss2d(*self)
        for name, dims in {"dt_weight": 4, "dt_bias": 3, "A": 4, "D": 3}.items():
            tensor = getattr(self, name)
            if tensor.dim() != dims:
                raise ModelError(f"{name}.shape={tuple(tensor.shape)} expected a leading b")

    def arguments(self, parts: int) -> dict[str, Any]:
        """Return what forward and backward give the kernel alike."""
        x, projected, dt_weight, dt_bias, A, D, order = self
        b, l, d = x.shape  # noqa: E741
        return {
            "x": x.contiguous(),
            "projected": projected.contiguous(),
            "order": order.contiguous(),
            **ops.per_example(dt_weight=dt_weight, dt_bias=dt_bias, A=A, D=D),
            **{"b": b, "l": l, "d": d, "k": A.shape[1], "n": A.shape[3], "r": dt_weight.shape[3]},
            "parts": parts,
            "threads": library.num_threads(),
        }


def _forward(*given: Any) -> tuple[Tensor, Tensor]:
    *tensors, keep = given
    inputs = Inputs(*tensors)
    inputs.check()
    b, _, d = inputs.x.shape
    arguments = inputs.arguments(ops.forward_parts(b, d))
    y, boundaries = _forward_outputs(*given)
    if keep:
        arguments["boundaries"] = boundaries
    ops.run(library.load().ss2d_forward, Ss2dArguments(**arguments, y=y))
    return y, boundaries


def _forward_outputs(*given: Any) -> tuple[Tensor, Tensor]:
    *tensors, keep = given
    inputs = Inputs(*tensors)
    x = inputs.x
    return x.new_empty(x.shape), x.new_empty(inputs.boundaries_shape() if keep else 0)


def _backward(grad_y: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *tensors, boundaries = given
    inputs = Inputs(*tensors)
    inputs.check()
    x, projected, dt_weight, dt_bias, A, D, _ = inputs
    parts = ops.backward_parts(x.shape[2])
    arguments = inputs.arguments(parts)
    ops.check_kept(boundaries, inputs.boundaries_shape())
    ops.check_float32(grad_y=grad_y)
    if grad_y.shape != x.shape:
        raise ModelError(f"grad_y.shape={tuple(grad_y.shape)} expected {tuple(x.shape)}")
    gradients = {
        "grad_x": x.new_empty(x.shape),
        "grad_projected": x.new_empty((parts, *projected.shape)),
        "grad_dt_weight": x.new_empty(dt_weight.shape),
        "grad_dt_bias": x.new_empty(dt_bias.shape),
        "grad_A": x.new_empty(A.shape),
        "grad_D": x.new_empty(D.shape),
    }
    ops.run(
        library.load().ss2d_backward,
        Ss2dArguments(
            **arguments, **gradients, grad_y=grad_y.contiguous(), boundaries=boundaries.contiguous()
        ),
    )
    gradients["grad_projected"] = ops.sum_of_parts(gradients["grad_projected"])
    return tuple(gradients.values())


def _backward_outputs(grad_y: Tensor, *given: Any) -> tuple[Tensor, ...]:
    *differentiated, _, _ = given
    return tuple(grad_y.new_empty(tensor.shape) for tensor in differentiated)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for the boundaries; y always has a gradient here


def _gradient(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, boundaries = ctx.saved_tensors
    if boundaries.numel() == 0:  # traced without gradients, differentiated nevertheless
        boundaries = torch.ops.medmamba.native_ss2d(*tensors, True)[1]
    gradients = torch.ops.medmamba.native_ss2d_backward(grad_y, *tensors, boundaries)
    return (*gradients, None, None)


_INPUTS = (
    "Tensor x, Tensor projected, Tensor dt_weight, Tensor dt_bias, Tensor A, Tensor D, Tensor order"
)
ops.register(
    "native_ss2d",
    (
        f"({_INPUTS}, bool keep) -> (Tensor, Tensor)",
        f"(Tensor grad_y, {_INPUTS}, Tensor boundaries) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    ),
    (_forward, _backward),
    (_forward_outputs, _backward_outputs),
    _gradient,
    _context,
)
