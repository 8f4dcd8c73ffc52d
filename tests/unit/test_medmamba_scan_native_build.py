"""Compiling the kernel: the compiler, the target, and what happens without either."""

from __future__ import annotations

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from medmamba.scan.native import build

EXPORT = '__attribute__((visibility("default")))'


@pytest.fixture
def sources(tmp_path, monkeypatch) -> Path:
    """Sources that compile at once, in place of the kernel's."""
    if not any(map(shutil.which, ("cc", "gcc", "clang"))):
        pytest.skip("there is no C compiler")
    folder = tmp_path / "sources"
    folder.mkdir()
    (folder / "kernel.h").write_text("#define JOIN(a, b) a##b\n#define NAME(b) JOIN(answer_, b)\n")
    (folder / "kernel.c").write_text(
        f'#include "kernel.h"\n{EXPORT} int NAME(ISA)(void) {{ return 42; }}\n'
    )
    (folder / "select.c").write_text(f"{EXPORT} int choose(void) {{ return 1; }}\n")
    monkeypatch.setattr(build, "FOLDER", folder)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("MEDMAMBA_NATIVE", raising=False)
    return folder


@pytest.fixture
def no_compiler(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)


def compiler_for(target: str, folder: Path) -> list[str]:
    """A compiler that says what it compiles for, and cannot."""
    script = folder / "cc"
    script.write_text(f'#!/bin/sh\n[ "$1" = -dumpmachine ] && echo {target} && exit\nexit 3\n')
    script.chmod(0o755)
    return [str(script)]


def test_one_library_has_every_instruction_set_and_its_sources_digest(sources, tmp_path):
    made = tmp_path / "made.so"
    machine = build.build(made, build.find_compiler())
    assert machine == os.uname().machine
    opened = ctypes.CDLL(str(made))
    assert [opened[f"answer_{isa}"]() for isa in build.INSTRUCTION_SETS[machine]] == [
        42 for _ in build.INSTRUCTION_SETS[machine]
    ]
    assert opened.choose() == 1
    stamp = (ctypes.c_char * 65).in_dll(opened, "medmamba_scan_sources").value.decode()
    assert stamp == build.digest()
    assert [path.name for path in tmp_path.glob(".build-*")] == []


def test_the_digest_follows_sources_names_and_flags(sources, monkeypatch):
    seen = {build.digest()}
    (sources / "kernel.h").write_text("#define NAME(b) other\n")
    seen.add(build.digest())
    (sources / "kernel.h").rename(sources / "other.h")
    seen.add(build.digest())
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    seen.add(build.digest())
    assert len(seen) == 4
    (sources / "notes.txt").write_text("not compiled")
    assert build.digest() in seen


def test_a_compilation_that_fails_says_why_and_leaves_the_library_as_it_was(sources, tmp_path):
    made = tmp_path / "made.so"
    made.write_bytes(b"before")
    (sources / "select.c").write_text("int choose(void) { return missing; }\n")
    with pytest.raises(build.BuildError, match=r"select\.c.* failed:\n(.|\n)*missing.* undeclared"):
        build.build(made, build.find_compiler())
    assert made.read_bytes() == b"before"
    assert [path.name for path in tmp_path.glob(".build-*")] == []


def test_a_compiler_from_the_environment(sources, monkeypatch):
    monkeypatch.setenv("CC", "gcc -m64 'a b'")
    assert build.find_compiler() == ["gcc", "-m64", "a b"]
    monkeypatch.setenv("CC", "no-such-compiler -x")
    with pytest.raises(build.BuildError, match="CC=no-such-compiler expected a C compiler"):
        build.find_compiler()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("riscv64-linux-gnu", "the kernel has no instruction set for riscv64"),
        ("arm64-apple-darwin23.1.0", "the kernel is built on Linux only for now"),
    ],
)
def test_a_target_that_the_kernel_does_not_know(target, message, tmp_path):
    with pytest.raises(build.NoKernelError, match=message):
        build.target_machine(compiler_for(target, tmp_path))


@pytest.mark.parametrize("target", ["x86_64-linux-gnu", "x86_64-pc-linux-musl"])
def test_targets_that_it_knows(target, tmp_path):
    assert build.target_machine(compiler_for(target, tmp_path)) == "x86_64"


def test_without_a_compiler_the_build_goes_on_and_says_so(no_compiler, tmp_path):
    said: list[str] = []
    assert build.build_if_possible(tmp_path / "made.so", said.append) is None
    (line,) = said
    assert line.startswith("no scan kernel: there is no C compiler (install gcc, or set CC)")
    assert not (tmp_path / "made.so").exists()


def test_the_kernel_can_be_required(no_compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMAMBA_NATIVE", "1")
    with pytest.raises(build.BuildError, match="there is no C compiler"):
        build.build_if_possible(tmp_path / "made.so", pytest.fail)


def test_the_kernel_can_be_left_out(sources, tmp_path, monkeypatch):
    monkeypatch.setenv("MEDMAMBA_NATIVE", "0")
    said: list[str] = []
    (tmp_path / "made.so").write_bytes(b"before")
    assert build.build_if_possible(tmp_path / "made.so", said.append) is None
    assert said == ["no scan kernel: MEDMAMBA_NATIVE=0"]
    assert not (tmp_path / "made.so").exists()
    monkeypatch.setenv("MEDMAMBA_NATIVE", "no")
    with pytest.raises(build.BuildError, match="MEDMAMBA_NATIVE=no expected 0"):
        build.build_if_possible(tmp_path / "made.so", pytest.fail)


def test_a_failing_compiler_is_an_error_also_where_none_would_do(tmp_path, monkeypatch):
    monkeypatch.setenv("CC", *compiler_for(f"{os.uname().machine}-linux-gnu", tmp_path))
    with pytest.raises(build.BuildError, match=r"failed:"):
        build.build_if_possible(tmp_path / "made.so", pytest.fail)


def test_the_command(sources, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "_scan.so")
    assert build.main() == 0
    sets = " ".join(build.INSTRUCTION_SETS[os.uname().machine])
    printed = capsys.readouterr().out
    assert printed.startswith(f"built _scan.so for {os.uname().machine} ({sets}): ")
    monkeypatch.setenv("PATH", "")
    assert shutil.which("cc") is None
    assert build.main() == 1
    assert capsys.readouterr().err.startswith("error: there is no C compiler")
