"""The site's node: Flower's SuperNode as a transport, our installed ClientApp as the only code.

Invariant: code shipped by a run is never unpacked or executed. The SuperNode runs with
``--isolation process``: it fetches messages and waits for an executor to claim them over a
loopback port protected by a secret; the executor is this process, and it calls ``client.app``.

All private Flower names of this package are in this file (checked against flwr 1.41).
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from flwr.app import Context, Error, Message
from flwr.proto.runtime_pb2 import AcquireTaskRequest
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message, push_task_output

from client.app import app
from client.site import Site, register
from strategies.errors import ConfigError, FederationError
from strategies.files import held, write_atomic

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
GRACE_SECONDS = 10
PATIENCE_SECONDS = 10
RETRY_SECONDS = 10.0
GOODBYE_SECONDS = 2.0
ERROR_CODE_CLIENT_APP = 2  # Flower's own code for an exception in a ClientApp


def run_node(site: Site) -> None:
    """Connect the site and answer instructions until the process is told to stop.

    Raises:
        ConfigError: Flower is not installed beside this Python, or the site is running already.
        FederationError: The SuperNode ended without being asked to.
    """
    register(site)
    state_dir = site.config.state_dir
    refusal = ConfigError(
        f"state-dir={state_dir} is in use: this site is running already",
        hint="stop the other `python -m client` first",
    )
    with held(state_dir / "node.lock", refusal):
        _serve(site)


def _serve(site: Site) -> None:
    # Flower's lines reach our log by propagation; its own handler would print them twice.
    logging.getLogger("flwr").handlers.clear()
    secret = secrets.token_bytes(32)
    secret_file = site.config.state_dir / "executor.secret"
    write_atomic(secret_file, secret, mode=0o600)
    port = _free_port()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with _supernode(site, port, secret_file) as (node, node_log):
        log.info("site=%s connecting superlink=%s", site.name, site.config.superlink)
        client = RuntimeHttpClient.from_server_address(
            server_address=f"127.0.0.1:{port}",
            insecure=True,
            root_certificates=None,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperExec"),
                SuperExecAuthHttpInterceptor(
                    master_secret=secret,
                    protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
                ),
            ],
        )
        request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
        connection = _Connection(site, node_log)
        while node.poll() is None:
            connection.tell()
            try:
                claim = client.AcquireTask(request)
            except httpx.HTTPError:  # the SuperNode is still starting, busy, or just ended
                time.sleep(POLL_SECONDS)
                continue
            if claim.token:
                _execute(site, port, claim.token)
            else:
                time.sleep(POLL_SECONDS)
    raise FederationError(
        f"the connection to superlink={site.config.superlink} ended (SuperNode exit code "
        f"{node.returncode}: {_last_line(node_log)})",
        hint=f"is flower-superlink running there? The full log is {node_log.name} in the state "
        "folder",
    )


def _execute(site: Site, port: int, token: str) -> None:
    """Answer one instruction with the installed ClientApp."""
    # Flower's own retries never end, and the SuperNode is a process of this machine.
    retries = make_simple_http_retry_invoker()
    retries.max_time = RETRY_SECONDS
    client = RuntimeHttpClient.from_server_address(
        server_address=f"127.0.0.1:{port}",
        insecure=True,
        root_certificates=None,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
            RuntimeTokenHttpInterceptor(token),
        ],
        retry_invoker=retries,
    )
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    context: Context | None = None
    status, details = "failed", "not executed"
    try:
        message, context, _, _ = pull_task_input(client)
        try:
            reply = app(message, context)
            status, details = "completed", ""
        except Exception as error:
            details = type(error).__name__
            reply = Message(Error(ERROR_CODE_CLIENT_APP, details), reply_to=message)
        push_message(client, reply, context)
    except (Exception, RunNotRunningException) as error:
        # The run was stopped or the link is down: the next task is asked for as usual.
        log.warning("site=%s reply not delivered: %s", site.name, type(error).__name__)
        log.debug("traceback", exc_info=True)
    finally:
        retries.max_time = GOODBYE_SECONDS
        with suppress(httpx.HTTPError, RunNotRunningException):
            push_task_output(client, context, status, details)
        heartbeat.stop()
        client.close()


class _Connection:
    """Tells once that the SuperNode reached the coordinator, or that it has not for a while."""

    def __init__(self, site: Site, node_log: Path) -> None:
        self._site, self._log = site, node_log
        self._connected = self._warned = False
        self._started = time.monotonic()

    def tell(self) -> None:
        """Look at the SuperNode's log and say what has changed."""
        if self._connected:
            return
        if "SuperNode ID" in self._log.read_text(errors="replace"):
            self._connected = True
            log.info("site=%s connected", self._site.name)
        elif not self._warned and time.monotonic() - self._started > PATIENCE_SECONDS:
            self._warned = True
            log.warning(
                "site=%s superlink=%s does not answer yet; still trying",
                self._site.name,
                self._site.config.superlink,
            )


@contextmanager
def _supernode(
    site: Site, port: int, secret_file: Path
) -> Generator[tuple[subprocess.Popen[bytes], Path]]:
    """Run ``flower-supernode`` as a child that never outlives this process."""
    program = Path(sys.executable).with_name("flower-supernode")
    if not program.exists():
        raise ConfigError(
            f"{program.name} is not beside {Path(sys.executable).name}",
            hint="install this project with pip into the Python that runs it",
        )
    command = [
        str(program),
        "--insecure",
        *("--superlink", site.config.superlink),
        *("--isolation", "process"),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
        *("--superexec-auth-secret-file", str(secret_file)),
        *("--node-config", f'site="{site.name}"'),
    ]
    home = site.config.state_dir / "flower"
    home.mkdir(exist_ok=True)
    node_log = site.config.state_dir / "supernode.log"
    with node_log.open("wb") as output:
        node = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "FLWR_HOME": str(home)},
            preexec_fn=_die_with_parent,
        )
    try:
        yield node, node_log
    finally:
        node.terminate()
        try:
            node.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            node.kill()
            node.wait()


def _die_with_parent() -> None:
    """Ask Linux to end this child when its parent dies, however it dies."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _last_line(path: Path) -> str:
    # Without Flower's colours.
    lines = re.sub(r"\x1b\[[0-9;]*m", "", path.read_text(errors="replace")).splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")
