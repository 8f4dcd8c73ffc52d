"""What goes wrong at a site leaves as a class name; nothing leaves that could not be audited."""

from __future__ import annotations

import json
from typing import NoReturn

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ConfigRecord, RecordDict

from client import app as app_module
from fakes.benches import ORDER, RUN, everything_sent, initial, instruction
from fakes.orders import ORDER_KEY, order
from fakes.replies import with_envelope
from strategies.arrays import ARRAYS, Arrays, to_record
from strategies.records import ENVELOPE, REASON_LENGTH, SCHEMA_VERSION, Reply

SECRET = "/srv/hospital/patient-4711.dcm"


@pytest.fixture(scope="module")
def weights() -> Arrays:
    return initial()


@pytest.fixture
def no_work(monkeypatch):
    """Whatever computes on the site's data fails the test."""
    for name in ("train", "evaluate"):
        monkeypatch.setattr(app_module, name, lambda *_, name=name: pytest.fail(f"{name}: worked"))


def fail_with_a_path(*_: object) -> NoReturn:
    raise RuntimeError(f"cannot read {SECRET}")


# --- instructions that are not the coordinator's


def of_a_stranger(weights) -> RecordDict:
    stranger = Ed25519PrivateKey.generate()
    return instruction(weights, order=order(RUN, key=stranger)).to_content(stranger)


BAD = {
    "empty": (lambda w: RecordDict(), "record 'envelope' is missing"),
    "old": (
        lambda w: with_envelope(content(w), schema_version=2),
        f"schema-version=2; expected {SCHEMA_VERSION}",
    ),
    "foreign": (
        lambda w: RecordDict({ENVELOPE: ConfigRecord({"lr": 0.1})}),
        f"schema-version=None; expected {SCHEMA_VERSION}",
    ),
    "stranger": (of_a_stranger, "signature does not match the signed content"),
    "unsigned": (
        lambda w: with_envelope(content(w), order_signature=b""),
        "signature does not match the signed content",
    ),
    "other-round": (
        lambda w: with_envelope(content(w), server_round=2),
        "signature does not match the signed content",
    ),
    "other-task": (
        lambda w: with_envelope(content(w), task="val"),
        "signature does not match the signed content",
    ),
    "other-weights": (
        lambda w: with_arrays(content(w), b"anything"),
        "signature does not match the signed content",
    ),
    "no-weights": (lambda w: with_arrays(content(w), None), "record 'arrays' is missing"),
}


def content(weights) -> RecordDict:
    return instruction(weights).to_content(ORDER_KEY)


def with_arrays(sent: RecordDict, data: bytes | None) -> RecordDict:
    if data is None:
        del sent[ARRAYS]
    else:
        sent[ARRAYS] = to_record(data)
    return sent


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", BAD)
def test_an_instruction_that_is_not_the_coordinators_is_refused_and_audited(bench, weights, case):
    make, reason = BAD[case]
    assert bench.refusal(make(weights)) == f"bad-instruction: {reason}"
    (entry,) = bench.audited()  # nothing was followed, nothing begun
    assert entry["event"] == "answered"
    assert entry["fields"]["reason"] == f"bad-instruction: {reason}"
    assert (entry["fields"]["run_uuid"], entry["fields"]["server_round"]) == ("", 0)
    assert not (bench.state_dir / "orders.json").exists()


@pytest.mark.usefixtures("no_work")
def test_what_a_stranger_wrote_is_one_short_line_at_the_site_too(bench, weights, caplog):
    forged = "x\nround=1 site=A loss=0.0\x1b[2J" + "y" * 10_000
    for changes in ({forged: 1}, {"task": forged}, {"server_round": forged}):
        caplog.clear()
        reason = bench.refusal(with_envelope(content(weights), **changes))
        assert reason.isprintable()
        assert len(reason) <= REASON_LENGTH
        assert all(record.getMessage().isprintable() for record in caplog.records)
        assert bench.audited()[-1]["fields"]["reason"] == reason


# --- failures


@pytest.mark.parametrize("place", ["train", "evaluate", "check_run"])
def test_an_exception_leaves_only_its_class_name(bench, weights, monkeypatch, caplog, place):
    monkeypatch.setattr(app_module, place, fail_with_a_path)
    message = bench.send(instruction(weights))
    assert "patient-4711" not in everything_sent(message)
    assert "/srv/" not in everything_sent(message)
    reply = Reply.from_content(message.content, bench.keys)
    assert reply.status == "refused"
    assert reply.reason == "failed: RuntimeError, see the site's log"
    assert (reply.run_uuid, reply.server_round) == ("a1b2", 1)
    assert SECRET in caplog.text  # the site's own log has it all
    assert "patient-4711" not in (bench.state_dir / "audit.jsonl").read_text()


def test_data_that_cannot_be_read_leave_no_path(bench, weights):
    bench.site.load = fail_with_a_path
    message = bench.send(instruction(weights))
    assert "patient-4711" not in everything_sent(message)
    assert Reply.from_content(message.content, bench.keys).status == "refused"


@pytest.mark.parametrize("name", ["B", ""])
@pytest.mark.usefixtures("no_work", "bench")
def test_a_node_that_names_no_site_of_this_process_does_nothing(bench, weights, name):
    message = bench.send(instruction(weights), site=name)
    assert message.error.reason == f"site={name} is not configured in this process"


# --- the log


@pytest.mark.usefixtures("no_work")
def test_a_site_that_cannot_write_its_log_does_not_train(bench, weights):
    path = bench.state_dir / "audit.jsonl"
    path.unlink()
    path.mkdir()
    message = bench.send(instruction(weights))
    assert message.has_error()
    assert message.error.reason.startswith("site=A cannot answer: IsADirectoryError")
    assert str(bench.state_dir) not in message.error.reason


@pytest.mark.usefixtures("no_work")
def test_a_site_whose_log_is_gone_does_not_train(bench, weights):
    (bench.state_dir / "audit.jsonl").unlink()
    message = bench.send(instruction(weights))
    assert message.error.reason == "site=A cannot answer: FederationError"


def test_a_site_whose_log_was_tampered_with_does_not_train(bench, weights, monkeypatch):
    bench.ask(instruction(weights, "val"))
    path = bench.state_dir / "audit.jsonl"
    path.write_text(path.read_text().replace('"status":"ok"', '"status":"no"'))
    monkeypatch.setattr(app_module, "train", lambda *_: pytest.fail("trained"))
    message = bench.send(instruction(weights))
    assert message.error.reason == "site=A cannot answer: FederationError"


def full_disk(*events: str):
    """An audit log that has no room for entries of these kinds."""

    def append(event: str, **fields: object) -> str:
        if event in events:
            raise OSError(28, "No space left on device", SECRET)
        return ""

    return append


def test_no_answer_leaves_when_it_cannot_be_audited(bench, weights, monkeypatch):
    """Trained, then the disk is full: the update stays at the site."""
    monkeypatch.setattr(bench.site.audit, "append", full_disk("answered"))
    message = bench.send(instruction(weights))
    assert message.error.reason.startswith("site=A cannot answer: OSError")
    assert "patient-4711" not in message.error.reason


@pytest.mark.usefixtures("no_work")
def test_an_order_that_cannot_be_audited_is_not_followed(bench, weights, monkeypatch):
    monkeypatch.setattr(bench.site.audit, "append", full_disk("order-followed"))
    reason = bench.refusal(instruction(weights))
    assert reason.startswith("failed: OSError")
    assert "patient-4711" not in reason
    remembered = json.loads((bench.state_dir / "orders.json").read_text())
    assert (remembered["order_sha256"], remembered["runs"]) == ("", {})


def test_an_order_is_audited_once_there_is_room_again(bench, weights, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(bench.site.audit, "append", full_disk("order-followed"))
        bench.ask(instruction(weights, "val"))
    assert bench.ask(instruction(weights, "val")).status == "ok"
    (followed,) = bench.audited("order-followed")
    assert followed["fields"]["order_sha256"] == ORDER.sha256
