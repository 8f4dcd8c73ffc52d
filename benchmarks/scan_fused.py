"""The fused operator over tiny's ten blocks, and its roof: its own inner loop (scan_core.c)."""

from __future__ import annotations

import ctypes
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from measuring import check, median_ratio, seconds
from torch import Tensor

from medmamba.scan import path_order, ss2d_scan
from medmamba.scan.native import build, library
from medmamba.scan.native import ops as _ops  # noqa: F401  registers the operators

SOURCE = Path(__file__).with_name("scan_core.c")
STATE, PATHS = 16, 4
# Of tiny at 224 px: blocks, side of the image in positions, channels, rank of the step size.
STAGES = ((2, 56, 96, 3), (2, 28, 192, 6), (4, 14, 384, 12), (2, 7, 768, 24))


class Block:
    """One block's arguments to the operator, and what its forward keeps for backward.

    Attributes:
        updates: State updates of one pass.
    """

    def __init__(self, batch: int, side: int, d: int, r: int, generator: torch.Generator) -> None:
        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        l, k, n = side * side, PATHS, STATE  # noqa: E741
        rate = torch.arange(1.0, n + 1).expand(k, d, n)
        shared = (normal(k, d, r) * r**-0.5, normal(k, d) - 4, -rate, normal(k, d))
        self.tensors = (
            normal(batch, l, d),
            normal(batch, l, k * (r + 2 * n)),
            *(tensor.contiguous().expand(batch, *tensor.shape) for tensor in shared),
        )
        self.order = path_order(side, side, torch.device("cpu"))
        self.grad_y = normal(batch, l, d)
        self.updates = batch * l * k * d * n
        self.forward()

    def forward(self) -> Tensor:
        """Run the operator as training does."""
        y, self.boundaries = torch.ops.medmamba.native_ss2d(*self.tensors, self.order, True)
        return y

    def backward(self) -> tuple[Tensor, ...]:
        """Run the operator's gradient."""
        return torch.ops.medmamba.native_ss2d_backward(
            self.grad_y, *self.tensors, self.order, self.boundaries
        )

    def expected(self) -> tuple[Tensor, ...]:
        """Return the output and the gradients that the project's reference gives."""
        inputs = [tensor.detach().requires_grad_() for tensor in self.tensors]
        x, projected, dt_weight, dt_bias, A, D = inputs
        y = ss2d_scan(x, projected, dt_weight, dt_bias, A, D, self.order, backend="reference")
        return (y.detach(), *torch.autograd.grad(y, inputs, self.grad_y))


def tiny_blocks(batch: int) -> list[Block]:
    """Return tiny's ten blocks at 224 px, each with tensors of its own."""
    generator = torch.Generator().manual_seed(0)
    return [
        Block(batch, side, d, r, generator) for count, side, d, r in STAGES for _ in range(count)
    ]


class Core:
    """The kernel's inner loop, compiled for the instruction set that the operator uses.

    Args:
        folder: Where the compiled code goes.
        updates: State updates to do in a run, at least.

    Attributes:
        updates: State updates that a run does.

    Raises:
        BuildError: There is no compiler, or it failed.
    """

    def __init__(self, folder: Path, updates: int) -> None:
        isa, made = library.load().isa, folder / "core.so"
        compiler = build.find_compiler()
        flags = (*build.FLAGS, *build.INSTRUCTION_SETS[build.target_machine(compiler)][isa])
        command = [*compiler, *flags, f"-DISA={isa}", f"-I{build.FOLDER}", "-shared"]
        done = subprocess.run(
            [*command, str(SOURCE), "-o", str(made)], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise build.BuildError(done.stderr)
        self._run = ctypes.CDLL(str(made)).core_run
        self._run.argtypes, self._run.restype = [ctypes.c_int64] * 4, ctypes.c_int64
        self._tasks = 1
        self._tasks = -(-updates // self.run("forward"))
        self.updates = self.run("forward")

    def run(self, name: str) -> int:
        """Run it forward or backward on all threads; returns the state updates."""
        updates = self._run(self._tasks, STATE, name == "backward", torch.get_num_threads())
        if updates < 0:
            raise MemoryError("scan_core.c found no memory")
        return updates


def fused_figures(batch: int, rounds: int) -> dict[str, float]:
    """Return the operator's share of the inner loop; nothing where that cannot be compiled."""
    blocks = tiny_blocks(batch)
    for block in {block.order.shape: block for block in blocks}.values():  # one of each stage
        check("fused operator", (block.forward(), *block.backward()), block.expected())
    updates = sum(block.updates for block in blocks)
    figures: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            core = Core(Path(folder), updates)
        except build.BuildError as error:
            print(f"left out: fused_forward_share, fused_backward_share: {error}", file=sys.stderr)
            return figures
        for name in ("forward", "backward"):
            run_core = partial(core.run, name)
            fused, roof = [], []
            for _ in range(rounds + 1):
                fused.append(updates / seconds(partial(_run_each, blocks, name)))
                roof.append(core.updates / seconds(run_core))
            del fused[0], roof[0]  # they warm up
            figures[f"fused_{name}_share"] = median_ratio(fused, roof)
            figures[f"fused_{name}_giga"] = statistics.median(fused) / 1e9
            figures[f"core_{name}_giga"] = statistics.median(roof) / 1e9
    return figures


def _run_each(blocks: Sequence[Block], name: str) -> None:
    for block in blocks:
        getattr(block, name)()
