"""Compile the scan kernel: hatchling's build hook, and a command that compiles it in place.

    python -m medmamba.scan.native.build

Invariant: one shared library holds every instruction set of the target machine, and the digest of
the sources it was made from; ``library.py`` chooses and compares at load. It is not linked to an
OpenMP runtime: it takes the one that PyTorch has loaded, so that both use one pool of threads.

Only the standard library is imported: hatchling runs this file by its path, without the project.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
LIBRARY = FOLDER / "_scan.so"
VARIABLE = "MEDMAMBA_NATIVE"

# Compiled once for each instruction set, which ends the names of its functions; the rest once.
KERNEL = "kernel.c"
FLAGS = (
    *("-O3", "-std=gnu11", "-fPIC", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi"),
)
INSTRUCTION_SETS = {
    "x86_64": {
        "avx512": (
            *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
            "-mprefer-vector-width=512",
        ),
        "avx2": ("-mavx2", "-mfma"),
        "sse2": (),
    },
    "aarch64": {"neon": ()},
}
STAMP = """
__attribute__((visibility("default"))) const char medmamba_scan_sources[] = "{digest}";
"""


class BuildError(Exception):
    """The kernel was to be compiled and could not be."""


class NoKernelError(BuildError):
    """Nothing is here to compile the kernel with, or it does not run on the target."""


def digest() -> str:
    """Return what tells one set of sources and flags from another."""
    state = hashlib.sha256(repr((FLAGS, INSTRUCTION_SETS)).encode())
    for path in sorted([*FOLDER.glob("*.c"), *FOLDER.glob("*.h")]):
        state.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return state.hexdigest()


def find_compiler() -> list[str]:
    """Return the C compiler's command: ``$CC`` if it is set, else the first there is.

    Raises:
        BuildError: ``$CC`` names a command that is not there.
        NoKernelError: There is no C compiler.
    """
    if command := shlex.split(os.environ.get("CC", "")):
        if not shutil.which(command[0]):
            raise BuildError(f"CC={command[0]} expected a C compiler's command")
        return command
    for name in ("cc", "gcc", "clang"):
        if path := shutil.which(name):
            return [path]
    raise NoKernelError("there is no C compiler (install gcc, or set CC)")


def target_machine(compiler: Sequence[str]) -> str:
    """Return the machine that the compiler compiles for, ``x86_64`` or ``aarch64``.

    Raises:
        NoKernelError: The kernel does not run on the compiler's target.
    """
    target = _run([*compiler, "-dumpmachine"]).strip()
    machine = target.split("-")[0]
    if "linux" not in target:
        raise NoKernelError(f"the kernel is built on Linux only for now (target {target})")
    if machine not in INSTRUCTION_SETS:
        raise NoKernelError(f"the kernel has no instruction set for {machine}")
    return machine


def build(library: Path, compiler: Sequence[str]) -> str:
    """Compile the kernel into ``library``, which appears whole or not at all.

    Returns:
        The target machine.

    Raises:
        BuildError: The compiler failed; the message is what it printed.
    """
    machine = target_machine(compiler)
    with tempfile.TemporaryDirectory(dir=library.parent, prefix=".build-") as name:
        folder = Path(name)
        stamp = folder / "stamp.c"
        stamp.write_text(STAMP.format(digest=digest()), encoding="utf-8")
        once = [path for path in sorted(FOLDER.glob("*.c")) if path.name != KERNEL]

        def compile_unit(source: Path, stem: str, flags: Sequence[str] = ()) -> str:
            made = str(folder / f"{stem}.o")
            _run([*compiler, *FLAGS, *flags, "-c", str(source), "-o", made])
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            units = [
                pool.submit(compile_unit, FOLDER / KERNEL, isa, (*flags, f"-DISA={isa}"))
                for isa, flags in INSTRUCTION_SETS[machine].items()
            ]
            units += [pool.submit(compile_unit, source, source.stem) for source in (stamp, *once)]
            objects = [unit.result() for unit in units]
        made = folder / library.name
        _run([*compiler, "-shared", *objects, "-o", str(made)])
        made.replace(library)
    return machine


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise BuildError(f"{shlex.join(command)} failed:\n{done.stdout}")
    return done.stdout


def build_if_possible(library: Path, warn: Callable[[str], None]) -> str | None:
    """Compile the kernel as ``MEDMAMBA_NATIVE`` asks: 0 never, 1 or an error, unset if possible.

    Returns:
        The target machine, or None where no kernel was compiled; ``warn`` has then been told why.

    Raises:
        BuildError: The variable is set to something else, the compiler failed, or there is none
            and the kernel was asked for.
    """
    wish = os.environ.get(VARIABLE, "")
    if wish not in ("", "0", "1"):
        raise BuildError(f"{VARIABLE}={wish} expected 0 (no kernel) or 1 (no build without it)")
    if wish == "0":
        library.unlink(missing_ok=True)
        warn(f"no scan kernel: {VARIABLE}=0")
        return None
    try:
        return build(library, find_compiler())
    except NoKernelError as error:
        if wish:
            raise
        warn(f"no scan kernel: {error}; the model runs without it, many times slower on a CPU")
        return None


def get_build_hook() -> type:
    """Return the hook's class; only hatchling calls this, and only then it is there."""
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface

    class KernelHook(BuildHookInterface):
        """Put the kernel into a wheel, or beside the sources of an editable installation."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Compile the kernel and give the wheel its platform."""
            # Not beside the sources: a wheel for another machine spares the checkout's kernel.
            self.folder = tempfile.TemporaryDirectory()
            editable = version == "editable"
            library = LIBRARY if editable else Path(self.folder.name) / LIBRARY.name
            try:
                machine = build_if_possible(library, self.app.display_warning)
            except BuildError as error:
                hint = f"{VARIABLE}=0 installs without the scan kernel"
                self.app.abort(f"error: {error}\nhint: {hint}")
            if machine is None:
                return
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-linux_{machine}"
            if not editable:
                place = LIBRARY.relative_to(Path(self.root).resolve()).as_posix()
                build_data["force_include"][str(library)] = place

        def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
            """Remove what the wheel has taken in."""
            self.folder.cleanup()

    return KernelHook


def main() -> int:
    """Compile the kernel beside its sources."""
    started = time.monotonic()
    try:
        machine = build(LIBRARY, find_compiler())
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    sets = " ".join(INSTRUCTION_SETS[machine])
    size, seconds = LIBRARY.stat().st_size // 1000, time.monotonic() - started
    print(f"built {LIBRARY.name} for {machine} ({sets}): {size} kB in {seconds:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
