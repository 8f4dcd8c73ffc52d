"""A site's signature: whatever is changed on the way, or sent in another's name, is noticed."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
from flwr.app import MetricRecord
from hypothesis import given, settings

from fakes.replies import (
    KEYS,
    NAMED_ARRAYS,
    SITE_KEY,
    arrays,
    assert_same_arrays,
    refusal,
    reply,
    sums,
    with_envelope,
    with_metrics,
)
from simulation.grid import _over_the_wire as over_the_wire
from strategies.arrays import ARRAYS, hash_arrays, serialise, to_record
from strategies.errors import ProtocolError, SignatureError
from strategies.records import ENVELOPE, METRICS, Reply

CHANGES: dict[str, object] = {
    "federation": "heart",
    "run-uuid": "a1b3",
    "server-round": 4,
    "task": "val",
    "message-id": "m-8",
    "key-epoch": 1,
    "site": "B",
    "reason": "other",
    "num-examples": 18,
    "code-sha256": "0" * 64,
    "version": "9.9",
    "signature": b"\x00" * 64,
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_envelope_breaks_the_signature(key):
    content = with_envelope(reply().to_content(SITE_KEY), **{key: CHANGES[key]})
    if key == "task":  # a task has its own metrics; with them only the signature is wrong
        content[METRICS] = MetricRecord(dict(sums().to_metrics("val")))
    with pytest.raises(SignatureError, match="does not match the signed content"):
        Reply.from_content(over_the_wire(content), KEYS)


def test_a_refusal_cannot_be_turned_into_an_answer_or_back():
    answer = with_envelope(refusal().to_content(SITE_KEY), status="ok")
    answer[METRICS] = reply().to_content(SITE_KEY)[METRICS]
    refused = with_envelope(reply().to_content(SITE_KEY), status="refused", reason="x: y")
    refused[METRICS] = MetricRecord({})
    for content in (answer, refused):
        with pytest.raises(SignatureError):
            Reply.from_content(over_the_wire(content), KEYS)


def test_the_changes_tried_here_are_all_fields_there_are():
    kept = {"schema-version", "status"}  # have tests of their own
    assert CHANGES.keys() | kept == dict(reply().to_content(SITE_KEY)[ENVELOPE]).keys()
    covered = {name.replace("-", "_") for name in CHANGES} | {"status", "update", "metrics"}
    assert {f.name for f in fields(Reply)} == covered - {"signature"}


@pytest.mark.parametrize("name", reply().metrics)
def test_a_changed_metric_breaks_the_signature(name):
    value = reply().metrics[name]
    changed = [*value[:-1], value[-1] + 1] if isinstance(value, list) else value + 1
    content = with_metrics(reply().to_content(SITE_KEY), **{name: changed})
    with pytest.raises(SignatureError):
        Reply.from_content(over_the_wire(content), KEYS)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: {**a, "head.bias": a["head.bias"] * np.float32(1 + 2**-23)},
        lambda a: {**a, "head.bias": np.abs(a["head.bias"])},  # -0.0 to 0.0 and a sign
        lambda a: {**a, "stem.weight": a["stem.weight"].T},
        lambda a: {**a, "stem.weight": a["stem.weight"].reshape(2, 3)},
        lambda a: {"stem.weight": a["stem.weight"]},
        lambda a: {**a, "extra": a["head.bias"]},
        lambda a: {"head.bia": a["head.bias"], "stem.weight": a["stem.weight"]},
        lambda a: {},
    ],
    ids=["bit", "sign", "transposed", "reshaped", "missing", "extra", "renamed", "none"],
)
def test_changed_arrays_break_the_signature(change):
    content = reply().to_content(SITE_KEY)
    content[ARRAYS] = to_record(serialise(change(arrays())))
    with pytest.raises(SignatureError):
        Reply.from_content(over_the_wire(content), KEYS)


def test_a_site_cannot_sign_for_another():
    with pytest.raises(SignatureError):
        Reply.from_content(reply(site="B").to_content(SITE_KEY), KEYS)


def test_a_site_that_nobody_admitted_is_refused():
    with pytest.raises(ProtocolError, match=r"^site='X' is not admitted to this federation$"):
        Reply.from_content(reply(site="X").to_content(SITE_KEY), KEYS)


def test_memory_layout_is_no_content():
    plain = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    fortran = {"w": np.asfortranarray(plain["w"])}
    strided = {"w": np.repeat(plain["w"], 2, axis=1)[:, ::2]}
    for same in (fortran, strided):
        assert hash_arrays(same) == hash_arrays(plain)
        sent = reply(update=same).to_content(SITE_KEY)
        assert_same_arrays(plain, Reply.from_content(over_the_wire(sent), KEYS).update)


@settings(max_examples=60)
@given(NAMED_ARRAYS, NAMED_ARRAYS)
def test_equal_hashes_mean_equal_arrays(first, second):
    def listed(named):
        return [(name, named[name].shape, named[name].tobytes()) for name in sorted(named)]

    assert (hash_arrays(first) == hash_arrays(second)) == (listed(first) == listed(second))


def test_a_scalar_and_a_list_of_one_have_different_hashes():
    assert hash_arrays({"w": np.ones((), np.float32)}) != hash_arrays({"w": np.ones(1, np.float32)})


def test_two_arrays_never_hash_like_one_with_a_strange_name():
    content = np.frombuffer(b"XXXX", np.float32)
    two = {"a": content, "b": np.ones(1, np.float32)}
    assert hash_arrays(two) != hash_arrays({"a|(1,)|XXXXb": np.ones(1, np.float32)})
