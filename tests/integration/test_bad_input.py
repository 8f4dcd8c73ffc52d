"""Bad input ends in exit code 2, one ``error:`` line that names it, and nothing half-written."""

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from server.run_directory import RunDirectory
from simulation import experiment
from simulation.run import command
from simulation.scenario import parse_scenario
from strategies import cli

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]

TINY = """
[federation]
num-sites = 2
partition = "iid"
min-examples = 1

[run]
dataset = "own"
num-server-rounds = 1

[run.model]
depths = "1,1"
dims = "8,16"
image-size = 16
num-classes = 2
in-channels = 1

[run.training]
local-steps = 1
batch-size = 4

[run.strategy]
min-sites = 1
"""


class Killed(BaseException):
    """Stands for the process being killed."""


@dataclass(frozen=True)
class Result:
    """How one command line ended."""

    code: int
    lines: list[str]

    @property
    def error(self) -> str:
        """The text of its only error line."""
        errors = [line for line in self.lines if line.startswith("error: ")]
        assert len(errors) == 1, self.lines
        return errors[0]

    @property
    def hint(self) -> str:
        hints = [line for line in self.lines if line.startswith("hint: ")]
        assert len(hints) == 1, self.lines
        return hints[0]


@pytest.fixture
def run(capsys, caplog):
    """Run a command line in this process, exit code and standard error included."""
    caplog.set_level(logging.INFO)  # as the command line sets it where nothing else did
    handlers = list(logging.getLogger().handlers)
    filters = {handler: list(handler.filters) for handler in handlers}

    def _run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as exit_:
            cli.run(command, [str(argument) for argument in arguments])
        assert isinstance(exit_.value.code, int)
        return Result(exit_.value.code, capsys.readouterr().err.splitlines())

    yield _run
    for handler in handlers:
        handler.filters = filters[handler]


@pytest.fixture
def refused(run, tmp_path):
    """Run a command line that must be refused, into an output that must not come to be."""

    def _refused(*arguments: object, output: Path = tmp_path / "out") -> Result:
        result = run(*arguments, "--output", output)
        assert result.code == 2, result.lines
        assert not output.exists()
        assert not [line for line in result.lines if "Traceback" in line]
        assert {line.split(":")[0] for line in result.lines} <= {"error", "hint"}
        return result

    return _refused


def layout(num_images: int = 8, shape: Sequence[int] = (16, 16), **changes) -> dict:
    """Make the six arrays of MedMNIST's layout, two classes in turn."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        images = generator.integers(0, 256, (num_images, *shape), dtype=np.uint8)
        arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = np.arange(num_images).reshape(-1, 1) % 2
    return {**arrays, **changes}


@pytest.fixture
def own(tmp_path):
    """Write an npz file and a scenario that uses it; returns both."""

    def _own(arrays: dict | None = None) -> tuple[Path, Path]:
        file = tmp_path / "own.npz"
        np.savez(file, **(layout() if arrays is None else arrays))
        scenario = tmp_path / "own.toml"
        data = f'[data]\ndataset = "npz"\nfile = "{file}"\nclasses = ["no", "yes"]\n'
        scenario.write_text(data + TINY)
        return file, scenario

    return _own


def test_good_input_runs_through_the_same_command(run, own, tmp_path):
    result = run("--scenario", own()[1], "--output", tmp_path / "out")
    assert result.code == 0, result.lines
    assert (tmp_path / "out" / "report.html").exists()
    assert (tmp_path / "out" / "log.txt").read_text().count("round=1/1") == 1


# --- words


def test_an_unknown_scenario(refused):
    result = refused("--scenario", "quik")
    assert result.error == "error: scenario=quik is not known"
    assert result.hint == "hint: did you mean quick?"


@pytest.mark.parametrize(
    ("assignment", "error", "hint"),
    [
        ("modle.size=nano", "unknown key modle.size=nano", "did you mean model.size?"),
        ("federation.sites=3", "unknown key federation.sites=3", "federation."),
        ("model.size.x=1", "unknown key model.size.x=1", "model.size"),
    ],
)
def test_an_unknown_key(refused, assignment, error, hint):
    result = refused("--set", assignment)
    assert result.error == f"error: {error}"
    assert hint in result.hint


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--set", "seed"], "--set seed: expected key=value"),
        (["--set", "model.size=huge"], "model.size=huge: Input should be"),
        (["--seed", "-1"], "seed=-1: "),
        (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["--sed", "1"], "--sed"),
        (["--set", "federation.num-sites=0"], "federation.num-sites=0: "),
    ],
)
def test_a_value_that_cannot_be(refused, arguments, error):
    assert error in refused(*arguments).error


def test_images_too_small_for_the_network(refused):
    result = refused("--set", "model.image-size=16", "--set", "model.patch-size=4")
    assert "image-size=16 with patch-size=4 leaves no pixel after 4 stages" in result.error
    assert "expected at least 32" in result.error


# --- data


def test_a_file_that_is_cut_off(refused, own):
    file, scenario = own()
    content = file.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        result = refused("--scenario", scenario)
        assert "own.npz" in result.error
        assert "truncated" in result.error


def test_a_file_whose_bytes_changed(refused, own):
    file, scenario = own()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(bytes(content))
    assert "own.npz cannot be read: " in refused("--scenario", scenario).error


def test_an_official_file_that_was_altered(refused, tmp_path):
    np.savez(tmp_path / "breastmnist.npz", **layout(shape=(28, 28)))
    result = refused(
        *("--set", "data.dataset=breastmnist", "--set", "dataset=breastmnist"),
        *("--set", "federation.partition=iid", "--set", "model.num-classes=2"),
        *("--data-dir", tmp_path),
        *("--scenario", _bare_scenario(tmp_path)),
    )
    assert "breastmnist.npz" in result.error
    assert "md5" in result.error.lower()


def _bare_scenario(tmp_path: Path) -> Path:
    path = tmp_path / "bare.toml"
    path.write_text('description = "everything by --set"\n')
    return path


def test_a_file_that_is_not_there(refused, own):
    file, scenario = own()
    file.unlink()
    assert "own.npz expected an existing npz file" in refused("--scenario", scenario).error


def test_a_data_folder_that_is_not_there(refused, tmp_path):
    result = refused("--data-dir", tmp_path / "nowhere")
    assert f"--data-dir {tmp_path / 'nowhere'} is not a folder" in result.error


def test_labels_outside_the_declared_classes(refused, own):
    _, scenario = own(layout(val_labels=np.array([0, 1, 0, 1, 0, 1, 5, 5])))
    result = refused("--scenario", scenario)
    assert "label=5 in 2 examples expected 0..1 for the 2 declared classes" in result.error


def test_a_model_that_cannot_be_built(refused):
    error = refused("--set", "model.depths=1,1,1,1", "--set", "model.dims=16,20,64,128").error
    assert "dims" in error


def test_a_table_is_not_a_number(refused):
    assert refused("--set", "model=3", "--set", "model.size=nano").error == (
        "error: unknown key model=3"
    )


def test_another_number_of_classes_than_the_models(refused, own):
    _, scenario = own()
    result = refused("--scenario", scenario, "--set", "model.num-classes=3")
    assert "model.num-classes=3: dataset=npz has 2 classes" in result.error
    assert result.hint == "hint: --set model.num-classes=2"


def test_more_sites_than_examples(refused, own):
    _, scenario = own()
    result = refused("--scenario", scenario, "--set", "federation.num-sites=25")
    assert "federation.num-sites=25: more sites than patients (24)" in result.error


def test_fewer_examples_than_a_site_must_have(refused, own):
    _, scenario = own()
    result = refused("--scenario", scenario, "--set", "federation.min-examples=5")
    assert "federation.min-examples=5: " in result.error


def test_colour_images_for_a_grey_model(refused, own):
    """Said before a run directory is made, not by every site in turn."""
    _, scenario = own(layout(shape=(16, 16, 3)))
    assert "images are RGB" in refused("--scenario", scenario).error


def test_images_too_large_to_pad(refused, own):
    _, scenario = own(layout(shape=(20, 20)))
    result = refused("--scenario", scenario, "--set", "model.small-images=pad")
    assert "expected at least 20 to pad 20x20 images" in result.error


# --- directories


def test_an_output_that_exists_is_left_alone(run, tmp_path):
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    file.write_text("mine")
    for path in (folder, file):
        result = run("--output", path)
        assert result.code == 2
        assert result.error == (
            f"error: output={path} exists; a run never writes into an existing directory"
        )
    assert [path.name for path in folder.iterdir()] == ["mine.txt"]
    assert file.read_text() == "mine"


def test_an_output_that_cannot_be_made(refused, own, tmp_path):
    (tmp_path / "file").write_text("mine")
    result = refused("--scenario", own()[1], output=tmp_path / "file" / "out")
    assert "file is not a folder to write in" in result.error


# --- resuming


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


# --- the real process


def test_the_program_itself_ends_with_code_2_and_no_traceback(tmp_path):
    """From another folder, as a researcher may start it."""
    ended = subprocess.run(
        [sys.executable, ROOT / "simulation" / "run.py", "--scenario", "quik", "--output", "out"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.splitlines() == [
        "error: scenario=quik is not known",
        "hint: did you mean quick?",
    ]
    assert list(tmp_path.iterdir()) == []
