"""F27: the process of a simulation dies in the middle of a run."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from fakes.experiments import history, model_bytes, start, untimed
from server.run_directory import RunDirectory
from simulation.scenario import read_scenario
from strategies.errors import CheckpointError
from strategies.run_config import parse_assignments

ROUNDS = 4
SETTINGS = (
    f"num-server-rounds={ROUNDS}",
    "data.patients-per-site=9",
    "data.image-size=32",
    "model.depths=1,1",
    "model.dims=8,16",
    "model.image-size=32",
    "training.local-steps=8",
    "seed=3",
)


@pytest.fixture
def simulate(repository, environment):
    """Start ``python simulation/run.py`` with these words."""

    def _simulate(*words: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, repository / "simulation" / "run.py", *map(str, words)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return _simulate


def killed_when(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Kill a run at the moment when something is true."""
    with process:
        while not condition():
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.001)
        process.kill()


@pytest.mark.timeout(300)
@pytest.mark.fault(
    "F27",
    fault="The process of a simulation dies",
    injection="SIGKILL to simulation/run.py in round 2, and to its --resume while it writes down "
    "round 3",
    promise="the run directory says that the run is not finished, and --resume ends in the same "
    "bytes as a run that was never interrupted",
)
def test_a_killed_simulation_is_unfinished_and_resumes_to_the_same_bytes(simulate, tmp_path):
    whole, path = tmp_path / "whole", tmp_path / "killed"
    log = path / "history.jsonl"
    start(whole, read_scenario("quick", parse_assignments(SETTINGS)))
    settings = (word for assignment in SETTINGS for word in ("--set", assignment))
    first = path / "checkpoints" / "round_000001.safetensors"
    killed_when(first.exists, simulate(*settings, "--output", path))
    unfinished(path)
    # While it writes down round 3, before the checkpoint that counts.
    killed_when(lambda: '"server_round": 3' in log.read_text(), simulate("--resume", path))
    unfinished(path)

    last = simulate("--resume", path)
    said, _ = last.communicate()
    assert last.returncode == 0, said
    assert (path / "report.html").exists()
    assert model_bytes(path) == model_bytes(whole)
    assert untimed(history(path)) == untimed(history(whole))
    assert (path / "log.txt").read_text().count("resumed after round=") == 2
    with pytest.raises(CheckpointError, match="is complete"):
        RunDirectory.open(path)


def unfinished(path: Path) -> None:
    """A run directory without its results: nothing in it can be taken for a finished run."""
    for name in ("summary.json", "report.html", "model.safetensors"):
        assert not (path / name).exists()
    assert max(entry["server_round"] for entry in history(path)) < ROUNDS
