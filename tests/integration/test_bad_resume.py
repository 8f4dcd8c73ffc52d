"""Only an unfinished run, whole and with its own data, goes on; anything else stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fakes.command_lines import Result, layout
from fakes.experiments import Killed
from medmamba.scan import active_backend
from server.run_directory import RunDirectory
from simulation import experiment
from simulation.scenario import parse_scenario

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory) -> Path:
    """A run of two rounds that was killed in the second. Tests copy it."""
    path = tmp_path_factory.mktemp("runs") / "interrupted"
    scenario = parse_scenario(
        {
            "data": {"dataset": "phantom", "patients-per-site": 6, "image-size": 16},
            "federation": {"num-sites": 2, "partition": "natural", "min-examples": 1},
            "run": {
                "num-server-rounds": 2,
                "model": {"depths": "1,1", "dims": "8,16", "image-size": 16, "in-channels": 1},
                "training": {"local-steps": 1, "batch-size": 4},
            },
        }
    )
    answered: list[str] = []

    def kill(site: str) -> None:
        answered.append(site)
        if len(answered) == 3:
            raise Killed

    data = experiment.prepare(scenario)
    with pytest.raises(Killed):
        experiment.execute(
            experiment.create(path, scenario, data, "0" * 32), scenario, data, on_reply=kill
        )
    return path


@pytest.fixture
def directory(interrupted, tmp_path) -> Path:
    return shutil.copytree(interrupted, tmp_path / "run")


@pytest.fixture
def not_resumed(run):
    """Resume a directory that must be refused and must stay as it is, up to its log."""

    def _not_resumed(path: Path, *arguments: object) -> Result:
        before = _content(path)
        result = run("--resume", path, *arguments)
        assert result.code == 2, result.lines
        assert not [line for line in result.lines if "Traceback" in line]
        assert _content(path) == before
        return result

    return _not_resumed


def _content(path: Path) -> dict[str, bytes]:
    """Return every result file of a run directory; the logs of an attempt may grow."""
    kept = ("config.json", "summary.json", "history.jsonl", "model.safetensors", "report.html")
    files = [path / name for name in kept] + sorted(path.glob("checkpoints/*"))
    return {file.name: file.read_bytes() for file in files if file.is_file()}


def test_an_interrupted_run_can_be_resumed(run, directory):
    result = run("--resume", directory)
    assert result.code == 0, result.lines
    assert (directory / "summary.json").exists()


def test_a_finished_run_without_its_report_gets_it(run, directory):
    assert run("--resume", directory).code == 0
    report = directory / "report.html"
    before = report.read_text()
    report.unlink()
    assert run("--resume", directory).code == 0
    assert report.read_text() == before


def test_a_finished_run_is_not_resumed(not_resumed, directory):
    RunDirectory(directory).write_summary({})
    (directory / "report.html").write_text("<html>")
    result = not_resumed(directory)
    assert result.error == f"error: resume={directory} is complete"


@pytest.mark.parametrize(
    "config",
    [
        None,
        "",
        "{",
        "[]",
        "{}",
        '{"scenario": {}}',
        '{"run_uuid": "x", "run_config": {}}',
        '{"run_uuid": "x", "run_config": {}, "scenario": 3}',
    ],
    ids=["none", "empty", "cut", "list", "no-keys", "no-run", "of-a-server", "other-kind"],
)
def test_a_foreign_directory_is_not_resumed(not_resumed, tmp_path, config):
    folder = tmp_path / "foreign"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    result = not_resumed(folder)
    assert "config.json" in result.error
    assert result.hint


def test_a_directory_that_is_not_there_is_not_resumed(not_resumed, tmp_path):
    assert "nowhere/config.json is not readable" in not_resumed(tmp_path / "nowhere").error


def test_resuming_takes_no_other_option(not_resumed, directory):
    for more in (["--seed", "1"], ["--scenario", "quick"], ["--set", "seed=1"]):
        result = not_resumed(directory, *more)
        assert (
            result.error
            == "error: --resume takes everything but --data-dir from the run's own config.json"
        )


def test_resuming_takes_the_folder_that_the_data_are_in_now(not_resumed, directory, tmp_path):
    error = not_resumed(directory, "--data-dir", tmp_path).error
    assert f"data-dir={tmp_path} has no effect with dataset=phantom" in error


def test_a_checkpoint_of_another_architecture_shows_both_shapes(not_resumed, directory):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["run_config"]["model"]["dims"] = "16,32"
    path.write_text(json.dumps(config))
    error = not_resumed(directory).error
    assert "the checkpoint is of another architecture: head.weight has shape=(3, 16)" in error
    assert "and shape=(3, 32) in this run's model" in error


def test_other_data_than_the_run_began_with(run, own, tmp_path):
    """Results of one data set must not go on under another."""
    file, scenario = own()
    assert run("--scenario", scenario, "--output", tmp_path / "out").code == 0
    (tmp_path / "out" / "summary.json").unlink()
    changed = layout()
    changed["train_labels"] = 1 - changed["train_labels"]
    np.savez(file, **changed)
    result = run("--resume", tmp_path / "out")
    assert (result.code, result.error) == (
        2,
        "error: dataset=npz: not the data that this run began with",
    )


def test_a_directory_that_another_process_is_at_work_in(not_resumed, directory):
    with RunDirectory(directory).session():
        assert not_resumed(directory).error.endswith("run is in use by another process")


def test_a_history_that_is_gone(not_resumed, directory):
    (directory / "history.jsonl").unlink()
    assert not_resumed(directory).error.endswith("history.jsonl is cut short or missing")


def test_checkpoints_that_are_gone(not_resumed, directory):
    shutil.rmtree(directory / "checkpoints")
    assert not_resumed(directory).error.endswith("checkpoints is missing")


def test_damaged_checkpoints_are_not_taken_for_a_new_run(not_resumed, directory):
    for path in (directory / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    assert not_resumed(directory).error == "error: no checkpoint is usable"


def test_a_run_that_goes_on_with_another_scan_says_so(run, directory):
    config = json.loads((directory / "config.json").read_text())
    config["provenance"]["scan_backend"] = "triton"
    (directory / "config.json").write_text(json.dumps(config))
    assert run("--resume", directory).code == 0
    log = (directory / "log.txt").read_text()
    assert f"scan_backend={active_backend()} but the run began with triton" in log
