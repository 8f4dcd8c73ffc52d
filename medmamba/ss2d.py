"""SS2D: the selective scan over an image, along four paths.

    d_model, d_inner  channels outside and inside (d_inner = 2 d_model)
    dt_rank           rank of the projection that makes the step size delta
    A, B, C, D        the state-space matrices; delta the step size (Mamba's letters)
    k                 path: 0 along rows, 1 along columns, 2 and 3 the same two backwards

Invariant: what a path computes does not depend on the others; their outputs are summed at the
pixel. Parameters that no ``nn.Linear`` or ``nn.Conv2d`` holds live in ``DirectionalScan``, which
has no children: code that computes one gradient per example then meets them in one leaf module.
Arguments of every ``forward`` are tensors with a leading batch dimension, for the same reason.

Source: section 3.2 of arXiv 2403.03849; ``SS2D.forward_corev0`` of the official code.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmamba.config import EXPAND, NORM_EPS, NUM_DIRECTIONS, dt_rank
from medmamba.scan import selective_scan

# Step sizes that softplus(dt_bias) is drawn from, log-uniformly, at initialisation.
DT_MIN, DT_MAX = 1e-3, 1e-1


class SS2D(nn.Module):
    """Project up, convolve each channel, scan along four paths, gate, project down.

    Args:
        d_model: Channels of input and output.
        d_state: Size of the state of each scanned channel.
    """

    def __init__(self, d_model: int, d_state: int) -> None:
        super().__init__()
        d_inner, rank = EXPAND * d_model, dt_rank(d_model)
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.depthwise = nn.Conv2d(d_inner, d_inner, 3, padding=1, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, NUM_DIRECTIONS * (rank + 2 * d_state), bias=False)
        self.scan = DirectionalScan(d_inner, d_state, rank)
        self.out_norm = nn.LayerNorm(d_inner, eps=NORM_EPS)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, h, w, d_model) to the same shape."""
        grid = x.shape[1:3]
        x, gate = self.in_proj(x.flatten(1, 2)).chunk(2, dim=-1)  # twice (b, l, d)
        # Contiguous channels first: Opacus' convolution samplers are wrong for channels_last.
        x = x.transpose(1, 2).unflatten(2, grid).contiguous()  # (b, d, h, w)
        x = functional.silu(self.depthwise(x)).permute(0, 2, 3, 1)  # (b, h, w, d)
        projected = self.x_proj(x.flatten(1, 2)).unflatten(1, grid)  # (b, h, w, (k (r + 2n)))
        y = self.scan(x, projected).flatten(1, 2)  # (b, l, d)
        y = self.out_proj(self.out_norm(y) * functional.silu(gate))  # (b, l, d_model)
        return y.unflatten(1, grid)  # (b, h, w, d_model)


class DirectionalScan(nn.Module):
    """The four scans and their own parameters; a leaf.

    Args:
        d_inner: Scanned channels.
        d_state: Size of the state of each.
        rank: Columns that delta is made of.

    Attributes:
        dt_weight: From rank to d_inner, per path (k, d, r).
        dt_bias: Added before softplus ((k d)).
        A_log: log(-A) ((k d), n).
        D: Skip ((k d)).
    """

    def __init__(self, d_inner: int, d_state: int, rank: int) -> None:
        super().__init__()
        scanned = NUM_DIRECTIONS * d_inner
        bound = rank**-0.5
        self.dt_weight = nn.Parameter(
            torch.empty(NUM_DIRECTIONS, d_inner, rank).uniform_(-bound, bound)
        )
        dt = torch.empty(scanned).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp_()
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus
        states = torch.arange(1, d_state + 1, dtype=torch.get_default_dtype())
        self.A_log = nn.Parameter(states.log().repeat(scanned, 1))
        self.D = nn.Parameter(torch.ones(scanned))

    def forward(self, x: Tensor, projected: Tensor) -> Tensor:
        """Scan along the four paths and sum what they give each pixel.

        Args:
            x: What is scanned (b, h, w, d).
            projected: For each pixel and path its delta, B and C (b, h, w, (k (r + 2n))).

        Returns:
            (b, h, w, d), in the dtype of x.
        """
        return self.per_path(x, projected).sum(3).to(x.dtype)

    def per_path(self, x: Tensor, projected: Tensor) -> Tensor:
        """Scan as ``forward`` does, but return each path's share (b, h, w, k, d), unsummed.

        The result is float32 or float64: autocast and half precision end before the scan.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        k, d_inner, rank = self.dt_weight.shape
        d_state = self.A_log.shape[1]
        height, width = x.shape[1:3]
        with torch.autocast(x.device.type, enabled=False):
            u = to_paths(x.to(dtype).unsqueeze(3).expand(-1, -1, -1, k, -1))  # (b, l, k, d)
            projected = projected.to(dtype).unflatten(3, (k, -1))  # (b, h, w, k, r + 2n)
            dt, B, C = to_paths(projected).split((rank, d_state, d_state), dim=-1)
            delta = torch.einsum("blkr,kdr->blkd", dt, self.dt_weight.to(dtype))
            y = selective_scan(
                u.flatten(2).transpose(1, 2),  # (b, (k d), l)
                delta.flatten(2).transpose(1, 2),  # (b, (k d), l)
                -torch.exp(self.A_log.to(dtype)),
                B.permute(0, 2, 3, 1),  # (b, k, n, l)
                C.permute(0, 2, 3, 1),  # (b, k, n, l)
                self.D.to(dtype),
                delta_bias=self.dt_bias.to(dtype),
                delta_softplus=True,
            )
        y = y.transpose(1, 2).unflatten(2, (k, d_inner))  # (b, l, k, d)
        return from_paths(y, height, width)


def to_paths(pixels: Tensor) -> Tensor:
    """Reorder pixels (b, h, w, k, c) as each path visits them (b, l, k, c)."""
    rows, columns, rows_back, columns_back = pixels.unbind(3)
    return torch.stack(
        (
            rows.flatten(1, 2),
            columns.transpose(1, 2).flatten(1, 2),
            rows_back.flatten(1, 2).flip(1),
            columns_back.transpose(1, 2).flatten(1, 2).flip(1),
        ),
        dim=2,
    )


def from_paths(visited: Tensor, height: int, width: int) -> Tensor:
    """Undo ``to_paths``: from the order of each path (b, l, k, c) to pixels (b, h, w, k, c)."""
    rows, columns, rows_back, columns_back = visited.unbind(2)
    return torch.stack(
        (
            rows.unflatten(1, (height, width)),
            columns.unflatten(1, (width, height)).transpose(1, 2),
            rows_back.flip(1).unflatten(1, (height, width)),
            columns_back.flip(1).unflatten(1, (width, height)).transpose(1, 2),
        ),
        dim=3,
    )
