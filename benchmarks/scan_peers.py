"""The ways to compute the selective scan that the benchmarks compare, and what they run on.

Each takes u and delta (b, d, l), A (d, n), B and C (b, g, n, l), D and delta_bias (d), and returns
(b, d, l); the step size is softplus(delta + delta_bias).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional

from medmamba.scan import selective_scan
from medmamba.scan.native.library import ISA_VARIABLE

BATCH, STATE, GROUPS = 8, 16, 4


def published_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """The recurrence as the published reference has it: whole tensors, indexed by time.

    The backward of ``x[:, :, t]`` fills a zero tensor of full length for each t, so that its time
    is quadratic in l.
    """
    decay, drive, C = _whole_tensors(u, delta, A, B, C, delta_bias)
    steps = ((decay[:, :, t], drive[:, :, t], C[..., t]) for t in range(u.shape[2]))
    return _loop(steps, A.new_zeros(u.shape[0], *A.shape)) + u * D.unsqueeze(-1)


def unbind_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """The same arithmetic, but for one ``unbind`` over time, whose backward is one stack."""
    decay, drive, C = _whole_tensors(u, delta, A, B, C, delta_bias)
    steps = zip(decay.unbind(2), drive.unbind(2), C.unbind(3), strict=True)
    return _loop(steps, A.new_zeros(u.shape[0], *A.shape)) + u * D.unsqueeze(-1)


def mambapy_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
) -> Tensor:
    """Mambapy's parallel scan, with its arithmetic around it, time before channels as it has them.

    It knows no groups: they become examples.
    """
    from mambapy.pscan import pscan  # pyright: ignore[reportMissingImports]

    (b, d, l), (g, n) = u.shape, B.shape[1:3]  # noqa: E741

    def time_first(x: Tensor) -> Tensor:
        return x.reshape(b * g, -1, l).transpose(1, 2).contiguous()  # (b g, l, ...)

    delta = functional.softplus(delta + delta_bias.unsqueeze(-1))
    x, step, B, C = (time_first(tensor) for tensor in (u, delta, B, C))
    A = A.view(g, 1, d // g, n).repeat(b, 1, 1, 1)  # (b g, 1, d / g, n)
    decay = torch.exp(step.unsqueeze(-1) * A)  # (b g, l, d / g, n)
    drive = step.unsqueeze(-1) * B.unsqueeze(2) * x.unsqueeze(-1)
    y = (pscan(decay, drive) @ C.unsqueeze(-1)).squeeze(-1)  # (b g, l, d / g)
    return y.transpose(1, 2).reshape(b, d, l) + u * D.unsqueeze(-1)


def _whole_tensors(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Decay and drive of all steps (b, d, l, n); C of each channel (b, d, n, l)."""
    delta = functional.softplus(delta + delta_bias.unsqueeze(-1))
    B, C = (matrix.repeat_interleave(u.shape[1] // matrix.shape[1], 1) for matrix in (B, C))
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    drive = torch.einsum("bdl,bdnl,bdl->bdln", delta, B, u)
    return decay, drive, C


def _loop(steps: Iterable[tuple[Tensor, Tensor, Tensor]], state: Tensor) -> Tensor:
    outputs: list[Tensor] = []
    for decay, drive, C in steps:
        state = decay * state + drive
        outputs.append(torch.einsum("bdn,bdn->bd", state, C))
    return torch.stack(outputs, dim=2)


def project_scan(backend: str) -> Callable[..., Tensor]:
    """Return one of this project's backends with the arguments of the others."""

    def scan(
        u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor
    ) -> Tensor:
        return selective_scan(
            u, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=True, backend=backend
        )

    return scan


SCANS = {
    "native": project_scan("native"),
    "project_reference": project_scan("reference"),
    "published": published_loop,
    "unbind": unbind_loop,
    "mambapy": mambapy_scan,
}


def make_inputs(d: int, l: int, batch: int = BATCH) -> tuple[list[Tensor], Tensor]:  # noqa: E741
    """Return a scan's arguments, the parameters as MedMamba starts, and a gradient of y."""
    generator = torch.Generator().manual_seed(0)
    u, delta, grad_y = (torch.randn(batch, d, l, generator=generator) for _ in range(3))
    B, C = (torch.randn(batch, GROUPS, STATE, l, generator=generator) for _ in range(2))
    A = -torch.arange(1.0, STATE + 1).repeat(d, 1)
    bias = torch.randn(d, generator=generator) - 4
    inputs = (u, delta, A, B, C, torch.ones(d), bias)
    return [tensor.requires_grad_() for tensor in inputs], grad_y


def forward(name: str, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a scan without gradients."""
    with torch.no_grad():
        return (SCANS[name](*inputs),)


def train(
    name: str, inputs: Sequence[Tensor], grad_y: Tensor, isa: str | None = None
) -> tuple[Tensor, ...]:
    """Run a scan, on an instruction set if one is given, and its gradients."""
    with instruction_set(isa):
        y = SCANS[name](*inputs)
        return (y.detach(), *torch.autograd.grad(y, inputs, grad_y))


@contextmanager
def instruction_set(isa: str | None) -> Iterator[None]:
    """Let the kernel run on an instruction set; None leaves it as it is."""
    before = os.environ.get(ISA_VARIABLE, "")
    os.environ[ISA_VARIABLE] = isa or before
    yield
    os.environ[ISA_VARIABLE] = before
