"""The Triton scan against mamba-ssm's CUDA kernel, on a GPU.

    python benchmarks/scan_gpu.py [--quick] [--json]

Shapes are those of the four stages of tiny and base at 224 pixels, batch 8: (b, k d, l) from
(8, 384, 3136) to (8, 3072, 49), and (8, 512, 3136) to (8, 4096, 49), with n = 16 and 4 groups; u,
delta, B and C in float32 and in bfloat16. Interleaved rounds in one process, timed by CUDA events;
a ratio is the median over the rounds of mamba-ssm's time over ours, and a figure without a stage is
the smallest of them. Before that, outputs and gradients of the two are compared.

* ``forward_vs_mamba_ssm``, ``train_vs_mamba_ssm``: the call as PyTorch makes it, forward without
  gradients, and forward and backward. Short sequences measure the processor, which launches.
* ``forward_on_device_vs_mamba_ssm``, ``train_on_device_vs_mamba_ssm``: the same from a CUDA graph,
  which leaves the launches out.
* ``memory_vs_mamba_ssm``: growth of PyTorch's allocations at the peak of forward and backward,
  mamba-ssm's over ours: 1 or more is no more memory. ``triton_mib``: ours.
* ``triton_..._ms``: our times.

Without mamba-ssm only our own figures are printed; without a CUDA device nothing is, and the exit
status says so.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from measuring import CANNOT_RUN_HERE, median_ratio, print_figures
from torch import Tensor

from medmamba.scan import mamba_ssm, triton

BATCH, STATE, GROUPS = 8, 16, 4
LENGTHS = (3136, 784, 196, 49)
CHANNELS = {"tiny": 96, "base": 128}  # of the first stage, on each path
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # of the norm
MILLISECONDS = 20.0  # that a contestant runs for in a round, about

Work = Callable[[], object]
Inputs = dict[str, Tensor]


def make_inputs(channels: int, length: int, dtype: torch.dtype) -> tuple[Inputs, Tensor]:
    """Return arguments of a scan that ask for gradients, and a gradient of y (b, d, l)."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda")

    inputs = {
        "u": normal(BATCH, channels, length).to(dtype),
        "delta": normal(BATCH, channels, length).to(dtype),
        "A": -torch.arange(1.0, STATE + 1, device="cuda").repeat(channels, 1),
        "B": normal(BATCH, GROUPS, STATE, length).to(dtype),
        "C": normal(BATCH, GROUPS, STATE, length).to(dtype),
        "D": normal(channels),
        "delta_bias": normal(channels) - 4,
    }
    grad_y = normal(BATCH, channels, length).to(dtype)
    return {name: x.requires_grad_() for name, x in inputs.items()}, grad_y


def forward(backend: ModuleType, inputs: Inputs) -> Tensor:
    """Return y (b, d, l), without a graph."""
    with torch.no_grad():
        return backend.selective_scan(**inputs, delta_softplus=True)


def train(backend: ModuleType, inputs: Inputs, grad_y: Tensor) -> Sequence[Tensor]:
    """Return y (b, d, l) and all gradients."""
    y = backend.selective_scan(**inputs, delta_softplus=True)
    return y.detach(), *torch.autograd.grad(y, list(inputs.values()), grad_y)


def captured(work: Work) -> Work:
    """Return the work as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def milliseconds(work: Work, calls: int) -> float:
    """Return the mean time of a call on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / calls


def mebibytes(work: Work) -> float:
    """Return how far PyTorch's allocations grow at the peak."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def compare(kind: str, works: dict[str, Work], rounds: int) -> dict[str, float]:
    """Return our time, and the others' over it."""
    calls = {}
    for name, work in works.items():
        work()  # Triton compiles
        calls[name] = max(1, round(MILLISECONDS / milliseconds(work, 5)))
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(milliseconds(work, calls[name]))
    figures = {f"triton_{kind}_ms": statistics.median(times["triton"])}
    if "mamba_ssm" in times:
        figures[f"{kind}_vs_mamba_ssm"] = median_ratio(times["mamba_ssm"], times["triton"])
    return figures


def stage_figures(
    backends: dict[str, ModuleType], channels: int, length: int, dtype: torch.dtype, rounds: int
) -> dict[str, float]:
    """Compare the backends on one stage; the names of the figures lack stage and dtype."""
    inputs, grad_y = make_inputs(channels, length, dtype)
    works: dict[str, dict[str, Work]] = {
        "forward": {name: lambda b=b: forward(b, inputs) for name, b in backends.items()},
        "train": {name: lambda b=b: train(b, inputs, grad_y) for name, b in backends.items()},
    }
    expected = train(triton, inputs, grad_y)
    for name, backend in backends.items():
        for i, (x, right) in enumerate(zip(train(backend, inputs, grad_y), expected, strict=True)):
            error = float((x.float() - right.float()).norm() / right.float().norm())
            if not error <= TOLERANCE[dtype]:  # NaN too
                sys.exit(f"error: {name}: error of result {i}={error:.1e} beside triton")
    del expected

    mib = {name: mebibytes(work) for name, work in works["train"].items()}
    figures = {"triton_mib": mib["triton"]}
    if "mamba_ssm" in mib:
        figures["memory_vs_mamba_ssm"] = mib["mamba_ssm"] / mib["triton"]
    for kind, of_kind in works.items():
        figures |= compare(kind, of_kind, rounds)
        graphs = {name: captured(work) for name, work in of_kind.items()}
        figures |= compare(f"{kind}_on_device", graphs, rounds)
    return figures


def all_figures(backends: dict[str, ModuleType], rounds: int) -> dict[str, float]:
    """Return each ratio as the smallest of all, and then every figure of every stage."""
    found: dict[str, dict[str, float]] = {}
    for size, channels in CHANNELS.items():
        for stage, length in enumerate(LENGTHS):
            for dtype_name, dtype in DTYPES.items():
                where = f"{size}_stage{stage + 1}_{dtype_name}"
                of_stage = channels * GROUPS * 2**stage
                found[where] = stage_figures(backends, of_stage, length, dtype, rounds)
                torch.cuda.empty_cache()
    figures: dict[str, float] = {}
    for name in next(iter(found.values())):
        if "_vs_" in name:
            figures[name] = min(by_name[name] for by_name in found.values())
        figures |= {f"{name}_{where}": by_name[name] for where, by_name in found.items()}
    return figures


def version(package: str) -> str:
    """Return a package's version, or that it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> None:
    """Print a table, or one JSON object."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="fewer rounds")
    options.add_argument("--json", action="store_true", help="one JSON object")
    given = options.parse_args()
    if not torch.cuda.is_available():
        print("error: scan_gpu measures on a CUDA device and there is none here", file=sys.stderr)
        sys.exit(CANNOT_RUN_HERE)
    backends = {"triton": triton, "mamba_ssm": mamba_ssm}
    for name, backend in list(backends.items()):
        if missing := backend.unavailable():
            print(f"error: {name}: {missing[0]}\nhint: {missing[1]}", file=sys.stderr)
            if backend is triton:
                sys.exit(CANNOT_RUN_HERE)
            del backends[name]

    figures = all_figures(backends, rounds=3 if given.quick else 15)
    machine = {
        "processor": platform.machine(),
        "gpu": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton"),
        "mamba_ssm": version("mamba-ssm"),
    }
    print_figures(machine, figures, as_json=given.json)


if __name__ == "__main__":
    main()
