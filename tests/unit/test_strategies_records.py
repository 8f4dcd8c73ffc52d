"""The wire contract: what is sent arrives, what is changed on the way is noticed."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import fields, replace

import numpy as np
import pytest
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from simulation.grid import _over_the_wire as over_the_wire
from strategies.errors import ProtocolError, SignatureError
from strategies.evaluation import EvaluationSums
from strategies.records import (
    ARRAYS,
    BLOB,
    ENVELOPE,
    METRICS,
    SCHEMA_VERSION,
    TRAIN_METRICS,
    Arrays,
    Instruction,
    Reply,
    declared_metrics,
    hash_arrays,
    pack,
)

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


@pytest.mark.parametrize(
    ("task", "server_round"), [("train", 1), ("train", 9), ("val", 0), ("test", 4)]
)
def test_an_instruction_arrives_as_it_was_sent(task, server_round):
    sent = Instruction("lung", "a1b2", server_round, task, arrays())
    received = Instruction.from_content(over_the_wire(sent.to_content()))
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


def test_memory_layout_is_no_content():
    plain = {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}
    fortran = {"w": np.asfortranarray(plain["w"])}
    strided = {"w": np.repeat(plain["w"], 2, axis=1)[:, ::2]}
    for same in (fortran, strided):
        assert hash_arrays(same) == hash_arrays(plain)
        sent = reply(update=same).to_content(SITE_KEY)
        assert_same_arrays(plain, Reply.from_content(over_the_wire(sent), KEYS).update)


def test_a_reply_shows_its_single_numbers():
    assert reply().number("train-loss") == 0.7


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
    content[ARRAYS] = pack(change(arrays()))
    with pytest.raises(SignatureError):
        Reply.from_content(over_the_wire(content), KEYS)


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


def test_a_site_cannot_sign_for_another():
    with pytest.raises(SignatureError):
        Reply.from_content(reply(site="B").to_content(SITE_KEY), KEYS)


def test_a_site_that_nobody_admitted_is_refused():
    with pytest.raises(ProtocolError, match=r"^site='X' is not admitted to this federation$"):
        Reply.from_content(reply(site="X").to_content(SITE_KEY), KEYS)


KINDS = ["instruction", "reply"]


def content_of(kind: str) -> tuple[RecordDict, Callable[[RecordDict], object]]:
    if kind == "instruction":
        sent = Instruction("lung", "a1b2", 3, "train", arrays())
        return sent.to_content(), Instruction.from_content
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
@pytest.mark.parametrize("version", [SCHEMA_VERSION + 1, 0, None, "1"])
def test_another_schema_version_is_refused_with_the_cause(kind, version):
    content, read = content_of(kind)
    with pytest.raises(ProtocolError, match=f"^schema-version={version}; expected ") as caught:
        read(with_envelope(content, schema_version=version))
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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "fit"}, "^task='fit': expected train, val or test$"),
        ({"server_round": 0}, "^server-round=0: too small for task train$"),
        ({"task": "val", "server_round": -1}, "^server-round=-1: too small for task val$"),
    ],
)
def test_an_instruction_out_of_bounds_is_refused(change, message):
    content, read = content_of("instruction")
    with pytest.raises(ProtocolError, match=message):
        read(with_envelope(content, **change))


@pytest.mark.parametrize("change", [{"status": "done"}, {"task": "fit"}])
def test_a_reply_with_an_unknown_word_is_refused(change):
    content, read = content_of("reply")
    with pytest.raises(ProtocolError, match=r"are not known$"):
        read(with_envelope(content, **change))


def blob(data: bytes) -> ArrayRecord:
    return ArrayRecord({BLOB: Array("uint8", (len(data),), BLOB, data)})


def save(value: np.ndarray) -> bytes:
    return safetensors.numpy.save({"w": value})


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle from the network was executed",))


def header(**changes) -> bytes:
    """A blob of three numbers whose header says something else."""
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12], **changes}
    text = json.dumps({"w": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(12)


WHOLE = save(np.ones(3, np.float32))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("record", "message"),
    [
        (blob(save(np.ones(3))), "^array 'w' has dtype=float64; expected float32$"),
        (blob(save(np.ones(3, np.int64))), "^array 'w' has dtype=int64; expected float32$"),
        (blob(save(np.ones(3, np.float16))), "^array 'w' has dtype=float16; expected float32$"),
        (blob(header(dtype="BF16", data_offsets=[0, 6])), "is not readable|has dtype="),
        (blob(b""), "is not readable"),
        (blob(bytes(64)), "is not readable"),
        (blob(WHOLE[:-1]), "is not readable"),
        (blob(WHOLE + b"x"), "is not readable"),
        (blob(pickle.dumps(_Bomb())), "is not readable"),
        (blob(header(shape=[10**15])), "is not readable"),
        (blob(header(shape=[-3])), "is not readable"),
        (blob(header(data_offsets=[0, 10**15])), "is not readable"),
        (blob((2**63).to_bytes(8, "little") + bytes(64)), "is not readable"),
        (ArrayRecord({}), "^record 'arrays' has 0 arrays; expected safetensors alone$"),
        (ArrayRecord({"w": Array(np.ones(3, np.float32))}), "has 1 arrays; expected safetensors"),
        (ArrayRecord({**blob(WHOLE), "w": Array(np.ones(3))}), "has 2 arrays; expected safetens"),
    ],
    ids=[
        "float64", "int64", "float16", "bfloat16", "empty", "zeros", "cut", "longer", "pickle",
        "huge", "negative", "beyond", "header", "nothing", "plain", "beside",
    ],
)  # fmt: skip
def test_bytes_that_are_no_float32_arrays_are_refused(kind, record, message):
    content, read = content_of(kind)
    content[ARRAYS] = record
    with pytest.raises(ProtocolError, match=message):
        read(over_the_wire(content))


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_protocol_error(data):
    content, read = content_of("instruction")
    content[ARRAYS] = blob(data)
    with pytest.raises(ProtocolError):
        read(content)


def test_all_arrays_travel_as_one_object_of_their_own_size():
    """Flower asks for every array by itself, so one a parameter makes a small round slow."""
    record = pack({str(k): np.ones(1000, np.float32) for k in range(100)})
    assert len(record) == 1
    assert record[BLOB].shape[0] < 100 * 1000 * 4 * 1.02


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
    with pytest.raises(ProtocolError, match=f"^metric '{name}' is a list; expected one number$"):
        Reply.from_content(content, KEYS)


def test_the_declared_metrics_are_all_that_leaves_a_site():
    sums_of = ("confusion", "scores", "calibration", "loss-sum", "num-examples")
    assert declared_metrics("train", "ok") == (
        "train-loss",
        "num-steps",
        "seconds",
        "learning-rate",
        *(f"val-{name}" for name in sums_of),
    )
    assert declared_metrics("val", "ok") == tuple(f"val-{name}" for name in sums_of)
    assert declared_metrics("test", "ok") == tuple(f"test-{name}" for name in sums_of)
    assert declared_metrics("train", "refused") == ()
