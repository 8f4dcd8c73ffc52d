"""The README's commands do what it says, run as they are written in a copy of the project."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

# Enough to see that a command works; what it then learns is measured elsewhere.
SHORT = " ".join(
    f"--set {setting}"
    for setting in (
        "num-server-rounds=1",
        "training.local-steps=1",
        "model.image-size=32",
        "model.depths=1,1",
        "model.dims=8,16",
    )
)
PORT = 8000  # the default, which the README relies on


def block(readme: str, after: str) -> str:
    """Return the first fenced block after a text."""
    fenced = re.search(r"```\w*\n(.*?)```", readme[readme.index(after) :], re.DOTALL)
    assert fenced is not None
    return fenced.group(1)


def commands(text: str) -> list[str]:
    """Return a shell block's command lines, without comments."""
    lines = (re.sub(r"\s+#.*", "", line).strip() for line in text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def frame(line: str) -> str:
    """Return a result line without what differs from run to run."""
    return " ".join(
        re.sub(
            r"\d\.\d{3}(±\d\.\d+)?|n/a|runs/\S+|round \d+ of \d+|●+ +\d+ of \d+ rounds", "#", line
        ).split()
    )


@pytest.fixture
def copy(repository: Path, tmp_path: Path) -> Path:
    """The tracked files of this checkout, as a clone has them."""
    names = subprocess.run(
        ["git", "ls-files", "-z"], cwd=repository, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, names):
        if (repository / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, tmp_path / name)
    return tmp_path


@pytest.fixture
def environment() -> dict[str, str]:
    """What `. .venv/bin/activate` does: this Python comes first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"}


@pytest.fixture
def shell(copy: Path, environment: dict[str, str]):
    """Run one command line in the copy; returns what it printed."""

    def _shell(line: str) -> str:
        done = subprocess.run(
            ["bash", "-euc", line],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    return _shell


@pytest.fixture
def readme(repository: Path) -> str:
    return (repository / "README.md").read_text(encoding="utf-8")


def test_the_first_two_commands_are_targets_of_the_makefile(readme, repository):
    makefile = (repository / "Makefile").read_text()
    lines = commands(block(readme, "Two commands"))
    assert lines == ["make demo", "make test"]
    for line in lines:
        assert f"\n{line.removeprefix('make ')}: " in makefile


def test_the_demo_ends_in_the_table_that_is_shown(readme, repository, shell):
    recipe = re.search(r"^demo:.*\n\t\$\(BIN\)/(.*)", (repository / "Makefile").read_text(), re.M)
    assert recipe is not None
    printed = shell(f"{recipe.group(1)} {SHORT}").splitlines()
    shown = block(readme, "<!-- demo -->").splitlines()
    assert [frame(line) for line in printed] == [frame(line) for line in shown]


def test_the_researchers_commands_work(readme, repository, copy, shell):
    files = repository.parent / "shared" / "data" / "medmnist"
    if not (files / "breastmnist.npz").exists():
        pytest.skip("official MedMNIST files are not on this disk")
    lines = commands(block(readme, "## The researcher"))
    assert lines[0] == ". .venv/bin/activate"
    assert len(lines) == 5
    for line in lines[1:]:
        if "--resume" in line:
            # A finished run is not resumed; without its last file it is one that was interrupted.
            (copy / "runs" / "breast" / "summary.json").unlink()
            printed = shell(line)
        else:
            printed = shell(f"{line.replace('--data-dir DATA', f'--data-dir {files}')} {SHORT}")
        assert printed.splitlines()[-1].startswith("report runs/")
        assert (copy / printed.splitlines()[-1].removeprefix("report ")).exists()


@pytest.fixture
def background(copy: Path, environment: dict[str, str]) -> Iterator:
    """Start one command line as in a terminal of its own; all are ended after the test."""
    processes: list[subprocess.Popen[bytes]] = []

    def _background(line: str) -> Path:
        log = copy / f"terminal-{len(processes)}.log"
        with log.open("wb") as output:
            processes.append(
                subprocess.Popen(
                    ["bash", "-euc", f"exec {line}"],
                    cwd=copy,
                    env=environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )
        return log

    yield _background
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def test_the_deployment_commands_train_three_hospitals(readme, copy, shell, background):
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", PORT))
        except OSError:
            pytest.skip(f"port {PORT}, which the README's commands use, is taken")
    printed: dict[str, str] = {}
    for line in commands(block(readme, "<!-- deployment -->")):
        if re.match(r"python -m (server superlink|client --site)", line):
            log = background(line)
            deadline = time.monotonic() + 120
            while not re.search("Uvicorn running|site=. connecting", log.read_text()):
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.1)
        else:
            printed[line.split()[3]] = shell(line)
    lines = printed["run"].splitlines()
    result = lines.index(next(line for line in lines if line.startswith("test ")))
    assert [line.split()[0] for line in lines[result + 1 : result + 5]] == ["pooled", "A", "B", "C"]
    assert [f"{site}  ●●  2 of 2 rounds" in lines for site in "ABC"] == [True] * 3
    status = printed["status"].splitlines()
    assert ": complete, round 2 of 2, " in status[3]
    assert [line.split()[:2] for line in status[-3:]] == [[site, "online"] for site in "ABC"]
    assert (copy / "runs" / "first" / "report.html").exists()
    config = (copy / "runs" / "first" / "config.json").read_text()
    assert '"simulated": false' in config
