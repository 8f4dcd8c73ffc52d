"""What is installed: a wheel with the kernel, a wheel without, and a checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from hatchling.build import build_sdist

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(300)]

KERNEL = "medmamba/scan/native/_scan.so"
MACHINE = os.uname().machine

FORWARD = """
import torch
import medmamba
from medmamba import MedMamba, MedMambaConfig
from medmamba.scan import active_backend, selective_scan

torch.manual_seed(0)
b, d, l, n = 2, 12, 40, 16
tensors = [torch.randn(b, d, l), torch.rand(b, d, l), -torch.rand(d, n)]
tensors += [torch.randn(b, n, l), torch.randn(b, n, l)]
y = selective_scan(*tensors, backend=BACKEND)
torch.testing.assert_close(y, selective_scan(*tensors, backend="reference"))
for _ in range(2):
    logits = MedMamba(MedMambaConfig.from_name("nano", num_classes=3))(torch.randn(2, 3, 64, 64))
assert logits.shape == (2, 3) and logits.isfinite().all()
print(active_backend(), medmamba.__file__)
"""
FORCED = """
from medmamba import ModelError
from medmamba.scan import active_backend
try:
    active_backend(backend="native")
except ModelError as error:
    print(error, error.hint, sep="\\n")
"""


@pytest.fixture(scope="module")
def no_compiler(tmp_path_factory) -> dict[str, str]:
    """The environment of a machine that has no compiler."""
    kept = {name: value for name, value in os.environ.items() if name not in ("CC", "PATH")}
    return {**kept, "PATH": str(tmp_path_factory.mktemp("empty"))}


def run(command: list[str], cwd: Path, env: dict[str, str] | None = None):
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def pip(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> None:
    """Run pip offline: hatchling is part of the tests' environment."""
    options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
    run([sys.executable, "-m", "pip", *arguments, *options], cwd, env)


@pytest.fixture(scope="module")
def checkout(repository: Path, tmp_path_factory) -> Path:
    """This project's files as a clone has them: nothing that git ignores."""
    root = tmp_path_factory.mktemp("checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, run(command, repository).stdout.split("\0")):
        if (repository / name).exists():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes((repository / name).read_bytes())
    return root


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment with this one's libraries, and without this project; its Python."""
    root = tmp_path / "environment"
    run([sys.executable, "-m", "venv", "--without-pip", str(root)], tmp_path)
    (packages,) = root.glob("lib/python*/site-packages")
    # As a line of a .pth file, so that the .pth file of the editable installation there is unread.
    (packages / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    return root / "bin" / "python"


def install(python: Path, wheel: Path) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", str(wheel)]
    run([*command, "--no-deps", "--no-index", "--disable-pip-version-check"], wheel.parent)


def test_a_wheel_carries_the_kernel_to_a_machine_without_a_compiler(
    checkout, environment, no_compiler, tmp_path, monkeypatch
):
    # From the source archive, which therefore holds all that a wheel needs.
    monkeypatch.chdir(checkout)
    archive = checkout / build_sdist(str(tmp_path))
    pip("wheel", str(tmp_path / archive.name), "--wheel-dir", str(tmp_path), cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith(f"-py3-none-linux_{MACHINE}.whl")
    with zipfile.ZipFile(wheel) as content:
        names = content.namelist()
    assert names.count(KERNEL) == 1
    top = {"client", "medmamba", "server", "simulation", "strategies"}
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == top
    endings = {Path(name).suffix for name in names if ".dist-info/" not in name}
    assert endings <= {".py", ".toml", ".html", ".so", ".c", ".h"}
    assert [name for name in names if "/." in name] == []

    install(environment, wheel)
    script = FORWARD.replace("BACKEND", "'native'", 1)
    done = run([str(environment), "-W", "error", "-c", script], tmp_path, no_compiler)
    backend, path = done.stdout.split()
    assert backend == "native"
    assert Path(path).is_relative_to(environment.parent.parent)


def test_without_a_compiler_the_installation_works_and_says_what_it_lacks(
    checkout, environment, no_compiler, tmp_path
):
    pip("wheel", ".", "--wheel-dir", str(tmp_path), cwd=checkout, env=no_compiler)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as content:
        assert KERNEL not in content.namelist()

    install(environment, wheel)
    script = FORWARD.replace("BACKEND", "None", 1)
    done = run([str(environment), "-W", "error", "-c", script], tmp_path, no_compiler)
    assert done.stdout.startswith("reference ")
    assert done.stderr.count("\n") == 1  # said once
    assert "scan_backend=reference" in done.stderr
    assert "the native scan kernel is not built" in done.stderr

    done = run([str(environment), "-c", FORCED], tmp_path, no_compiler)
    assert done.stdout.splitlines() == [
        "backend=native cannot run here: the native scan kernel is not built",
        "install a C compiler (gcc), then run python -m medmamba.scan.native.build",
    ]

    # And that is how to get it.
    run([str(environment), "-W", "error", "-m", "medmamba.scan.native.build"], tmp_path)
    done = run([str(environment), "-c", script], tmp_path, no_compiler)
    assert done.stdout.startswith("native ")


def test_an_editable_installation_has_the_kernel_beside_its_sources(
    checkout, environment, no_compiler, tmp_path
):
    pip("--python", str(environment), "install", "--editable", ".", cwd=checkout)
    assert (checkout / KERNEL).exists()
    assert [path.name for path in (checkout / KERNEL).parent.glob(".build-*")] == []
    script = FORWARD.replace("BACKEND", "'native'", 1)
    done = run([str(environment), "-W", "error", "-c", script], tmp_path, no_compiler)
    assert done.stdout.split() == ["native", str(checkout / "medmamba" / "__init__.py")]

    # Another source, and the kernel is known to be an old one.
    source = checkout / "medmamba" / "scan" / "native" / "select.c"
    source.write_text(source.read_text() + "// changed\n")
    done = run([str(environment), "-c", FORCED], tmp_path, no_compiler)
    assert done.stdout.splitlines() == [
        "backend=native cannot run here: the native scan kernel is not built from these sources",
        "build it again with python -m medmamba.scan.native.build",
    ]
