"""The kernel under tools that watch memory: nothing out of bounds, nothing undefined, nothing used
before it is written.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from fakes import scan_drivers
from fakes.scan_cases import SCANS, SS2D_SCANS, check_scan, check_ss2d
from fakes.scan_drivers import DrivenKernel, compile_driver
from medmamba.scan.native import build, library

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]

SETS = build.INSTRUCTION_SETS.get(platform.machine(), {})
# The sanitizer for every instruction set. Uninitialised memory, which only valgrind sees and more
# slowly, for the one that every processor has: the sources are the same, and it lacks AVX-512.
RUNS = [*(("sanitizer", isa) for isa in SETS), *(("valgrind", isa) for isa in list(SETS)[-1:])]
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")
VALGRIND = ["valgrind", "--quiet", "--error-exitcode=97"]


def sets_of_this_processor(folder: Path) -> list[str]:
    compiled = folder / "select.so"
    select = build.FOLDER / "select.c"
    subprocess.run(["gcc", "-shared", "-fPIC", str(select), "-o", str(compiled)], check=True)
    names = ctypes.CDLL(str(compiled)).medmamba_scan_isas
    names.restype = ctypes.c_char_p
    return names().decode().split()


@pytest.fixture(scope="module", params=RUNS, ids="-".join)
def kernel(request, tmp_path_factory):
    tool, isa = request.param
    folder = tmp_path_factory.mktemp(f"{tool}-{isa}")
    if isa not in sets_of_this_processor(folder):
        pytest.skip(f"this processor has no {isa}")
    if tool == "valgrind" and not shutil.which(tool):
        pytest.skip("valgrind is not installed")
    flags = SANITIZE if tool == "sanitizer" else ("-g",)
    driver = str(compile_driver(folder, "gcc", isa, SETS[isa], *flags))
    command = [driver] if tool == "sanitizer" else [*VALGRIND, driver]
    # Idle threads sleep: under these tools they would take the time of those that work.
    return DrivenKernel(command, folder, {"OMP_WAIT_POLICY": "passive"})


@pytest.fixture(autouse=True)
def _watched(kernel, monkeypatch):
    monkeypatch.setattr(library, "load", lambda: kernel)


@pytest.mark.parametrize("case", SCANS, ids=str)
def test_nothing_is_reported_of_the_scan(case):
    check_scan(case)


@pytest.mark.parametrize("case", SS2D_SCANS, ids=str)
def test_nothing_is_reported_of_the_scan_of_an_image(case):
    check_ss2d(case)


@pytest.mark.parametrize("array", ["u", "B", "y", "boundaries", "last_state"])
def test_one_float_too_few_is_reported(array, monkeypatch):
    sizes = scan_drivers.scan_sizes

    def too_few(arguments, kernel):
        right = sizes(arguments, kernel)
        return right | {array: right[array] - 1}

    monkeypatch.setattr(scan_drivers, "scan_sizes", too_few)
    with pytest.raises(AssertionError, match=r"AddressSanitizer|Invalid (read|write) of size"):
        check_scan(SCANS[3])
