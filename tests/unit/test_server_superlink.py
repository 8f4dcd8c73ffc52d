"""flower-superlink's command line, and the two processes of the executor."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import threading
import time
import tomllib
from pathlib import Path

import pytest

from server import superlink
from server.federation import Federation
from strategies.errors import ConfigError, FederationError

PROGRAMS = Path(sys.executable).parent


@pytest.fixture
def federation(tmp_path, monkeypatch):
    """A federation in a folder that was named relatively, as people do."""
    monkeypatch.chdir(tmp_path)
    return Federation.create(Path("state"), name="lung", address="hub.example.org:8443", port=18123)


def options(command: list[str]) -> dict[str, str]:
    """What follows each option; nothing for a switch."""
    words = iter([*command[1:], "--"])
    found, name = {}, ""
    for word in words:
        if word.startswith("--"):
            name = word
            found[name] = ""
        else:
            found[name] = word
    del found["--"]
    return found


def test_the_superlink_is_hardened(federation, tmp_path):
    command = superlink.superlink_command(federation)
    state = tmp_path / "state"
    assert command[0] == str(PROGRAMS / "flower-superlink")
    assert options(command) == {
        "--host": "127.0.0.1",
        "--port": "18123",
        "--ssl-certfile": f"{state}/server.pem",
        "--ssl-keyfile": f"{state}/server.key",
        "--ssl-ca-certfile": f"{state}/ca.pem",
        "--enable-supernode-auth": "",
        "--database": f"{state}/superlink.sqlite",
        "--isolation": "process",
        "--superexec-auth-secret-file": f"{state}/superlink.secret",
        "--disable-runtime-dependency-installation": "",
    }


def test_every_option_is_one_that_flower_has(federation):
    from flwr.supercore.cli.flower_superexec import _parse_args
    from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink

    parsed = _parse_args_run_superlink().parse_args(superlink.superlink_command(federation)[1:])
    assert not parsed.insecure
    assert not parsed.runtime_dependency_install
    parsed = _parse_args().parse_args(superlink.executor_command(federation)[1:])
    assert not parsed.insecure
    assert not parsed.runtime_dependency_install


def test_the_executor_has_the_secret_and_knows_whom_it_talks_to(federation, tmp_path, repository):
    command = superlink.executor_command(federation)
    assert command[0] == str(PROGRAMS / "flower-superexec")
    assert options(command) == {
        "--runtime-api-address": "127.0.0.1:18123",
        "--root-certificates": f"{tmp_path}/state/ca.pem",
        "--superexec-auth-secret-file": f"{tmp_path}/state/superlink.secret",
    }
    environment = superlink.executor_environment(federation)
    assert environment["FEDERATION_STATE"] == f"{tmp_path}/state"
    assert environment["FEDERATION_CODE"] == str(repository)
    assert environment["PATH"].split(os.pathsep)[0] == str(PROGRAMS)
    assert environment.items() >= superlink.superlink_environment(federation).items()


def test_flower_neither_asks_the_internet_nor_opens_its_former_ports(federation, tmp_path):
    assert superlink.superlink_environment(federation) == {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_INTERNAL_GRPC_CONTROL_API": "0",
        "FLWR_INTERNAL_GRPC_FLEET_API": "0",
        "FLWR_HOME": f"{tmp_path}/state/flower",
    }


def test_what_is_described_is_what_runs(federation):
    for executor in (False, True):
        lines = superlink.described(federation, executor=executor).splitlines()
        commands = [superlink.superlink_command(federation)]
        if executor:
            commands.append(superlink.executor_command(federation))
        assert len(lines) == len(commands)
        for line, command in zip(lines, commands, strict=True):
            words = shlex.split(line)
            assert words[0] == "env"
            assert words[-len(command) :] == command
            assert "FLWR_TELEMETRY_ENABLED=0" in words
    assert f"FEDERATION_STATE={federation.state_dir.resolve()}" in shlex.split(lines[1])


@pytest.fixture
def ran(monkeypatch):
    """What :func:`superlink.serve` would have run: commands, environment, and what beside."""
    calls = []
    monkeypatch.setattr(superlink, "supervise", lambda *words: calls.append(words) or 0)
    return calls


def test_the_superlink_runs_alone_whatever_the_environment_says(federation, monkeypatch, ran):
    monkeypatch.setenv("FLWR_INTERNAL_GRPC_CONTROL_API", "1")
    monkeypatch.setenv("FLWR_HOME", "elsewhere")
    monkeypatch.setenv("KEPT", "yes")
    assert superlink.serve(federation, executor=False) == 0
    [(commands, environment, _)] = ran
    assert commands == [superlink.superlink_command(federation)]
    assert environment.items() >= superlink.superlink_environment(federation).items()
    assert environment["KEPT"] == "yes"
    assert "FEDERATION_STATE" not in environment
    assert federation.flower_home.stat().st_mode & 0o777 == 0o700


def test_with_the_executor_both_run_and_everybody_is_warned(federation, ran, caplog):
    assert superlink.serve(federation, executor=True) == 0
    [(commands, environment, _)] = ran
    assert commands == [
        superlink.superlink_command(federation),
        superlink.executor_command(federation),
    ]
    assert environment.items() >= superlink.executor_environment(federation).items()
    assert "every user of this machine can run code as this user" in caplog.text

    connection = tomllib.loads((federation.flower_home / "config.toml").read_text())["superlink"]
    assert connection == {
        "default": "hospitals",
        "hospitals": {
            "address": "127.0.0.1:18123",
            "root-certificates": str(federation.ca_file.resolve()),
        },
    }


def test_the_register_of_sites_is_brought_to_a_superlink_that_starts(federation, monkeypatch, ran):
    told = []
    monkeypatch.setattr(superlink, "synchronise_when_up", lambda *words: told.append(words))
    superlink.serve(federation, executor=False)
    [(_, _, beside)] = ran
    stop = threading.Event()
    beside(stop)
    assert told == [(federation, stop)]


def test_a_python_without_flower_beside_it_is_said(federation, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(ConfigError, match="flower-superlink is not beside python") as error:
        superlink.serve(federation, executor=True)
    assert "pip" in error.value.hint


# --- two processes ------------------------------------------------------------------------------


def sh(script: str) -> list[str]:
    return ["sh", "-c", script]


@pytest.fixture
def start():
    """Supervise shell scripts in a process of its own."""
    processes = []

    def _start(*scripts: str, grace: float = 20) -> subprocess.Popen[str]:
        program = (
            "import os, sys\n"
            "from server import superlink\n"
            f"superlink.GRACE_SECONDS = {grace}\n"
            f"commands = {[sh(script) for script in scripts]!r}\n"
            "sys.exit(superlink.supervise(commands, dict(os.environ)))"
        )
        words = [sys.executable, "-c", program]
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        return processes[-1]

    yield _start
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def is_gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody collects (a zombie) has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until_gone(*pids: int) -> None:
    deadline = time.monotonic() + 30
    while not all(is_gone(pid) for pid in pids):
        assert time.monotonic() < deadline, f"still there: {pids}"
        time.sleep(0.02)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_told_to_stop_all_end_the_last_one_first(number, tmp_path, start):
    ended = tmp_path / "ended"
    script = f"trap 'echo NAME >> {ended}; exit' TERM; echo $$; while :; do sleep 0.05; done"
    process = start(script.replace("NAME", "hub"), script.replace("NAME", "executor"))
    pids = [int(first_line(process)), int(first_line(process))]
    process.send_signal(number)
    assert process.wait(30) == 0
    assert ended.read_text().split() == ["executor", "hub"]
    assert all(is_gone(pid) for pid in pids)


def test_under_nohup_they_outlive_their_terminal(start):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        process = start("echo $$; exec sleep 600")
    finally:
        signal.signal(signal.SIGHUP, before)
    pid = int(first_line(process))
    process.send_signal(signal.SIGHUP)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(1)
    assert not is_gone(pid)
    process.terminate()
    assert process.wait(30) == 0


def test_when_one_ends_the_other_ends_too_and_it_is_named(tmp_path):
    pid_file = tmp_path / "pid"
    ending = f"while ! [ -s {pid_file} ]; do sleep 0.02; done; exit 3"
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(FederationError, match=r"^sh ended by itself \(exit code 3\)$") as error:
        superlink.supervise(
            [sh(f"echo $$ > {pid_file}; exec sleep 600"), sh(ending)], {**os.environ}
        )
    assert "port" in error.value.hint
    assert is_gone(int(pid_file.read_text()))
    assert signal.getsignal(signal.SIGTERM) is handler


def test_what_runs_beside_ends_with_the_programs():
    seen = []
    beside_ended = threading.Event()

    def beside(told):
        seen.append(told.wait(30))
        beside_ended.set()

    with pytest.raises(FederationError, match="exit code 0"):
        superlink.supervise([sh("exit 0")], {**os.environ}, beside)
    assert beside_ended.wait(30)
    assert seen == [True]


def test_a_first_program_ends_when_the_second_cannot_start(tmp_path, monkeypatch):
    started = []

    def popen(*words, **named):
        started.append(real(*words, **named))
        return started[-1]

    real = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(FileNotFoundError):
        superlink.supervise([["sleep", "600"], [str(tmp_path / "nothing")]], {**os.environ})
    [first] = started
    assert first.returncode == -signal.SIGTERM


def test_one_that_does_not_listen_is_ended_by_force_with_all_that_it_started(start):
    process = start("trap '' TERM; sleep 601 & echo $$ $!; wait; sleep 602", grace=0.3)
    pids = [int(word) for word in first_line(process).split()]
    process.terminate()
    assert process.wait(30) == 0
    wait_until_gone(*pids)


def test_what_a_program_started_has_time_to_say_goodbye(tmp_path, start):
    said = tmp_path / "said"
    # As flower-superexec: it ends at once, and what it started notices that.
    child = f"while kill -0 $PARENT 2>/dev/null; do sleep 0.05; done; sleep 0.3; echo bye > {said}"
    process = start(
        f"export PARENT=$$; ({child}) & trap exit TERM; echo up; while :; do sleep 0.05; done"
    )
    first_line(process)
    process.terminate()
    assert process.wait(30) == 0
    assert said.read_text() == "bye\n"


def test_nothing_outlives_a_supervisor_that_is_killed(start):
    process = start("trap '' TERM; echo $$; while :; do sleep 0.1; done", "echo $$; exec sleep 603")
    pids = [int(first_line(process)), int(first_line(process))]
    process.kill()
    process.wait(30)
    wait_until_gone(*pids)
