"""The scan over an image along paths, composed from any ``selective_scan``.

A path is a row of a table: the positions of the image in the order in which it visits them, each
once. A new way through an image, or through a volume, is a new table.

Invariant: what a path computes does not depend on the others; their outputs are summed at the
position. The native kernel computes the same in one pass (``native.ss2d_scan``).

Source: section 3.2 of arXiv 2403.03849; ``SS2D.forward_corev0`` of the official code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def path_order(height: int, width: int, device: torch.device) -> Tensor:
    """Return MedMamba's four paths over an image: a table (k, l) of positions, int32.

    Path 0 goes along rows, 1 along columns, 2 and 3 the same two backwards; position row * width +
    column. Made anew each time: it costs microseconds, and a kept table would outlive the tracing
    that made it.
    """
    positions = torch.arange(height * width, dtype=torch.int32, device=device).view(height, width)
    rows, columns = positions.flatten(), positions.t().flatten()
    return torch.stack((rows, columns, rows.flip(0), columns.flip(0)))


def each_path(
    scan: Callable[..., Tensor],
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: Tensor,
) -> Tensor:
    """Scan along every path; arguments as of ``medmamba.scan.ss2d_scan``.

    Args:
        scan: A ``selective_scan``.
        x: (b, l, d).
        projected: (b, l, k (r + 2n)).
        dt_weight: (k, d, r), or (b, k, d, r).
        dt_bias: (k, d), or (b, k, d).
        A: (k, d, n), or (b, k, d, n).
        D: (k, d), or (b, k, d).
        order: (k, l).

    Returns:
        What each path gives each position (b, l, k, d).
    """
    k, d_inner = dt_bias.shape[-2:]
    d_state, rank = A.shape[-1], dt_weight.shape[-1]
    u = _along(x.unsqueeze(2).expand(-1, -1, k, -1), order)  # (b, l, k, d)
    rows = _along(projected.unflatten(2, (k, -1)), order)  # (b, l, k, r + 2n)
    dt, B, C = rows.split((rank, d_state, d_state), dim=-1)
    weights = "bkdr" if dt_weight.dim() == 4 else "kdr"
    delta = torch.einsum(f"blkr,{weights}->blkd", dt, dt_weight)
    y = scan(
        u.flatten(2).transpose(1, 2),  # (b, (k d), l)
        delta.flatten(2).transpose(1, 2),  # (b, (k d), l)
        A.flatten(-3, -2),  # (..., (k d), n)
        B.permute(0, 2, 3, 1),  # (b, k, n, l)
        C.permute(0, 2, 3, 1),  # (b, k, n, l)
        D.flatten(-2),  # (..., (k d))
        delta_bias=dt_bias.flatten(-2),
        delta_softplus=True,
    )
    y = y.transpose(1, 2).unflatten(2, (k, d_inner))  # (b, l, k, d)
    return _along(y, order.argsort(dim=1))


def _along(positions: Tensor, order: Tensor) -> Tensor:
    """Reorder (b, l, k, c): step t of path i becomes what stands at position order[i, t]."""
    return torch.stack(
        [
            _Reorder.apply(path, table)
            for path, table in zip(positions.unbind(2), order.unbind(0), strict=True)
        ],
        dim=2,
    )


class _Reorder(torch.autograd.Function):
    """Indexing by a permutation, whose gradient is indexing by the inverse.

    ``index_select`` does not know that each position is read once: its gradient adds, on a GPU in
    an order that differs from run to run.
    """

    @staticmethod
    def forward(x: Tensor, order: Tensor) -> Tensor:
        """Reorder x (b, l, c) by order (l)."""
        return x.index_select(1, order)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Keep the order."""
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        """Reorder the tangent alike."""
        (order,) = ctx.saved_tensors
        return tangent.index_select(1, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Put every step back to its position."""
        (order,) = ctx.saved_tensors
        return grad.index_select(1, order.argsort()), None
