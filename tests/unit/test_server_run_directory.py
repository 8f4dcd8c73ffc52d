"""The run directory: new or refused, whole or absent, and cut back when a run is resumed."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import stat
from pathlib import Path

import pytest

from server import run_directory
from server.run_directory import (
    CHECKPOINTS,
    CONFIG,
    HISTORY,
    LOG,
    PACKAGES,
    REPORT,
    SUMMARY,
    RunDirectory,
    provenance,
    read_json,
    require_new,
    to_json,
)
from strategies.errors import CheckpointError, ConfigError, QuorumError

DOCUMENT = {"run_uuid": "a1b2", "run_config": {"seed": 3}, "name": "K\u00f6ln"}


@pytest.fixture
def directory(tmp_path) -> RunDirectory:
    return RunDirectory.create(tmp_path / "runs" / "first", DOCUMENT)


def test_a_new_directory_holds_its_configuration_and_a_place_for_checkpoints(directory):
    assert sorted(path.name for path in directory.path.iterdir()) == [CHECKPOINTS, CONFIG]
    assert directory.config() == DOCUMENT
    assert (directory.path / CONFIG).read_text().endswith("}\n")


def test_a_runs_figures_are_for_nobody_else_on_the_machine(directory):
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o700


def test_a_directory_that_could_not_be_made_whole_is_not_there(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(run_directory, "write_atomic", full)
    with pytest.raises(ConfigError) as caught:
        RunDirectory.create(tmp_path / "first", DOCUMENT)
    assert str(caught.value) == (
        f"output={tmp_path / 'first'} cannot be made (No space left on device)"
    )
    assert list(tmp_path.iterdir()) == []


def test_an_existing_directory_is_refused_and_not_touched(directory):
    before = (directory.path / CONFIG).read_bytes()
    for refuse in (
        lambda: require_new(directory.path),
        lambda: RunDirectory.create(directory.path, {"run_uuid": "other"}),
    ):
        with pytest.raises(ConfigError) as caught:
            refuse()
        assert str(caught.value) == (
            f"output={directory.path} exists; a run never writes into an existing directory"
        )
        assert "--resume" in caught.value.hint
    assert (directory.path / CONFIG).read_bytes() == before


def test_the_root_folder_is_an_existing_directory_like_any_other():
    with pytest.raises(ConfigError, match=r"^output=/ exists"):
        require_new(Path("/"))


def test_a_file_in_the_way_is_refused_in_one_line(tmp_path):
    (tmp_path / "runs").write_text("a file")
    with pytest.raises(
        ConfigError, match=r"^output=.* cannot be made: .* is not a folder to write in$"
    ):
        RunDirectory.create(tmp_path / "runs" / "first", DOCUMENT)


def test_an_interrupted_run_can_be_opened(directory):
    assert RunDirectory.open(directory.path).config() == DOCUMENT


@pytest.mark.parametrize("content", [None, "", "{", "\u00e4".encode("latin-1")])
def test_what_is_no_run_directory_is_refused(tmp_path, content):
    if content is not None:
        data = content.encode() if isinstance(content, str) else content
        (tmp_path / CONFIG).write_bytes(data)
    with pytest.raises(CheckpointError, match=r"config\.json is not readable$") as caught:
        RunDirectory.open(tmp_path)
    assert caught.value.hint == "name a directory that a run made"
    assert caught.value.exit_code == 2


def test_a_complete_run_is_not_resumed(directory):
    directory.write_summary({"best_round": 3})
    (directory.path / REPORT).write_text("<html>")
    with pytest.raises(CheckpointError, match=r"^resume=.* is complete$") as caught:
        RunDirectory.open(directory.path)
    assert caught.value.hint == "its report.html has all"


def test_a_run_whose_report_failed_can_be_opened_for_it(directory):
    assert directory.summary() is None
    directory.write_summary({"best_round": 3})
    assert RunDirectory.open(directory.path).summary() == {"best_round": 3}


def test_a_value_of_another_kind_is_named(directory):
    assert directory.stored("run_uuid", str) == "a1b2"
    for name, kind in (("run_uuid", dict), ("scenario", dict)):
        with pytest.raises(CheckpointError, match=rf"config\.json has no {name}: dict expected"):
            directory.stored(name, kind)


def test_history_grows_by_lines(directory):
    assert directory.history_bytes() == 0
    entries = [{"type": "round", "server_round": n, "loss": 0.1 + n} for n in range(3)]
    for entry in entries:
        directory.append(entry)
    lines = (directory.path / HISTORY).read_text().splitlines()
    assert [json.loads(line) for line in lines] == entries
    assert directory.history_bytes() == (directory.path / HISTORY).stat().st_size


def test_resuming_drops_what_came_after_the_checkpoint(directory):
    directory.append({"server_round": 1})
    length = directory.history_bytes()
    kept = (directory.path / HISTORY).read_bytes()
    directory.append({"server_round": 2})
    directory.cut_history(length)
    assert (directory.path / HISTORY).read_bytes() == kept
    directory.append({"server_round": 2, "again": True})
    assert len((directory.path / HISTORY).read_text().splitlines()) == 2


def test_a_history_that_lost_lines_is_refused_not_continued(directory):
    directory.cut_history(0)
    assert not (directory.path / HISTORY).exists()
    directory.append({"server_round": 1})
    before = (directory.path / HISTORY).read_bytes()
    with pytest.raises(CheckpointError, match=r"history\.jsonl is cut short or missing$"):
        directory.cut_history(len(before) + 1)
    assert (directory.path / HISTORY).read_bytes() == before


def test_two_processes_never_write_into_one_directory(directory):
    with directory.session():
        other = RunDirectory(directory.path).session()
        with pytest.raises(ConfigError, match="is in use by another process"), other:
            pass
    with RunDirectory(directory.path).session():
        pass


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_figures_that_json_cannot_say_are_never_written(directory, value):
    with pytest.raises(ValueError, match="JSON"):
        directory.append({"loss": value})
    with pytest.raises(ValueError, match="JSON"):
        directory.write_summary({"auc": value})
    assert directory.history_bytes() == 0
    assert not (directory.path / SUMMARY).exists()


def test_a_summary_is_there_whole_or_not_at_all(directory, monkeypatch):
    def fails(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        directory.write_summary({"best_round": 3})
    assert sorted(path.name for path in directory.path.iterdir()) == [CHECKPOINTS, CONFIG]


def test_what_is_written_is_read(tmp_path):
    (tmp_path / "x.json").write_text(to_json(DOCUMENT))
    assert read_json(tmp_path / "x.json") == DOCUMENT


def test_log_lines_go_to_the_directory_while_it_is_open(directory):
    logger = logging.getLogger("server.rounds")
    handlers = list(logging.getLogger().handlers)
    with directory.session():
        logger.warning("round=%d site=%s", 1, "A")
    logger.warning("after")
    lines = (directory.path / LOG).read_text().splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(" WARNING round=1 site=A")
    assert logging.getLogger().handlers == handlers


def test_the_log_is_closed_when_the_run_fails(directory):
    handlers = list(logging.getLogger().handlers)
    with pytest.raises(RuntimeError), directory.session():
        raise RuntimeError
    assert logging.getLogger().handlers == handlers


def test_a_log_on_a_full_disk_is_told_once_and_hides_no_error(directory, caplog, capsys):
    (directory.path / LOG).symlink_to("/dev/full")

    def run():
        with directory.session():
            for word in ("first", "second"):
                logging.getLogger("a.module").warning(word)
            raise QuorumError("too few")

    with pytest.raises(QuorumError, match="too few"):
        run()
    assert caplog.messages == [
        "first",
        "log.txt is not written any more (No space left on device)",
        "second",
    ]
    assert capsys.readouterr().err == ""


def test_a_resumed_run_continues_its_log(directory):
    for text in ("first", "second"):
        with directory.session():
            logging.getLogger("server").warning(text)
    assert len((directory.path / LOG).read_text().splitlines()) == 2


def test_provenance_names_commit_and_versions():
    found = provenance()
    assert set(found) == {"git_commit", "versions"}
    assert set(found["versions"]) == set(PACKAGES)
    assert found["versions"]["flwr"].startswith("1.4")
    commit = found["git_commit"].removesuffix("+changes")
    assert commit == "unknown" or (len(commit) == 40 and set(commit) <= set("0123456789abcdef"))


def test_provenance_without_git_says_so(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance()["git_commit"] == "unknown"


@pytest.mark.parametrize("rounds", [0, 1])
def test_a_run_without_a_checkpoint_begins_again(tmp_path, rounds):
    directory = RunDirectory.create(tmp_path / "run", {"seed": 1})
    for server_round in range(1, rounds + 1):
        directory.append({"type": "round", "server_round": server_round})
    directory.restart_history()
    assert directory.history_bytes() == 0


def test_the_history_of_a_run_whose_checkpoints_were_lost_is_kept(tmp_path):
    directory = RunDirectory.create(tmp_path / "run", {"seed": 1})
    for server_round in (1, 2):
        directory.append({"type": "round", "server_round": server_round})
    before = directory.history_bytes()
    with pytest.raises(CheckpointError, match=r"is empty, but 2 rounds are in history\.jsonl"):
        directory.restart_history()
    assert directory.history_bytes() == before
