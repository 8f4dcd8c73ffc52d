"""Sites that answer what a test writes; every message makes Flower's wire round trip."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message, RecordDict

from fakes.orders import ORDER_KEY, order, unverified
from simulation.grid import LocalGrid
from strategies.arrays import Arrays
from strategies.audit import AuditLog
from strategies.base import SiteKeys
from strategies.evaluation import EvaluationSums
from strategies.fedavg import FedAvg
from strategies.records import Reply
from strategies.run_config import RunConfig

SITES = ("A", "B", "C")
PRIVATE = {site: Ed25519PrivateKey.generate() for site in SITES}
KEYS = {site: key.public_key() for site, key in PRIVATE.items()}
NODES = {11: "A", 12: "B", 13: "C"}
NODE_OF = {site: node for node, site in NODES.items()}
CAP = 1000

NUM_EXAMPLES = {"A": 10, "B": 300, "C": 7}

Answer = Callable[[str, Message], RecordDict | Message]


def weights() -> Arrays:
    return {
        "stem.weight": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
        "head.bias": np.array([0.1, -0.2], np.float32),
    }


def update(site: str) -> Arrays:
    generator = np.random.default_rng(ord(site))
    return {k: generator.normal(size=v.shape).astype(np.float32) for k, v in weights().items()}


def sums(site: str, num_examples: int = 5) -> EvaluationSums:
    generator = np.random.default_rng(ord(site))
    labels = generator.integers(0, 3, num_examples)
    return EvaluationSums.from_logits(generator.normal(size=(num_examples, 3)), labels)


def good(site: str, message: Message, **changes) -> Reply:
    """The reply of a site that works."""
    instruction = unverified(message.content)
    train = instruction.task == "train"
    numbers = {
        "train-loss": 0.5,
        "num-steps": 2,
        "seconds": 0.1,
        "learning-rate": 1e-3,
        "scan-backend": 1,
    }
    return replace(
        Reply(
            site=site,
            federation=instruction.federation,
            run_uuid=instruction.run_uuid,
            server_round=instruction.server_round,
            task=instruction.task,
            message_id=message.metadata.message_id,
            num_examples=NUM_EXAMPLES[site] if train else sums(site).num_examples,
            update=update(site) if train else {},
            metrics={
                **(numbers if train else {}),
                **sums(site).to_metrics("val" if train else instruction.task),
            },
        ),
        **changes,
    )


def signed(site: str, message: Message, **changes) -> RecordDict:
    return good(site, message, **changes).to_content(PRIVATE[site])


def silent(site: str, message: Message) -> RecordDict:
    """A site whose reply is lost."""
    return RecordDict()


def changed_update(change: Callable[[Arrays], Arrays]) -> Answer:
    return lambda site, message: signed(site, message, update=change(update(site)))


def poke(value: float) -> Answer:
    def change(arrays):
        arrays["stem.weight"][1, 2] = value
        return arrays

    return changed_update(change)


class Sites(LocalGrid):
    """Nodes that answer as the test says.

    Args:
        answers: Site to what it answers, content or a whole message; the others work.
        nodes: Node id to the name that it is registered under.
        delays: Site to seconds before its reply arrives.

    Attributes:
        instructions: All that were sent, in order.
    """

    def __init__(
        self,
        answers: dict[str, Answer] | None = None,
        nodes: dict[int, str] = NODES,
        delays: dict[str, float] | None = None,
    ) -> None:
        super().__init__(self._answer, nodes, RunConfig().flatten(), fault=self._link)
        self._answers, self._delays = answers or {}, delays or {}
        self._due: dict[str, float] = {}
        self.instructions: list[Message] = []

    def push_messages(self, messages):
        messages = list(messages)
        message_ids = super().push_messages(messages)
        for key, message in zip(message_ids, messages, strict=True):
            self.instructions.append(message)
            delay = self._delays.get(self._sites[message.metadata.dst_node_id], 0)
            self._due[key] = time.monotonic() + delay
        return message_ids

    def pull_messages(self, message_ids):
        return super().pull_messages(
            key for key in message_ids if time.monotonic() >= self._due[key]
        )

    def _link(self, site: str, message: Message):
        return "lose" if self._answers.get(site) is silent else "deliver"

    def _answer(self, message: Message, context) -> Message:
        site = context.node_config["site"]
        answer = self._answers.get(site, signed)(site, message)
        return answer if isinstance(answer, Message) else Message(answer, reply_to=message)


class Entries(AuditLog):
    """An audit log that forgets when the test ends."""

    def __init__(self) -> None:
        super().__init__(Path("audit.jsonl"))
        self.entries: list[dict] = []

    def append(self, event, **fields):
        self.entries.append({"event": event, **fields})
        return ""


def strategy(
    kind=FedAvg,
    *,
    sites=SITES,
    admitted: Callable[[], SiteKeys] = lambda: KEYS,
    audit: AuditLog | None = None,
    **settings,
) -> FedAvg:
    """A strategy whose order names ``sites``; ``admitted`` says whose keys are known."""
    values = {
        "num-server-rounds": 5,
        "strategy.min-sites": 2,
        "strategy.max-num-examples": CAP,
        "strategy.round-timeout-seconds": 30.0,
        "strategy.wait-seconds": 0.05,
        **{f"strategy.{key.replace('_', '-')}": value for key, value in settings.items()},
    }
    return kind(
        order(RunConfig.parse(values), sites=sites),
        order_key=ORDER_KEY,
        sites=admitted,
        audit=Entries() if audit is None else audit,
    )


def mean_by_hand(sites) -> Arrays:
    """McMahan's sum in exact arithmetic but for one rounding of each product and sum."""
    total = sum(NUM_EXAMPLES[site] for site in sites)
    result = {}
    for name, value in weights().items():
        moved = np.zeros(value.shape)
        for site in sorted(sites):
            moved = moved + NUM_EXAMPLES[site] * update(site)[name].astype(np.float64)
        result[name] = (value.astype(np.float64) + moved / total).astype(np.float32)
    return result


def assert_same_bits(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].tobytes() == value.tobytes(), name


def by_site(outcomes):
    assert [o.site for o in outcomes] == sorted(o.site for o in outcomes)
    return {o.site: o for o in outcomes}
