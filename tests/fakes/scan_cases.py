"""Scans of odd shapes with the native backend, compared with the reference in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from medmamba.scan import native, path_order, selective_scan, ss2d_scan

FORWARD, BACKWARD = 1e-5, 1e-4  # relative, of the Euclidean norm


class Scan(NamedTuple):
    b: int
    d: int
    l: int  # noqa: E741
    n: int
    g: int = 1
    constant: str = ""  # which of B and C
    per_example: bool = False
    plain: bool = False  # no D, no bias, no softplus


class Ss2d(NamedTuple):
    b: int
    d: int
    height: int
    width: int
    n: int
    r: int
    per_example: bool = False


# One step; channels that fill no vector; all small state sizes; groups; time around a chunk's end.
SCANS = [
    Scan(1, 1, 1, 1),
    Scan(2, 3, 1, 5, plain=True),
    Scan(1, 16, 32, 16),
    Scan(2, 17, 33, 3),
    Scan(2, 21, 31, 4, g=3),
    Scan(1, 40, 65, 17, g=2, per_example=True),
    Scan(3, 6, 40, 2, g=6),
    Scan(2, 19, 70, 7, constant="B"),
    Scan(2, 8, 37, 9, constant="C", plain=True),
    Scan(1, 5, 34, 6, constant="BC", per_example=True),
    Scan(1, 260, 40, 16),  # in several parts
    *(Scan(1, 18, 35, n) for n in (8, 10, 11, 12, 13, 14, 15)),
]
SS2D_SCANS = [
    Ss2d(1, 1, 1, 1, 1, 1),
    Ss2d(2, 5, 1, 7, 3, 2),
    Ss2d(2, 16, 6, 6, 16, 1),
    Ss2d(1, 33, 5, 13, 17, 3, per_example=True),
    Ss2d(3, 12, 8, 8, 4, 6),
    Ss2d(1, 200, 3, 11, 5, 4),  # in several parts
]


def check_scan(case: Scan) -> None:
    """Compare the output, the last state and all gradients."""
    torch.manual_seed(0)
    b, d, l, n, g = case[:5]  # noqa: E741
    lead = (b,) if case.per_example else ()
    tensors = {"u": torch.randn(b, d, l), "delta": torch.randn(b, d, l) * 0.5}
    if case.plain:
        tensors["delta"] = tensors["delta"].abs()
    tensors["A"] = -torch.rand(*lead, d, n) * 4
    for name in "BC":
        shape = (d, n) if name in case.constant else (b, g, n, l)
        tensors[name] = torch.randn(shape)
    if not case.plain:
        tensors |= {"D": torch.randn(*lead, d), "delta_bias": torch.randn(*lead, d)}
    weights = torch.randn(b, d, l), torch.randn(b, d, n)

    def run(scan, dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
        y, last = scan(**leaves, delta_softplus=not case.plain, return_last_state=True)
        loss = (y * weights[0].to(dtype)).sum() + (last * weights[1].to(dtype)).sum()
        return [y, last, *torch.autograd.grad(loss, list(leaves.values()))]

    ours, expected = run(native.selective_scan, torch.float32), run(selective_scan, torch.float64)
    _compare(("y", "last_state", *tensors), ours, expected, num_outputs=2)


def check_ss2d(case: Ss2d) -> None:
    """Compare the output and all gradients."""
    torch.manual_seed(0)
    b, d, height, width, n, r, per_example = case
    k, l, lead = 4, height * width, (b,) if per_example else ()  # noqa: E741
    tensors = {
        "x": torch.randn(b, l, d),
        "projected": torch.randn(b, l, k * (r + 2 * n)),
        "dt_weight": torch.randn(*lead, k, d, r) * 0.5,
        "dt_bias": torch.randn(*lead, k, d),
        "A": -torch.rand(*lead, k, d, n) * 4,
        "D": torch.randn(*lead, k, d),
    }
    order = path_order(height, width, torch.device("cpu"))
    weight = torch.randn(b, l, d)

    def run(scan, dtype: torch.dtype) -> list[Tensor]:
        leaves = {name: x.to(dtype).requires_grad_() for name, x in tensors.items()}
        y = scan(**leaves, order=order)
        return [y, *torch.autograd.grad((y * weight.to(dtype)).sum(), list(leaves.values()))]

    ours, expected = run(native.ss2d_scan, torch.float32), run(ss2d_scan, torch.float64)
    _compare(("y", *tensors), ours, expected, num_outputs=1)


def _compare(names, ours: list[Tensor], expected: list[Tensor], num_outputs: int) -> None:
    for i, (name, x, right) in enumerate(zip(names, ours, expected, strict=True)):
        error = (x.double() - right).norm() / right.norm().clamp(min=1e-30)
        assert error <= (FORWARD if i < num_outputs else BACKWARD), (name, error)
