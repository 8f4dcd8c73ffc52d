"""An instruction is the order key's: whoever changes or replays one changes nothing at a site."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import RecordDict
from hypothesis import given
from hypothesis import strategies as st

from fakes.orders import FEDERATION, ORDER_KEY, order
from fakes.replies import arrays, with_envelope
from simulation.grid import _over_the_wire as over_the_wire
from strategies.arrays import ARRAYS, hash_arrays, hash_blob, serialise, to_record
from strategies.errors import ProtocolError, RefusalError, SignatureError
from strategies.identity import canonical, sign
from strategies.records import ENVELOPE, SCHEMA_VERSION, Instruction
from strategies.run_config import RunConfig

RUN = RunConfig.parse({"num-server-rounds": 4})
ORDER = order(RUN)
OTHER = order(RUN, run_uuid="ffff")


def sent(**changes) -> Instruction:
    values = {"order": ORDER, "server_round": 2, "task": "train", "weights": arrays(), **changes}
    return Instruction(**values)


def content(**changes) -> RecordDict:
    return sent(**changes).to_content(ORDER_KEY)


def read(received: RecordDict, *, federation: str = FEDERATION) -> Instruction:
    key = ORDER_KEY.public_key()
    return Instruction.from_content(over_the_wire(received), key, federation=federation)


def test_an_instruction_names_its_run():
    received = read(content())
    assert received.order == ORDER
    assert (received.federation, received.run_uuid) == (FEDERATION, "a1b2")


def test_the_signature_is_over_schema_order_run_round_task_and_weights():
    document = {
        "schema-version": SCHEMA_VERSION,
        "order-sha256": ORDER.sha256,
        "flower-run": "0",
        "server-round": 2,
        "task": "train",
        "arrays-sha256": hash_arrays(arrays()),
    }
    envelope = dict(content()[ENVELOPE])
    assert envelope["signature"] == sign(ORDER_KEY, document)
    # And everything else that travels is the order, signed by itself, or that signature.
    assert set(envelope) == {
        "schema-version", "order", "order-signature", "flower-run", "server-round", "task",
        "signature",
    }  # fmt: skip
    assert envelope["order-signature"] == ORDER_KEY.sign(ORDER.text.encode())


# --- altered


@pytest.mark.parametrize(
    "change",
    [
        {"server_round": 1},
        {"server_round": 0},
        {"server_round": 99},
        {"task": "val"},
        {"task": "test"},
        {"signature": b""},
        {"signature": bytes(64)},
        {"order_signature": bytes(64)},
        {"order": ORDER.text.replace("a1b2", "a1b3")},
    ],
    ids=str,
)
def test_a_changed_envelope_breaks_a_signature(change):
    with pytest.raises(SignatureError):
        read(with_envelope(content(), **change))


@given(place=st.integers(0, 2**16), bit=st.integers(0, 7))
def test_weights_changed_in_one_bit_break_the_signature(place, bit):
    received = content()
    data = bytearray(serialise(arrays()))
    data[place % len(data)] ^= 1 << bit
    received[ARRAYS] = to_record(bytes(data))
    with pytest.raises(SignatureError):
        read(received)


def test_other_weights_break_the_signature():
    received = content()
    received[ARRAYS] = content(weights={**arrays(), "head.bias": np.zeros(3, np.float32)})[ARRAYS]
    with pytest.raises(SignatureError):
        read(received)


def test_an_instruction_is_of_its_order_alone():
    """Whoever sees one of each cannot have round 2 of one run trained under another."""
    for mine, theirs in ((ORDER, OTHER), (OTHER, ORDER)):
        received = with_envelope(
            content(order=mine), order=theirs.text, order_signature=theirs.signature
        )
        with pytest.raises(SignatureError):
            read(received)


def test_a_signature_of_another_purpose_is_no_instruction():
    """The order key signs orders and join documents too."""
    for other in (ORDER.signature, ORDER_KEY.sign(canonical({"kind": "JoinDocument"}))):
        with pytest.raises(SignatureError):
            read(with_envelope(content(), signature=other))


def test_an_instruction_of_another_coordinator_is_refused():
    stranger = Ed25519PrivateKey.generate()
    theirs = order(RUN, key=stranger)
    for received in (
        sent(order=theirs).to_content(stranger),  # all their own
        sent(order=theirs).to_content(ORDER_KEY),
        sent().to_content(stranger),  # our order, their instruction
    ):
        with pytest.raises(SignatureError):
            read(received)


def test_weights_that_nobody_signed_are_never_parsed(monkeypatch):
    monkeypatch.setattr("strategies.records.parse", lambda data: pytest.fail("parsed"))
    received = content()
    received[ARRAYS] = to_record(b"anything")
    with pytest.raises(SignatureError):
        read(received)


# --- signed, and not to be followed


@pytest.mark.parametrize(
    ("task", "server_round"),
    [("train", 0), ("train", 5), ("train", -1), ("val", -1), ("val", 5), ("test", 5)],
)
def test_a_round_that_the_run_does_not_have_is_refused(task, server_round):
    with pytest.raises(ProtocolError) as caught:
        read(content(task=task, server_round=server_round))
    assert str(caught.value) == f"server-round={server_round}: out of range for task {task}"


@pytest.mark.parametrize(
    ("task", "server_round"), [("train", 1), ("train", 4), ("val", 0), ("val", 4), ("test", 4)]
)
def test_the_first_and_the_last_round_are_the_runs(task, server_round):
    assert read(content(task=task, server_round=server_round)).server_round == server_round


def test_an_instruction_of_another_federation_is_refused():
    with pytest.raises(RefusalError) as caught:
        read(content(), federation="heart")
    assert caught.value.code == "other-federation"


def test_an_instruction_under_an_expired_order_is_refused():
    """Also one that was kept: an instruction lives no longer than its order."""
    with pytest.raises(RefusalError) as caught:
        read(content(order=order(RUN, issued_ms=1, expires_ms=2)))
    assert caught.value.code == "order-expired"


def test_signed_bytes_that_are_no_weights_are_refused():
    data = b"\x80\x04garbage"
    document = {
        "schema-version": SCHEMA_VERSION,
        "order-sha256": ORDER.sha256,
        "flower-run": "0",
        "server-round": 2,
        "task": "train",
        "arrays-sha256": hash_blob(data),
    }
    received = with_envelope(content(), signature=sign(ORDER_KEY, document))
    received[ARRAYS] = to_record(data)
    with pytest.raises(ProtocolError, match="record 'arrays' is not readable"):
        read(received)
