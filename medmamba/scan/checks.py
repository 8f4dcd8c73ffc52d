"""Shapes and types that a scan accepts, checked once, before any backend sees them."""

from __future__ import annotations

import torch
from torch import Tensor

from medmamba.config import ModelError


def wide(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor has it, else float32: half precision loses the long recurrence."""
    double = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


def check_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    """Check the arguments of ``selective_scan``.

    Raises:
        ModelError: Names the argument, and what it has to be.
    """
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
    given |= {"D": D, "z": z, "delta_bias": delta_bias}
    _check_kind(given)
    if u.dim() != 3 or 0 in u.shape[1:]:
        raise ModelError(f"u.shape={tuple(u.shape)} expected (b, d, l) with d and l of at least 1")
    b, d, l = u.shape  # noqa: E741 the letter of the shapes
    n = A.shape[-1] if A.dim() else 0
    if n == 0 or A.shape not in ((d, n), (b, d, n)):
        raise ModelError(
            f"A.shape={tuple(A.shape)} expected (d, n) or (b, d, n) with b={b}, d={d} as in u "
            "and n of at least 1"
        )
    for name, tensor in {"delta": delta, "z": z}.items():
        if tensor is not None and tensor.shape != u.shape:
            raise ModelError(f"{name}.shape={tuple(tensor.shape)} expected {(b, d, l)} as u has")
    for name, tensor in {"D": D, "delta_bias": delta_bias}.items():
        if tensor is not None and tensor.shape not in ((d,), (b, d)):
            raise ModelError(f"{name}.shape={tuple(tensor.shape)} expected {(d,)} or {(b, d)}")
    for name, tensor in {"B": B, "C": C}.items():
        grouped = tensor.dim() == 4 and tensor.shape[1] > 0 and d % tensor.shape[1] == 0
        if tensor.shape not in ((d, n), (b, n, l)) and not (
            grouped and tensor.shape == (b, tensor.shape[1], n, l)
        ):
            raise ModelError(
                f"{name}.shape={tuple(tensor.shape)} expected {(d, n)}, {(b, n, l)} or "
                f"(b, g, n, l)=({b}, g, {n}, {l}) with g a divisor of d={d}"
            )
    if B.dim() == C.dim() == 4 and 1 not in (B.shape[1], C.shape[1]) and B.shape[1] != C.shape[1]:
        raise ModelError(
            f"B.shape={tuple(B.shape)} and C.shape={tuple(C.shape)} expected the same g in both"
        )


def check_ss2d(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: Tensor,
) -> None:
    """Check the arguments of ``ss2d_scan``, but for the entries of ``order``.

    Raises:
        ModelError: Names the argument, and what it has to be.
    """
    parameters = {"dt_weight": dt_weight, "dt_bias": dt_bias, "A": A, "D": D}
    _check_kind({"x": x, "projected": projected, **parameters})
    if x.dim() != 3 or 0 in x.shape[1:]:
        raise ModelError(f"x.shape={tuple(x.shape)} expected (b, l, d) with l and d of at least 1")
    b, l, d = x.shape  # noqa: E741
    if order.dim() != 2 or order.shape[1] != l or order.dtype != torch.int32:
        raise ModelError(
            f"order.shape={tuple(order.shape)} order.dtype={order.dtype} "
            f"expected (k, l) with l={l} as in x, int32"
        )
    if order.device != x.device:
        raise ModelError(f"order.device={order.device} expected {x.device} as x has")
    k = order.shape[0]
    n, r = (tensor.shape[-1] if tensor.dim() else 0 for tensor in (A, dt_weight))
    if 0 in (k, n, r):
        raise ModelError(f"k={k}, n={n}, r={r} expected at least 1 each, of order, A and dt_weight")
    shapes = {"dt_weight": (k, d, r), "dt_bias": (k, d), "A": (k, d, n), "D": (k, d)}
    for name, shape in shapes.items():
        actual = tuple(parameters[name].shape)
        if actual not in (shape, (b, *shape)):
            raise ModelError(f"{name}.shape={actual} expected {shape} or {(b, *shape)}")
    if projected.shape != (b, l, k * (r + 2 * n)):
        raise ModelError(
            f"projected.shape={tuple(projected.shape)} expected {(b, l, k * (r + 2 * n))} "
            f"for k={k}, r={r}, n={n}"
        )


def check_order(order: Tensor) -> None:
    """Check that every path visits every position once.

    Args:
        order: (k, l).

    Raises:
        ModelError: Names the path and the first position that it leaves out.
    """
    l = order.shape[1]  # noqa: E741
    visited = order.long().sort(dim=1).values
    wrong = (visited != torch.arange(l, device=order.device)).nonzero()
    if len(wrong):
        path, position = wrong[0].tolist()
        raise ModelError(
            f"order[{path}]={order[path].tolist()[:8]} expected every position from 0 to {l - 1} "
            f"once: position {position} is missing or another is there twice",
            "a path is a permutation of the positions",
        )


def _check_kind(given: dict[str, Tensor | None]) -> None:
    device = next(tensor.device for tensor in given.values() if tensor is not None)
    for name, tensor in given.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ModelError(f"{name}.dtype={tensor.dtype} expected a real floating-point dtype")
        if tensor.device != device:
            raise ModelError(f"{name}.device={tensor.device} expected {device} as the others have")
