"""Orders: a site follows what its coordinator signed, for its federation, in time, and no other."""

from __future__ import annotations

import hashlib
import json
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.orders import FEDERATION, ORDER_KEY, manifest, order
from strategies.errors import ConfigError, RefusalError, SignatureError
from strategies.identity import canonical
from strategies.orders import CLOCK_TOLERANCE_SECONDS, Order, RunManifest
from strategies.run_config import RunConfig

NOW = 1_800_000_000.0
NOW_MS = round(NOW * 1000)
HOUR_MS = 3_600_000
IN_TIME = {"issued_ms": NOW_MS, "expires_ms": NOW_MS + HOUR_MS}


def read(text: str, signature: bytes, *, federation: str = FEDERATION, now: float = NOW) -> Order:
    return Order.verify(text, signature, ORDER_KEY.public_key(), federation=federation, now=now)


def signed(values: object) -> tuple[str, bytes]:
    """Whatever the coordinator's program wrote, with its signature."""
    text = values if isinstance(values, str) else json.dumps(values)
    return text, ORDER_KEY.sign(text.encode())


def document(**changes: object) -> dict[str, object]:
    values = {**manifest(**IN_TIME).model_dump(mode="json"), **changes}
    return {name: value for name, value in values.items() if value is not ...}


def refusal(values: object, **where) -> RefusalError:
    with pytest.raises(RefusalError) as caught:
        read(*signed(values), **where)
    return caught.value


def test_an_order_is_read_as_it_was_issued():
    run = RunConfig.parse({"seed": 7, "training.learning-rate": 1e-3, "strategy.name": "fedprox"})
    issued = order(run, sites=("B", "A"), **IN_TIME)
    assert read(issued.text, issued.signature) == issued
    assert issued.run == run
    assert issued.manifest.cohort == ("B", "A")
    assert issued.text.encode() == canonical(issued.manifest.model_dump(mode="json"))
    assert issued.sha256 == hashlib.sha256(issued.text.encode()).hexdigest()


def test_the_clock_is_this_machines_where_no_other_is_given():
    now = time.time_ns() // 1_000_000
    issued = order(issued_ms=now, expires_ms=now + HOUR_MS)
    key = ORDER_KEY.public_key()
    Order.verify(issued.text, issued.signature, key, federation=FEDERATION)
    late = order(issued_ms=now - HOUR_MS, expires_ms=now - 1)
    with pytest.raises(RefusalError, match="expired"):
        Order.verify(late.text, late.signature, key, federation=FEDERATION)


def test_no_order_is_issued_with_settings_that_are_none():
    with pytest.raises(ConfigError):
        Order.issue(ORDER_KEY, manifest(run_config={"model.sice": "tiny"}))


# --- signatures


@pytest.mark.parametrize("signature", [b"", bytes(64), b"x" * 63, b"x" * 65])
def test_an_unsigned_order_is_refused(signature):
    with pytest.raises(SignatureError):
        read(order(**IN_TIME).text, signature)


def test_an_order_of_another_key_is_refused():
    theirs = order(key=Ed25519PrivateKey.generate(), **IN_TIME)
    with pytest.raises(SignatureError):
        read(theirs.text, theirs.signature)


ISSUED = order(**IN_TIME)


@settings(max_examples=200)
@given(place=st.integers(0, len(ISSUED.text) - 1), letter=st.characters(max_codepoint=0x7F))
def test_an_order_altered_in_one_letter_is_refused(place, letter):
    text = ISSUED.text[:place] + letter + ISSUED.text[place + 1 :]
    if text != ISSUED.text:
        with pytest.raises(SignatureError):
            read(text, ISSUED.signature)


@given(bit=st.integers(0, 511))
def test_a_signature_altered_in_one_bit_is_refused(bit):
    signature = bytearray(ISSUED.signature)
    signature[bit // 8] ^= 1 << bit % 8
    with pytest.raises(SignatureError):
        read(ISSUED.text, bytes(signature))


@pytest.mark.parametrize(
    "text",
    [ISSUED.text + " ", " " + ISSUED.text, json.dumps(json.loads(ISSUED.text), indent=1), ""],
    ids=["after", "before", "spaced", "nothing"],
)
def test_another_spelling_of_the_same_order_is_refused(text):
    with pytest.raises(SignatureError):
        read(text, ISSUED.signature)


def test_nothing_is_read_before_its_signature_was_checked(monkeypatch):
    monkeypatch.setattr(RunManifest, "model_validate_json", lambda text: pytest.fail("read"))
    with pytest.raises(SignatureError):
        read("[" * 10, b"x" * 64)


# --- time


@pytest.mark.parametrize(
    ("issued", "expires", "code"),
    [
        (-HOUR_MS, 1, None),
        (-HOUR_MS, 0, "order-expired"),
        (-2 * HOUR_MS, -HOUR_MS, "order-expired"),
        (CLOCK_TOLERANCE_SECONDS * 1000, HOUR_MS, None),
        (CLOCK_TOLERANCE_SECONDS * 1000 + 1, HOUR_MS, "order-from-the-future"),
        (2 * HOUR_MS, 3 * HOUR_MS, "order-from-the-future"),
    ],
)
def test_an_order_is_followed_in_its_time_alone(issued, expires, code):
    values = document(issued_ms=NOW_MS + issued, expires_ms=NOW_MS + expires)
    if code is None:
        assert read(*signed(values)).manifest.issued_ms == NOW_MS + issued
    else:
        assert refusal(values).code == code


def test_an_order_is_for_a_year_at_most():
    issued = NOW_MS - HOUR_MS
    year = 366 * 24 * HOUR_MS
    longest = document(issued_ms=issued, expires_ms=issued + year)
    assert read(*signed(longest)).manifest.expires_ms == issued + year
    error = refusal(document(issued_ms=issued, expires_ms=issued + year + 1))
    assert (error.code, str(error)) == ("bad-order", "the order is for longer than a year")


def test_the_reason_says_how_far_the_clocks_are_apart():
    expired = document(issued_ms=NOW_MS - 4 * HOUR_MS, expires_ms=NOW_MS - 3 * HOUR_MS)
    assert str(refusal(expired)) == "the order expired 3.0 h ago"
    ahead = document(issued_ms=NOW_MS + HOUR_MS, expires_ms=NOW_MS + 2 * HOUR_MS)
    assert str(refusal(ahead)) == (
        "the order was issued 3600 s from now by this site's clock; tolerance 300 s"
    )


# --- signed, and not to be followed


def test_an_order_of_another_federation_is_refused_by_name():
    error = refusal(document(federation="heart"))
    assert error.code == "other-federation"
    assert str(error) == "federation='heart' is not this site's"


@pytest.mark.parametrize("name", RunManifest.model_fields)
def test_a_manifest_without_a_field_is_refused(name):
    if name == "version":  # there is only one
        return
    error = refusal(document(**{name: ...}))
    assert (error.code, str(error)) == ("bad-order", f"manifest {name} is missing")


@pytest.mark.parametrize(
    "changes",
    [
        {"note": "x"},
        {"version": 2},
        {"version": "1"},
        {"federation": ""},
        {"run_uuid": ""},
        {"run_uuid": None},
        {"run_uuid": "../elsewhere"},
        {"run_uuid": "a" * 65},
        {"cohort": []},
        {"cohort": "ABC"},
        {"cohort": ["A", "../B"]},
        {"cohort": ["A", ""]},
        {"cohort": ["A\n"]},
        {"cohort": [f"S{n}" for n in range(1001)]},
        {"run_config": []},
        {"run_config": {"seed": [1]}},
        {"run_config": {"seed": None}},
        {"code_sha256": 3},
        {"code_sha256": "0" * 63},
        {"code_sha256": "Z" * 64},
        {"issued_ms": "1"},
        {"issued_ms": 1.5},
        {"issued_ms": -1},
        {"issued_ms": 10**400},
        {"expires_ms": None},
        {"expires_ms": True},
        {"expires_ms": 10**400},
    ],
    ids=lambda changes: str(changes)[:60],
)
def test_a_malformed_manifest_is_refused_though_it_is_signed(changes):
    assert refusal(document(**changes)).code == "bad-order"


@pytest.mark.parametrize("text", ["", "null", "[]", "3", "{", "[" * 100_000, '"x"', "\x00"])
def test_a_text_that_is_no_manifest_is_refused_though_it_is_signed(text):
    assert refusal(text).code == "bad-order"


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"model.sice": "tiny"}, "unknown key model.sice=tiny"),
        ({"model.size": "huge"}, "model.size=huge: "),
        ({"training.batch-size": 0}, "training.batch-size=0: "),
        ({"training.learning-rate": float("nan")}, "training.learning-rate=nan: "),
    ],
)
def test_settings_that_are_not_valid_here_are_refused_by_name(setting, reason):
    """As from a coordinator with a newer version."""
    error = refusal(document(run_config={**RunConfig().flatten(), **setting}))
    assert error.code == "bad-order"
    assert str(error).startswith(reason)
