"""What ``flwr run`` carries to every hospital: the four packages' code, and nothing of a site."""

from __future__ import annotations

import io
import os
import re
import shutil
import zipfile

import pytest

from server import flower_runtime
from server.flower_runtime import build_fab
from strategies.errors import ConfigError

ALLOWED = re.compile(
    r"pyproject\.toml|\.info/CONTENT|(client|medmamba|server|strategies)/([a-z_]+/)*\w+\.py"
    r"|client/data/[a-z_]+\.toml"
)
FOREIGN = re.compile(r"(^|/)(tests?|simulation|benchmarks|sites|state|runs)/|(^|/)test_")


def names(fab: bytes) -> list[str]:
    with zipfile.ZipFile(io.BytesIO(fab)) as archive:
        assert archive.testzip() is None
        return archive.namelist()


@pytest.fixture
def checkout(repository, tmp_path, monkeypatch):
    """A copy of what matters of the checkout, which the bundle is then built from."""
    root = tmp_path / "checkout"
    for package in ("client", "medmamba", "server", "simulation", "strategies"):
        shutil.copytree(
            repository / package,
            root / package,
            ignore=shutil.ignore_patterns("__pycache__", "state"),
        )
    for file in ("pyproject.toml", ".gitignore"):
        shutil.copy(repository / file, root / file)
    monkeypatch.setattr(flower_runtime, "__file__", str(root / "server" / "flower_runtime.py"))
    return root


def test_the_bundle_holds_the_code_of_the_four_packages_and_nothing_else(repository):
    packed = names(build_fab())
    assert [name for name in packed if not ALLOWED.fullmatch(name)] == []
    assert [name for name in packed if FOREIGN.search(name)] == []
    code = {
        path.relative_to(repository).as_posix()
        for package in ("client", "medmamba", "server", "strategies")
        for path in (repository / package).rglob("*.py")
    }
    assert {name for name in packed if name.endswith(".py")} == code
    assert len(packed) == len(set(packed))


def test_what_is_packed_is_what_is_here(repository):
    with zipfile.ZipFile(io.BytesIO(build_fab())) as archive:
        for name in archive.namelist():
            if name.endswith(".py"):
                assert archive.read(name) == (repository / name).read_bytes()


def test_nothing_of_a_site_travels(checkout):
    clean = build_fab()
    secrets = {
        "client/sites/A.toml": 'site = "A"',
        "client/sites/state/A/signing.key": "PRIVATE",
        "client/sites/state/A/A.pub": "PUBLIC",
        "client/sites/state/A/audit.jsonl": "{}",
        "client/state/ledger.json": "{}",
        "client/data/images.npz": "PK",
        "client/data/patients.csv": "name",
        "client/data/scan.dcm": "DICM",
        "state/server/superlink.secret": "secret",
        "runs/first/config.json": "{}",
        "tests/unit/test_x.py": "",
        "site.toml": "",
        "server/notes.md": "",
    }
    for name, content in secrets.items():
        path = checkout / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    fab = build_fab()
    assert set(names(fab)) & set(secrets) == set()
    assert fab == clean


def test_equal_code_gives_equal_bytes(checkout):
    first = build_fab()
    assert build_fab() == first
    for path in checkout.rglob("*"):
        os.utime(path, (1, 1))
        path.chmod(0o755)
    assert build_fab() == first


def test_other_code_gives_another_bundle(checkout):
    first = build_fab()
    with (checkout / "client" / "policy.py").open("a") as file:
        file.write("# changed\n")
    assert build_fab() != first


def test_an_installation_without_a_checkout_is_told_what_to_do(checkout):
    (checkout / "pyproject.toml").unlink()
    with pytest.raises(ConfigError, match=r"needs the project's pyproject\.toml") as caught:
        build_fab()
    assert caught.value.hint == "install with `pip install -e .` in the checkout"
