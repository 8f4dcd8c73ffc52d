"""Hosting a run in the foreground: submit it to flower-superlink and be its ServerApp.

Invariant: the ServerApp that runs is the installed one in this process; flower-superlink, started
with ``--isolation process`` and a secret, executes nothing and hands the task only to a holder of
that secret.

All private Flower names of this package are in this file (checked against flwr 1.41).
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import time
import tomllib
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import httpx
from flwr.app import Context
from flwr.cli.build import build_fab_from_files
from flwr.cli.typing import SuperLinkConnection
from flwr.cli.utils import init_http_client_from_connection
from flwr.common.serde import (
    context_from_proto,
    fab_to_proto,
    run_from_proto,
    user_config_to_proto,
)
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid import HttpGrid

from strategies.errors import ConfigError, FederationError
from strategies.run_config import RunConfig

log = logging.getLogger(__name__)

POLL_SECONDS = 0.2
CLAIM_SECONDS = 30.0
RECONNECT_SECONDS = 90.0  # flower-superlink gives a run up after 60 s without a sign of life
GOODBYE_SECONDS = 5.0


def superlink_command(*, port: int, secret_file: Path, database: Path) -> list[str]:
    """Return the ``flower-superlink`` command line for one machine, without TLS."""
    return [
        str(Path(sys.executable).with_name("flower-superlink")),
        "--insecure",
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(secret_file)),
        *("--database", str(database)),
        "--disable-runtime-dependency-installation",
    ]


def build_fab() -> bytes:
    """Pack the installed code as a Flower App Bundle; its hash names the code of a run.

    Sites do not execute it. Built from pyproject's ``fab-include`` alone, so that no site file or
    data slips in.

    Raises:
        ConfigError: This installation is not a checkout with its pyproject.toml.
    """
    root = Path(__file__).resolve().parent.parent
    project = root / "pyproject.toml"
    if not project.is_file():
        raise ConfigError(
            "server run needs the project's pyproject.toml beside the server package",
            hint="install with `pip install -e .` in the checkout",
        )
    patterns = tomllib.loads(project.read_text())["tool"]["flwr"]["app"]["fab-include"]
    paths = [project, *(path for pattern in patterns for path in sorted(root.glob(pattern)))]
    return build_fab_from_files({path.relative_to(root).as_posix(): path for path in paths})[0]


def host_run(
    address: str, secret_file: Path, run: RunConfig, main: Callable[[Grid, Context], None]
) -> None:
    """Submit a run and execute ``main`` with its grid, in this process.

    Args:
        address: Of flower-superlink, ``host:port``; loopback, without TLS.
        secret_file: The secret it was started with.
        run: The run's configuration.
        main: The ServerApp.

    Raises:
        ConfigError: The secret cannot be read.
        FederationError: flower-superlink does not answer, or refuses the run or the secret.
    """
    try:
        secret = secret_file.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"secret={secret_file} cannot be read ({error.strerror})",
            hint="start `python -m server superlink` first, with the same --state-dir",
        ) from error
    fab = build_fab()
    fab_hash = hashlib.sha256(fab).hexdigest()
    # Flower's lines reach our log by propagation; its own handler would print them twice.
    logging.getLogger("flwr").handlers.clear()
    with _superlink_errors(address):
        with redirect_stdout(sys.stderr):  # it prints; standard output is for the result
            control = init_http_client_from_connection(
                SuperLinkConnection(name="coordinator", address=address, insecure=True)
            )
        started = control.StartRun(
            StartRunRequest(
                fab=fab_to_proto(Fab(fab_hash, fab, {})),
                override_config=user_config_to_proto(dict(run.flatten())),
            )
        )
        token = _claim(address, secret, started.run_id)
    log.info("submitted flower_run_id=%d code_sha256=%s", started.run_id, fab_hash[:16])
    _serve(address, token, run, main)


def _claim(address: str, secret: bytes, run_id: int) -> str:
    """Claim the ServerApp task of the run just submitted and return its token."""
    executor = RuntimeHttpClient.from_server_address(
        server_address=address,
        insecure=True,
        root_certificates=None,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(
                master_secret=secret,
                protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
            ),
        ],
        retry_invoker=make_simple_http_retry_invoker(),
    )
    deadline = time.monotonic() + CLAIM_SECONDS
    try:
        while time.monotonic() < deadline:
            claim = executor.AcquireTask(
                AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
            )
            if claim.token:
                if claim.task.run_id != run_id:
                    raise FederationError(
                        f"flower-superlink handed out run {claim.task.run_id} before {run_id}",
                        hint="another run was waiting there; start this one again",
                    )
                return claim.token
            time.sleep(POLL_SECONDS)
    finally:
        executor.close()
    raise FederationError(
        f"flower-superlink did not hand out the run within {CLAIM_SECONDS:g} s",
        hint="it must run with --isolation process: `python -m server superlink` does that",
    )


def _serve(address: str, token: str, run: RunConfig, main: Callable[[Grid, Context], None]) -> None:
    grid = HttpGrid(address, insecure=True, token=token)
    # Flower's own retries never end.
    grid._retry_invoker.max_time = RECONNECT_SECONDS
    client = grid._runtime_client
    heartbeat = HeartbeatSender(make_task_heartbeat_fn_http(client))
    heartbeat.start()
    status, details = "failed", "interrupted"
    try:
        task = client.PullTaskInput(PullTaskInputRequest())
        TaskIdentity.task_id = task.task_id
        TaskIdentity.run_id = task.run.run_id
        TaskIdentity.node_id = task.context.node_id
        grid.set_run(run_from_proto(task.run))
        context = context_from_proto(task.context)
        context.run_config = dict(run.flatten())
        main(grid, context)
        status, details = "completed", ""
    except (httpx.HTTPError, RunNotRunningException) as error:
        raise FederationError(
            f"flower-superlink at {address} stopped answering or ended the run",
            hint="see its log, start it again, and continue with --resume",
        ) from error
    except Exception as error:
        details = type(error).__name__
        raise
    finally:
        grid._retry_invoker.max_time = GOODBYE_SECONDS
        try:
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=status, details=details))
        except (httpx.HTTPError, RunNotRunningException):
            log.warning("flower-superlink did not take note of the end of the run")
        heartbeat.stop()
        grid.close()


@contextmanager
def _superlink_errors(address: str) -> Generator[None]:
    """Turn a connection that fails into one line."""
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise FederationError(
            f"flower-superlink at {address} answered HTTP {error.response.status_code}",
            hint="was it started by `python -m server superlink` with the same --state-dir?",
        ) from error
    except httpx.TransportError as error:
        raise FederationError(
            f"flower-superlink at {address} does not answer",
            hint="start it with `python -m server superlink`",
        ) from error
