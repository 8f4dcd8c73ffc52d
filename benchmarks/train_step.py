"""What a training step costs on this machine, and what the scan's linear backward saves.

    python benchmarks/train_step.py [--quick] [--json]

Two questions, each answered by interleaved rounds in one process and medians of per-round ratios:

* ``train_vs_published``: forward and backward of the published reference loop (it indexes
  ``x[:, :, i]``, whose backward is quadratic in the length) over ours, at MedMamba's first stage
  for 64-pixel images.
* ``seconds_per_example_<size>``: a training step of the whole model, 64 pixels.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the commands set it

import torch
from torch import Tensor
from torch.nn import functional

from medmamba import MedMamba
from medmamba.scan import active_backend, selective_scan

BATCH, STATE = 4, 16


def published_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The recurrence as the published reference writes it: whole tensors, indexed by time.

    Args:
        u: (b, d, l).
        delta: (b, d, l), positive.
        A: (d, n).
        B: (b, n, l).
        C: (b, n, l).

    Returns:
        (b, d, l).
    """
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    drive = torch.einsum("bdl,bnl,bdl->bdln", delta, B, u)
    state = A.new_zeros(u.shape[0], *A.shape)  # (b, d, n)
    outputs: list[Tensor] = []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append(torch.einsum("bdn,bn->bd", state, C[:, :, t]))
    return torch.stack(outputs, dim=2)


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def scan_ratio(length: int, channels: int, rounds: int) -> float:
    """Return the median over rounds of published time over ours, forward and backward."""
    generator = torch.Generator().manual_seed(0)
    u, delta = (torch.randn(BATCH, channels, length, generator=generator) for _ in range(2))
    B, C = (torch.randn(BATCH, STATE, length, generator=generator) for _ in range(2))
    A = -torch.rand(channels, STATE, generator=generator)
    inputs = [u, functional.softplus(delta), A, B, C]
    for tensor in inputs:
        tensor.requires_grad_()
    expected, got = published_loop(*inputs), selective_scan(*inputs)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    ratios = [
        seconds(lambda: published_loop(*inputs).sum().backward())
        / seconds(lambda: selective_scan(*inputs).sum().backward())
        for _ in range(rounds)
    ]
    return statistics.median(ratios)


def step_seconds(size: str, batch: int, rounds: int) -> float:
    """Return the median seconds an example of one forward and backward of a named size."""
    model = MedMamba.from_name(size, num_classes=2, norm="group")
    images = torch.randn(batch, 3, 64, 64)
    labels = torch.zeros(batch, dtype=torch.long)

    def step() -> None:
        functional.cross_entropy(model(images), labels).backward()

    step()
    return statistics.median(seconds(step) for _ in range(rounds)) / batch


def main() -> None:
    """Print a table, or one JSON object."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="fewer rounds")
    options.add_argument("--json", action="store_true", help="one JSON object")
    given = options.parse_args()
    rounds = 2 if given.quick else 5
    figures = {
        "train_vs_published": scan_ratio(length=256, channels=384, rounds=rounds),
        "seconds_per_example_nano": step_seconds("nano", 32, rounds),
        "seconds_per_example_tiny": step_seconds("tiny", 8, rounds),
    }
    machine = {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "scan_backend": active_backend(),
    }
    if given.json:
        print(json.dumps({"machine": machine, "figures": figures}))
        return
    print(" ".join(f"{name}={value}" for name, value in machine.items()))
    for name, value in figures.items():
        print(f"{name:<28}{value:.4g}")


if __name__ == "__main__":
    main()
