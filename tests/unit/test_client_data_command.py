"""``python -m client data``: what each command prints, and how it ends."""

import json
from pathlib import Path

import pytest

from client.__main__ import command
from client.data import archives
from client.data.catalogue import catalogue, entry
from fakes.miniatures import miniature, zipped
from strategies import cli
from strategies.errors import ConfigError

FILES = Path(__file__).resolve().parents[3] / "shared" / "data" / "medmnist"
needs_files = pytest.mark.skipif(
    not (FILES / "breastmnist.npz").exists(), reason="official MedMNIST files are not on this disk"
)


@pytest.fixture
def ended(capsys):
    """Run a command line; exit code, standard output, lines of standard error."""

    def _ended(*words):
        with pytest.raises(SystemExit) as exit_:
            cli.run(command, ["data", *(str(word) for word in words)])
        out, err = capsys.readouterr()
        return exit_.value.code, out, err.splitlines()

    return _ended


def test_list_has_a_line_for_every_set(ended):
    code, out, err = ended("list")
    head, *lines = out.splitlines()
    assert (code, err) == (0, [])
    assert head.split() == [
        *("name", "images", "classes", "access", "commercial", "use", "reader", "tested", "on"),
        "shows",
    ]
    assert [line.split()[0] for line in lines] == list(catalogue())
    by_name = {line.split()[0]: line for line in lines}
    assert "  real files  " in by_name["pad-ufes-20"]
    assert "  official-layout miniature  " in by_name["kvasir"]
    assert "  private  " in by_name["otoscopy2024"]
    assert "  with written permission  " in by_name["kvasir"]


def test_list_and_show_are_one_json_object_when_asked(ended):
    _, out, _ = ended("list", "--json")
    everything = json.loads(out)
    assert list(everything) == list(catalogue())
    _, out, _ = ended("show", "kvasir", "--json")
    assert json.loads(out) == everything["kvasir"]
    assert everything["kvasir"]["classes"]["polyps"] == 500
    assert everything["pathmnist"]["official-split"] == {"train": 89996, "val": 10004, "test": 7180}
    assert everything["kvasir"]["md5"] == "none known"


@pytest.mark.parametrize("name", catalogue())
def test_show_tells_all_that_is_known(name, ended):
    code, out, _ = ended("show", name)
    facts = entry(name)
    assert code == 0
    for known in (facts.title, facts.licence, facts.commercial, facts.url, facts.layout):
        assert known in out
    assert all(label in out for label in facts.classes)
    assert all(f"{label}: {count}" in out for label, count in facts.class_counts.items())
    assert all(f"{file}: {md5}" in out for file, md5 in facts.md5.items())
    assert (facts.how or f"python -m client data fetch {name}") in out


def test_the_multi_label_set_says_its_loss_and_that_training_is_refused(ended):
    _, out, _ = ended("show", "chestmnist")
    assert "binary cross-entropy of each finding" in out
    assert "AUC of each finding, averaged over the findings" in out
    assert "refused: several labels an image are not supported yet" in out


@pytest.mark.parametrize("name", ["otoscopy2024", "cervical-us"])
def test_a_private_set_is_asked_for_by_hand(name, ended, tmp_path):
    code, out, err = ended("fetch", name, "--data-dir", tmp_path)
    assert (code, out) == (2, "")
    assert err == [
        f"error: dataset={name} is private and cannot be fetched",
        f"hint: {entry(name).how}",
    ]


def test_fetch_says_where_the_file_is_and_what_may_be_done_with_it(ended, tmp_path, monkeypatch):
    def deliver(url, target, md5):
        target.write_bytes(zipped({"a.png": b"x"}))
        return target

    monkeypatch.setattr(archives, "download", deliver)
    path = tmp_path / "kvasir-dataset.zip"
    terms = "licence=research and education commercial-use=with written permission\n"
    words = ("fetch", "kvasir", "--data-dir", tmp_path)
    assert ended(*words) == (0, f"file={path} fetched {terms}", [])
    assert ended(*words) == (0, f"file={path} was there already {terms}", [])


def test_verify_ends_with_1_and_the_number_of_differences(ended, tmp_path):
    miniature("kvasir", tmp_path, per_class=1)
    code, out, err = ended("verify", "kvasir", "--data-dir", tmp_path)
    *lines, last = out.splitlines()
    assert (code, err) == (1, [])
    assert last == "dataset=kvasir differences=9"
    assert sum(line.startswith("DIFFERS  ") for line in lines) == 9
    code, out, _ = ended("verify", "kvasir", "--data-dir", tmp_path, "--json")
    report = json.loads(out)
    assert (code, report["dataset"], report["differences"]) == (1, "kvasir", 9)
    assert {"level": "DIFFERS", "name": "images", "detail": "images: 8, published 4000"} in report[
        "findings"
    ]


@needs_files
def test_verify_of_a_real_file_ends_with_0(ended):
    code, out, _ = ended("verify", "breastmnist", "--data-dir", FILES)
    assert code == 0
    assert out.splitlines()[-1] == "dataset=breastmnist differences=0"


@pytest.mark.parametrize("words", [["show", "kvaser"], ["fetch", "kvaser"], ["verify", "kvaser"]])
def test_a_mistyped_name_is_two_lines_and_exit_code_2(words, ended):
    code, out, (error, hint) = ended(*words)
    assert (code, out, hint) == (2, "", "hint: did you mean kvasir?")
    assert error.startswith("error: dataset=kvaser expected one of")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["lst"], "invalid choice: 'lst'"),
        (["verify"], "the following arguments are required: NAME"),
        (["verify", "kvasir", "--size", "x"], "argument --size: invalid int value: 'x'"),
    ],
)
def test_a_bad_command_line_is_told(words, message):
    with pytest.raises(ConfigError) as error:
        command(["data", *words])
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["kvasir", "breastmnist"])
def test_verify_without_a_folder_looks_where_the_variable_says(name, ended, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDERATION_DATA", str(tmp_path / "none"))
    code, _, (error, _) = ended("verify", name)
    assert (code, error) == (2, f"error: data-dir={tmp_path / 'none'} expected a folder")


@pytest.mark.parametrize("word", ["fetch", "verify"])
def test_a_size_is_refused_where_there_is_but_one(word, ended, tmp_path):
    code, _, lines = ended(word, "kvasir", "--data-dir", tmp_path, "--size", "28")
    assert code == 2
    assert lines == [
        "error: --size 28 has no effect with kvasir",
        "hint: only MedMNIST sets have sizes",
    ]
    code, _, (error, _) = ended(word, "breastmnist", "--data-dir", tmp_path, "--size", "32")
    assert (code, error) == (2, "error: image-size=32 expected one of 28, 64, 128, 224")
