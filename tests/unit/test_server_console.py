"""A coordinator sees each round as it ends, and at the end who contributed when."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys

import pytest

from fakes.report_files import write_files
from server import console
from server.console import contribution_lines, finish, head, ranges, round_lines, shown_rounds
from server.progress import read_progress
from server.rounds import RoundResult
from server.run_directory import RunDirectory
from strategies.base import Outcome
from strategies.errors import CheckpointError
from strategies.run_config import RunConfig

RUN = RunConfig.parse({"num-server-rounds": 20})
OUTCOMES = (
    Outcome("A", "ok"),
    Outcome("B", "missing", "no reply within 3600 s"),
    Outcome("C", "refused", "too-much-work: limit 3"),
)


def result(server_round: int = 3, **changes) -> RoundResult:
    values = {
        "outcomes": OUTCOMES,
        "num_examples": 221,
        "train_loss": 1.10193,
        "seconds": 12.12,
        "validation": {"auc": 0.5123},
        **changes,
    }
    return RoundResult(server_round=server_round, **values)


def test_a_round_is_a_line_below_the_names_of_its_columns():
    line, *sites = (str(text) for text in round_lines(RUN, result()))
    assert line.split() == ["3/20", "1/3", "221", "1.1019", "0.5123", "12.1", "off", "off"]
    names = head(RUN)
    for name, value in (("sites", "1/3"), ("train loss", "1.1019"), ("val auc", "0.5123")):
        assert names.index(name) + len(name) == line.index(value) + len(value)
    assert [site.strip() for site in sites] == [
        "B missing: no reply within 3600 s",
        "C refused: too-much-work: limit 3",
    ]


def test_the_metric_is_the_one_that_chooses_and_may_not_exist():
    run = RunConfig.parse({"strategy.selection-metric": "balanced_accuracy"})
    line = str(round_lines(run, result(validation={"auc": 0.5, "balanced_accuracy": None}))[0])
    assert "val balanced_accuracy" in head(run)
    assert "n/a" in line
    assert len(line) == len(str(round_lines(run, result())[0]))


def test_rounds_are_printed_with_one_head(capsys):
    with shown_rounds(RUN) as show:
        assert capsys.readouterr().out == ""
        show(result(1))
        show(result(2, outcomes=OUTCOMES[:1]))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["round", "1/20", "B", "C", "2/20"]
    assert "\x1b" not in "".join(lines)


def test_whoever_read_along_may_leave():
    """The run goes on, and its log says once that rounds are not shown."""
    program = (
        "import logging\n"
        "from server.console import shown_rounds\n"
        "from server.rounds import RoundResult\n"
        "from strategies.run_config import RunConfig\n"
        "logging.basicConfig(format='%(message)s')\n"
        "with shown_rounds(RunConfig()) as show:\n"
        "    for n in (1, 2, 3):\n"
        "        show(RoundResult(n, outcomes=(), num_examples=1, train_loss=1.0, seconds=1.0,\n"
        "                         validation={}))\n"
        "    print('went on', file=__import__('sys').stderr)\n"
    )
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-c", program]
    done = subprocess.run(words, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert "went on" in done.stderr
    assert done.stderr.count("rounds are not shown") == 1, done.stderr
    assert "Traceback" not in done.stderr


def test_on_a_terminal_the_log_does_not_say_it_twice(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(screen)
    logging.getLogger().addHandler(handler)
    try:
        with shown_rounds(RUN) as show:
            logging.getLogger("server.rounds").warning("round=%d/20 sites=1/3", 1)
            logging.getLogger("strategies.base").warning("round=1 task=train site=B status=x")
            logging.getLogger("strategies.base").warning("round=1 task=test site=B status=y")
            logging.getLogger("server.rounds").warning("resumed")
            show(result(1))
        assert handler.stream is screen
        logging.getLogger("server.rounds").warning("round=2/20 after it")
    finally:
        logging.getLogger().removeHandler(handler)
    text = screen.getvalue()
    for shown in ("resumed", "task=test", "no reply within 3600 s", "1/20", "after it"):
        assert shown in text
    for left_out in ("round=1/20", "task=train"):
        assert left_out not in text


def history(path, lines) -> RunDirectory:
    path.mkdir(exist_ok=True)
    (path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return RunDirectory(path)


def rounds(*statuses: dict[str, str]) -> list[dict]:
    """A history's lines: each round's status by site."""
    lines = []
    for server_round, sites in enumerate(statuses, start=1):
        lines.append({"type": "round", "server_round": server_round, "seconds": 1.0})
        lines += [
            {
                "type": "site",
                "server_round": server_round,
                "site": site,
                "status": status,
                "reason": "",
            }
            for site, status in sites.items()
        ]
    return lines


def test_who_contributed_when(tmp_path):
    directory = history(
        tmp_path,
        rounds(
            {"B": "ok", "A": "ok"},
            {"B": "missing", "A": "ok"},
            {"B": "dropped", "A": "ok", "later": "ok"},
            {"B": "missing", "A": "ok", "later": "ok"},
        ),
    )
    assert contribution_lines(read_progress(directory))[1:] == [
        "A      ●●●●  4 of 4 rounds",
        "B      ●○○○  1 of 4 rounds; missing in 2, 4; dropped in 3",
        "later    ●●  2 of 4 rounds",
    ]


def test_of_many_rounds_and_sites_the_missed_ones_are_told(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "MAX_SITES", 3)
    sites = {f"s{number}": "ok" for number in range(5)}
    directory = history(tmp_path, rounds(*[sites] * 60, {**sites, "s3": "refused"}))
    assert contribution_lines(read_progress(directory))[1:] == [
        "s3  60 of 61 rounds; refused in 61",
        "4 of 5 sites missed no round",
    ]


def test_ranges_are_short():
    assert ranges([]) == ""
    assert ranges([1, 2]) == "1-2"
    assert ranges([1, 2, 3, 5, 7, 8]) == "1-3, 5, 7-8"


def test_a_history_that_is_being_written(tmp_path):
    directory = history(tmp_path, rounds({"A": "ok"}, {"A": "missing"}))
    path = directory.path / "history.jsonl"
    path.write_text(path.read_text()[:-20])
    progress = read_progress(directory)
    assert progress.last_round == 2
    assert list(progress.sites["A"]) == [1]
    assert read_progress(RunDirectory(tmp_path / "none")).last_round == 0


@pytest.mark.parametrize("line", ["{", '{"type": "site"}', "[]", '{"server_round": 1}'])
def test_a_damaged_history_names_its_line(tmp_path, line):
    directory = history(tmp_path, rounds({"A": "ok"}))
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(CheckpointError, match=r"history\.jsonl line 3 is damaged"):
        read_progress(directory)


def test_the_end_has_results_contributions_and_the_report(tmp_path, capsys):
    run_dir = write_files(tmp_path / "run")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert finish(run_dir, summary) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "C  ●○●●●●  5 of 6 rounds; dropped in 2" in lines
    assert "D  ●●○○○●  3 of 6 rounds; refused in 3-5" in lines
    assert lines[-1] == f"report {run_dir / 'report.html'}"
    assert (run_dir / "report.html").exists()


def test_the_end_of_a_run_does_not_hang_on_who_reads_it(tmp_path, monkeypatch, caplog):
    path = write_files(tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert finish(path, summary) == 0
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)
    assert f"standard output is closed: the results are in {path}" in caplog.text


def test_the_end_is_printed_where_marks_cannot_be(tmp_path, monkeypatch):
    run_dir = write_files(tmp_path / "run")
    summary = json.loads((run_dir / "summary.json").read_text())
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    assert finish(run_dir, summary) == 0
    screen.flush()
    assert b"5 of 6 rounds; dropped in 2" in screen.buffer.getvalue()
