"""Enrolment requests and join documents: what is altered on the way is refused."""

from __future__ import annotations

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.coordinators import Coordinator
from fakes.hospitals import Hospital, openssh
from strategies.enrolment import EnrolmentRequest, FederationPolicy, JoinDocument, _raw
from strategies.errors import ConfigError, SignatureError
from strategies.identity import fingerprint, sign

REFUSED = (ConfigError, SignatureError)


HOSPITAL, COORDINATOR = Hospital(), Coordinator()
REQUEST = HOSPITAL.request()
JOIN = COORDINATOR.admit(REQUEST, policy=FederationPolicy(min_cohort=3, max_num_examples=99))
DOCUMENTS = {"request": REQUEST, "join": JOIN}
each_document = pytest.mark.parametrize("document", DOCUMENTS.values(), ids=list(DOCUMENTS))


@each_document
def test_a_document_that_was_carried_unaltered_is_read_as_it_was_written(document):
    assert type(document).parse(document.to_json()) == document
    loosely = json.dumps(json.loads(document.to_json()), indent=None)  # as a mail program may
    assert type(document).parse(loosely) == document


def test_a_request_holds_the_sites_public_keys():
    assert REQUEST.site == "A"
    assert _raw(REQUEST.signing_key) == _raw(HOSPITAL.signing.public_key())
    assert _raw(REQUEST.wrap_key) == _raw(HOSPITAL.wrap.public_key())
    assert REQUEST.node_public_key == openssh(HOSPITAL.node)
    assert REQUEST.fingerprint == fingerprint(HOSPITAL.signing.public_key())


def test_a_join_document_answers_its_request_and_names_the_order_key():
    assert (JOIN.site, JOIN.site_fingerprint) == ("A", REQUEST.fingerprint)
    assert _raw(JOIN.order_key) == _raw(COORDINATOR.order_key.public_key())
    assert JOIN.fingerprint == fingerprint(COORDINATOR.order_key.public_key())
    assert JOIN.policy == FederationPolicy(min_cohort=3, max_num_examples=99)


def test_no_private_key_is_in_a_document():
    secrets = [
        HOSPITAL.signing.private_bytes_raw(),
        HOSPITAL.wrap.private_bytes_raw(),
        HOSPITAL.node.private_numbers().private_value.to_bytes(48, "big"),
        COORDINATOR.order_key.private_bytes_raw(),
        COORDINATOR._key.private_numbers().private_value.to_bytes(32, "big"),
    ]
    for document in DOCUMENTS.values():
        text = document.to_json()
        assert "PRIVATE" not in text
        for secret in secrets:
            for spelling in (secret.hex(), base64.b64encode(secret).decode().rstrip("=")):
                assert spelling not in text
    # And no field that could: whoever adds one thinks of this test.
    assert set(json.loads(REQUEST.to_json())) == {
        "version", "created", "signature", "site", "node_public_key", "signing_public_key",
        "wrap_public_key", "wrap_signature", "node_signature",
    }  # fmt: skip
    assert set(json.loads(JOIN.to_json())) == {
        "version", "created", "signature", "federation", "name", "site", "site_fingerprint",
        "address", "ca_certificate", "order_public_key", "policy",
    }  # fmt: skip


@each_document
def test_the_signature_is_over_the_kind_and_every_other_field(document):
    key = HOSPITAL.signing if document is REQUEST else COORDINATOR.order_key
    values = json.loads(document.to_json())
    signature = base64.b64decode(values.pop("signature"))
    assert signature == sign(key, {"kind": type(document).__name__, **values})


# --- altered on the way


def fields(document) -> list[tuple[str, ...]]:
    """The path of every value of a document."""
    return [
        (name, *inner)
        for name, value in json.loads(document.to_json()).items()
        for inner in ([(key,) for key in value] if isinstance(value, dict) else [()])
    ]


EVERY_FIELD = [
    pytest.param(document, path, id=f"{name}-{'.'.join(path)}")
    for name, document in DOCUMENTS.items()
    for path in fields(document)
]


def changed(document, path: tuple[str, ...], change) -> str:
    """A document's text with one value changed."""
    values = json.loads(document.to_json())
    table = values
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = change(table[path[-1]])
    return json.dumps(values)


def alterations(value):
    """Other values of the same kind, each as near as can be."""
    if isinstance(value, int):
        return [value + 1, value - 1]
    last = value.rstrip("=")
    return [
        value[1:],
        value[:-1],
        value + "A",
        value + "\n",
        " " + value,
        "",
        value.swapcase(),
        "B" + value[1:],
        # The last letter of base64 has bits that no byte needs.
        *(last[:-1] + letter + value[len(last) :] for letter in "ABCDQRgwxyz+/" if last),
    ]


@pytest.mark.parametrize(("document", "path"), EVERY_FIELD)
def test_a_field_that_was_altered_is_refused(document, path):
    value = json.loads(document.to_json())
    for key in path:
        value = value[key]
    for other in alterations(value):
        if other != value:
            with pytest.raises(REFUSED):
                type(document).parse(changed(document, path, lambda _, new=other: new))


@pytest.mark.parametrize(("document", "path"), EVERY_FIELD)
@pytest.mark.parametrize("value", [None, True, 3, 1.0, "x", [], {}])
def test_a_field_of_another_kind_is_refused(document, path, value):
    before = json.loads(document.to_json())
    for key in path:
        before = before[key]
    if value == before:  # 1, 1.0 and true are one number
        return
    with pytest.raises(REFUSED):
        type(document).parse(changed(document, path, lambda _: value))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_letter_that_was_altered_anywhere_is_refused_or_no_content(data):
    document = data.draw(st.sampled_from(list(DOCUMENTS.values())))
    text = document.to_json()
    place = data.draw(st.integers(0, len(text) - 1))
    letter = data.draw(st.characters(max_codepoint=0x2FF))
    end = place + data.draw(st.integers(0, 2))  # inserted, replaced, or one more is lost
    try:
        read = type(document).parse(text[:place] + letter + text[end:])
    except REFUSED:
        return
    assert read == document


@each_document
def test_a_field_that_is_missing_is_refused_or_changes_nothing(document):
    for name in json.loads(document.to_json()):
        values = json.loads(document.to_json())
        del values[name]
        if name == "version":  # there is only one
            assert type(document).parse(json.dumps(values)) == document
            continue
        with pytest.raises(REFUSED):
            type(document).parse(json.dumps(values))


@each_document
def test_a_field_that_nobody_declared_is_refused(document):
    values = json.loads(document.to_json())
    with pytest.raises(ConfigError, match="unknown key note=x"):
        type(document).parse(json.dumps({**values, "note": "x"}))
    if "policy" in values:
        values["policy"]["note"] = "x"
        with pytest.raises(ConfigError, match=r"unknown key policy\.note=x"):
            type(document).parse(json.dumps(values))


@each_document
def test_another_version_is_refused_by_name(document):
    with pytest.raises(ConfigError, match=r"version=2: "):
        type(document).parse(changed(document, ("version",), lambda _: 2))


@pytest.mark.parametrize("kind", [EnrolmentRequest, JoinDocument])
@pytest.mark.parametrize(
    "text",
    ["", "{", "null", "3", '"x"', "[]", "{}", "[" * 100_000, '{"site": "\\ud800"}', "\0", "-----B"],
    ids=["empty", "cut", "null", "number", "text", "list", "none", "deep", "half", "zero", "pem"],
)  # fmt: skip
def test_a_file_that_is_something_else_is_refused_in_one_line(kind, text):
    with pytest.raises(ConfigError) as caught:
        kind.parse(text)
    assert kind.__name__ in str(caught.value)
    assert "\n" not in str(caught.value)


def test_neither_document_passes_for_the_other():
    for kind, document in ((JoinDocument, REQUEST), (EnrolmentRequest, JOIN)):
        with pytest.raises(ConfigError):
            kind.parse(document.to_json())
