"""Documents whose maker signs what is not true, or that are not of whom they seem."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from fakes.coordinators import Coordinator
from fakes.hospitals import Hospital, openssh
from strategies.enrolment import (
    EnrolmentRequest,
    FederationPolicy,
    JoinDocument,
    _raw,
    _statement,
    _text,
)
from strategies.errors import ConfigError, SignatureError
from strategies.identity import sign

REFUSED = (ConfigError, SignatureError)
HOSPITAL, OTHER, COORDINATOR = Hospital(), Hospital(), Coordinator()
REQUEST = HOSPITAL.request()
JOIN = COORDINATOR.admit(REQUEST)


# --- a request of a site that signs what is not true


def test_the_node_key_of_somebody_else_is_refused():
    """Whoever could enrol another's node under a name of his own would have it revoked with his."""
    stolen = HOSPITAL.request(node_public_key=OTHER.request().node_public_key)
    with pytest.raises(SignatureError, match="node_signature was not made by node_public_key"):
        EnrolmentRequest.parse(stolen.to_json())


def test_a_proof_of_possession_serves_its_own_request_alone():
    theirs = OTHER.request()
    copied = {"node_public_key": theirs.node_public_key, "node_signature": theirs.node_signature}
    with pytest.raises(SignatureError, match="node_signature"):
        EnrolmentRequest.parse(HOSPITAL.request(**copied).to_json())


def test_a_proof_of_possession_is_for_one_name():
    """Also where all else is signed for the new name, as a thief of the signing key could."""
    wrap = _statement("wrap-key", "B", REQUEST.wrap_public_key)
    renamed = HOSPITAL.request(site="B", wrap_signature=_text(sign(HOSPITAL.signing, wrap)))
    with pytest.raises(SignatureError, match="node_signature"):
        EnrolmentRequest.parse(renamed.to_json())


def test_a_request_signed_by_another_key_than_its_own_is_refused():
    forged = REQUEST.model_copy(update={"created": "today"})._signed_by(OTHER.signing)
    with pytest.raises(SignatureError):
        EnrolmentRequest.parse(forged.to_json())


def test_a_request_under_another_signing_key_needs_that_keys_node():
    """Somebody who intercepts a request cannot put his own signing key into it."""
    public = _raw(OTHER.signing.public_key())
    forged = REQUEST.model_copy(update={"signing_public_key": public})._signed_by(OTHER.signing)
    with pytest.raises(SignatureError):
        EnrolmentRequest.parse(forged.to_json())


def test_a_wrap_key_must_be_signed_for_this_site():
    wrap = _raw(OTHER.wrap.public_key())
    with pytest.raises(SignatureError):
        EnrolmentRequest.parse(HOSPITAL.request(wrap_public_key=wrap).to_json())
    for statement in (_statement("wrap-key", "B", wrap), _statement("node-key", "A", wrap)):
        signature = _text(sign(HOSPITAL.signing, statement))
        request = HOSPITAL.request(wrap_public_key=wrap, wrap_signature=signature)
        with pytest.raises(SignatureError):
            EnrolmentRequest.parse(request.to_json())


def test_a_wrap_signature_serves_without_the_document():
    statement = _statement("wrap-key", "A", REQUEST.wrap_public_key)
    assert REQUEST.wrap_signature == _text(sign(HOSPITAL.signing, statement))


@pytest.mark.parametrize(
    "text",
    [
        openssh(ec.generate_private_key(ec.SECP256R1())),
        openssh(ec.generate_private_key(ec.SECP521R1())),
        openssh(Ed25519PrivateKey.generate()),
        openssh(rsa.generate_private_key(65537, 2048)),
        "",
        "ecdsa-sha2-nistp384",
        "ecdsa-sha2-nistp384 AAAA",
        "ssh-nonsense AAAA",
        "\u00e4",
        HOSPITAL.node.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        .decode(),
    ],
    ids=["p256", "p521", "ed25519", "rsa", "empty", "no-key", "cut", "unknown", "letter", "pem"],
)  # fmt: skip
def test_a_node_key_of_another_kind_is_refused(text):
    with pytest.raises(ConfigError, match="node_public_key is not"):
        EnrolmentRequest.parse(HOSPITAL.request(node_public_key=text).to_json())


@pytest.mark.parametrize("more", [" root@hospital", "\n", "\nssh-rsa AAAA", "\x1b[2J", " "])
def test_a_node_key_is_the_key_and_nothing_beside_it(more):
    """It becomes a line of other programs' files; what is not the key is not ours to pass on."""
    request = HOSPITAL.request(node_public_key=openssh(HOSPITAL.node) + more)
    with pytest.raises(ConfigError, match="node_public_key is not"):
        EnrolmentRequest.parse(request.to_json())


@pytest.mark.parametrize("name", ["signing_public_key", "wrap_public_key"])
@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_a_key_of_another_length_is_refused(name, size):
    with pytest.raises(REFUSED):
        EnrolmentRequest.parse(HOSPITAL.request(**{name: _text(bytes(size))}).to_json())


@pytest.mark.parametrize(
    "site", ["", "-A", "A B", "a/b", "..", "A\n", "\u00c4", "A" * 33, "A;rm", "A.pub"]
)
def test_a_name_that_could_be_something_else_is_refused(site):
    with pytest.raises(REFUSED):
        EnrolmentRequest.parse(HOSPITAL.request(site=site).to_json())


# --- a join document of a coordinator that is not the pinned one


def test_a_document_of_another_coordinator_has_another_fingerprint():
    """It proves itself, so it parses: the comparison by telephone is what tells them apart."""
    impostor = Coordinator(federation=JOIN.federation)
    forged = JoinDocument.parse(impostor.admit(REQUEST).to_json())
    assert forged.fingerprint != JOIN.fingerprint


def test_a_document_with_another_order_key_does_not_keep_its_signature():
    impostor = Coordinator()
    public = _raw(impostor.order_key.public_key())
    with pytest.raises(SignatureError):
        JoinDocument.parse(JOIN.model_copy(update={"order_public_key": public}).to_json())
    forged = JOIN.model_copy(update={"address": "evil:1"})._signed_by(impostor.order_key)
    with pytest.raises(SignatureError):
        JoinDocument.parse(forged.to_json())


@pytest.mark.parametrize("text", ["", "no certificate", COORDINATOR.ca_pem[:200]])
def test_a_certificate_that_is_none_is_refused(text):
    broken = COORDINATOR.admit(REQUEST, ca_certificate=text)
    with pytest.raises(ConfigError, match="ca_certificate is not a readable PEM certificate"):
        JoinDocument.parse(broken.to_json())


@pytest.mark.parametrize("values", [{"min_cohort": 0}, {"max_num_examples": 0}])
def test_a_policy_that_promises_nothing_is_refused(values):
    policy = FederationPolicy().model_copy(update=values)
    with pytest.raises(ConfigError, match=f"policy.{next(iter(values))}=0: "):
        JoinDocument.parse(COORDINATOR.admit(REQUEST, policy=policy).to_json())
