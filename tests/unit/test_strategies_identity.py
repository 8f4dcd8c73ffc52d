"""Keys that only their owner reads, and signatures over one canonical form."""

from __future__ import annotations

import json
import math
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import ConfigError, SignatureError
from strategies.identity import (
    canonical,
    create_node_key,
    create_signing_key,
    create_wrap_key,
    fingerprint,
    load_node_key,
    load_signing_key,
    load_wrap_key,
    read_secret,
    sign,
    verify,
    verify_bytes,
)

# RFC 8032 section 7.1, test 1: its public key's SHA-256 begins with these 20 digits.
RFC_SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
RFC_FINGERPRINT = "21fe-31df-a154-a261-626b"

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)  # fmt: skip


@pytest.fixture
def key() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.generate()


def test_the_canonical_form_is_fixed():
    document = {"b": [1, 2.5, True, None], "a": {"z": '\u00e4"', "y": -0.0}}
    assert canonical(document) == (
        b'{"a":{"y":-0.0,"z":"\\u00e4\\""},"b":[1,2.5,true,null]}'
    )  # fmt: skip


@settings(max_examples=50)
@given(st.dictionaries(st.text(max_size=4), JSON, max_size=5))
def test_the_canonical_form_depends_on_content_alone(document):
    backwards = dict(reversed(document.items()))
    assert canonical(backwards) == canonical(document)
    assert canonical(json.loads(canonical(document))) == canonical(document)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_json_cannot_say_has_no_canonical_form(value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical({"loss": value})


def test_a_signature_holds_for_its_document_and_key_alone(key):
    document = {"round": 3, "site": "A"}
    signature = sign(key, document)
    assert len(signature) == 64
    verify(key.public_key(), {"site": "A", "round": 3}, signature)
    other = Ed25519PrivateKey.generate()
    for forged in (
        (key.public_key(), {**document, "round": 4}, signature),
        (key.public_key(), document, bytes([signature[0] ^ 1]) + signature[1:]),
        (key.public_key(), document, b""),
        (other.public_key(), document, signature),
    ):
        with pytest.raises(SignatureError, match="does not match the signed content"):
            verify(*forged)


def test_a_document_that_json_cannot_say_is_never_verified(key):
    with pytest.raises(SignatureError):
        verify(key.public_key(), {"loss": math.nan}, b"\0" * 64)


@given(flipped=st.integers(0, 8 * 40 - 1))
def test_bytes_that_were_changed_in_one_bit_are_refused(flipped):
    key = Ed25519PrivateKey.generate()
    data = bytearray(range(40))
    signature = key.sign(bytes(data))
    verify_bytes(key.public_key(), bytes(data), signature)
    data[flipped // 8] ^= 1 << flipped % 8
    with pytest.raises(SignatureError):
        verify_bytes(key.public_key(), bytes(data), signature)


def test_the_same_key_and_document_give_the_same_signature(key):
    assert sign(key, {"a": 1, "b": 2}) == sign(key, {"b": 2, "a": 1})


def test_a_fingerprint_is_five_groups_of_four():
    known = Ed25519PrivateKey.from_private_bytes(RFC_SECRET)
    assert fingerprint(known.public_key()) == RFC_FINGERPRINT


def test_another_key_has_another_fingerprint():
    keys = (Ed25519PrivateKey.generate().public_key() for _ in range(50))
    assert len({fingerprint(one) for one in keys}) == 50


# --- three kinds of private keys

KINDS = {
    "signing": (create_signing_key, load_signing_key, Ed25519PrivateKey.generate, "PRIVATE KEY"),
    "wrap": (create_wrap_key, load_wrap_key, X25519PrivateKey.generate, "PRIVATE KEY"),
    "node": (
        create_node_key,
        load_node_key,
        lambda: ec.generate_private_key(ec.SECP384R1()),
        "OPENSSH PRIVATE KEY",
    ),
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "private.key"


def raw(private) -> bytes:
    form = PrivateFormat.PKCS8
    return private.private_bytes(Encoding.DER, form, NoEncryption())


def test_a_new_key_is_readable_by_its_owner_alone_and_kept(kind, path):
    create, load, _, name = kind
    first = create(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    assert content.startswith(f"-----BEGIN {name}-----\n".encode())
    assert raw(create(path)) == raw(first) == raw(load(path))
    assert path.read_bytes() == content


def test_no_two_keys_are_alike(kind, tmp_path):
    create = kind[0]
    assert raw(create(tmp_path / "one")) != raw(create(tmp_path / "two"))


def test_a_node_key_is_of_the_curve_that_flower_takes(path):
    assert isinstance(create_node_key(path).curve, ec.SECP384R1)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_may_touch_is_refused(kind, path, mode):
    create, load, *_ = kind
    create(path)
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value) == (
        f"secret file private.key has mode {mode:04o}: others may read it; expected 0600"
    )
    assert caught.value.hint.startswith("chmod 600 private.key")
    with pytest.raises(ConfigError, match="others may read it"):
        create(path)


def test_a_key_that_only_its_owner_reads_may_be_read_only(kind, path):
    create, load, *_ = kind
    create(path)
    path.chmod(0o400)
    load(path)


def test_a_missing_key_is_never_made_by_reading(kind, path):
    with pytest.raises(ConfigError, match=r"private\.key cannot be read \(No such file") as caught:
        kind[1](path)
    assert "restore it from a backup" in caught.value.hint
    assert not path.exists()


@pytest.mark.parametrize("other", KINDS)
def test_a_key_of_another_kind_is_refused(kind, path, other):
    if KINDS[other] is kind:
        return
    KINDS[other][0](path)
    with pytest.raises(ConfigError, match=r"^private key private\.key is "):
        kind[1](path)


@pytest.mark.parametrize(
    "content",
    [b"", b"-----BEGIN PRIVATE KEY-----\nMC4C\n-----END PRIVATE KEY-----\n", b"\xff\xfe\x00"],
    ids=["empty", "cut", "binary"],
)
def test_a_file_that_is_no_key_is_refused_and_left_alone(kind, path, content):
    create, load, *_ = kind
    path.write_bytes(content)
    path.chmod(0o600)
    for read in (load, create):
        with pytest.raises(ConfigError, match=r"^private key private\.key is not a readable key"):
            read(path)
    assert path.read_bytes() == content


@pytest.mark.parametrize("name", ["signing", "wrap"])
def test_an_encrypted_key_is_refused(path, name):
    """Nobody is there to type a password when a node starts."""
    _, load, generate, _ = KINDS[name]
    word = BestAvailableEncryption(b"word")
    path.write_bytes(generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, word))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"^private key private\.key is not a readable key"):
        load(path)


def test_another_curve_is_no_signing_key(path):
    other = ec.generate_private_key(ec.SECP256R1())
    path.write_bytes(other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="is ECPrivateKey; expected Ed25519PrivateKey"):
        load_signing_key(path)


# --- secrets that are no keys


def test_a_secret_is_read_as_it_is(path):
    path.write_bytes(b"\x00\xff\n")
    path.chmod(0o600)
    assert read_secret(path) == b"\x00\xff\n"


def test_a_secret_that_others_may_read_or_that_is_a_folder_is_refused(path):
    path.write_bytes(b"x")
    path.chmod(0o640)
    with pytest.raises(ConfigError, match="has mode 0640"):
        read_secret(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        read_secret(path)
