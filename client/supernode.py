"""The child that carries a site's messages: ``flower-supernode``, made to end when it is of no use.

Left alone (flwr 1.41, over TLS) Flower's node takes any error with "ssl" in its text for a wrong
certificate, also a handshake that a network fault cuts. It then leaves its main loop while its
local HTTP server keeps the process: a node that looks alive and never connects again. A heartbeat
thread that dies leaves another such. It takes a piece of a reply of which only the receipt was
lost, or late on a slow line, for one that the coordinator refuses, and gives the whole reply up.
Where a run ends just as its instruction has come, it forgets that an answer will follow, sends
that in place of the next one, and stays an answer behind for ever.

Invariant: this process is connected, trying to connect, or gone; and it does not outlive its
parent. Started by :mod:`client.supervisor` as ``python -m client.supernode PARENT_PID OPTIONS``.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import traceback
from typing import Any, NoReturn

import httpx
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.supercore.retry import RetryInvoker, make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import fleet_http_connection
from flwr.supernode.cli import flower_supernode
from flwr.supernode.fleet_http_client import FleetHttpClient

# What waiting does not mend; every other failure of a connection is tried again.
HOPELESS = ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER")
# Pieces are of 5 MiB and two travel at once; from one to the next a coordinator waits 180 s.
PIECE_SECONDS = 150.0
PUSH_OBJECT = "/v1/fleet/push-object"
PULL_OBJECT = "/v1/fleet/pull-object"
FAILED = 1


def main() -> NoReturn:
    """Run the node with the options of ``flower-supernode`` until it is told to leave or fails."""
    die_with(int(sys.argv.pop(1)))
    threading.excepthook = _end
    for flowers, ours in OURS.items():
        # Read before it is written: an assignment alone would not notice that the name has moved.
        getattr(fleet_http_connection, flowers)
        setattr(fleet_http_connection, flowers, ours)
    try:
        flower_supernode()
    except SystemExit:
        if _broken.is_set():
            os._exit(FAILED)
        raise
    except BaseException:  # Flower's RunNotRunningException is no Exception
        traceback.print_exc()
    # Here the main loop is gone, and other threads would keep the process.
    sys.stderr.flush()
    os._exit(FAILED)


def patient_retries() -> RetryInvoker:
    """Return Flower's retries, without end but for answers and certificates that stay wrong."""
    retries = make_simple_http_retry_invoker()
    by_status = retries.should_giveup
    assert by_status is not None

    def give_up(error: Exception) -> bool:
        if isinstance(error, httpx.TransportError):
            return any(word in str(error) for word in HOPELESS)
        try:
            return by_status(error)
        except RunNotRunningException as over:
            assert isinstance(error, httpx.HTTPStatusError)
            if error.request.url.path == PULL_OBJECT:
                # Flower forgets a message that it fails to fetch, but not for that exception.
                raise ConnectionAbortedError("the run ended while it was fetched") from over
            raise

    retries.should_giveup = give_up
    return retries


class PatientClient(FleetHttpClient):
    """Flower's client, which may lose the receipt for a piece and still knows that it was sent.

    A coordinator takes each piece once and refuses it from then on.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unsure: set[tuple[str, str]] = set()

    def PushObject(self, request: PushObjectRequest) -> PushObjectResponse:  # noqa: N802
        """Send one piece of a reply."""
        piece = (request.session_id, request.object_id)
        try:
            response = super().PushObject(request)
        except httpx.HTTPError:
            self._unsure.add(piece)
            raise
        if piece in self._unsure:
            # If it had not arrived after all, the coordinator misses it and says so.
            response.stored = True
            self._unsure.discard(piece)
        return response

    def ConfirmMessageReceived(  # noqa: N802
        self, request: ConfirmMessageReceivedRequest
    ) -> ConfirmMessageReceivedResponse:
        """Say that an instruction is here, also to a coordinator that has ended its run."""
        try:
            return super().ConfirmMessageReceived(request)
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.FORBIDDEN:
                raise
            # Its answer is on the way already, and the node has to wait for it.
            return ConfirmMessageReceivedResponse()

    def _unary_unary(self, *, path: str, timeout: float | None = None, **rest: Any) -> Any:
        if path == PUSH_OBJECT:
            timeout = PIECE_SECONDS
        return super()._unary_unary(path=path, timeout=timeout, **rest)


OURS = {
    "make_simple_http_retry_invoker": patient_retries,
    "FleetHttpClient": PatientClient,
}


def die_with(parent: int) -> None:
    """Have Linux ask this process to leave when its parent dies, however that dies.

    By SIGTERM, upon which a node tells the coordinator that it goes, so that its successor need
    not wait for the lease (60 s) to end.
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
    if os.getppid() != parent:  # it died before this line
        os._exit(FAILED)


_broken = threading.Event()


def _end(failure: threading.ExceptHookArgs) -> None:
    """Leave as if told to, because a thread has died: without heartbeats a node is offline."""
    threading.__excepthook__(failure)
    _broken.set()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
