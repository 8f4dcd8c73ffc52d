"""Bad input ends in exit code 2, one ``error:`` line that names it, and nothing half-written."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fakes.command_lines import Result, layout

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]


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
