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
from fakes.coordinators import Coordinator
from server.federation import Federation
from strategies.enrolment import EnrolmentRequest
from strategies.errors import ConfigError

SERVER = ["--debug", "--help", "--state-dir VALUE"]
DATA = ["--debug", "--help"]
SITE = ["--config VALUE", "--debug", "--help", "--site VALUE"]

SURFACE = {
    "python -m client": [*SITE, "--print-systemd"],
    "python -m client audit": [*SITE, "--verify"],
    "python -m client check": SITE,
    "python -m client data": DATA,
    "python -m client data fetch": [*DATA, "--data-dir VALUE", "--size VALUE", "NAME"],
    "python -m client data list": [*DATA, "--json"],
    "python -m client data show": [*DATA, "--json", "NAME"],
    "python -m client data verify": [*DATA, "--data-dir VALUE", "--json", "--size VALUE", "NAME"],
    "python -m client init": ["--allow-unprotected", *SITE],
    "python -m client join": [*SITE, "--fingerprint VALUE", "FILE"],
    "python -m server": ["--help"],
    "python -m server admit": [*SERVER, "--fingerprint VALUE", "--output VALUE", "FILE"],
    "python -m server audit": [*SERVER, "--verify"],
    "python -m server init": [
        *SERVER,
        "--address VALUE",
        "--demo",
        "--min-cohort VALUE",
        "--name VALUE",
        "--port VALUE",
        "--renew",
        "--san VALUE",
    ],
    "python -m server revoke": [*SERVER, "SITE"],
    "python -m server run": [
        *SERVER,
        "--output VALUE",
        "--resume VALUE",
        "--run-config VALUE",
        "--set VALUE",
    ],
    "python -m server status": [*SERVER, "--json"],
    "python -m server superlink": [*SERVER, "--executor", "--print"],
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
    """Arguments of a parser and, under their own names, those of its commands."""
    options, commands = [], {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                commands |= surface(command)
        elif action.option_strings:
            options.append(action.option_strings[-1] + (" VALUE" if action.nargs is None else ""))
        else:
            options.append(str(action.metavar))
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


def site_file(folder, superlink: str = ""):
    path = folder / "A.toml"
    path.write_text(f'site = "A"\nsuperlink = "{superlink}"\n[data]\ndataset = "phantom"\n')
    return path


@pytest.mark.parametrize("superlink", ["", "127.0.0.1:8000"])
def test_a_site_that_joined_no_federation_does_not_run(tmp_path, superlink):
    path = site_file(tmp_path, superlink)
    error = refusal(client.__main__, "--site", "A", "--config", str(path))
    assert str(error) == "site=A has joined no federation: join.json is missing"
    assert error.hint == "python -m client join FILE --site A, with the coordinator's file"


def test_the_unit_is_printed_for_the_node_alone(tmp_path, capsys):
    words = ["--site", "A", "--config", str(tmp_path / "A.toml")]
    assert client.__main__.command(["init", *words]) == 0
    capsys.readouterr()
    assert client.__main__.command([*words, "--print-systemd"]) == 0
    assert f"ExecStart={sys.executable} -m client --site A " in capsys.readouterr().out
    error = refusal(client.__main__, "--print-systemd", "check", *words)
    assert str(error) == "--print-systemd goes without check"


def test_a_site_says_where_it_connects_before_it_does(tmp_path, capsys, monkeypatch):
    words = ["--site", "A", "--config", str(tmp_path / "A.toml")]
    client.__main__.command(["init", *words])
    request = EnrolmentRequest.parse((tmp_path / "state" / "A" / "A.enroll.json").read_text())
    document = Coordinator().admit(request, address="hub.example:443")
    (tmp_path / "A.join.json").write_text(document.to_json())
    joined = ["join", str(tmp_path / "A.join.json"), "--fingerprint", document.fingerprint]
    assert client.__main__.command([*joined, *words]) == 0
    connected = []
    monkeypatch.setattr("client.flower_runtime.run_node", connected.append)
    capsys.readouterr()
    assert client.__main__.command(words) == 0
    said = dict(word.split("=", 1) for word in capsys.readouterr().out.split())
    assert said["superlink"] == "hub.example:443"
    assert said["federation"] == "lungs"
    assert said["public_key"] == request.fingerprint
    assert [site.membership.document for site in connected] == [document]


@pytest.mark.parametrize("port", ["0", "65536", "-1"])
def test_a_port_out_of_range_is_refused(tmp_path, port):
    words = ["--address", "127.0.0.1:9000", "--port", port, "--state-dir", str(tmp_path / "state")]
    error = refusal(server.__main__, "init", *words)
    assert str(error).startswith(f"port={port}: ")
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["admit", "A.enroll.json"],
        ["audit"],
        ["revoke", "A"],
        ["run", "--output", "x"],
        ["status"],
        ["superlink"],
    ],
)
def test_every_command_but_init_needs_a_federation(tmp_path, words):
    error = refusal(server.__main__, *words, "--state-dir", str(tmp_path / "none"))
    assert str(error) == f"state-dir={tmp_path / 'none'} has no federation"
    assert error.hint.startswith("python -m server init --address hub.example.org:443")
    assert list(tmp_path.iterdir()) == []


def test_superlink_print_shows_the_whole_command_line(tmp_path, capsys):
    state = tmp_path / "state"
    Federation.create(state, name="test", address="127.0.0.1:9000", port=9000)
    words = ["superlink", "--print", "--state-dir", str(state)]
    assert server.__main__.command(words) == 0
    first = capsys.readouterr().out
    line = shlex.split(first)
    assert "flower-superlink" in [os.path.basename(word) for word in line]
    for option, value in (
        ("--host", "127.0.0.1"),
        ("--port", "9000"),
        ("--isolation", "process"),
        ("--ssl-certfile", str(state / "server.pem")),
        ("--superexec-auth-secret-file", str(state / "superlink.secret")),
        ("--database", str(state / "superlink.sqlite")),
    ):
        assert line[line.index(option) + 1] == value
    assert "--enable-supernode-auth" in line
    assert "--insecure" not in line
    secret = state / "superlink.secret"
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    content = secret.read_bytes()
    assert len(content) == 32
    assert content.hex() not in first
    # Started again, it keeps its secret: `server run` must still be let in.
    server.__main__.command(words)
    assert secret.read_bytes() == content
