"""The public surface: these commands and options, with help, examples and one-line errors.

A command or option that is added, renamed or dropped changes the table here, knowingly.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import stat
import subprocess
import sys

import pytest

import client.__main__
import server.__main__
import simulation.run
from strategies.errors import ConfigError

SERVER = ["--debug", "--help", "--insecure", "--port VALUE", "--state-dir VALUE"]
SITE = ["--config VALUE", "--debug", "--help", "--site VALUE"]

SURFACE = {
    "python -m client": [*SITE, "--insecure"],
    "python -m client audit": [*SITE, "--verify"],
    "python -m client init": ["--allow-unprotected", *SITE],
    "python -m server": ["--help"],
    "python -m server run": [
        *SERVER,
        "--federation VALUE",
        "--output VALUE",
        "--resume VALUE",
        "--run-config VALUE",
        "--set VALUE",
        "--site-keys VALUE",
    ],
    "python -m server superlink": [*SERVER, "--print"],
    "python simulation/run.py": [
        "--data-dir VALUE",
        "--debug",
        "--help",
        "--output VALUE",
        "--resume VALUE",
        "--scenario VALUE",
        "--seed VALUE",
        "--set VALUE",
    ],
}

MAINS = {
    "python -m client": client.__main__,
    "python -m server": server.__main__,
    "python simulation/run.py": simulation.run,
}


def surface(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """Options of a parser and, under their own names, of its commands."""
    options, commands = [], {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                commands |= surface(command)
        else:
            assert action.option_strings, f"{action.dest} is a positional argument"
            options.append(action.option_strings[-1] + (" VALUE" if action.nargs is None else ""))
    return {parser.prog: sorted(options), **commands}


def arguments(command: str) -> list[str]:
    """Words that start a program with this Python: the command without its ``python``."""
    return [sys.executable, *shlex.split(command)[1:]]


def run(command: str, *words: str, cwd) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*arguments(command), *words], cwd=cwd, capture_output=True, text=True, timeout=60
    )


def test_the_surface_is_this_and_no_other():
    found = {}
    for main in MAINS.values():
        found |= surface(main.parser())
    assert found == {command: sorted(options) for command, options in SURFACE.items()}


@pytest.mark.parametrize("command", SURFACE)
def test_help_exits_with_0_and_shows_an_example(command, capsys):
    program = next(name for name in MAINS if command.startswith(name))
    words = command.removeprefix(program).split()
    with pytest.raises(SystemExit) as caught:
        MAINS[program].parser().parse_args([*words, "--help"])
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: {command} ")
    for option in SURFACE[command]:
        assert option.removesuffix(" VALUE") in shown
    _, _, examples = re.sub(r"\s+", " ", shown).partition(" example")
    assert command in examples


def epilogs(parser: argparse.ArgumentParser) -> list[str]:
    """The examples of a parser and of its commands."""
    inner = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return [parser.epilog or ""] + [
        text for action in inner for command in action.choices.values() for text in epilogs(command)
    ]


@pytest.mark.parametrize("program", MAINS)
def test_the_examples_are_command_lines_that_parse(program):
    parser = MAINS[program].parser()
    for epilog in epilogs(parser):
        text = re.sub(r"\\\n\s*", "", re.sub(r"^examples?:", "", epilog))
        # What follows two spaces explains the example.
        lines = [re.split(r"\s{2,}", line.strip())[0] for line in text.strip().splitlines()]
        assert lines
        for line in lines:
            assert line.startswith(program)
            parser.parse_args(shlex.split(line.removeprefix(program)))


PROBE = """
import runpy, sys
sys.argv[1:] = ["--help"]
for start in (
    lambda: runpy.run_module("client", run_name="__main__"),
    lambda: runpy.run_module("server", run_name="__main__"),
    lambda: runpy.run_path("simulation/run.py", run_name="__main__"),
):
    try:
        start()
    except SystemExit as end:
        assert end.code == 0, end.code
print(sorted({"torch", "flwr", "matplotlib", "datasets", "monai"} & sys.modules.keys()))
"""


def test_help_answers_at_once(repository):
    result = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=repository, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"


BAD = {
    "python -m client": (["--site"], "argument --site: expected one argument"),
    "python -m server": (["admitt"], "argument COMMAND: invalid choice: 'admitt'"),
    "python simulation/run.py": (["--seed", "x"], "argument --seed: invalid int value: 'x'"),
}


@pytest.mark.parametrize("program", BAD)
def test_a_bad_command_line_is_two_lines_and_exit_code_2(program, repository):
    words, message = BAD[program]
    result = run(program, *words, cwd=repository)
    assert (result.returncode, result.stdout) == (2, "")
    error, hint = result.stderr.splitlines()
    assert error.startswith(f"error: {message}")
    assert hint == f"hint: `{program} --help` shows the options and an example"


@pytest.mark.parametrize("program", BAD)
def test_debug_shows_the_traceback(program, repository):
    words, message = BAD[program]
    result = run(program, "--debug", *words, cwd=repository)
    assert result.returncode != 0
    assert result.stderr.startswith("Traceback (most recent call last):")
    assert f"strategies.errors.ConfigError: {message}" in result.stderr


def test_the_programs_start_from_any_folder(repository, tmp_path):
    script = repository / "simulation" / "run.py"
    for words in (["-m", "client"], ["-m", "server"], [str(script)]):
        result = subprocess.run(
            [sys.executable, *words, "--help"], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0
    assert list(tmp_path.iterdir()) == []


def refusal(main, *words: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        main.command(words)
    return caught.value


def test_a_client_needs_its_site():
    error = refusal(client.__main__, "audit")
    assert (str(error), error.hint) == ("--site is missing", "python -m client --site A")


def site_file(folder, superlink: str):
    path = folder / "A.toml"
    path.write_text(f'site = "A"\nsuperlink = "{superlink}"\n[data]\ndataset = "phantom"\n')
    return path


@pytest.mark.parametrize(
    "superlink", ["192.0.2.1:8000", "hub.example:8000", "0.0.0.0:8000", "127.0.0.1.example:8000"]
)
def test_insecure_is_refused_for_any_address_but_loopback(tmp_path, superlink):
    path = site_file(tmp_path, superlink)
    error = refusal(client.__main__, "--site", "A", "--config", str(path), "--insecure")
    assert str(error).startswith(f"--insecure with superlink={superlink}: refused")
    assert error.hint == "--insecure is for 127.0.0.1, ::1 and localhost only"


def test_without_insecure_there_is_no_silent_plain_connection(tmp_path):
    path = site_file(tmp_path, "127.0.0.1:8000")
    error = refusal(client.__main__, "--site", "A", "--config", str(path))
    assert "without --insecure needs TLS" in str(error)
    for words in (["superlink"], ["run"]):
        assert "without --insecure needs TLS" in str(refusal(server.__main__, *words))


@pytest.mark.parametrize("command", ["run", "superlink"])
@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_out_of_range_is_refused(command, port):
    error = refusal(server.__main__, command, "--insecure", "--port", port)
    assert str(error) == f"--port {port}: expected 1 to 65535"


def test_superlink_print_shows_the_whole_command_line(tmp_path, capsys):
    state = tmp_path / "state"
    words = ["superlink", "--insecure", "--print", "--port", "9000", "--state-dir", str(state)]
    assert server.__main__.command(words) == 0
    first = capsys.readouterr().out
    line = shlex.split(first)
    assert os.path.basename(line[0]) == "flower-superlink"
    for option, value in (
        ("--host", "127.0.0.1"),
        ("--port", "9000"),
        ("--isolation", "process"),
        ("--superexec-auth-secret-file", str(state / "superlink.secret")),
        ("--database", str(state / "superlink.sqlite")),
    ):
        assert line[line.index(option) + 1] == value
    secret = state / "superlink.secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    content = secret.read_bytes()
    assert len(content) == 32
    assert content.hex() not in first
    # Started again, it keeps its secret: `server run` must still be let in.
    server.__main__.command(words)
    assert secret.read_bytes() == content
