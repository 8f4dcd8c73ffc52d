"""The in-process Grid: the same ServerApp, strategies and ClientApp, without processes or sockets.

Invariant: every message makes the wire round trip (deflate to bytes, inflate), so what works here
works over HTTP, and no two sites share an object. A site works when its reply is asked for, so that
only one reply is in memory at a time. Each node has one Context for the whole run, as a real node
has. A ``fault`` decides what a node's link does to a message: the hook for tests.

The private Flower names of this package are in this file (checked against flwr 1.41).
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from strategies.run_config import Scalar

log = logging.getLogger(__name__)

RUN_ID = 1
SERVER_NODE_ID = 1
ERROR_CODE_CLIENT_APP = 2  # as a real node reports an exception in a ClientApp

Fault = Callable[[str, Message], Literal["deliver", "lose"] | Message]


def no_fault(site: str, message: Message) -> Literal["deliver"]:
    """Deliver every message."""
    return "deliver"


class LocalGrid(Grid):
    """A Grid whose nodes are sites in this process, answered one after the other.

    Args:
        app: The ClientApp.
        sites: Node id to site name.
        run_config: Flattened run configuration that every node holds.
        fault: Given (site, instruction): ``deliver``; ``lose`` the reply; or a Message to deliver
            in place of the site's own reply.
        on_reply: Called with the site after each reply; moves a progress bar.
    """

    def __init__(
        self,
        app: ClientApp,
        sites: Mapping[int, str],
        run_config: Mapping[str, Scalar],
        *,
        fault: Fault = no_fault,
        on_reply: Callable[[str], None] = lambda site: None,
    ) -> None:
        TaskIdentity.task_id, TaskIdentity.run_id = RUN_ID, RUN_ID
        TaskIdentity.node_id = SERVER_NODE_ID
        self._app, self._sites, self._fault, self._on_reply = app, dict(sites), fault, on_reply
        self._contexts = {
            node: Context(
                run_id=RUN_ID,
                node_id=node,
                node_config={"site": site},
                state=RecordDict(),
                run_config=dict(run_config),
                series_id=RUN_ID,
            )
            for node, site in sites.items()
        }
        self._waiting: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=RUN_ID)

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run this grid operates in."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Make a message, as Flower's own grids do."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return all nodes: they are always connected."""
        return list(self._sites)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return all nodes with the sites' names, as a superlink has registered them."""
        return [NodeInfo(node_id=node, name=site) for node, site in self._sites.items()]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Accept messages for the nodes; returns one id per message, in order."""
        message_ids: list[str] = []
        for message in messages:
            message_id = uuid.uuid4().hex
            message.metadata.__dict__["_message_id"] = message_id
            message_ids.append(message_id)
            self._waiting[message_id] = message
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Have the sites answer these messages and hand over their replies."""
        replies: list[Message] = []
        for message_id in message_ids:
            message = self._waiting.pop(message_id, None)
            if message is not None:
                site = self._sites[message.metadata.dst_node_id]
                reply = self._deliver(site, message)
                if reply is not None:
                    replies.append(reply)
                self._on_reply(site)
        return replies

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push messages and pull their replies."""
        return self.pull_messages(self.push_messages(messages))

    def _deliver(self, site: str, message: Message) -> Message | None:
        decision = self._fault(site, message)
        if isinstance(decision, Message):
            return decision
        received = Message(  # pyright: ignore[reportCallIssue]  # the overload is private
            metadata=message.metadata,
            content=_over_the_wire(message.content),
        )
        try:
            reply = self._app(received, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            log.exception("site=%s raised", site)
            reply = Message(Error(ERROR_CODE_CLIENT_APP, str(error)), reply_to=message)
        if decision == "lose":
            return None
        if reply.has_content():
            reply.content = _over_the_wire(reply.content)
        return reply


def _over_the_wire(content: RecordDict) -> RecordDict:
    """Return what arrives when this content is sent: new objects from bytes."""
    parts = get_all_nested_objects(content)
    received = inflate_object_from_contents(
        content.object_id, {name: part.deflate() for name, part in parts.items()}
    )
    assert isinstance(received, RecordDict)
    return received
