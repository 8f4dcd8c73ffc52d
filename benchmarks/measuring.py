"""What the benchmarks share: how they compare and time, and what they say about the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medmamba.config import ModelError
from medmamba.scan import active_backend, backend_details

SHORTEST = 0.2  # seconds that a contestant runs for in a round, or one call
OUTPUT_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # of the largest expected value
CANNOT_RUN_HERE = os.EX_UNAVAILABLE  # exit status where the device or the kernel is missing


def need_native() -> None:
    """Leave with one line where the native scan, which is what is measured, cannot run."""
    try:
        active_backend("cpu", "native")
    except ModelError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        sys.exit(CANNOT_RUN_HERE)


def print_figures(machine: dict[str, Any], figures: dict[str, float], *, as_json: bool) -> None:
    """Print a table, or one JSON object."""
    if as_json:
        print(json.dumps({"machine": machine, "figures": figures}))
        return
    print(" ".join(f"{name}={value}" for name, value in machine.items()))
    width = max(map(len, figures)) + 2
    for name, value in figures.items():
        print(f"{name:<{width}}{value:.4g}")


def check(name: str, got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Compare an output, and gradients after it, with the expected; only those that got has.

    Raises:
        SystemExit: They differ by more than rounding.
    """
    for i, (ours, theirs) in enumerate(zip(got, expected, strict=False)):
        tolerance = GRADIENT_TOLERANCE if i else OUTPUT_TOLERANCE
        error = float((ours - theirs).abs().max() / theirs.abs().max())
        if not error <= tolerance:  # NaN too
            what = f"gradient {i}" if i else "output"
            sys.exit(f"error: {name}: error of {what}={error:.1e} expected at most {tolerance:g}")


def seconds(work: Callable[[], object]) -> float:
    """Return how long one call takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def mean_seconds(work: Callable[[], object]) -> float:
    """Return how long a call takes, as the mean over as many as last ``SHORTEST``."""
    start, calls = time.perf_counter(), 0
    while True:
        work()
        calls += 1
        passed = time.perf_counter() - start
        if passed >= SHORTEST:
            return passed / calls


def median_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Return the median over rounds of one contestant's time over another's."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def status_kib(field: str) -> int:
    """Return a figure of this process's memory as Linux tells it, such as ``VmHWM``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}")


def describe_machine() -> dict[str, Any]:
    """Return what the figures were measured on."""
    return {
        "processor": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **backend_details(active_backend()),
    }
