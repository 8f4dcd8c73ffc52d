"""flower-superlink as this project runs it, and Flower's executor where it is asked for.

Flower's defaults suit a laptop: an open port, code that anybody may start, packages installed for
it from the internet. Here flower-superlink has TLS and a database, knows its nodes by their keys,
listens on this machine alone (gateway.py has the way in), and executes nothing: it hands tasks to a
holder of the secret.

Invariant: what is printed is what runs. Both programs end together, and none outlives this process.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from server.app import CODE_VARIABLE, STATE_VARIABLE
from server.federation import Federation
from server.nodes import synchronise_when_up
from strategies.errors import ConfigError, FederationError
from strategies.files import write_atomic

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
# flower-superlink waits for open connections; Flower keeps them open.
GRACE_SECONDS = 10.0
CONNECTION = "hospitals"


def superlink_command(federation: Federation) -> list[str]:
    """Return the ``flower-superlink`` command line; it takes :func:`superlink_environment`."""
    return [
        _program("flower-superlink"),
        *("--host", "127.0.0.1"),
        *("--port", str(federation.port)),
        *("--ssl-certfile", str(federation.server_certificate_file.resolve())),
        *("--ssl-keyfile", str(federation.server_key_file.resolve())),
        *("--ssl-ca-certfile", str(federation.ca_file.resolve())),
        "--enable-supernode-auth",
        *("--database", str(federation.database_file.resolve())),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(federation.secret_file.resolve())),
        "--disable-runtime-dependency-installation",
    ]


def executor_command(federation: Federation) -> list[str]:
    """Return the ``flower-superexec`` command line; it takes :func:`executor_environment`."""
    return [
        _program("flower-superexec"),
        *("--runtime-api-address", federation.superlink_address),
        *("--root-certificates", str(federation.ca_file.resolve())),
        *("--superexec-auth-secret-file", str(federation.secret_file.resolve())),
    ]


def superlink_environment(federation: Federation) -> dict[str, str]:
    """Return what flower-superlink needs in its environment beside what is there."""
    return {
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # Flower's former interfaces would listen on every interface of this machine.
        "FLWR_INTERNAL_GRPC_CONTROL_API": "0",
        "FLWR_INTERNAL_GRPC_FLEET_API": "0",
        "FLWR_HOME": str(federation.flower_home.resolve()),
    }


def executor_environment(federation: Federation) -> dict[str, str]:
    """Return what flower-superexec, and the ServerApp that it starts, need besides."""
    programs = str(Path(sys.executable).parent)
    return {
        **superlink_environment(federation),
        # It starts flwr-serverapp by that name alone.
        "PATH": os.pathsep.join([programs, os.environ.get("PATH", os.defpath)]),
        STATE_VARIABLE: str(federation.state_dir.resolve()),
        # What is installed, for server/app.py: Flower puts the code that a run brings first.
        CODE_VARIABLE: str(Path(__file__).resolve().parent.parent),
    }


def described(federation: Federation, *, executor: bool) -> str:
    """Return the command lines as a shell takes them, one a line."""
    superlink = superlink_environment(federation), superlink_command(federation)
    parts = [superlink]
    if executor:
        parts.append((executor_environment(federation), executor_command(federation)))
    return "\n".join(
        shlex.join(["env", *(f"{name}={value}" for name, value in environment.items()), *command])
        for environment, command in parts
    )


def serve(federation: Federation, *, executor: bool) -> int:
    """Run flower-superlink, and the executor if wanted, until told to stop.

    Args:
        federation: Whose superlink this is.
        executor: Also claim and run what ``flwr run . hospitals`` submits. Flower's control
            interface asks nobody who they are: every user of this machine can submit.

    Returns:
        0 when told to stop.

    Raises:
        ConfigError: Flower's programs are not beside this Python.
        FederationError: A program ended without being asked to.
    """
    commands = [superlink_command(federation)]
    if executor:
        commands.append(executor_command(federation))
    for program, *_ in commands:
        if not Path(program).exists():
            raise ConfigError(
                f"{Path(program).name} is not beside {Path(sys.executable).name}",
                hint="install this project with pip into the Python that runs it",
            )
    federation.flower_home.mkdir(mode=0o700, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    environment = {**os.environ, **superlink_environment(federation)}
    if executor:
        environment |= executor_environment(federation)
        write_connection(federation)
        log.warning(
            "executor on: every user of this machine can run code as this user, through port %d",
            federation.port,
        )
    # Sites may have been admitted or revoked while flower-superlink was down.
    return supervise(commands, environment, partial(synchronise_when_up, federation))


def write_connection(federation: Federation) -> None:
    """Tell Flower's own commands the way: ``FLWR_HOME=STATE/flower flwr run . hospitals``."""
    quoted = json.dumps  # TOML's basic strings are JSON's
    write_atomic(
        federation.flower_home / "config.toml",
        f"[superlink]\ndefault = {quoted(CONNECTION)}\n\n[superlink.{CONNECTION}]\n"
        f"address = {quoted(federation.superlink_address)}\n"
        f"root-certificates = {quoted(str(federation.ca_file.resolve()))}\n",
    )


def supervise(
    commands: list[list[str]],
    environment: dict[str, str],
    beside: Callable[[threading.Event], None] | None = None,
) -> int:
    """Run programs until SIGTERM or SIGINT, or until one ends; then end all, last one first.

    Each is the head of a process group, so that what it started ends with it.

    Args:
        commands: The programs' command lines.
        environment: Of all of them.
        beside: Called in a thread once they are started, with the event that ends it.

    Returns:
        0 when told to stop.

    Raises:
        FederationError: One ended by itself; this names it.
    """
    told = threading.Event()
    handlers = {
        number: signal.signal(number, lambda *_: told.set())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        # nohup means it when it leaves SIGHUP ignored; a shell's `&` does not, with SIGINT.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    }
    children: list[subprocess.Popen[bytes]] = []
    ended: list[str] = []
    try:
        for command in commands:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                env=environment,
                process_group=0,  # the terminal's Ctrl-C is for this process
                preexec_fn=_die_with(os.getpid()),
            )
            children.append(child)
        if beside is not None:
            threading.Thread(target=beside, args=(told,), daemon=True).start()
        while not ended and not told.wait(POLL_SECONDS):
            ended = [
                f"{Path(program).name} ended by itself (exit code {child.returncode})"
                for child, (program, *_) in zip(children, commands, strict=True)
                if child.poll() is not None
            ]
    finally:
        told.set()
        for child in reversed(children):
            _end(child)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if ended:
        raise FederationError(
            "; ".join(ended), hint="its last lines are above; is the port taken by another?"
        )
    return 0


def _end(child: subprocess.Popen[bytes]) -> None:
    """Ask a child to end, wait for all that it started, end by force what is left."""
    # flwr-serverapp sees its parent end and reports; a signal besides would cut that short.
    child.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    with suppress(ProcessLookupError):  # nobody is left in the group
        while time.monotonic() < deadline:
            child.poll()
            os.killpg(child.pid, 0)
            time.sleep(POLL_SECONDS)
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _die_with(parent: int) -> Callable[[], None]:
    """Return what a child calls first: Linux is to end it when its parent dies, however it dies."""
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def call() -> None:
        if prctl is not None:
            pr_set_pdeathsig = 1
            prctl(pr_set_pdeathsig, signal.SIGKILL)
            if os.getppid() != parent:  # it died before the line above
                os._exit(1)

    return call


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))
