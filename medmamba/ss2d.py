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
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from medmamba.config import EXPAND, NORM_EPS, NUM_DIRECTIONS, dt_rank
from medmamba.layers import Conv2d, Linear
from medmamba.scan import path_order, ss2d_scan

# Step sizes that softplus(dt_bias) is drawn from, log-uniformly, at initialisation.
DT_MIN, DT_MAX = 1e-3, 1e-1


class SS2D(nn.Module):
    """Project up, convolve each channel, scan along four paths, gate, project down.

    Args:
        d_model: Channels of input and output.
        d_state: Size of the state of each scanned channel.
        scan_backend: What runs the scan; None takes the default of the device.
    """

    def __init__(self, d_model: int, d_state: int, scan_backend: str | None = None) -> None:
        super().__init__()
        d_inner, rank = EXPAND * d_model, dt_rank(d_model)
        self.in_proj = Linear(d_model, 2 * d_inner, bias=False)
        self.depthwise = Conv2d(d_inner, d_inner, 3, padding=1, groups=d_inner)
        self.x_proj = Linear(d_inner, NUM_DIRECTIONS * (rank + 2 * d_state), bias=False)
        self.scan = DirectionalScan(d_inner, d_state, rank, scan_backend)
        self.out_norm = nn.LayerNorm(d_inner, eps=NORM_EPS)
        self.out_proj = Linear(d_inner, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, h, w, d_model) to the same shape."""
        grid = x.shape[1:3]
        x, gate = self.in_proj(x.flatten(1, 2)).chunk(2, dim=-1)  # twice (b, l, d)
        x, gate = x.contiguous(), gate.contiguous()  # a view of gate would keep x twice
        x = x.unflatten(1, grid).permute(0, 3, 1, 2)  # (b, d, h, w), channels last
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
        backend: What runs the scan; None takes the default of the device.

    Attributes:
        dt_weight: From rank to d_inner, per path (k, d, r).
        dt_bias: Added before softplus ((k d)).
        A_log: log(-A) ((k d), n).
        D: Skip ((k d)).
        observe_gradient: Called in backward with a parameter's name and its gradients per example
            (b, ...), before they are summed over the batch; None leaves it out. They come from the
            same backward pass, at no further cost.
    """

    def __init__(self, d_inner: int, d_state: int, rank: int, backend: str | None = None) -> None:
        super().__init__()
        self.backend = backend
        self.observe_gradient: Callable[[str, Tensor], object] | None = None
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
            (b, h, w, d), in the dtype of x; autocast and half precision do not reach the scan.
        """
        b, height, width, _ = x.shape
        y = ss2d_scan(
            x.flatten(1, 2),
            projected.flatten(1, 2),
            *self.parameters_of_paths(b),
            order=path_order(height, width, x.device),
            backend=self.backend,
        )
        return y.unflatten(1, (height, width))

    def parameters_of_paths(self, b: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return dt_weight, dt_bias, A, D by path; with a leading b if gradients are observed."""
        parameters: dict[str, Tensor] = dict(self.named_parameters())
        if self.observe_gradient is not None and torch.is_grad_enabled():
            for name, parameter in parameters.items():
                if parameter.requires_grad:
                    expanded = parameter.expand(b, *parameter.shape)
                    expanded.register_hook(partial(_observe, self.observe_gradient, name))
                    parameters[name] = expanded
        dt_weight, k = parameters["dt_weight"], self.dt_weight.shape[0]
        return (
            dt_weight,
            parameters["dt_bias"].unflatten(-1, (k, -1)),  # (..., k, d)
            -torch.exp(parameters["A_log"]).unflatten(-2, (k, -1)),  # (..., k, d, n)
            parameters["D"].unflatten(-1, (k, -1)),  # (..., k, d)
        )


def _observe(observer: Callable[[str, Tensor], object], name: str, gradient: Tensor) -> None:
    observer(name, gradient)  # what it returns must not replace the gradient
