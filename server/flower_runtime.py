"""Hosting a run in the foreground: submit it to flower-superlink and be its ServerApp.

Invariant: the ServerApp that runs is the installed one in this process; flower-superlink, started
with ``--isolation process`` and a secret, executes nothing and hands the task only to a holder of
that secret. A run that flower-superlink gave up is submitted anew; one that somebody stopped is
not. Flower tells a ServerApp of both by the signal of a Ctrl-C; that is replaced here, so that a
SIGINT in this process comes from a person.

Private Flower names are those of flwr 1.41.
"""

from __future__ import annotations

import logging
import os
import signal
import time
import tomllib
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
from flwr.app import Context
from flwr.cli.build import build_fab_from_files
from flwr.common.constant import SubStatus
from flwr.common.serde import context_from_proto, run_from_proto
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PushTaskOutputRequest,
)
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.protobuf.client import ProtobufClientInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from server import flower_runs
from server.flower_control import Control
from server.flower_grid import RunEndedError, RunGrid, heartbeat, run_retries
from server.flower_runs import RunLostError
from strategies.errors import ConfigError, FederationError, StoppedError
from strategies.run_config import RunConfig

log = logging.getLogger(__name__)

COMPONENT = "flwr-serverapp"  # as Flower's own ServerApp process calls itself
POLL_SECONDS = 0.2
CLAIM_SECONDS = 30.0
CONTROL_SECONDS = 10.0
GOODBYE_SECONDS = 5.0
# A run lost so soon was not lost to a passing outage: those are sat out for longer.
QUICK_LOSS_SECONDS = 60.0
MAX_QUICK_LOSSES = 3
PAUSE_SECONDS = 2.0  # before the next submission; twice as long after each quick loss
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SAME_STATE = "was it started by `python -m server superlink` with the same --state-dir?"

Main = Callable[[Grid, Context], None]


@dataclass(frozen=True)
class _Superlink:
    """How to reach flower-superlink on this machine."""

    address: str
    certificates: bytes
    secret: bytes

    def runtime(self, name: str, *interceptors: ProtobufClientInterceptor) -> RuntimeHttpClient:
        """Open its runtime interface, which does not retry."""
        return RuntimeHttpClient.from_server_address(
            server_address=self.address,
            insecure=False,
            root_certificates=self.certificates,
            interceptors=[RuntimeVersionHttpInterceptor(component_name=name), *interceptors],
        )


def build_fab() -> bytes:
    """Pack the installed code as a Flower App Bundle, without which no run can be submitted.

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


def host_run(*, address: str, ca_file: Path, secret_file: Path, run: RunConfig, main: Main) -> None:
    """Submit a run and execute ``main`` with its grid, in this process.

    When flower-superlink goes away for too long and gives the run up, this waits for it, submits
    again and calls ``main`` again, which continues from its checkpoint. It does so after growing
    pauses, and not for ever when each run is lost soon.

    Args:
        address: Of flower-superlink, ``host:port``.
        ca_file: The authority that its certificate is checked against.
        secret_file: The secret it was started with.
        run: The run's configuration; ``strategy.wait-seconds`` bounds each wait.
        main: The ServerApp.

    Raises:
        ConfigError: The secret or the certificate cannot be read.
        FederationError: flower-superlink does not answer, refuses the run or the secret, or loses
            one run after the other.
        StoppedError: Ctrl-C, SIGTERM or ``flwr stop`` ended the run.
    """
    superlink = _Superlink(address, _read(ca_file), _read(secret_file))
    fab = build_fab()
    # Flower's lines reach our log by propagation; its own handler would print them twice.
    flower = logging.getLogger("flwr")
    flower.handlers.clear()
    flower.setLevel(logging.getLogger().level)
    patience = run.strategy.wait_seconds
    with _superlink_errors(address), Control(address, ca_file) as control, _interruptible():
        control.client._client.timeout = httpx.Timeout(CONTROL_SECONDS)
        quick = 0
        while True:
            submitted = time.monotonic()
            run_id = flower_runs.start(control.client, fab, run)
            try:
                _serve(superlink, control.client, run_id, run, main)
                return
            except RunLostError as lost:
                quick = quick + 1 if time.monotonic() - submitted < QUICK_LOSS_SECONDS else 0
                if quick == MAX_QUICK_LOSSES:
                    raise FederationError(
                        f"flower-superlink lost the run {quick} times in a row, each time within "
                        f"{QUICK_LOSS_SECONDS:g} s; the last time: {lost}",
                        hint="the log of `python -m server superlink` says why",
                    ) from lost
                log.warning(
                    "flower_run_id=%d is lost: %s; waiting up to %g s for flower-superlink, then "
                    "continuing from the checkpoint",
                    run_id,
                    lost,
                    patience,
                )
            time.sleep(PAUSE_SECONDS * 2**quick)
            flower_runs.clear(control.client, run_id, patience=patience)


@contextmanager
def _interruptible() -> Generator[None]:
    """Have a first Ctrl-C, SIGTERM or SIGHUP end the run in order, a second leave at once."""

    def leave(number: int, frame: object) -> None:
        os._exit(StoppedError.exit_code)

    def stop(number: int, frame: object) -> None:
        for each in before:
            signal.signal(each, leave)
        # Not through the log: this may interrupt a line that is being written.
        os.write(2, b"stopping: telling the sites; once more leaves at once\n")
        raise KeyboardInterrupt

    before = {
        number: signal.signal(number, stop)
        for number in SIGNALS
        # nohup means it when it leaves SIGHUP ignored; a shell's `&` does not, with SIGINT.
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    except KeyboardInterrupt:
        raise StoppedError("the run was interrupted") from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(
    superlink: _Superlink, control: ControlHttpClient, run_id: int, run: RunConfig, main: Main
) -> None:
    """Be the ServerApp of a submitted run until it ends, however it ends."""
    try:
        token = _claim(superlink, control, run_id)
        _execute(superlink, token, run, main)
    except RunEndedError as ended:
        raise flower_runs.why_ended(control, run_id) from ended
    except httpx.TransportError as error:
        name = type(error).__name__
        raise RunLostError(f"flower-superlink does not answer ({name})") from error
    except BaseException:  # the sites drop its work
        flower_runs.stop(control, run_id)
        raise


def _claim(superlink: _Superlink, control: ControlHttpClient, run_id: int) -> str:
    """Claim the ServerApp task of the run just submitted and return its token."""
    signed = SuperExecAuthHttpInterceptor(
        master_secret=superlink.secret,
        protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
    )
    request = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
    deadline = time.monotonic() + CLAIM_SECONDS
    with superlink.runtime("SuperExec", signed) as executor:
        while time.monotonic() < deadline:
            claim = executor.AcquireTask(request)
            if claim.token and claim.task.run_id == run_id:
                return claim.token
            if claim.token:
                # Left by a `server run` that was killed before it began. Tasks are handed out
                # oldest first, so it would stand before every later run.
                log.warning("flower_run_id=%d: nobody hosts it; stopped", claim.task.run_id)
                flower_runs.stop(control, claim.task.run_id)
            elif not flower_runs.is_waiting(control, run_id):
                raise FederationError(
                    "another executor took the run from flower-superlink",
                    hint="with `server superlink --executor` start runs by `flwr run`, or start "
                    "the superlink without it",
                )
            else:
                time.sleep(POLL_SECONDS)
    raise FederationError(
        f"flower-superlink did not hand out the run within {CLAIM_SECONDS:g} s",
        hint="it must run with --isolation process: `python -m server superlink` does that",
    )


def _execute(superlink: _Superlink, token: str, run: RunConfig, main: Main) -> None:
    """Call ``main`` as the task that ``token`` stands for."""
    grid = RunGrid(superlink.address, root_certificates=superlink.certificates, token=token)
    grid._retry_invoker = retries = run_retries()
    try:
        with heartbeat(superlink.runtime(COMPONENT, RuntimeTokenHttpInterceptor(token=token))):
            client = grid._runtime_client
            task = client.PullTaskInput(PullTaskInputRequest())
            TaskIdentity.task_id = task.task_id
            TaskIdentity.run_id = task.run.run_id
            TaskIdentity.node_id = task.context.node_id
            grid.set_run(run_from_proto(task.run))
            context = context_from_proto(task.context)
            context.run_config = dict(run.flatten())
            main(grid, context)
            retries.max_time = GOODBYE_SECONDS
            try:
                client.PushTaskOutput(PushTaskOutputRequest(sub_status=SubStatus.COMPLETED))
            except (httpx.HTTPError, RunEndedError):  # all is written: nothing depends on it
                log.warning("flower-superlink did not take note of the end of the run")
    finally:
        retries.max_time = 0.0  # threads that still fetch something give up too
        grid.close()


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read ({error.strerror})",
            hint="`python -m server init` makes the coordinator's state folder",
        ) from error


@contextmanager
def _superlink_errors(address: str) -> Generator[None]:
    """Turn a connection that fails into one line."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        raise FederationError(
            f"flower-superlink at {address} answered HTTP {error.response.status_code}",
            hint=f"its log says why; {SAME_STATE}",
        ) from error
    except httpx.TransportError as error:
        hangs = isinstance(error, httpx.TimeoutException)  # its text may name the TLS handshake
        if not hangs and any(word in str(error).lower() for word in ("certificate", "ssl")):
            raise FederationError(
                f"{address} has no certificate of this federation ({error})", hint=SAME_STATE
            ) from error
        raise FederationError(
            f"flower-superlink at {address} does not answer",
            hint="start it with `python -m server superlink`",
        ) from error
