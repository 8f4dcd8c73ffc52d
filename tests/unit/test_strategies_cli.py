"""Command lines: one ``error:`` line and an exit code, a traceback only when asked for."""

from __future__ import annotations

import errno
import io
import logging
import os
import subprocess
import sys

import pytest
from rich.console import Console

from medmamba import ModelError
from strategies import cli
from strategies.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    FederationError,
    ProtocolError,
    QuorumError,
    RefusalError,
    SignatureError,
    StoppedError,
)


@pytest.fixture(autouse=True)
def _leave_logging_alone(monkeypatch):
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
        monkeypatch.setenv(name, os.environ[name])


def raises(error: BaseException):
    def command(arguments):
        raise error

    return command


def exit_code(command, *arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.run(command, arguments)
    return caught.value.code


@pytest.mark.parametrize("code", [0, 1, 2])
def test_the_process_ends_with_the_commands_code(code):
    assert exit_code(lambda arguments: code) == code


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("seed=-1: expected 0 or more"), 2),
        (DataError("file x.npz is damaged"), 2),
        (CheckpointError("no checkpoint is usable"), 2),
        (FederationError("the link is down"), 1),
        (ProtocolError("record is missing"), 1),
        (SignatureError("signature does not match"), 1),
        (QuorumError("valid updates=1"), 3),
        (StoppedError("stopped by a person"), 130),
        (RefusalError("code", "model.size=base is not allowed here"), 1),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(capsys, error, code):
    assert exit_code(raises(error)) == code
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err == f"error: {error}\n"


def test_a_hint_has_a_line_of_its_own(capsys):
    assert exit_code(raises(ConfigError("seed=-1", hint="use 0"))) == 2
    assert capsys.readouterr().err == "error: seed=-1\nhint: use 0\n"


def test_texts_of_several_lines_are_joined(capsys):
    exit_code(raises(ConfigError("first\n  second\tthird", hint="a\n\nb")))
    assert capsys.readouterr().err == "error: first second third\nhint: a b\n"


def test_a_model_that_cannot_be_built_is_a_configuration_to_fix(capsys):
    assert exit_code(raises(ModelError("dims=(15,): expected even", "use 16"))) == 2
    assert capsys.readouterr().err == "error: dims=(15,): expected even\nhint: use 16\n"


def test_an_unforeseen_error_is_one_line_too(capsys):
    assert exit_code(raises(ZeroDivisionError("division\nby zero"))) == 1
    assert capsys.readouterr().err == (
        "error: ZeroDivisionError: division by zero\n"
        "hint: run again with --debug for the traceback\n"
    )


def test_a_file_of_another_user_is_a_configuration_to_fix(capsys):
    error = PermissionError(errno.EACCES, "Permission denied", "state/signing.key")
    assert exit_code(raises(error)) == 2
    first, hint = capsys.readouterr().err.splitlines()
    assert first == "error: state/signing.key: permission denied"
    assert "another user" in hint


SAYS_MUCH = """
import sys
from strategies import cli
def command(arguments):
    for line in range(int(arguments[0])):
        print("a line of many", line)
    print("done", file=sys.stderr)
    return 0
cli.run(command, sys.argv[1:])
"""


@pytest.mark.parametrize(("lines", "code", "said"), [(3, 0, "done\n"), (100_000, 141, "")])
def test_a_reader_who_leaves_is_no_failure_to_explain(lines, code, said):
    """Work that is done stays done; work that only prints ends."""
    reader, writer = os.pipe()
    os.close(reader)
    words = [sys.executable, "-c", SAYS_MUCH, str(lines)]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    done = subprocess.run(
        words, stdout=writer, stderr=subprocess.PIPE, text=True, check=False, env=buffered
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (code, said)


def test_a_command_works_where_nobody_listens():
    words = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", SAYS_MUCH, "3"]
    assert subprocess.run(words, check=False).returncode == 0


def test_an_interrupt_is_no_failure_to_explain(capsys):
    assert exit_code(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("error", [ConfigError("seed=-1"), ZeroDivisionError("x"), ModelError("y")])
@pytest.mark.parametrize("place", [0, 1])
def test_debug_anywhere_shows_the_traceback(error, place):
    arguments = ["run"]
    arguments.insert(place, "--debug")
    with pytest.raises(type(error)) as caught:
        cli.run(raises(error), arguments)
    assert caught.value is error


def test_the_command_does_not_see_debug():
    seen = []

    def command(arguments):
        seen.extend(arguments)
        return 0

    exit_code(command, "--debug", "run", "--seed", "3")
    assert seen == ["run", "--seed", "3"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, None)],
)
def test_waiting_threads_spin_briefly_unless_the_environment_decides(monkeypatch, given, expected):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    exit_code(lambda arguments: 0)
    assert os.environ.get("GOMP_SPINCOUNT") == expected


@pytest.mark.parametrize("decided", [None, *cli.MALLOC_VARIABLES])
def test_freed_memory_is_kept_unless_the_environment_decides(monkeypatch, decided):
    for name in cli.MALLOC_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if decided:
        monkeypatch.setenv(decided, "1")
    calls = []
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: calls.append(1))
    exit_code(lambda arguments: 0)
    assert len(calls) == (decided is None)


def test_freed_memory_comes_back_without_page_faults():
    """A process of its own, because the setting stays."""
    program = """
import resource
from strategies.cli import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        bytearray(b"1") * 50_000_000
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
keep_freed_memory()
faults()
print(before, faults())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    before, after = map(int, done.stdout.split())
    assert after < before / 10


@pytest.mark.parametrize("platform", ["darwin", "linux"])
def test_without_glibc_nothing_is_set(monkeypatch, platform):
    monkeypatch.setattr(cli.sys, "platform", platform)
    monkeypatch.setattr(cli.ctypes, "CDLL", lambda name: object())
    cli.keep_freed_memory()


def test_flower_asks_the_internet_for_nothing(monkeypatch):
    for name in ("FLWR_TELEMETRY_ENABLED", "FLWR_DISABLE_UPDATE_CHECK"):
        monkeypatch.delenv(name)
    exit_code(lambda arguments: 0)
    assert os.environ["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.environ["FLWR_DISABLE_UPDATE_CHECK"] == "1"


def test_a_wrong_command_line_reads_like_every_other_error(capsys):
    def command(arguments):
        parser = cli.Parser(prog="python -m server")
        parser.add_argument("--port", type=int)
        parser.parse_args(arguments)
        return 0

    assert exit_code(command, "--port", "x") == 2
    assert exit_code(command, "--prot", "1") == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: argument --port: invalid int value: 'x'",
        "hint: `python -m server --help` shows the options and an example",
        "error: unrecognized arguments: --prot 1",
        "hint: `python -m server --help` shows the options and an example",
    ]


def test_an_abbreviated_option_is_unknown(capsys):
    def command(arguments):
        parser = cli.Parser(prog="python -m client")
        parser.add_argument("--insecure", action="store_true")
        commands = parser.add_subparsers(dest="command")
        commands.add_parser("audit").add_argument("--verify", action="store_true")
        parser.parse_args(arguments)
        return 0

    assert exit_code(command, "--insecure", "audit", "--verify") == 0
    assert exit_code(command, "--insecur") == 2
    assert exit_code(command, "audit", "--verif") == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert errors == [
        "error: unrecognized arguments: --insecur",
        "error: unrecognized arguments: --verif",
    ]


def test_help_is_no_error(capsys):
    def command(arguments):
        cli.Parser(prog="python -m server", description="The coordinator.").parse_args(arguments)
        return 3

    assert exit_code(command, "--help") == 0
    assert "The coordinator." in capsys.readouterr().out


def test_the_nearest_word_is_suggested_or_all_are_listed():
    assert cli.nearest("trainig", ["training", "model"]) == "did you mean training?"
    assert cli.nearest("zzz", {"b": 1, "a": 2}) == "valid: a, b"
    assert cli.nearest("zzz", []) == "valid: "


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_drawn_on_a_terminal_and_nowhere_else(monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    assert Console(stderr=True).is_terminal == terminal
    with cli.progress() as bar:
        task = bar.add_task("training", total=2)
        bar.advance(task)
    assert ("training" in stream.getvalue()) == terminal
