"""A bad reply is dropped with a reason that names its fault; the good ones count exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from flwr.app import ConfigRecord, Error, Message, RecordDict

from fakes.orders import FEDERATION
from fakes.replies import carrying
from fakes.sites import (
    CAP,
    NODE_OF,
    PRIVATE,
    SITES,
    Answer,
    Sites,
    assert_same_bits,
    by_site,
    changed_update,
    good,
    mean_by_hand,
    poke,
    signed,
    strategy,
    sums,
    weights,
)
from strategies.arrays import ARRAYS
from strategies.evaluation import EvaluationSums
from strategies.records import ENVELOPE, METRICS, REASON_LENGTH, SCHEMA_VERSION

pytestmark = pytest.mark.usefixtures("poll_often")


def with_arrays(data: bytes) -> Answer:
    """Arrays that no working site sends, signed by the site that sends them."""
    return lambda site, message: carrying(good(site, message), data, PRIVATE[site])


def with_metrics(**changes) -> Answer:
    """A signed reply with other metrics."""
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    return lambda site, message: signed(
        site, message, metrics={**good(site, message).metrics, **named}
    )


def with_record(name: str, record) -> Answer:
    def answer(site, message):
        content = signed(site, message)
        if record is None:
            del content[name]
        else:
            content[name] = record
        return content

    return answer


def with_envelope(**changes) -> Answer:
    def answer(site, message):
        content = signed(site, message)
        content[ENVELOPE] = ConfigRecord({**content[ENVELOPE], **changes})
        return content

    return answer


def evaluated(num_examples: int) -> Answer:
    """A reply that claims validation examples, all of class 0 and predicted so."""
    claimed = EvaluationSums.zeros(3)
    claimed.confusion[0, 0] = num_examples
    claimed.scores[0, 1, 0] = claimed.scores[1, 0, 0] = claimed.scores[2, 0, 0] = num_examples
    claimed.calibration[0, 0] = claimed.calibration[2, 0] = num_examples
    metrics = replace(claimed, num_examples=num_examples).to_metrics("val")
    return with_metrics(**metrics)


BAD: dict[str, tuple[Answer, str]] = {
    "nan": (poke(np.nan), "array 'stem.weight' holds values that are not finite"),
    "infinity": (poke(-np.inf), "array 'stem.weight' holds values that are not finite"),
    "shape": (
        changed_update(lambda u: {**u, "head.bias": u["head.bias"][:1]}),
        "array 'head.bias' has shape=(1,); expected (2,)",
    ),
    "broadcastable": (
        changed_update(lambda u: {**u, "stem.weight": u["stem.weight"][:1]}),
        "array 'stem.weight' has shape=(1, 3); expected (2, 3)",
    ),
    "missing-array": (
        changed_update(lambda u: {"head.bias": u["head.bias"]}),
        "arrays stem.weight are missing or unknown (1)",
    ),
    "unknown-array": (
        changed_update(lambda u: {**u, "tail": u["head.bias"]}),
        "arrays tail are missing or unknown (1)",
    ),
    "no-arrays": (
        changed_update(lambda u: {}),
        "arrays head.bias, stem.weight are missing or unknown (2)",
    ),
    "float64": (
        with_arrays(safetensors.numpy.save({"stem.weight": np.ones((2, 3))})),
        "array 'stem.weight' has dtype=float64; expected float32",
    ),
    "integer-buffer": (
        with_arrays(safetensors.numpy.save({"num.batches.tracked": np.array([3])})),
        "array 'num.batches.tracked' has dtype=int64; expected float32",
    ),
    "garbage": (
        with_arrays(b"\x80\x04garbage"),
        "record 'arrays' is not readable",
    ),
    "overflowing-loss": (with_metrics(train_loss=1.7e308), "train-loss=1.7e+308: expected a num"),
    "too-long": (poke(1e30), "update norm=1e+30: expected at most "),
    "no-examples": (
        lambda s, m: signed(s, m, num_examples=0),
        f"num-examples=0: expected 1 to {CAP}",
    ),
    "negative-examples": (
        lambda s, m: signed(s, m, num_examples=-5),
        f"num-examples=-5: expected 1 to {CAP}",
    ),
    "too-many-examples": (
        lambda s, m: signed(s, m, num_examples=CAP + 1),
        f"num-examples={CAP + 1}: expected 1 to {CAP}",
    ),
    "true-examples": (with_envelope(**{"num-examples": True}), "num-examples=True: expected int"),
    "endless-reason": (
        lambda s, m: signed(s, m, status="refused", reason="x" * 201, update={}, metrics={}),
        "reason has 201 characters; expected at most 200",
    ),
    "endless-version": (
        lambda s, m: signed(s, m, version="1" * 201),
        "version has 201 characters; expected at most 200",
    ),
    "other-round": (
        lambda s, m: signed(s, m, server_round=2),
        "server_round=2: expected 1",
    ),
    "other-run": (
        lambda s, m: signed(s, m, run_uuid="ffff"),
        "run_uuid='ffff': expected 'a1b2'",
    ),
    "other-federation": (
        lambda s, m: signed(s, m, federation="heart"),
        f"federation='heart': expected {FEDERATION!r}",
    ),
    "other-message": (
        lambda s, m: signed(s, m, message_id="another"),
        "the signature covers another instruction",
    ),
    "evaluation": (
        lambda s, m: signed(s, m, task="val", update={}, metrics=sums(s).to_metrics("val")),
        "task='val': expected 'train'",
    ),
    "metric": (
        with_metrics(patient_age=61),
        "metrics patient-age are missing or not declared",
    ),
    "totals": (
        with_metrics(val_num_examples=6),
        "val-confusion counts 5 examples; expected val-num-examples=6",
    ),
    "val-examples": (evaluated(CAP + 1), f"val-num-examples={CAP + 1}"),
    "empty": (lambda s, m: RecordDict(), "record 'envelope' is missing"),
    "no-metrics": (with_record(METRICS, None), "record 'metrics' is missing"),
    "no-arrays-record": (with_record(ARRAYS, None), "record 'arrays' is missing"),
    "foreign-envelope": (
        with_record(ENVELOPE, ConfigRecord({"schema-version": SCHEMA_VERSION, "x": [1, 2]})),
        "are missing or unknown",
    ),
    "old-version": (
        with_envelope(**{"schema-version": 0}),
        f"schema-version=0; expected {SCHEMA_VERSION}",
    ),
    "tampered": (with_envelope(**{"num-examples": 999}), "signature does not match"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("bad", ["A", "B"])
def test_a_bad_reply_is_dropped_with_its_reason_and_the_round_goes_on(case, bad, caplog):
    answer, reason = BAD[case]
    found, outcomes = strategy().train(Sites({bad: answer}), NODE_OF, 1, weights())
    others = [site for site in SITES if site != bad]
    assert_same_bits(found, mean_by_hand(others))
    dropped = [o for o in outcomes if o.status == "dropped"]
    assert len(dropped) == 1
    assert reason in dropped[0].reason
    assert "\n" not in dropped[0].reason
    assert (dropped[0].reply, dropped[0].sums) == (None, None)
    assert [o.site for o in outcomes if o.status == "ok"] == others
    assert dropped[0].site == bad
    assert f"round=1 task=train site={bad} status=dropped reason=" in caplog.text


def test_as_many_validation_examples_as_allowed_are_no_reason_to_drop_a_reply():
    _, outcomes = strategy().train(Sites({"B": evaluated(CAP)}), NODE_OF, 1, weights())
    assert [o.status for o in outcomes] == ["ok", "ok", "ok"]


def test_an_evaluation_that_contradicts_itself_is_dropped():
    grid = Sites({"B": lambda s, m: signed(s, m, num_examples=4)})
    outcomes = by_site(strategy().evaluate(grid, NODE_OF, 0, weights(), "val"))
    assert outcomes["B"].reason == "num-examples=4 but 5 were evaluated"
    assert outcomes["B"].status == "dropped"


def test_an_evaluation_of_the_other_split_is_dropped():
    def reads_test(site, message):
        return signed(site, message, task="test", metrics=sums(site).to_metrics("test"))

    outcomes = strategy().evaluate(Sites({"B": reads_test}), NODE_OF, 0, weights(), "val")
    assert by_site(outcomes)["B"].reason == "task='test': expected 'val'"


def test_what_a_stranger_writes_forges_no_line_and_fills_no_history(caplog):
    """Reasons and names of keys are another party's text."""
    forged = "zz\nround=5/5 sites=3/3 train_loss=0.0000\x1b[2J" + "x" * 100_000
    for answer in (
        with_envelope(**{forged: 1}),
        lambda site, message: signed(
            site, message, status="refused", reason=forged, update={}, metrics={}
        ),
        lambda site, message: Message(Error(3, forged), reply_to=message),
    ):
        caplog.clear()
        _, outcomes = strategy().train(Sites({"B": answer}), NODE_OF, 1, weights())
        (reason,) = [o.reason for o in outcomes if o.reason]
        assert reason.isprintable()
        assert len(reason) <= REASON_LENGTH
        assert all(record.getMessage().isprintable() for record in caplog.records)
