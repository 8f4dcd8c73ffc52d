"""Loading the compiled kernel: which part of it, on which threads, and what is said without it."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys

import pytest

from medmamba.config import ModelError
from medmamba.scan.native import build, library, structs


@pytest.fixture(autouse=True)
def _fresh():
    """Nothing that another test has loaded, and nothing for the next."""
    for cached in (library._open, library._load):
        cached.cache_clear()
    yield
    for cached in (library._open, library._load):
        cached.cache_clear()


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The place of a library that a test puts there, or not."""
    path = tmp_path / "_scan.so"
    monkeypatch.setattr(library, "LIBRARY", path)
    return path


def loads() -> None:
    missing = library.unavailable()
    if missing:
        pytest.skip(missing[0])  # not a listed reason: where all tests run, the kernel is there


def fields(name: str) -> list[tuple[str, type]]:
    """The fields of a struct of kernel.h, as ctypes spells them."""
    source = re.sub(r"//.*", "", (build.FOLDER / "kernel.h").read_text())
    body = re.search(rf"typedef struct \{{([^}}]*)\}} {name};", source)
    assert body is not None
    found = []
    for declaration in filter(None, map(str.strip, body.group(1).split(";"))):
        match = re.fullmatch(r"(?:const )?(float|int32_t|int64_t) (.*)", declaration, re.DOTALL)
        assert match is not None, declaration
        for item in match.group(2).split(","):
            pointer = item.strip().startswith("*")
            assert pointer or match.group(1) == "int64_t", declaration
            kind = ctypes.c_void_p if pointer else ctypes.c_int64
            found.append((item.strip().removeprefix("*"), kind))
    return found


def test_the_structs_are_those_of_the_header():
    assert list(structs.ScanArguments._fields_) == fields("Scan")
    assert list(structs.Ss2dArguments._fields_) == fields("Ss2d")


def test_the_best_instruction_set_is_taken(monkeypatch):
    loads()
    monkeypatch.delenv("MEDMAMBA_SCAN_ISA", raising=False)
    kernel = library.load()
    monkeypatch.setenv("MEDMAMBA_SCAN_ISA", "")
    assert library.load() == kernel
    monkeypatch.setenv("MEDMAMBA_SCAN_ISA", "mmx")
    with pytest.raises(ModelError) as caught:
        library.load()
    message = "MEDMAMBA_SCAN_ISA=mmx expected one that this processor has: "
    assert str(caught.value).startswith(message)
    assert caught.value.hint == "unset MEDMAMBA_SCAN_ISA to take the best"

    names = str(caught.value).removeprefix(message).split(", ")
    assert names[0] == kernel.isa
    assert set(names) <= set(build.INSTRUCTION_SETS[os.uname().machine])
    widths = []
    for name in names:
        monkeypatch.setenv("MEDMAMBA_SCAN_ISA", name)
        assert library.load().isa == name
        widths.append(library.load().width)
    assert widths == sorted(widths, reverse=True)


def test_a_missing_library(elsewhere):
    missing = (
        "the native scan kernel is not built",
        "install a C compiler (gcc), then run python -m medmamba.scan.native.build",
    )
    assert library.unavailable() == missing
    with pytest.raises(ModelError, match=missing[0]) as caught:
        library.load()
    assert caught.value.hint == missing[1]


@pytest.mark.parametrize("content", [b"", b"not a library", b"\x7fELF" + bytes(60)])
def test_a_broken_library(elsewhere, content):
    elsewhere.write_bytes(content)
    missing = library.unavailable()
    assert missing is not None
    assert missing[0].startswith("the native scan kernel does not load: ")
    assert str(elsewhere) not in missing[0]
    assert missing[1] == "build it again with python -m medmamba.scan.native.build"


def test_a_library_of_other_sources(monkeypatch):
    loads()
    library._open.cache_clear()
    monkeypatch.setattr(build, "digest", lambda: "0" * 64)
    assert library.unavailable() == (
        "the native scan kernel is not built from these sources",
        "build it again with python -m medmamba.scan.native.build",
    )


def test_another_system(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert library.unavailable() == (
        "the native scan kernel runs on Linux only",
        "use Linux on x86_64 or aarch64",
    )


def test_no_openmp_runtime(monkeypatch):
    loads()
    library._open.cache_clear()
    monkeypatch.setattr(library, "_share_openmp", lambda: None)
    assert library.unavailable() == (
        "the native scan kernel finds no OpenMP runtime",
        "install libgomp (apt: libgomp1)",
    )


POOLS = """
import ctypes, os, re
from pathlib import Path
global_scope = ctypes.RTLD_GLOBAL
ctypes.RTLD_GLOBAL = {scope}
import torch
ctypes.RTLD_GLOBAL = global_scope
from medmamba.scan.native import library, structs

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(3)
torch.ones(2_000_000).exp_()
before = threads()
kernel = library.load()
x, y, A = torch.ones(8, 4, 16), torch.ones(8, 4, 16), -torch.ones(4, 1)
shared, state = torch.ones(8, 1, 1, 16), torch.ones(8, 4, 1)
sizes = dict(b=8, d=4, l=16, g=1, n=1, parts=1, threads=3)
arguments = structs.ScanArguments(
    u=x, delta=x, A=A, B=shared, C=shared, y=y, last_state=state, **sizes
)
assert kernel.scan_forward(ctypes.byref(arguments)) == 0
runtimes = set(re.findall(r"\\S*/lib(?:gomp|iomp5|omp)\\S*", Path("/proc/self/maps").read_text()))
print(threads() - before, len(runtimes), runtimes.pop().endswith("/" + kernel.openmp))
"""


@pytest.mark.parametrize("scope", ["ctypes.RTLD_GLOBAL", "ctypes.RTLD_LOCAL"])
def test_threads_are_those_of_pytorch(scope):
    # Whether PyTorch opened its OpenMP runtime for everyone, or for itself.
    loads()
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", POOLS.format(scope=scope)],
        env={**os.environ, "OMP_NUM_THREADS": "3"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.stderr) == ("0 1 True\n", "")
