"""The selective scan against other ways to compute it, and against the processor.

    python benchmarks/scan.py [--quick] [--json] [--stages 1,2,3,4] [--isa NAME] [--only PART,...]

Shapes are those of tiny's four stages at 224 pixels, batch 8: (b, k d, l) = (8, 384, 3136),
(8, 768, 784), (8, 1536, 196) and (8, 3072, 49), with n = 16 and 4 groups. A figure without a stage
is the smallest over the stages. All run in one process on the same threads, with denormals flushed
and with freed memory kept for the next call, as the commands keep it; with ``--usual-allocator`` it
is not, which slows the others most. In a round each runs in turn, for 0.2 s or one call; a ratio is
the median over the rounds of their time over ours. Before that, outputs (to 1e-5 of the largest)
and gradients (to 1e-4) are compared with the project's reference.

* ``forward_vs_reference``: forward, without gradients, against the published reference loop.
* ``train_vs_unbind``: forward and backward against the same arithmetic with ``unbind`` over time.
  ``_avx2`` and ``_sse2``: our side on a lesser instruction set than the processor's.
* ``train_vs_project_reference``: against this project's ``reference`` backend.
* ``train_vs_mambapy``: against the parallel scan of the package ``mambapy``.
* ``fused_forward_share``, ``fused_backward_share``: state updates a second of the fused operator in
  tiny's ten blocks, over those of its own inner loop on data that stays in the nearest cache. The
  operator forms step sizes, reads and writes images, and keeps states for backward; the loop does
  not. ``_giga``: either's updates in 1e9 a second.
* ``memory_stage1_mib``: how far a fresh process grows at the peak of forward and backward of stage
  1, above its arguments and the gradient of y: y, what is kept for backward, and all gradients
  count. ``_unbind``: that of the loop with ``unbind``. Memory is freed as usual there.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import importlib.util
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the commands set it

import torch
from measuring import (
    CANNOT_RUN_HERE,
    check,
    describe_machine,
    mean_seconds,
    median_ratio,
    print_figures,
    status_kib,
)
from scan_fused import fused_figures
from scan_peers import BATCH, SCANS, forward, make_inputs, train
from torch import Tensor

from medmamba.config import ModelError
from medmamba.scan.native import library
from strategies.cli import keep_freed_memory

STAGES = {1: (384, 3136), 2: (768, 784), 3: (1536, 196), 4: (3072, 49)}  # k d, l
TRAINED = ("unbind", "project_reference", "mambapy")  # the others' forward and backward
PARTS = ("forward", *TRAINED, "fused", "memory")

Figures = dict[str, float]


def lesser_instruction_sets() -> list[str]:
    """Return those that the kernel could run on beside the processor's best; none if one is set."""
    if os.environ.get(library.ISA_VARIABLE):
        return []
    isas = ctypes.CDLL(str(library.LIBRARY)).medmamba_scan_isas
    isas.restype = ctypes.c_char_p
    return isas().decode().split()[1:]


def stage_figures(stage: int, parts: Sequence[str], rounds: int) -> Figures:
    """Compare all on one stage; the names of the figures lack the stage."""
    inputs, grad_y = make_inputs(*STAGES[stage])
    works: dict[str, Callable[[], Sequence[Tensor]]] = {}
    ratios: dict[str, tuple[str, str]] = {}  # of two works
    if "forward" in parts:
        works["forward"] = partial(forward, "native", inputs)
        works["published"] = partial(forward, "published", inputs)
        ratios["forward_vs_reference"] = "published", "forward"
    if peers := [name for name in TRAINED if name in parts]:
        works["train"] = partial(train, "native", inputs, grad_y)
    for peer in peers:
        works[peer] = partial(train, peer, inputs, grad_y)
        ratios[f"train_vs_{peer}"] = peer, "train"
    for isa in lesser_instruction_sets() if "unbind" in parts else ():
        works[isa] = partial(train, "native", inputs, grad_y, isa)
        ratios[f"train_vs_unbind_{isa}"] = "unbind", isa

    expected = train("project_reference", inputs, grad_y)
    for name, work in works.items():
        check(f"stage {stage}, {name}", work(), expected)
    del expected
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(mean_seconds(work))
    figures = {
        ratio: median_ratio(times[theirs], times[ours]) for ratio, (theirs, ours) in ratios.items()
    }
    for name in ("forward", "train"):
        if name in works:
            figures[f"{name}_ms"] = 1000 * statistics.median(times[name])
    return figures


def ratios_of_stages(stages: Sequence[int], parts: Sequence[str], rounds: int) -> Figures:
    """Return each ratio as the smallest over the stages and then for every stage; our times."""
    found = {stage: stage_figures(stage, parts, rounds) for stage in stages}
    figures: Figures = {}
    for name in next(iter(found.values())):
        if not name.endswith("_ms"):
            figures[name] = min(by_name[name] for by_name in found.values())
        figures |= {f"{name}_stage{stage}": by_name[name] for stage, by_name in found.items()}
    return figures


def extra_memory(name: str) -> float:
    """Return the MiB that this process grows by in forward and backward of stage 1."""
    inputs, grad_y = make_inputs(384, 8)
    train(name, inputs, grad_y)  # libraries and threads are not what is asked for
    inputs, grad_y = make_inputs(*STAGES[1])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_kib("VmRSS")
    train(name, inputs, grad_y)
    return (status_kib("VmHWM") - before) / 1024


def memory_figures() -> Figures:
    """Return the extra memory of our scan and of the loop with ``unbind``."""
    figures: Figures = {}
    for figure, name in {"": "native", "_unbind": "unbind"}.items():
        command = [sys.executable, __file__, "--memory", name]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        figures[f"memory_stage1{figure}_mib"] = float(done.stdout)
    return figures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""

    def some_of(choices: Sequence[str]) -> Callable[[str], list[str]]:
        def chosen(text: str) -> list[str]:
            if unknown := set(text.split(",")) - set(choices):
                known = ",".join(choices)
                raise argparse.ArgumentTypeError(f"{unknown.pop()} expected some of {known}")
            return [choice for choice in choices if choice in text.split(",")]

        return chosen

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds; stages 3 and 4")
    parser.add_argument("--json", action="store_true", help="one JSON object")
    parser.add_argument("--stages", type=some_of([str(stage) for stage in STAGES]))
    parser.add_argument("--isa", help="the kernel's instruction set; else the processor's best")
    parser.add_argument("--only", type=some_of(PARTS), default=[*PARTS], help=",".join(PARTS))
    parser.add_argument("--usual-allocator", action="store_true", help="do not keep freed memory")
    parser.add_argument("--memory", choices=SCANS, help="print one scan's extra memory in MiB")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a table, or one JSON object."""
    options = parse(arguments)
    if options.isa:
        os.environ[library.ISA_VARIABLE] = options.isa
    try:
        library.load()
    except ModelError as error:
        print(f"error: {error}\nhint: {error.hint}", file=sys.stderr)
        return CANNOT_RUN_HERE
    if options.memory:
        print(extra_memory(options.memory))
        return 0
    parts = options.only
    if "mambapy" in parts and importlib.util.find_spec("mambapy") is None:
        print("left out: train_vs_mambapy: the package mambapy is not installed", file=sys.stderr)
        parts.remove("mambapy")
    stages = [int(stage) for stage in options.stages or ("34" if options.quick else "1234")]
    figures: Figures = {}
    if "memory" in parts:
        figures |= memory_figures()
    if not options.usual_allocator:
        keep_freed_memory()
    torch.set_flush_denormal(True)
    if "fused" in parts:
        figures |= fused_figures(BATCH, rounds=5 if options.quick else 20)
    if {"forward", *TRAINED} & set(parts):
        figures |= ratios_of_stages(stages, parts, rounds=2 if options.quick else 5)
    machine = describe_machine()
    if "mambapy" in parts:
        machine["mambapy"] = importlib.metadata.version("mambapy")
    print_figures(machine, figures, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
