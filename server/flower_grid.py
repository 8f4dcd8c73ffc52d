"""What a hosted run sends and receives: Flower's grid, bounded in time, size and patience.

Invariant: one call for replies waits no longer than the round, holds no more than a reply can be,
and ends when flower-superlink refuses the run's token.

Private Flower names are those of flwr 1.41.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager

import httpx
from flwr.app import Message
from flwr.common.constant import HEARTBEAT_CALL_TIMEOUT
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.runtime_pb2 import (
    PullAppMessagesRequest,
    PullAppMessagesResponse,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.retry import (
    RetryInvoker,
    RetryState,
    exponential,
    make_simple_http_retry_invoker,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.superlink.grid import HttpGrid

from server.flower_runs import LEASE_SECONDS
from strategies.base import grace_seconds
from strategies.errors import ProtocolError

log = logging.getLogger(__name__)

RETRY_SECONDS = 2
# Flower forgets a reply of which not all came: who waits for it has to have stopped waiting.
MARGIN_SECONDS = 1.0
# A reply holds weights as its instruction did, and metrics; what is far larger is none.
REPLY_FACTOR = 2
REPLY_SPARE_BYTES = 16 * 2**20
PIECE_BYTES = 5 * 2**20  # Flower cuts arrays so
SPARE_PIECES = 64  # the message, its records, and pieces that are not full


class RunEndedError(Exception):
    """flower-superlink refuses the run's token: the run was stopped, or given up."""


class RunGrid(HttpGrid):
    """Flower's grid; it takes of a reply no more, and waits for the whole no longer, than it may.

    Flower's own fetches all that a site has announced, whatever its size and however often it names
    a piece, waits three minutes after each, at most two hours, for what does not come, and takes
    with a reply whatever any site has addressed to flower-superlink itself.
    """

    _deadline = math.inf
    _instruction_bytes = 0

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Push a round's instructions, whose time to live says when it ends."""
        messages = list(messages)
        ttl = max((message.metadata.ttl for message in messages), default=math.inf)
        self._instruction_bytes = max([self._instruction_bytes, *map(_array_bytes, messages)])
        try:
            return super().push_messages(messages)
        finally:
            self._deadline = time.monotonic() + ttl - grace_seconds(len(messages)) + MARGIN_SECONDS

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies; all of one call together have the size of one, so ask for one at a time.

        Raises:
            ProtocolError: A site announces more than a reply can be.
        """
        client = self._runtime_client
        pull_replies, pull = client.PullMessages, client.PullObject
        most = REPLY_FACTOR * self._instruction_bytes + REPLY_SPARE_BYTES
        taken, pieces, is_over = 0, 0, False
        counting = threading.Lock()

        def pull_wanted(request: PullAppMessagesRequest) -> PullAppMessagesResponse:
            response = pull_replies(request)
            wanted = set(request.message_ids)
            found = [
                (message, tree)
                for message, tree in zip(
                    response.messages_list, response.message_object_trees, strict=True
                )
                if message.metadata.reply_to_message_id in wanted
            ]
            return PullAppMessagesResponse(
                messages_list=[message for message, _ in found],
                message_object_trees=[tree for _, tree in found],
            )

        def pull_object(request: PullObjectRequest) -> PullObjectResponse:
            nonlocal taken, pieces, is_over
            response = pull(request)
            with counting:
                taken += len(response.object_content)
                pieces += response.object_available
                if taken > most or pieces > most / PIECE_BYTES + SPARE_PIECES:
                    taken = max(taken, most + 1)
                    raise ObjectPullError(request.object_id, "the reply is too large")
            waiting = response.object_found and not response.object_available
            if waiting and time.monotonic() >= self._deadline:
                is_over = True
                raise ObjectPullError(request.object_id, "the round is over")
            return response

        # Per call: threads of a call that was given up count what they still fetch on its own.
        client.PullMessages, client.PullObject = pull_wanted, pull_object
        try:
            messages = super().pull_messages(message_ids)
        finally:
            client.PullMessages, client.PullObject = pull_replies, pull
        # Flower's own words for either are those for an upload that was broken off.
        if taken > most:
            raise ProtocolError(f"its reply is too large: expected at most {most} bytes")
        return [] if is_over else messages


def _array_bytes(message: Message) -> int:
    records = message.content.array_records.values()
    return sum(len(array.data) for record in records for array in record.values())


def run_retries() -> RetryInvoker:
    """Return how calls are repeated: as Flower's are, but for what its own do badly here.

    Those never end, wait up to 20 s for a superlink that is back after two, and answer a refused
    token with a SIGINT.
    """
    flower = make_simple_http_retry_invoker()

    def should_give_up(error: Exception) -> bool:
        if isinstance(error, httpx.HTTPStatusError) and is_refusal(error):
            raise RunEndedError from error
        return flower.should_giveup is not None and flower.should_giveup(error)

    def on_backoff(state: RetryState) -> None:
        if state.tries == 1:
            log.warning("flower-superlink does not answer (%s)", type(state.exception).__name__)

    def on_success(state: RetryState) -> None:
        if state.tries > 1:
            log.info("flower-superlink answers again after %.0f s", state.elapsed_time)

    def on_give_up(state: RetryState) -> None:
        if isinstance(state.exception, httpx.TransportError):
            retries.max_time = 0.0  # the run is lost: what is still asked need not wait again

    retries = RetryInvoker(
        lambda: exponential(max_delay=RETRY_SECONDS),
        flower.recoverable_exceptions,
        max_tries=None,
        max_time=LEASE_SECONDS,
        on_success=on_success,
        on_backoff=on_backoff,
        on_giveup=on_give_up,
        should_giveup=should_give_up,
    )
    return retries


def is_refusal(error: httpx.HTTPStatusError) -> bool:
    """Say whether flower-superlink refused the token of a call."""
    return error.response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN)


@contextmanager
def heartbeat(client: RuntimeHttpClient) -> Generator[None]:
    """Give signs of life meanwhile, on a connection of its own that gives up soon.

    Args:
        client: That connection, with the run's token; closed at the end.
    """
    client._client.timeout = httpx.Timeout(HEARTBEAT_CALL_TIMEOUT)

    def beat() -> bool:
        try:
            client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
        except httpx.TransportError:
            return False
        except httpx.HTTPStatusError as error:
            return is_refusal(error)  # the main thread meets the same answer at its next call
        return True

    sender = HeartbeatSender(beat)
    sender._retry_invoker.wait_gen_factory = lambda: exponential(max_delay=RETRY_SECONDS)
    sender.start()
    try:
        yield
    finally:
        sender.stop()
        client.close()
