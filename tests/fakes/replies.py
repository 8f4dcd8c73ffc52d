"""Replies of a site and its keys, arrays of every kind, and ways to change what was sent."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, MetricRecord, RecordDict
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from strategies.arrays import ARRAYS, Arrays, hash_blob, to_record
from strategies.evaluation import EvaluationSums
from strategies.identity import sign
from strategies.records import ENVELOPE, METRICS, Reply

SITE_KEY, OTHER_KEY = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
KEYS = {"A": SITE_KEY.public_key(), "B": OTHER_KEY.public_key()}

ARRAY = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3))
NAMED_ARRAYS = st.dictionaries(st.text(min_size=1, max_size=6), ARRAY, max_size=3)


def arrays() -> Arrays:
    generator = np.random.default_rng(0)
    return {
        "stem.weight": generator.normal(size=(3, 2)).astype(np.float32),
        "head.bias": np.array([0.5, -0.0, 1e-45], np.float32),
    }


def sums(num_examples: int = 6) -> EvaluationSums:
    generator = np.random.default_rng(1)
    labels = generator.integers(0, 3, num_examples)
    return EvaluationSums.from_logits(generator.normal(size=(num_examples, 3)), labels)


def reply(**changes) -> Reply:
    return replace(
        Reply(
            site="A",
            federation="lung",
            run_uuid="a1b2",
            server_round=3,
            task="train",
            message_id="m-7",
            num_examples=17,
            update=arrays(),
            metrics={
                "train-loss": 0.7,
                "num-steps": 4,
                "seconds": 1.25,
                "learning-rate": 3e-4,
                "scan-backend": 1,
                **sums().to_metrics("val"),
            },
        ),
        **changes,
    )


def refusal() -> Reply:
    return reply(
        status="refused", reason="too-much-work: limit 3", update={}, metrics={}, num_examples=0
    )


def evaluation(split: str) -> Reply:
    return reply(task=split, update={}, metrics=sums().to_metrics(split), num_examples=6)


def assert_same_arrays(first: Arrays, second: Arrays) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert second[name].shape == value.shape
        assert second[name].dtype == np.float32
        assert second[name].tobytes() == value.tobytes(), name


def with_envelope(content: RecordDict, **changes) -> RecordDict:
    """The same content with envelope keys changed; None removes one."""
    envelope = {**content[ENVELOPE], **{k.replace("_", "-"): v for k, v in changes.items()}}
    content[ENVELOPE] = ConfigRecord({k: v for k, v in envelope.items() if v is not None})
    return content


def with_metrics(content: RecordDict, **changes) -> RecordDict:
    metrics = {**content[METRICS], **{k.replace("_", "-"): v for k, v in changes.items()}}
    content[METRICS] = MetricRecord({k: v for k, v in metrics.items() if v is not None})
    return content


def carrying(sent: Reply, data: bytes, key: Ed25519PrivateKey) -> RecordDict:
    """A reply that is signed as it should be and has these bytes for arrays."""
    content = sent.to_content(key)
    content[ARRAYS] = to_record(data)
    signature = sign(key, sent.signed_document(hash_blob(data)))
    return with_envelope(content, signature=signature)
