"""The kernel for arm64: cross-compiled, run by an emulator, compared with float64."""

from __future__ import annotations

import shutil

import pytest

from fakes.scan_cases import SCANS, SS2D_SCANS, check_scan, check_ss2d
from fakes.scan_drivers import DrivenKernel, compile_driver
from medmamba.scan.native import build, library

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    for program in (COMPILER, EMULATOR):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    assert build.target_machine([COMPILER]) == "aarch64"
    folder = tmp_path_factory.mktemp("arm64")
    ((isa, flags),) = build.INSTRUCTION_SETS["aarch64"].items()
    program = compile_driver(folder, COMPILER, isa, flags, "-static")
    return DrivenKernel([EMULATOR, str(program)], folder, {})


@pytest.fixture(autouse=True)
def _emulated(kernel, monkeypatch):
    monkeypatch.setattr(library, "load", lambda: kernel)


@pytest.mark.parametrize("case", SCANS, ids=str)
def test_the_scan_is_right(case, kernel):
    before = kernel.calls
    check_scan(case)
    assert kernel.calls == before + 2  # forward and backward ran there


@pytest.mark.parametrize("case", SS2D_SCANS, ids=str)
def test_the_scan_of_an_image_is_right(case, kernel):
    before = kernel.calls
    check_ss2d(case)
    assert kernel.calls == before + 2


def test_a_wheel_for_arm64_can_be_made_here(kernel, tmp_path):
    made = tmp_path / "_scan.so"
    assert build.build(made, [COMPILER]) == "aarch64"
    content = made.read_bytes()
    assert content[:4] == b"\x7fELF"
    assert int.from_bytes(content[18:20], "little") == 183  # EM_AARCH64
    assert build.digest().encode() in content
