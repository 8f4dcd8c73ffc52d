"""The wire contract: what an instruction and a reply hold, and the bytes that each end signs.

Invariant: a coordinator learns from a site nothing that is not declared here. Numbers travel as
Flower records: arrays as one blob in an ``ArrayRecord``, sums and seconds as ``MetricRecord``
(declared keys only), the rest as ``ConfigRecord``. An instruction carries its order and the order
key's signature over (schema, order, Flower run, round, task, hash of the arrays). Every reply, a
refusal too, carries the site's signature over (schema, federation, run_uuid, round, message id, key
epoch, site, code, status, reason, num_examples, hash of the arrays, metrics). Flower itself lets
one site answer in another's name, and anybody who reaches its control port give instructions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import ConfigRecord, MetricRecord, RecordDict

from strategies.arrays import (
    ARRAYS,
    Arrays,
    from_record,
    hash_blob,
    parse,
    serialise,
    to_record,
)
from strategies.code import code_sha256, version
from strategies.errors import ProtocolError
from strategies.evaluation import metric_keys
from strategies.identity import sign, verify
from strategies.orders import Order
from strategies.run_config import SCAN_BACKENDS

SCHEMA_VERSION = 4
METRICS, ENVELOPE = "metrics", "envelope"
CODE_HASH = r"[0-9a-f]{64}"
FLOWER_RUN = r"[0-9]{1,20}"  # 64 bits without a sign, which Flower's records cannot hold
VERSION = r"[0-9A-Za-z.+!_-]{1,64}"  # PEP 440; it is shown to people
REASON_LENGTH = 200  # of a refusal, as a site sends it and the coordinator keeps it
TEXT_LENGTH = 200  # of any text that a site sends

MetricValue = int | float | list[int] | list[float]
Task = Literal["train", "val", "test"]

# Each a number from the first bound to the second; the bounds keep sums and JSON finite.
TRAIN_METRICS = {
    "train-loss": (0, 1e9),
    "num-steps": (1, 1e9),
    "seconds": (0, 1e9),
    "learning-rate": (0, 1e9),
    "scan-backend": (0, len(SCAN_BACKENDS) - 1),  # which of them ran: its place among them
}


@dataclass(frozen=True)
class Instruction:
    """What the coordinator asks of one site.

    Attributes:
        order: The run it belongs to.
        task: ``train``, or the split to evaluate on: ``val`` or ``test``.
        server_round: The round to train, from 1; for an evaluation the round whose result the
            weights are, 0 being the initial ones.
        weights: The global weights, by parameter name.
        flower_run: Flower's id of the run that carries it: in another one it is a recording.
    """

    order: Order
    server_round: int
    task: Task
    weights: Arrays
    flower_run: int = 0

    @property
    def federation(self) -> str:
        """The federation's id."""
        return self.order.manifest.federation

    @property
    def run_uuid(self) -> str:
        """The run's name, which survives resuming."""
        return self.order.manifest.run_uuid

    def to_content(self, key: Ed25519PrivateKey) -> RecordDict:
        """Sign with the order key and pack for a Flower message."""
        data = serialise(self.weights)
        envelope: dict[str, int | float | str | bytes] = {
            "schema-version": SCHEMA_VERSION,
            "order": self.order.text,
            "order-signature": self.order.signature,
            "flower-run": str(self.flower_run),
            "server-round": self.server_round,
            "task": self.task,
            "signature": sign(key, _instruction_document(self, hash_blob(data))),
        }
        return RecordDict({ARRAYS: to_record(data), ENVELOPE: ConfigRecord(dict(envelope))})

    @classmethod
    def from_content(
        cls, content: RecordDict, key: Ed25519PublicKey, *, federation: str
    ) -> Instruction:
        """Unpack and check.

        Args:
            content: Of the message.
            key: The order key that the site pinned.
            federation: The federation that the site joined.

        Raises:
            ProtocolError: A record or key is missing, unknown, or of another type or version.
            SignatureError: The order key did not sign the order, or not this instruction.
            RefusalError: The order is expired, or of another federation.
        """
        values = _envelope(
            content,
            {
                "order": str,
                "order-signature": bytes,
                "flower-run": str,
                "server-round": int,
                "task": str,
                "signature": bytes,
            },
            records=(ARRAYS, ENVELOPE),
        )
        order_signature, signature = values["order-signature"], values["signature"]
        assert isinstance(order_signature, bytes)  # _envelope checked their types
        assert isinstance(signature, bytes)
        task, server_round = values["task"], int(values["server-round"])
        if task not in ("train", "val", "test"):
            raise ProtocolError(f"task={task!r}: expected train, val or test")
        order = Order.verify(str(values["order"]), order_signature, key, federation=federation)
        flower_run = str(values["flower-run"])
        if not re.fullmatch(FLOWER_RUN, flower_run):
            raise ProtocolError(f"flower-run={flower_run[:20]!r}: expected a number")
        data = from_record(content)
        unread = cls(order, server_round, task, {}, int(flower_run))
        verify(key, _instruction_document(unread, hash_blob(data)), signature)
        last = order.run.num_server_rounds
        if not (1 if task == "train" else 0) <= server_round <= last:
            raise ProtocolError(f"server-round={server_round}: out of range for task {task}")
        return replace(unread, weights=parse(data))


@dataclass(frozen=True)
class Reply:
    """What one site answers. Leaves the site: everything in it.

    Attributes:
        message_id: Flower's id of the instruction this answers.
        key_epoch: Which encryption key wrapped the update; 0 while updates are plain.
        status: ``ok``, or ``refused`` with a reason from the site's policy.
        reason: ``code: text`` of a refusal; empty otherwise.
        num_examples: Training examples behind the update, or examples evaluated.
        update: Local minus global weights; empty for evaluations and refusals.
        metrics: Declared keys only.
        code_sha256: Of the site's installed code.
        version: Of the site's installed package.
    """

    site: str
    federation: str
    run_uuid: str
    server_round: int
    task: Task
    message_id: str
    status: Literal["ok", "refused"] = "ok"
    reason: str = ""
    key_epoch: int = 0
    num_examples: int = 0
    update: Arrays = field(default_factory=dict)
    metrics: Mapping[str, MetricValue] = field(default_factory=dict[str, MetricValue])
    code_sha256: str = field(default_factory=code_sha256)
    version: str = field(default_factory=version)

    def number(self, name: str) -> float:
        """Return a metric that is one number; which ones are is checked on arrival."""
        value = self.metrics[name]
        assert not isinstance(value, list)
        return value

    @property
    def scan_backend(self) -> str:
        """What ran the selective scan of a training reply."""
        return SCAN_BACKENDS[int(self.number("scan-backend"))]

    def signed_document(self, arrays_sha256: str) -> dict[str, object]:
        """Return the document whose canonical JSON is signed."""
        return {
            "schema-version": SCHEMA_VERSION,
            "site": self.site,
            "federation": self.federation,
            "run-uuid": self.run_uuid,
            "server-round": self.server_round,
            "task": self.task,
            "message-id": self.message_id,
            "key-epoch": self.key_epoch,
            "status": self.status,
            "reason": self.reason,
            "num-examples": self.num_examples,
            "code-sha256": self.code_sha256,
            "version": self.version,
            "arrays-sha256": arrays_sha256,
            "metrics": dict(self.metrics),
        }

    def to_content(self, key: Ed25519PrivateKey) -> RecordDict:
        """Sign and pack for a Flower message."""
        data = serialise(self.update)
        document = self.signed_document(hash_blob(data))
        signature = sign(key, document)
        envelope = {
            name: value
            for name, value in document.items()
            if name not in ("arrays-sha256", "metrics")
        }
        return RecordDict(
            {
                ARRAYS: to_record(data),
                METRICS: MetricRecord(dict(self.metrics)),
                ENVELOPE: ConfigRecord({**envelope, "signature": signature}),  # pyright: ignore[reportArgumentType]
            }
        )

    @classmethod
    def from_content(cls, content: RecordDict, keys: Mapping[str, Ed25519PublicKey]) -> Reply:
        """Unpack, check the form, and verify the signature with the named site's key.

        Raises:
            ProtocolError: A record or key is missing, unknown, or of another type or version.
            SignatureError: The signature is not this site's over this content.
        """
        values = _envelope(
            content,
            {
                "site": str,
                "federation": str,
                "run-uuid": str,
                "server-round": int,
                "task": str,
                "message-id": str,
                "key-epoch": int,
                "status": str,
                "reason": str,
                "num-examples": int,
                "code-sha256": str,
                "version": str,
                "signature": bytes,
            },
            records=(ARRAYS, METRICS, ENVELOPE),
        )
        for name, value in values.items():
            if isinstance(value, str | bytes) and len(value) > TEXT_LENGTH:
                raise ProtocolError(
                    f"{name} has {len(value)} characters; expected at most {TEXT_LENGTH}"
                )
        signature = values["signature"]
        site, status, task = str(values["site"]), values["status"], values["task"]
        if site not in keys:
            raise ProtocolError(f"site={site!r} is not admitted to this federation")
        if status not in ("ok", "refused") or task not in ("train", "val", "test"):
            raise ProtocolError(f"status={status!r} task={task!r} are not known")
        if not re.fullmatch(CODE_HASH, str(values["code-sha256"])):
            raise ProtocolError(f"code-sha256={values['code-sha256']!r}: expected 64 hex digits")
        if not re.fullmatch(VERSION, str(values["version"])):
            raise ProtocolError(f"version={values['version']!r}: expected one such as 1.2.3")
        reply = cls(
            site=site,
            federation=str(values["federation"]),
            run_uuid=str(values["run-uuid"]),
            server_round=int(values["server-round"]),
            task=task,
            message_id=str(values["message-id"]),
            status=status,
            reason=str(values["reason"]),
            key_epoch=int(values["key-epoch"]),
            num_examples=int(values["num-examples"]),
            code_sha256=str(values["code-sha256"]),
            version=str(values["version"]),
            metrics=_metrics(content, declared_metrics(task, status)),
        )
        assert isinstance(signature, bytes)  # _envelope checked its type
        data = from_record(content)
        verify(keys[site], reply.signed_document(hash_blob(data)), signature)
        # Only now, so that nobody without an admitted key reaches the reader.
        return replace(reply, update=parse(data))


def declared_metrics(task: str, status: str) -> tuple[str, ...]:
    """Return the metric keys a reply to this task has: all of them and no other.

    Training replies carry the validation sums of the weights they started from, which saves a
    phase a round.
    """
    if status == "refused":
        return ()
    if task == "train":
        return (*TRAIN_METRICS, *metric_keys("val"))
    return metric_keys(task)


def _instruction_document(instruction: Instruction, arrays_sha256: str) -> dict[str, object]:
    """Return the document whose canonical JSON the order key signs."""
    return {
        "schema-version": SCHEMA_VERSION,
        "order-sha256": instruction.order.sha256,
        "flower-run": str(instruction.flower_run),
        "server-round": instruction.server_round,
        "task": instruction.task,
        "arrays-sha256": arrays_sha256,
    }


def _envelope(
    content: RecordDict, kinds: Mapping[str, type], *, records: tuple[str, ...]
) -> dict[str, int | float | str | bytes]:
    record = content.config_records.get(ENVELOPE)
    if record is None:
        raise ProtocolError(f"record {ENVELOPE!r} is missing")
    for name in content:
        if name not in records:
            raise ProtocolError(f"record {name!r} is not declared")
    values = dict(record)
    version = values.pop("schema-version", None)
    if version != SCHEMA_VERSION:
        raise ProtocolError(
            f"schema-version={version}; expected {SCHEMA_VERSION}",
            hint="coordinator and sites run different versions of this project",
        )
    if values.keys() != kinds.keys():
        raise ProtocolError(f"keys {_odd(values, kinds)} are missing or unknown")
    for name, kind in kinds.items():
        if type(values[name]) is not kind:
            raise ProtocolError(f"{name}={values[name]!r}: expected {kind.__name__}")
    return values  # pyright: ignore[reportReturnType]


def _metrics(content: RecordDict, declared: tuple[str, ...]) -> dict[str, MetricValue]:
    record = content.metric_records.get(METRICS)
    if record is None:
        raise ProtocolError(f"record {METRICS!r} is missing")
    if set(record) != set(declared):
        raise ProtocolError(f"metrics {_odd(record, declared)} are missing or not declared")
    for name, value in record.items():
        numbers = value if isinstance(value, list) else [value]
        if not all(math.isfinite(number) for number in numbers):
            raise ProtocolError(f"metric {name!r} is not finite")
        if name in TRAIN_METRICS:
            low, high = TRAIN_METRICS[name]
            if isinstance(value, list) or not low <= value <= high:
                raise ProtocolError(f"{name}={value}: expected a number from {low} to {high:g}")
            if name == "scan-backend" and not isinstance(value, int):
                raise ProtocolError(f"{name}={value}: expected a whole number")
    return dict(record)


def _odd(found: Iterable[str], expected: Iterable[str]) -> str:
    """Name what is in one of the two alone, as far as fits a line."""
    odd = sorted(set(found) ^ set(expected))
    return ", ".join(odd[:3]) + (f" and {len(odd) - 3} more" if len(odd) > 3 else "")
