"""Faults of a federation in one process: links that do to messages what a fault does.

Server, strategy and sites are the real ones, on the in-process Grid.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

from flwr.app import Message

from fakes.orders import unverified
from simulation.grid import LocalGrid

GRID = "simulation.experiment.LocalGrid"  # where an experiment takes its grid from
PATIENCE = 60.0


def audited(log: Path, event: str) -> list[dict[str, Any]]:
    """Return what an audit log says of one kind of event, in order."""
    entries = map(json.loads, log.read_text().splitlines())
    return [entry["fields"] for entry in entries if entry["event"] == event]


@dataclass
class Here:
    """What is at work now: an experiment's ``fault`` that only looks.

    Attributes:
        site: Whose program answers, and the task and round that it answers.
        seen: All (site, task, round) so far, in order.
    """

    site: str = ""
    task: str = ""
    server_round: int = 0
    seen: list[tuple[str, str, int]] = field(default_factory=list)

    def __call__(self, site: str, message: Message) -> str:
        asked = unverified(message.content)
        self.site, self.task, self.server_round = site, asked.task, asked.server_round
        self.seen.append((site, asked.task, asked.server_round))
        return "deliver"

    def at(self, site: str, *server_rounds: int) -> bool:
        """Say whether this site trains now, in one of these rounds where any are given."""
        rounds = server_rounds or (self.server_round,)
        return (self.site, self.task) == (site, "train") and self.server_round in rounds


class Straggler(LocalGrid):
    """Site B is at work on round 1 until round 2 has begun; its answers wait until asked for.

    Attributes:
        late: Answers of B that nobody has asked for, by the instruction's id.
        told_of_round_2: Set when all sites have the instructions of round 2.
    """

    slow = "B"

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.late: dict[str, Message | None] = {}
        self.told_of_round_2 = threading.Event()
        self._one_at_a_time = threading.Lock()  # the sites of a simulation share one model
        self._inbox: Queue[tuple[str, Message]] = Queue()
        threading.Thread(target=self._work, daemon=True).start()

    def push_messages(self, messages):
        messages = list(messages)
        message_ids = list(super().push_messages(messages))
        if unverified(messages[0].content).server_round == 2:
            self.told_of_round_2.set()
        for key, message in zip(message_ids, messages, strict=True):
            if self._sites[message.metadata.dst_node_id] == self.slow:
                self._inbox.put((key, self._waiting.pop(key)))
        return message_ids

    def pull_messages(self, message_ids):
        message_ids = list(message_ids)
        found = [self.late.pop(key) for key in message_ids if key in self.late]
        return [reply for reply in found if reply is not None] or super().pull_messages(message_ids)

    def _work(self) -> None:
        while True:
            key, message = self._inbox.get()
            if unverified(message.content).server_round == 1:
                self.told_of_round_2.wait(PATIENCE)
            self.late[key] = self._deliver(self.slow, message)

    def _deliver(self, site: str, message: Message) -> Message | None:
        with self._one_at_a_time:
            return super()._deliver(site, message)


class Absent(LocalGrid):
    """Only some sites are connected.

    Attributes:
        connected: Says whether a site is, at this moment.
    """

    connected: Callable[[str], bool] = staticmethod(lambda site: True)

    def get_nodes(self):
        return [node for node in super().get_nodes() if self.connected(node.name)]


class Replaying(LocalGrid):
    """Everybody's answers are overheard, and one node sends what it likes.

    Attributes:
        heard: Real answers by (site, task, round).
        send: Given the site, the instruction, its real answer and what was heard: what arrives.
    """

    send: Callable[..., list[Message]] = staticmethod(lambda site, message, reply, heard: [reply])

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.heard: dict[tuple[str, str, int], Message] = {}

    def pull_messages(self, message_ids):
        replies: list[Message] = []
        for key in message_ids:
            message = self._waiting.get(key)
            for reply in super().pull_messages([key]):
                assert message is not None
                site, asked = self._sites[message.metadata.dst_node_id], unverified(message.content)
                self.heard[site, asked.task, asked.server_round] = reply
                replies += self.send(site, message, reply, self.heard)
        return replies
