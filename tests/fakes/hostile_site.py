"""An admitted site with a program of its own: it speaks Flower's fleet calls as it likes.

It has what every admitted site has, its node key and its signing key, and what none should have:
other sites' node ids and the ids of the messages to them, as somebody who read the coordinator's
database would.
"""

from __future__ import annotations

import sqlite3
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

import httpx
import numpy as np
from flwr.app import Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.common.serde import message_to_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import make_pull_object_fn_protobuf
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents, pull_objects
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.site_config import NODE_KEY, SIGNING_KEY
from fakes.federations import Federation
from fakes.orders import unverified
from strategies.evaluation import EvaluationSums
from strategies.identity import load_node_key, load_signing_key
from strategies.records import Instruction, Reply

T = TypeVar("T")

HEARTBEAT_SECONDS = 30.0
POLL_SECONDS = 0.05
NUM_EXAMPLES = 50


@dataclass
class Asked:
    """One instruction that the hostile site got."""

    message: Message
    instruction: Instruction


Misdeed = Callable[["HostileSite", Asked], None]


class HostileSite:
    """A node of its own making, connected as an admitted site.

    Attributes:
        plan: What it does with the instruction to train in a round; it is honest in all others.
        failures: Exceptions of its misdeeds, which a test should look at.
        kept: Its replies by round, to be replayed.
        heard: The instructions to train that it got, by round.
    """

    def __init__(self, federation: Federation, name: str) -> None:
        self.federation, self.name = federation, name
        state = federation.state(name)
        self.signing_key = load_signing_key(state / SIGNING_KEY)
        node_key = load_node_key(state / NODE_KEY)
        self.public_key = public_key_to_bytes(node_key.public_key())
        self.fleet = fleet_client(federation, name)
        self.plan: Mapping[int, Misdeed] = {}
        self.failures: list[BaseException] = []
        self.kept: dict[int, RecordDict] = {}
        self.heard: dict[int, RecordDict] = {}
        self.node = Node()
        self._done = threading.Event()
        self._threads = [
            threading.Thread(target=work, daemon=True) for work in (self._serve, self._live)
        ]

    # --- being a node ----------------------------------------------------------------------------

    def start(self) -> None:
        """Connect, and answer from now on in a thread."""
        request = ActivateNodeRequest(
            public_key=self.public_key, heartbeat_interval=HEARTBEAT_SECONDS
        )
        self.node = Node(node_id=self.fleet.ActivateNode(request).node_id)
        for thread in self._threads:
            thread.start()

    @property
    def stopped(self) -> bool:
        """Whether it has left."""
        return self._done.is_set()

    def stop(self) -> None:
        """Leave as a node does."""
        self._done.set()
        for thread in self._threads:
            thread.join()
        with self.fleet, suppress(httpx.HTTPError):
            self.fleet.DeactivateNode(DeactivateNodeRequest(node_id=self.node.node_id))

    def _live(self) -> None:
        request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_SECONDS)
        while not self._done.wait(HEARTBEAT_SECONDS / 3):
            with suppress(httpx.HTTPError):
                self.fleet.SendNodeHeartbeat(request)

    def _serve(self) -> None:
        while not self._done.wait(POLL_SECONDS):
            try:
                message = self._pull()
            except httpx.HTTPError:  # the superlink has gone, or turned this site away
                continue
            if message is None:
                continue
            asked = Asked(message, unverified(message.content))
            server_round, task = asked.instruction.server_round, asked.instruction.task
            misdeed = honest
            if task == "train":
                self.heard[server_round] = message.content
                misdeed = self.plan.get(server_round, honest)
            try:
                misdeed(self, asked)
            except BaseException as error:
                self.failures.append(error)

    def _pull(self) -> Message | None:
        response = self.fleet.PullMessages(PullMessagesRequest(node=self.node))
        if not response.messages_list:
            return None
        proto, tree = response.messages_list[0], response.message_object_trees[0]
        pull = make_pull_object_fn_protobuf(self.fleet.PullObject, self.node, proto.metadata.run_id)
        objects = pull_objects([part.object_id for part in iterate_object_tree(tree)], pull)
        message = inflate_object_from_contents(proto.metadata.message_id, objects)
        assert isinstance(message, Message)
        message.metadata.__dict__["_message_id"] = proto.metadata.message_id
        return message

    # --- what it may say -------------------------------------------------------------------------

    def reply(self, asked: Asked, **changes) -> Reply:
        """A reply that is as it should be, but for what is changed."""
        instruction = asked.instruction
        train = instruction.task == "train"
        classes = instruction.order.run.model.num_classes
        generator = np.random.default_rng(instruction.server_round)
        labels = generator.integers(0, classes, NUM_EXAMPLES)
        sums = EvaluationSums.from_logits(generator.normal(size=(NUM_EXAMPLES, classes)), labels)
        numbers = {
            "train-loss": 1.0,
            "num-steps": 1,
            "seconds": 0.1,
            "learning-rate": 1e-3,
            "scan-backend": 0,
        }
        values = {
            "site": self.name,
            "federation": instruction.federation,
            "run_uuid": instruction.run_uuid,
            "server_round": instruction.server_round,
            "task": instruction.task,
            "message_id": asked.message.metadata.message_id,
            "num_examples": NUM_EXAMPLES,
            "update": {
                name: np.full_like(value, 1e-4) for name, value in instruction.weights.items()
            }
            if train
            else {},
            "metrics": {
                **(numbers if train else {}),
                **sums.to_metrics("val" if train else instruction.task),
            },
        }
        return Reply(**{**values, **changes})

    def content(self, asked: Asked, **changes) -> RecordDict:
        """That reply, signed by this site."""
        return self.reply(asked, **changes).to_content(self.signing_key)

    # --- saying it -------------------------------------------------------------------------------

    def send(
        self,
        asked: Asked,
        content: RecordDict,
        *,
        as_node: int | None = None,
        answers: str | None = None,
    ) -> bool:
        """Push an answer as a SuperNode does; False: flower-superlink took no note of it.

        Args:
            asked: Answered by it.
            content: Of the answer.
            as_node: In whose name; this node's by default.
            answers: The id of the message that it claims to answer; ``asked``'s by default.
        """
        message = Message(content, reply_to=asked.message)
        if as_node is not None:
            message.metadata.__dict__["_src_node_id"] = as_node
        if answers is not None:
            message.metadata.__dict__["_reply_to_message_id"] = answers
        return self.push(message)

    def instruct(self, node_id: int, content: RecordDict, asked: Asked) -> bool:
        """Push an instruction to another node, as if it were the superlink."""
        message = self.to_superlink(content, asked)
        message.metadata.__dict__["_dst_node_id"] = node_id
        return self.push(message)

    def to_superlink(self, content: RecordDict, asked: Asked) -> Message:
        """Make a message that flower-superlink seems to send to itself."""
        message = Message(content, reply_to=asked.message)
        metadata = message.metadata.__dict__
        metadata["_src_node_id"] = metadata["_dst_node_id"] = SUPERLINK_NODE_ID
        metadata["_reply_to_message_id"] = ""
        return message

    def push(
        self,
        message: Message,
        *,
        upload: Callable[[str, bytes], bytes | None] = lambda object_id, content: content,
    ) -> bool:
        """Announce a message and upload what flower-superlink then asks for, if anything.

        Args:
            message: Complete.
            upload: Given an object's id and content: what to upload for it, None for nothing.
        """
        with no_object_id_recompute():
            message.metadata.__dict__["_message_id"] = message.object_id
            objects = {
                object_id: part.deflate()
                for object_id, part in get_all_nested_objects(message).items()
            }
            return self.announce(message, get_object_tree(message), objects, upload)

    def announce(
        self,
        message: Message,
        tree: ObjectTree,
        objects: Mapping[str, bytes],
        upload: Callable[[str, bytes], bytes | None] = lambda object_id, content: content,
    ) -> bool:
        """Announce a message with any tree of objects, whether or not they are its own."""
        bare = message if message.has_error() else remove_content_from_message(message)
        request = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(bare)],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.1],
        )
        response = patiently(lambda: self.fleet.PushMessages(request))
        for object_id in response.objects_to_push:
            content = upload(object_id, objects[object_id])
            if content is not None:
                self.fleet.PushObject(
                    PushObjectRequest(
                        node=self.node,
                        run_id=message.metadata.run_id,
                        object_id=object_id,
                        object_content=content,
                        session_id=response.session_id,
                    )
                )
        return bool(response.objects_to_push)

    # --- what it should not know -----------------------------------------------------------------

    def has_answered(self, other: str, asked: Asked) -> bool:
        """Whether another site's answer to the same question lies at the superlink."""
        with self._database() as connection:
            found = connection.execute(
                "SELECT 1 FROM message_res WHERE reply_to_message_id = ?",
                (self.message_to(other, asked),),
            ).fetchone()
        return found is not None

    def _database(self) -> sqlite3.Connection:
        path = self.federation.server_state / "superlink.sqlite"
        return sqlite3.connect(f"file:{path}?mode=ro", uri=True)

    def message_to(self, other: str, asked: Asked) -> str:
        """The id of the message to another site that asks for the same."""
        with self._database() as connection:
            found = connection.execute(
                "SELECT message_id FROM message_ins WHERE dst_node_id = ? AND group_id = ? "
                "AND message_type = ? ORDER BY created_at DESC",
                (
                    signed64(self.federation.nodes()[other].node_id),
                    asked.message.metadata.group_id,
                    asked.message.metadata.message_type,
                ),
            ).fetchone()
        return found[0]


def fleet_client(federation: Federation, site: str, address: str = "") -> FleetHttpClient:
    """Flower's client of the fleet calls, with a site's node key; close it.

    Args:
        federation: Whose superlink is called.
        site: Whose key.
        address: Where, if not at the superlink itself.
    """
    key = load_node_key(federation.state(site) / NODE_KEY)
    return FleetHttpClient.from_server_address(
        address or f"127.0.0.1:{federation.port}",
        insecure=False,
        root_certificates=(federation.server_state / "ca.pem").read_bytes(),
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
    )


def honest(site: HostileSite, asked: Asked) -> None:
    """Answer as an honest site does; the answer is kept."""
    content = site.content(asked)
    if asked.instruction.task == "train":
        site.kept[asked.instruction.server_round] = content
    site.send(asked, content)


def patiently(call: Callable[[], T]) -> T:
    """Make a call again where flower-superlink failed, as it once did under load: no misdeed."""
    for seconds in (1, 2, 4, 8):
        try:
            return call()
        except httpx.HTTPStatusError as error:
            if error.response.status_code != httpx.codes.INTERNAL_SERVER_ERROR:
                raise
        time.sleep(seconds)
    return call()


def status_of(call: Callable[[], object]) -> int:
    """The HTTP status that refuses a call; 200 for one that is answered."""
    try:
        call()
    except httpx.HTTPStatusError as error:
        return error.response.status_code
    return 200


def signed64(number: int) -> int:
    """As SQLite keeps Flower's unsigned ids."""
    return number - 2**64 if number >= 2**63 else number
