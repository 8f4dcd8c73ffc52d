"""The selective scan in plain PyTorch: obvious first, and as quick as that allows.

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t        y_t = C_t . h_t + D u_t

Invariant: time and memory of forward and backward are linear in l. The loop therefore takes its
steps from ``unbind``, whose backward is one stack; indexing ``x[:, :, t]`` instead would make the
backward of every step fill a zero tensor of full length, which is quadratic. Each step works on
small tensors that stay in the processor's cache: computing exp(delta A) for all steps at once
measured three to four times slower.

Letters: b batch, d channels, g groups of channels that share B and C, l time, n state.
Source: ``selective_scan_ref`` of state-spaces/mamba, section 3.2 of arXiv 2312.00752.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat

import torch
from torch import Tensor
from torch.nn import functional

from medmamba.scan.checks import wide

REPRODUCIBLE = True


def unavailable() -> tuple[str, str] | None:
    """Return None: it runs wherever PyTorch does."""
    return None


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
    """
    dtype = wide(u, delta, A, B, C, D, z, delta_bias)
    x, delta, A = u.to(dtype), delta.to(dtype), A.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype).unsqueeze(-1)
    if delta_softplus:
        delta = functional.softplus(delta)

    groups = max(_num_groups(B), _num_groups(C))
    A = A.unflatten(-2, (groups, A.shape[-2] // groups))  # (..., g, d/g, n)
    state = x.new_zeros(x.shape[0], *A.shape[-3:])  # (b, g, d/g, n)
    outputs: list[Tensor] = []
    steps = zip(
        _channel_steps(delta, groups),
        _channel_steps(delta * x, groups),
        _state_steps(B.to(dtype), groups),
        _state_steps(C.to(dtype), groups),
        strict=False,  # constant B and C repeat without end
    )
    for delta_t, drive_t, B_t, C_t in steps:
        state = torch.exp(delta_t * A) * state + drive_t * B_t  # (b, g, d/g, n)
        outputs.append((state * C_t).sum(-1))  # (b, g, d/g)

    y = torch.stack(outputs).flatten(2).permute(1, 2, 0)  # (b, d, l)
    if D is not None:
        y = y + x * D.to(dtype).unsqueeze(-1)
    if z is not None:
        y = y * functional.silu(z.to(dtype))
    y = y.to(u.dtype)
    return (y, state.flatten(1, 2)) if return_last_state else y  # (b, d, l), (b, d, n)


def _num_groups(matrix: Tensor) -> int:
    """Groups of B or C: constant (d, n) and ungrouped (b, n, l) have one, else (b, g, n, l)."""
    return matrix.shape[1] if matrix.dim() == 4 else 1


def _channel_steps(x: Tensor, groups: int) -> Iterable[Tensor]:
    """Split x (b, d, l) into l tensors (b, g, d/g, 1)."""
    x = x.permute(2, 0, 1).contiguous()  # (l, b, d)
    return x.unflatten(2, (groups, -1)).unsqueeze(-1).unbind(0)


def _state_steps(matrix: Tensor, groups: int) -> Iterable[Tensor]:
    """Split B or C into one tensor a step that broadcasts against the state (b, g, d/g, n)."""
    if matrix.dim() == 2:
        return repeat(matrix.unflatten(0, (groups, -1)))  # (g, d/g, n)
    if matrix.dim() == 3:
        matrix = matrix.unsqueeze(1)  # (b, 1, n, l)
    return matrix.permute(3, 0, 1, 2).contiguous().unsqueeze(3).unbind(0)  # l of (b, g, 1, n)
