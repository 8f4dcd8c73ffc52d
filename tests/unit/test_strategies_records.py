"""The wire contract: what is sent arrives, and nothing arrives that it does not declare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings

from fakes.orders import FEDERATION, ORDER_KEY, order
from fakes.replies import (
    KEYS,
    NAMED_ARRAYS,
    SITE_KEY,
    arrays,
    assert_same_arrays,
    carrying,
    evaluation,
    refusal,
    reply,
    with_envelope,
    with_metrics,
)
from simulation.grid import _over_the_wire as over_the_wire
from strategies.arrays import ARRAYS, BLOB, to_record
from strategies.code import code_sha256, version
from strategies.errors import ProtocolError, SignatureError
from strategies.records import (
    ENVELOPE,
    SCHEMA_VERSION,
    TRAIN_METRICS,
    Instruction,
    Reply,
    declared_metrics,
)


@pytest.mark.parametrize(
    ("task", "server_round"), [("train", 1), ("train", 9), ("val", 0), ("test", 4)]
)
def test_an_instruction_arrives_as_it_was_sent(task, server_round):
    sent = Instruction(order(), server_round, task, arrays())
    received = read_instruction(over_the_wire(sent.to_content(ORDER_KEY)))
    assert replace(received, weights={}) == replace(sent, weights={})
    assert_same_arrays(sent.weights, received.weights)


@pytest.mark.parametrize(
    "sent",
    [reply(), refusal(), evaluation("val"), evaluation("test"), reply(key_epoch=2)],
    ids=["train", "refused", "val", "test", "epoch"],
)
def test_a_reply_arrives_as_it_was_sent_and_its_signature_holds(sent):
    received = Reply.from_content(over_the_wire(sent.to_content(SITE_KEY)), KEYS)
    assert replace(received, update={}) == replace(sent, update={})
    assert_same_arrays(sent.update, received.update)
    kinds = {name: type(value) for name, value in sent.metrics.items()}
    assert {name: type(value) for name, value in received.metrics.items()} == kinds


@settings(max_examples=30, deadline=None)
@given(NAMED_ARRAYS)
def test_any_float32_arrays_arrive_to_the_bit(named):
    # NaN and infinity too: whether they are usable is the strategy's question.
    received = Reply.from_content(over_the_wire(reply(update=named).to_content(SITE_KEY)), KEYS)
    assert_same_arrays(named, received.update)


def test_a_reply_shows_its_single_numbers():
    assert reply().number("train-loss") == 0.7


KINDS = ["instruction", "reply"]


def read_instruction(content: RecordDict) -> Instruction:
    return Instruction.from_content(content, ORDER_KEY.public_key(), federation=FEDERATION)


def content_of(kind: str) -> tuple[RecordDict, Callable[[RecordDict], object]]:
    if kind == "instruction":
        return Instruction(order(), 3, "train", arrays()).to_content(ORDER_KEY), read_instruction
    return reply().to_content(SITE_KEY), lambda content: Reply.from_content(content, KEYS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_record_is_named(kind):
    content, read = content_of(kind)
    for name in list(content):
        record = content.pop(name)
        with pytest.raises(ProtocolError, match=f"^record '{name}' is missing$"):
            read(content)
        content[name] = record


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("record", [ArrayRecord({}), MetricRecord({}), ConfigRecord({})])
def test_a_record_that_nobody_declared_is_refused(kind, record):
    content, read = content_of(kind)
    content["notes"] = record
    with pytest.raises(ProtocolError, match="notes"):
        read(over_the_wire(content))


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_or_unknown_key_is_named(kind):
    content, read = content_of(kind)
    for name in set(content[ENVELOPE]) - {"schema-version"}:
        envelope = dict(content[ENVELOPE])
        content[ENVELOPE] = ConfigRecord({k: v for k, v in envelope.items() if k != name})
        with pytest.raises(ProtocolError, match=f"^keys {name} are missing or unknown$"):
            read(content)
        content[ENVELOPE] = ConfigRecord(envelope)
    with pytest.raises(ProtocolError, match=r"^keys patient are missing or unknown$"):
        read(with_envelope(content, patient="x"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("schema", [SCHEMA_VERSION + 1, SCHEMA_VERSION - 1, 0, None, "3"])
def test_another_schema_version_is_refused_with_the_cause(kind, schema):
    content, read = content_of(kind)
    with pytest.raises(ProtocolError, match=f"^schema-version={schema}; expected ") as caught:
        read(with_envelope(content, schema_version=schema))
    assert caught.value.hint == "coordinator and sites run different versions of this project"


@pytest.mark.parametrize("kind", KINDS)
def test_a_value_of_another_type_is_refused(kind):
    content, read = content_of(kind)
    before = dict(content[ENVELOPE])
    for name in set(before) - {"schema-version"}:
        for wrong in (True, 1.0, [3], "3", b"3", 3):
            if type(wrong) is type(before[name]):
                continue
            content[ENVELOPE] = ConfigRecord({**before, name: wrong})
            with pytest.raises(ProtocolError, match=f"^{name}=.*: expected "):
                read(content)


def test_an_instruction_with_an_unknown_task_is_refused():
    content, read = content_of("instruction")
    with pytest.raises(ProtocolError, match=r"^task='fit': expected train, val or test$"):
        read(with_envelope(content, task="fit"))


@pytest.mark.parametrize(
    "code", ["", "c0de", "C0DE" * 16, "c0de" * 16 + "\n", "g0de" * 16, "c0de" * 17]
)
def test_a_code_hash_is_64_hex_digits(code):
    with pytest.raises(ProtocolError, match=r"^code-sha256=.*: expected 64 hex digits$"):
        Reply.from_content(reply(code_sha256=code).to_content(SITE_KEY), KEYS)


@pytest.mark.parametrize("text", ["", "1.0\n", "1.0\x1b[2J", "<b>1</b>", "1 0", "1" * 65, "\u00e4"])
def test_a_version_is_what_people_can_be_shown(text):
    with pytest.raises(ProtocolError, match=r"^version=.*: expected one such as 1\.2\.3$"):
        Reply.from_content(reply(version=text).to_content(SITE_KEY), KEYS)


def test_an_instruction_has_no_metrics():
    """Whatever is not signed is not there."""
    content, read = content_of("instruction")
    content["metrics"] = MetricRecord({"x": 1})
    with pytest.raises(ProtocolError, match="record 'metrics' is not declared"):
        read(over_the_wire(content))


def test_a_reply_says_which_code_answered():
    received = Reply.from_content(over_the_wire(reply().to_content(SITE_KEY)), KEYS)
    assert (received.code_sha256, received.version) == (code_sha256(), version())


@pytest.mark.parametrize("change", [{"status": "done"}, {"task": "fit"}])
def test_a_reply_with_an_unknown_word_is_refused(change):
    content, read = content_of("reply")
    with pytest.raises(ProtocolError, match=r"are not known$"):
        read(with_envelope(content, **change))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("record", "message"),
    [
        (ArrayRecord({}), "^record 'arrays' has 0 arrays; expected safetensors alone$"),
        (ArrayRecord({"w": Array(np.ones(3, np.float32))}), "has 1 arrays; expected safetensors"),
        (ArrayRecord({**to_record(b""), "w": Array(np.ones(3))}), "has 2 arrays; expected safet"),
        (ArrayRecord({BLOB: Array("uint8", (999,), BLOB, bytes(9))}), "does not describe its"),
        (ArrayRecord({BLOB: Array("int8", (9,), BLOB, bytes(9))}), "does not describe its"),
        (ArrayRecord({BLOB: Array("uint8", (9,), "numpy.ndarray", bytes(9))}), "not describe its"),
    ],
    ids=["nothing", "plain", "beside", "shape", "dtype", "kind"],
)
def test_a_record_that_is_not_one_blob_is_refused(kind, record, message):
    content, read = content_of(kind)
    content[ARRAYS] = record
    with pytest.raises(ProtocolError, match=message):
        read(over_the_wire(content))


def test_bytes_that_no_admitted_site_signed_are_never_parsed(monkeypatch):
    content = reply().to_content(SITE_KEY)
    content[ARRAYS] = to_record(b"anything")
    monkeypatch.setattr("strategies.records.parse", lambda data: pytest.fail("parsed"))
    with pytest.raises(SignatureError):
        Reply.from_content(over_the_wire(content), KEYS)


@pytest.mark.parametrize("data", [b"", b"\x80\x04garbage", bytes(64)])
def test_signed_bytes_that_are_no_arrays_are_refused(data):
    content = carrying(reply(), data, SITE_KEY)
    with pytest.raises(ProtocolError, match=r"^record 'arrays' is not readable$"):
        Reply.from_content(over_the_wire(content), KEYS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scan-backend", 1.5),
        ("train-loss", 1.7e308),
        ("train-loss", -0.1),
        ("num-steps", 0),
        ("seconds", -1.0),
    ],
)
def test_a_training_figure_out_of_bounds_is_refused(name, value):
    sent = reply(metrics={**reply().metrics, name: value})
    with pytest.raises(ProtocolError, match=f"^{name}=.*: expected a (whole )?number"):
        Reply.from_content(over_the_wire(sent.to_content(SITE_KEY)), KEYS)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_metric_that_is_not_finite_is_refused_as_such(value):
    content = with_metrics(reply().to_content(SITE_KEY), train_loss=value)
    with pytest.raises(ProtocolError, match="not finite"):
        Reply.from_content(over_the_wire(content), KEYS)


def test_a_site_cannot_sign_a_metric_that_is_not_finite():
    with pytest.raises(ValueError, match="JSON"):
        reply(metrics={**reply().metrics, "train-loss": float("nan")}).to_content(SITE_KEY)


@pytest.mark.parametrize("sent", [reply(), refusal(), evaluation("test")])
def test_a_metric_that_nobody_declared_is_refused(sent):
    extra = replace(sent, metrics={**sent.metrics, "patient-age": 61})
    with pytest.raises(ProtocolError, match=r"^metrics patient-age are missing or not declared$"):
        Reply.from_content(over_the_wire(extra.to_content(SITE_KEY)), KEYS)


@pytest.mark.parametrize("name", declared_metrics("train", "ok"))
def test_a_missing_metric_is_named(name):
    content = with_metrics(reply().to_content(SITE_KEY), **{name: None})
    with pytest.raises(ProtocolError, match=f"^metrics {name} are missing or not declared$"):
        Reply.from_content(content, KEYS)


@pytest.mark.parametrize("name", TRAIN_METRICS)
def test_a_list_is_not_one_number(name):
    content = with_metrics(reply().to_content(SITE_KEY), **{name: [1.0]})
    with pytest.raises(ProtocolError, match=f"^{name}=.*: expected a number from"):
        Reply.from_content(content, KEYS)


def test_the_declared_metrics_are_all_that_leaves_a_site():
    sums_of = ("confusion", "scores", "calibration", "loss-sum", "num-examples")
    assert declared_metrics("train", "ok") == (
        "train-loss",
        "num-steps",
        "seconds",
        "learning-rate",
        "scan-backend",
        *(f"val-{name}" for name in sums_of),
    )
    assert declared_metrics("val", "ok") == tuple(f"val-{name}" for name in sums_of)
    assert declared_metrics("test", "ok") == tuple(f"test-{name}" for name in sums_of)
    assert declared_metrics("train", "refused") == ()
