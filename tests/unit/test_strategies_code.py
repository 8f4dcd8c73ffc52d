"""The code hash: of the installed sources and nothing else, wherever they lie."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib.metadata import version as package_version
from pathlib import Path

import pytest

from strategies import code
from strategies.code import PACKAGES, SITE_FILES, SUFFIXES, code_sha256, version

ROOT = Path(code.__file__).resolve().parent.parent
SKIPPED = shutil.ignore_patterns("__pycache__", "*.so", "*.safetensors")


@pytest.fixture
def installation(tmp_path) -> Path:
    """A copy of what is installed, somewhere else."""
    root = tmp_path / "elsewhere"
    for package in PACKAGES:
        shutil.copytree(ROOT / package, root / package, ignore=SKIPPED)
    return root


@pytest.fixture
def hash_of(monkeypatch):
    """Compute the hash as the copy's own strategies/code.py would."""

    def _hash(root: Path) -> str:
        monkeypatch.setattr(code, "__file__", str(root / "strategies" / "code.py"))
        return code_sha256.__wrapped__()

    return _hash


def test_it_is_64_hex_digits():
    assert re.fullmatch("[0-9a-f]{64}", code_sha256())


def test_a_copy_elsewhere_has_the_same(installation, hash_of):
    assert hash_of(installation) == hash_of(ROOT)


def test_another_process_at_another_place_has_the_same(installation, hash_of):
    """Run where the copy lies: no path, order of files or state of this process is in it."""
    program = "import strategies.code as c; print(c.__file__, c.code_sha256())"
    ended = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, '.'); {program}"],
        cwd=installation, capture_output=True, text=True, check=True,
    )  # fmt: skip
    file, found = ended.stdout.split()
    assert Path(file).resolve().parent.parent == installation.resolve()
    assert found == hash_of(installation)


@pytest.mark.parametrize(
    "name",
    [
        "client/policy.py",
        "client/data/transforms.py",
        "medmamba/scan/native/kernel.h",
        "server/rounds.py",
        "strategies/__init__.py",
        "strategies/code.py",
    ],
)
def test_a_byte_of_any_source_changes_it(installation, hash_of, name):
    before = hash_of(installation)
    path = installation / name
    content = path.read_bytes()
    path.write_bytes(content + b"\n")
    longer = hash_of(installation)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert len({before, longer, hash_of(installation)}) == 3
    path.write_bytes(content)
    assert hash_of(installation) == before


def test_every_kind_of_source_is_in_it(installation, hash_of):
    before = hash_of(installation)
    found = {before}
    for suffix in SUFFIXES:
        (installation / "client" / f"new{suffix}").write_text("")
        found.add(hash_of(installation))
    assert len(found) == 1 + len(SUFFIXES)


def test_a_source_that_is_gone_or_has_another_name_changes_it(installation, hash_of):
    before = hash_of(installation)
    path = installation / "client" / "loss.py"
    path.rename(path.with_name("lost.py"))
    renamed = hash_of(installation)
    path.with_name("lost.py").unlink()
    assert len({before, renamed, hash_of(installation)}) == 3


def test_two_sources_that_change_places_change_it(installation, hash_of):
    before = hash_of(installation)
    one, two = installation / "client" / "loss.py", installation / "client" / "policy.py"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    assert hash_of(installation) != before


def test_a_hospitals_own_files_are_not_in_it(installation, hash_of):
    before = hash_of(installation)
    sites = installation.joinpath(*SITE_FILES)
    sites.mkdir(exist_ok=True)
    (sites / "A.toml").write_text('site = "A"')
    (sites / "deeper").mkdir()
    (sites / "deeper" / "B.toml").write_text('site = "B"')
    assert hash_of(installation) == before
    shutil.rmtree(sites)
    assert hash_of(installation) == before


@pytest.mark.parametrize(
    "name",
    [
        "medmamba/scan/native/_kernel.so",
        "client/__pycache__/app.cpython-311.pyc",
        "client/notes.md",
        "simulation/grid.py",
        "tests/unit/test_x.py",
    ],
)
def test_what_is_built_or_takes_no_part_is_not_in_it(installation, hash_of, name):
    before = hash_of(installation)
    path = installation / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\x7fELF")
    assert hash_of(installation) == before


def test_the_version_is_the_installed_ones():
    assert version() == package_version("medmamba-federation")
