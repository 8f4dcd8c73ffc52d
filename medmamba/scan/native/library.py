"""Load the compiled kernel: the instruction set, the OpenMP runtime, the types of its functions.

Invariant: the kernel that runs was built from the sources beside it, has an instruction set that
this processor has, and shares PyTorch's OpenMP runtime, so that both use one pool of threads. A
second runtime would bring threads that wait for work on the cores that PyTorch computes on.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch  # brings the OpenMP runtime that is then shared

from medmamba.config import ModelError
from medmamba.scan.native.structs import ScanArguments, Ss2dArguments

LIBRARY = Path(__file__).with_name("_scan.so")
ISA_VARIABLE = "MEDMAMBA_SCAN_ISA"
BUILD = "python -m medmamba.scan.native.build"

# Each function takes a pointer to one struct and returns an int (kernel.h); its symbol is
# medmamba_<name>_<instruction set>.
FUNCTIONS: dict[str, type[ctypes.Structure]] = {
    "scan_forward": ScanArguments,
    "scan_backward": ScanArguments,
    "ss2d_forward": Ss2dArguments,
    "ss2d_backward": Ss2dArguments,
}


@dataclass(frozen=True)
class Kernel:
    """The kernel's functions for one instruction set.

    Attributes:
        isa: The instruction set.
        openmp: File name of the OpenMP runtime that runs its threads.
        width: Floats of a vector: channels that are computed together.
        chunk: Steps of time between two states that are kept for backward.
        scan_forward: See kernel.h for what these do and return.
        scan_backward: Its backward.
        ss2d_forward: The scan over an image.
        ss2d_backward: Its backward.
    """

    isa: str
    openmp: str
    width: int
    chunk: int
    scan_forward: Callable[[Any], int]
    scan_backward: Callable[[Any], int]
    ss2d_forward: Callable[[Any], int]
    ss2d_backward: Callable[[Any], int]


# The pool of threads does not survive a fork: a child that used it would wait for ever.
_in_forked_child = False


def _note_fork() -> None:
    global _in_forked_child
    _in_forked_child = True


os.register_at_fork(after_in_child=_note_fork)


def num_threads() -> int:
    """Return how many threads a call may use: PyTorch's number, but one in a forked child."""
    return 1 if _in_forked_child else torch.get_num_threads()


@dataclass(frozen=True)
class _Opened:
    library: ctypes.CDLL
    openmp: str
    isas: tuple[str, ...]  # that this processor has, best first


def unavailable() -> tuple[str, str] | None:
    """Return None if the kernel can run here, else (what is missing, how to get it)."""
    opened = _open()
    return opened if isinstance(opened, tuple) else None


def isas() -> tuple[str, ...]:
    """Return the instruction sets that the library and this processor have, best first."""
    opened = _open()
    return () if isinstance(opened, tuple) else opened.isas


def load() -> Kernel:
    """Return the kernel for this processor's best instruction set, or ``MEDMAMBA_SCAN_ISA``.

    Raises:
        ModelError: The kernel is not available, or the processor lacks the instruction set.
    """
    return _load(os.environ.get(ISA_VARIABLE) or None)


@functools.cache
def _load(isa: str | None) -> Kernel:
    opened = _open()
    if isinstance(opened, tuple):
        raise ModelError(*opened)
    if isa is not None and isa not in opened.isas:
        raise ModelError(
            f"{ISA_VARIABLE}={isa} expected one that this processor has: {', '.join(opened.isas)}",
            f"unset {ISA_VARIABLE} to take the best",
        )
    isa = isa or opened.isas[0]
    functions: dict[str, Any] = {}
    for name, structure in FUNCTIONS.items():
        functions[name] = opened.library[f"medmamba_{name}_{isa}"]
        functions[name].argtypes = [ctypes.POINTER(structure)]
    width, chunk = (opened.library[f"medmamba_scan_{name}_{isa}"]() for name in ("width", "chunk"))
    return Kernel(isa=isa, openmp=opened.openmp, width=width, chunk=chunk, **functions)


@functools.cache
def _open() -> _Opened | tuple[str, str]:
    """Open the library; what is missing and how to get it where that cannot be done."""
    # Only here: that module is also a program, which Python loads twice if it is imported before.
    from medmamba.scan.native.build import digest

    if not sys.platform.startswith("linux"):
        return "the native scan kernel runs on Linux only", "use Linux on x86_64 or aarch64"
    if not LIBRARY.exists():
        return (
            "the native scan kernel is not built",
            f"install a C compiler (gcc), then run {BUILD}",
        )
    openmp = _share_openmp()
    if openmp is None:
        return "the native scan kernel finds no OpenMP runtime", "install libgomp (apt: libgomp1)"
    try:
        library = ctypes.CDLL(str(LIBRARY), mode=os.RTLD_NOW | os.RTLD_LOCAL)
        sources = (ctypes.c_char * 65).in_dll(library, "medmamba_scan_sources").value.decode()
        library.medmamba_scan_isas.restype = ctypes.c_char_p
        isas = library.medmamba_scan_isas().decode().split()
    except (OSError, AttributeError, ValueError) as error:
        reason = str(error).removeprefix(f"{LIBRARY}: ")
        return f"the native scan kernel does not load: {reason}", f"build it again with {BUILD}"
    if sources != digest():
        return (
            "the native scan kernel is not built from these sources",
            f"build it again with {BUILD}",
        )
    return _Opened(library, openmp, tuple(isas))


class _SymbolInfo(ctypes.Structure):
    """Dl_info of dladdr(3)."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    )


def _share_openmp() -> str | None:
    """Make PyTorch's OpenMP runtime visible to the kernel; return its file name, None without one.

    Usually it is visible already, because ``import torch`` opens its dependencies globally (and a
    preloaded runtime always is). Otherwise it is the one that libtorch_cpu is linked to, and where
    PyTorch has none, the system's.
    """
    process = ctypes.CDLL(None)
    if not hasattr(process, "GOMP_parallel"):
        try:
            linked = ctypes.CDLL("libtorch_cpu.so", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
            ctypes.CDLL(_file_of(linked.GOMP_parallel), mode=os.RTLD_GLOBAL)
        except (OSError, AttributeError):
            try:
                ctypes.CDLL("libgomp.so.1", mode=os.RTLD_GLOBAL)
            except OSError:
                return None
    return Path(_file_of(process.GOMP_parallel)).name


def _file_of(function: Any) -> str:
    """Return the path of the library that a C function is in."""
    info = _SymbolInfo()
    ctypes.CDLL(None).dladdr(ctypes.cast(function, ctypes.c_void_p), ctypes.byref(info))
    return os.fsdecode(info.file)
