"""The selective scan on a CPU: a kernel in C, wrapped as operators of PyTorch.

``kernel.h`` says what the kernel computes, ``build.py`` compiles it when the project is installed,
``library.py`` loads it, ``scan_op.py`` and ``ss2d_op.py`` make operators of it, and this file gives
them the arguments of the seam, ``medmamba.scan``.

The same inputs give the same bytes on any number of threads. The gate z alone is PyTorch's: where
PyTorch splits its work may change the last bit there.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from medmamba.config import ModelError
from medmamba.scan.native import library, scan_op, ss2d_op
from medmamba.scan.native.library import unavailable

__all__ = [
    "DEVICES",
    "REPRODUCIBLE",
    "details",
    "scan_op",
    "selective_scan",
    "ss2d_op",
    "ss2d_scan",
    "unavailable",
]

DEVICES = ("cpu",)
REPRODUCIBLE = True


def details() -> dict[str, str]:
    """Return what provenance says of this backend."""
    lib = library.load()
    return {"instruction_set": lib.isa, "openmp": lib.openmp}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the scan; arguments and result as in ``medmamba.scan.selective_scan``.

    Shapes are not checked here: the dispatcher has done it.

    Raises:
        ModelError: A tensor is float64, or not on the CPU.
    """
    _check(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
    b, groups = u.shape[0], max(_num_groups(B), _num_groups(C))
    tensors = (
        u.float(),
        delta.float(),
        _per_example(A, b, 3),
        _grouped(B, groups),
        _grouped(C, groups),
        None if D is None else _per_example(D, b, 2),
        None if delta_bias is None else _per_example(delta_bias, b, 2),
    )
    y, last_state, _ = torch.ops.medmamba.native_scan(
        *tensors, delta_softplus, _differentiated(*tensors)
    )
    if z is not None:
        y = y * functional.silu(z.float())
    y = y.to(u.dtype)
    return (y, last_state) if return_last_state else y


def ss2d_scan(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: Tensor,
) -> Tensor:
    """Scan along all paths in one pass; as ``medmamba.scan.ss2d_scan``.

    Raises:
        ModelError: A tensor is float64, or not on the CPU.
    """
    _check(x=x, projected=projected, dt_weight=dt_weight, dt_bias=dt_bias, A=A, D=D)
    b = x.shape[0]
    tensors = (
        x.float(),
        projected.float(),
        _per_example(dt_weight, b, 4),
        _per_example(dt_bias, b, 3),
        _per_example(A, b, 4),
        _per_example(D, b, 3),
    )
    y, _ = torch.ops.medmamba.native_ss2d(*tensors, order, _differentiated(*tensors))
    return y.to(x.dtype)


def _check(**tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype == torch.float64:
            raise ModelError(
                f"{name}.dtype={tensor.dtype} expected float32, bfloat16 or float16: the native "
                "scan computes in float32",
                "the reference backend computes in float64",
            )
        if tensor.device.type != "cpu":
            raise ModelError(
                f"{name}.device={tensor.device} expected cpu, as the native scan needs"
            )


def _differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _num_groups(matrix: Tensor) -> int:
    return matrix.shape[1] if matrix.dim() == 4 else 1


def _grouped(matrix: Tensor, groups: int) -> Tensor:
    """Bring a varying B or C to (b, g, n, l); a constant one stays (d, n)."""
    if matrix.dim() == 2:
        return matrix.float()
    if matrix.dim() == 3:
        matrix = matrix.unsqueeze(1)
    return matrix.float().expand(-1, groups, -1, -1)


def _per_example(parameter: Tensor, b: int, dims: int) -> Tensor:
    """Give a shared parameter a leading batch dimension; autograd then sums over the batch."""
    parameter = parameter.float()
    return parameter if parameter.dim() == dims else parameter.expand(b, *parameter.shape)
