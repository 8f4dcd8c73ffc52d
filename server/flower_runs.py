"""Flower's runs, through flower-superlink's control interface: start one, stop it, ask about it.

A Flower run carries messages between this process and the sites for as long as flower-superlink
lives; a run of this project may need several (resuming, or a superlink that was away).

Private Flower names are those of flwr 1.41.
"""

from __future__ import annotations

import hashlib
import logging
import time

import httpx
from flwr.common.constant import Status, SubStatus
from flwr.common.serde import fab_to_proto, user_config_to_proto
from flwr.proto.control_pb2 import ListRunsRequest, StartRunRequest, StopRunRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.fab import Fab

from strategies.code import code_sha256
from strategies.errors import StoppedError
from strategies.run_config import RunConfig

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
LEASE_SECONDS = 60.0  # without a sign of life for so long, flower-superlink gives a run up


class RunLostError(Exception):
    """flower-superlink went away or gave the run up; the checkpoint is where to go on."""


def start(client: ControlHttpClient, fab: bytes, run: RunConfig) -> int:
    """Submit a run and return Flower's id of it.

    Args:
        client: Of the control interface.
        fab: The bundle that Flower asks for.
        run: Its configuration.

    Raises:
        httpx.HTTPError: flower-superlink does not answer, or refuses the run.
    """
    fab_hash = hashlib.sha256(fab).hexdigest()
    request = StartRunRequest(
        fab=fab_to_proto(Fab(fab_hash, fab, {})),
        override_config=user_config_to_proto(dict(run.flatten())),
    )
    run_id = client.StartRun(request).run_id
    log.info("submitted flower_run_id=%d code_sha256=%s", run_id, code_sha256()[:16])
    return run_id


def clear(client: ControlHttpClient, run_id: int, *, patience: float) -> None:
    """Wait for flower-superlink to answer, and have it drop the messages of a lost run.

    Asking for a run that has ended does that. A node that still fetched one of them would begin
    work that it never gets the rest of.

    Args:
        client: Of the control interface.
        run_id: The lost run.
        patience: Longest wait in seconds.

    Raises:
        httpx.TransportError: It did not answer.
    """
    deadline = time.monotonic() + patience
    while True:
        try:
            _status(client, run_id)
            return
        except httpx.HTTPStatusError:
            return  # it has forgotten the run
        except httpx.TransportError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(POLL_SECONDS)


def stop(client: ControlHttpClient, run_id: int) -> None:
    """End a run if it can be told; the sites drop its work when they next hear of it."""
    try:
        client.StopRun(StopRunRequest(run_id=run_id))
    except httpx.HTTPError as error:
        log.warning(
            "flower_run_id=%d: flower-superlink was not told of its end (%s); it notices within "
            "%g s",
            run_id,
            type(error).__name__,
            LEASE_SECONDS,
        )


def is_waiting(client: ControlHttpClient, run_id: int) -> bool:
    """Say whether nobody has begun a run yet."""
    return _status(client, run_id).status == Status.PENDING


def why_ended(client: ControlHttpClient, run_id: int) -> RunLostError | StoppedError:
    """Tell a run that somebody stopped from one that flower-superlink gave up."""
    try:
        status = _status(client, run_id)
    except httpx.HTTPStatusError:
        return RunLostError("flower-superlink does not know it; was its database removed?")
    except httpx.TransportError as error:
        return RunLostError(f"flower-superlink does not answer ({type(error).__name__})")
    if status.sub_status == SubStatus.STOPPED:
        return StoppedError("the run was stopped through flower-superlink, as `flwr stop` does")
    return RunLostError(status.details or status.status)


def _status(client: ControlHttpClient, run_id: int):
    return client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id].status
