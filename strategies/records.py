"""The wire contract: what an instruction and a reply hold, and the bytes a site signs.

Invariant: a coordinator learns from a site nothing that is not declared here. Numbers travel as
Flower records: arrays as one blob in an ``ArrayRecord``, sums and seconds as ``MetricRecord``
(declared keys only), the rest as ``ConfigRecord``. Every reply, a refusal too, carries the site's
signature over (schema, federation, run_uuid, round, message id, key epoch, site, status, reason,
num_examples, hash of the arrays, metrics); Flower itself lets one site answer in another's name.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray

from strategies.errors import ProtocolError
from strategies.evaluation import metric_keys
from strategies.identity import sign, verify

SCHEMA_VERSION = 1
ARRAYS, METRICS, ENVELOPE = "arrays", "metrics", "envelope"
BLOB = "safetensors"

Arrays = dict[str, NDArray[np.float32]]
MetricValue = int | float | list[int] | list[float]
Task = Literal["train", "val", "test"]

TRAIN_METRICS = ("train-loss", "num-steps", "seconds", "learning-rate")


@dataclass(frozen=True)
class Instruction:
    """What the coordinator asks of one site.

    Attributes:
        task: ``train``, or the split to evaluate on: ``val`` or ``test``.
        server_round: The round to train, from 1; for an evaluation the round whose result the
            weights are, 0 being the initial ones.
        weights: The global weights, by parameter name.
    """

    federation: str
    run_uuid: str
    server_round: int
    task: Task
    weights: Arrays

    def to_content(self) -> RecordDict:
        """Pack for a Flower message."""
        envelope: dict[str, int | float | str | bytes] = {
            "schema-version": SCHEMA_VERSION,
            "federation": self.federation,
            "run-uuid": self.run_uuid,
            "server-round": self.server_round,
            "task": self.task,
        }
        return RecordDict({ARRAYS: pack(self.weights), ENVELOPE: ConfigRecord(dict(envelope))})

    @classmethod
    def from_content(cls, content: RecordDict) -> Instruction:
        """Unpack and check.

        Raises:
            ProtocolError: A record or key is missing, unknown, or of another type or version.
        """
        values = _envelope(
            content,
            {"federation": str, "run-uuid": str, "server-round": int, "task": str},
        )
        task = values["task"]
        if task not in ("train", "val", "test"):
            raise ProtocolError(f"task={task!r}: expected train, val or test")
        if int(values["server-round"]) < (1 if task == "train" else 0):
            raise ProtocolError(f"server-round={values['server-round']}: too small for task {task}")
        return cls(
            federation=str(values["federation"]),
            run_uuid=str(values["run-uuid"]),
            server_round=int(values["server-round"]),
            task=task,
            weights=unpack(content),
        )


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

    def number(self, name: str) -> float:
        """Return a metric that is one number; which ones are is checked on arrival."""
        value = self.metrics[name]
        assert not isinstance(value, list)
        return value

    def signed_document(self) -> dict[str, object]:
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
            "arrays-sha256": hash_arrays(self.update),
            "metrics": dict(self.metrics),
        }

    def to_content(self, key: Ed25519PrivateKey) -> RecordDict:
        """Sign and pack for a Flower message."""
        document = self.signed_document()
        signature = sign(key, document)
        envelope = {
            name: value
            for name, value in document.items()
            if name not in ("arrays-sha256", "metrics")
        }
        return RecordDict(
            {
                ARRAYS: pack(self.update),
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
                "signature": bytes,
            },
        )
        signature = values["signature"]
        site, status, task = str(values["site"]), values["status"], values["task"]
        if site not in keys:
            raise ProtocolError(f"site={site!r} is not admitted to this federation")
        if status not in ("ok", "refused") or task not in ("train", "val", "test"):
            raise ProtocolError(f"status={status!r} task={task!r} are not known")
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
            update=unpack(content),
            metrics=_metrics(content, declared_metrics(task, status)),
        )
        assert isinstance(signature, bytes)  # _envelope checked its type
        verify(keys[site], reply.signed_document(), signature)
        return reply


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


def pack(arrays: Arrays) -> ArrayRecord:
    """Turn named arrays into a Flower record of one safetensors blob.

    Flower moves every array as objects of their own, a request each, through two processes: with
    one blob a round of nano over sockets takes 5 s, with one array a parameter 28 s.
    """
    data = safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in arrays.items()})
    return ArrayRecord({BLOB: Array("uint8", (len(data),), BLOB, data)})


def unpack(content: RecordDict) -> Arrays:
    """Return the arrays of a message.

    Raises:
        ProtocolError: The record is missing, is not one readable blob, or holds another type than
            float32.
    """
    record = content.array_records.get(ARRAYS)
    if record is None:
        raise ProtocolError(f"record {ARRAYS!r} is missing")
    if list(record) != [BLOB]:
        raise ProtocolError(f"record {ARRAYS!r} has {len(record)} arrays; expected {BLOB} alone")
    try:
        arrays = safetensors.numpy.load(record[BLOB].data)
    except Exception as error:  # its reader raises several kinds on foreign bytes
        raise ProtocolError(f"record {ARRAYS!r} is not readable") from error
    for name, value in arrays.items():
        if value.dtype != np.float32:
            raise ProtocolError(f"array {name!r} has dtype={value.dtype}; expected float32")
    # The blob's alignment must not decide how later sums are vectorised.
    return {name: np.array(value) for name, value in arrays.items()}


def hash_arrays(arrays: Arrays) -> str:
    """Return the SHA-256 over names, shapes and little-endian bytes, in name order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = arrays[name].astype("<f4", order="C", copy=False)
        # JSON quotes the name, so that no name can look like the end of one array and the next.
        digest.update(json.dumps([name, value.shape]).encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _envelope(
    content: RecordDict, kinds: Mapping[str, type]
) -> dict[str, int | float | str | bytes]:
    record = content.config_records.get(ENVELOPE)
    if record is None:
        raise ProtocolError(f"record {ENVELOPE!r} is missing")
    for name in content:
        if name not in (ARRAYS, METRICS, ENVELOPE):
            raise ProtocolError(f"record {name!r} is not declared")
    values = dict(record)
    version = values.pop("schema-version", None)
    if version != SCHEMA_VERSION:
        raise ProtocolError(
            f"schema-version={version}; expected {SCHEMA_VERSION}",
            hint="coordinator and sites run different versions of this project",
        )
    if values.keys() != kinds.keys():
        odd = sorted(values.keys() ^ kinds.keys())
        raise ProtocolError(f"keys {', '.join(odd)} are missing or unknown")
    for name, kind in kinds.items():
        if type(values[name]) is not kind:
            raise ProtocolError(f"{name}={values[name]!r}: expected {kind.__name__}")
    return values  # pyright: ignore[reportReturnType]


def _metrics(content: RecordDict, declared: tuple[str, ...]) -> dict[str, MetricValue]:
    record = content.metric_records.get(METRICS)
    if record is None:
        raise ProtocolError(f"record {METRICS!r} is missing")
    if set(record) != set(declared):
        odd = sorted(set(record) ^ set(declared))
        raise ProtocolError(f"metrics {', '.join(odd)} are missing or not declared")
    for name, value in record.items():
        numbers = value if isinstance(value, list) else [value]
        if name in TRAIN_METRICS and isinstance(value, list):
            raise ProtocolError(f"metric {name!r} is a list; expected one number")
        if not all(math.isfinite(number) for number in numbers):
            raise ProtocolError(f"metric {name!r} is not finite")
    return dict(record)
