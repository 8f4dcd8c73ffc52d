"""The native backend with its kernel in another process: emulated, or under a tool.

``medmamba.scan.native`` prepares the arguments as ever; what would be a call of the library writes
them to a file, runs tests/e2e/scan_driver.c on it, and reads the results back into their tensors.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any

from medmamba.scan.native import build

SOURCE = Path(__file__).parent.parent / "e2e" / "scan_driver.c"
NUMBER, INPUT, OUTPUT = range(3)
FLOAT = 4  # bytes; of an int32 too
THREADS = 2


def compile_driver(
    folder: Path, compiler: str, isa: str, flags: Sequence[str], *more_flags: str
) -> Path:
    """Compile the driver and the kernel of one instruction set into one program."""
    program = folder / f"scan_driver_{isa}"
    sources = [build.FOLDER / build.KERNEL, SOURCE]
    common = [*build.FLAGS, "-Werror", f"-DISA={isa}", f"-I{build.FOLDER}"]
    subprocess.run(
        [
            compiler,
            *common,
            *flags,
            *more_flags,
            "-fopenmp",
            *map(str, sources),
            "-o",
            str(program),
        ],
        check=True,
    )
    return program


class DrivenKernel:
    """What ``library.load()`` returns, with every function a run of the driver.

    Attributes:
        calls: How often a function was called.
    """

    def __init__(self, command: Sequence[str], folder: Path, environment: Mapping[str, str]):
        self.command, self.folder, self.calls = list(command), folder, 0
        self.environment = {**os.environ, **environment}
        self.width, self.chunk = map(int, self._run("sizes").split())

    def scan_forward(self, reference: Any) -> int:
        return self._call("scan_forward", reference._obj, {"y", "last_state", "boundaries"})

    def scan_backward(self, reference: Any) -> int:
        return self._call("scan_backward", reference._obj, _gradients(reference._obj))

    def ss2d_forward(self, reference: Any) -> int:
        return self._call("ss2d_forward", reference._obj, {"y", "boundaries"})

    def ss2d_backward(self, reference: Any) -> int:
        return self._call("ss2d_backward", reference._obj, _gradients(reference._obj))

    def _call(self, function: str, arguments: ctypes.Structure, outputs: set[str]) -> int:
        arguments.threads = THREADS
        shapes = scan_sizes if function.startswith("scan") else ss2d_sizes
        sizes = {name: FLOAT * size for name, size in shapes(arguments, self).items()}
        records, arrays, results = b"", b"", []
        for name, kind in arguments._fields_:
            value = getattr(arguments, name)
            if kind is not ctypes.c_void_p or not value:
                records += struct.pack("<2q", NUMBER, value or 0)
                continue
            role = OUTPUT if name in outputs else INPUT
            records += struct.pack("<2q", role, sizes[name])
            if role == INPUT:
                arrays += ctypes.string_at(value, sizes[name])
            else:
                results.append((value, sizes[name]))
        given, made = self.folder / "input", self.folder / "output"
        given.write_bytes(records + arrays)
        self._run(function, str(given), str(made))
        content = made.read_bytes()
        for address, size in results:
            ctypes.memmove(address, content, size)
            content = content[size:]
        assert content == b""
        self.calls += 1
        return 0

    def _run(self, *arguments: str) -> str:
        done = subprocess.run(
            [*self.command, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return done.stdout


def _gradients(arguments: Any) -> set[str]:
    received = {"grad_y", "grad_last_state"}
    return {name for name, _ in arguments._fields_ if name.startswith("grad_")} - received


def scan_sizes(a: Any, kernel: DrivenKernel) -> dict[str, int]:
    """Floats of each array, from the comments of kernel.h."""
    b, d, l, g, n = a.b, a.d, a.l, a.g, a.n  # noqa: E741
    whole, states, shared = b * d * l, b * d * n, b * g * n * l
    sizes = dict.fromkeys(("u", "delta", "y", "grad_y", "grad_u", "grad_delta"), whole)
    sizes |= dict.fromkeys(("last_state", "grad_last_state", "grad_A"), states)
    sizes |= dict.fromkeys(("grad_D", "grad_delta_bias"), b * d)
    sizes["boundaries"] = (
        b * g * ceil(d // g / kernel.width) * ceil(l / kernel.chunk) * n * kernel.width
    )
    sizes["A"] = (b if a.A_stride else 1) * d * n
    sizes["D"] = (b if a.D_stride else 1) * d
    sizes["delta_bias"] = (b if a.delta_bias_stride else 1) * d
    for name, constant in (("B", a.B_is_constant), ("C", a.C_is_constant)):
        sizes[name] = d * n if constant else shared
        sizes[f"grad_{name}"] = states if constant else a.parts * shared
    return sizes


def ss2d_sizes(a: Any, kernel: DrivenKernel) -> dict[str, int]:
    """Floats of each array, from the comments of kernel.h."""
    b, l, d, k, n, r = a.b, a.l, a.d, a.k, a.n, a.r  # noqa: E741
    sizes = dict.fromkeys(("x", "y", "grad_y", "grad_x"), b * l * d)
    sizes["projected"] = b * l * k * (r + 2 * n)
    sizes["grad_projected"] = a.parts * sizes["projected"]
    sizes["order"] = k * l
    sizes["boundaries"] = b * k * ceil(d / kernel.width) * ceil(l / kernel.chunk) * n * kernel.width
    for name, size in {"dt_weight": d * r, "dt_bias": d, "A": d * n, "D": d}.items():
        sizes[name] = (b if getattr(a, f"{name}_stride") else 1) * k * size
        sizes[f"grad_{name}"] = b * k * size
    return sizes
