"""Keys that only their owner reads, and signatures over one canonical form."""

from __future__ import annotations

import json
import math
import stat

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.errors import ConfigError, SignatureError
from strategies.identity import (
    canonical,
    create_signing_key,
    fingerprint,
    load_signing_key,
    read_public_keys,
    sign,
    verify,
    write_public_key,
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


def pem(key, form=PrivateFormat.PKCS8, encryption=None) -> bytes:
    return key.private_bytes(Encoding.PEM, form, encryption or NoEncryption())


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


def test_the_same_key_and_document_give_the_same_signature(key):
    assert sign(key, {"a": 1, "b": 2}) == sign(key, {"b": 2, "a": 1})


def test_a_fingerprint_is_five_groups_of_four():
    known = Ed25519PrivateKey.from_private_bytes(RFC_SECRET)
    assert fingerprint(known.public_key()) == RFC_FINGERPRINT


def test_a_new_key_is_readable_by_its_owner_alone_and_kept(tmp_path):
    path = tmp_path / "signing.key"
    first = create_signing_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_bytes()
    second = create_signing_key(path)
    assert path.read_bytes() == content
    assert second.private_bytes_raw() == first.private_bytes_raw()
    assert load_signing_key(path).private_bytes_raw() == first.private_bytes_raw()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_may_touch_is_refused(tmp_path, mode):
    path = tmp_path / "signing.key"
    create_signing_key(path)
    path.chmod(mode)
    with pytest.raises(ConfigError) as caught:
        load_signing_key(path)
    assert str(caught.value) == (
        f"signing key signing.key has mode {mode:04o}: others may read it; expected 0600"
    )
    assert caught.value.hint.startswith("chmod 600 signing.key")
    with pytest.raises(ConfigError, match="others may read it"):
        create_signing_key(path)


def test_a_key_that_only_its_owner_reads_may_be_read_only(tmp_path):
    path = tmp_path / "signing.key"
    create_signing_key(path)
    path.chmod(0o400)
    load_signing_key(path)


def test_a_missing_key_says_which_command_makes_one(tmp_path):
    with pytest.raises(ConfigError, match=r"signing\.key cannot be read \(No such file") as caught:
        load_signing_key(tmp_path / "signing.key")
    assert caught.value.hint == "`python -m client init --site NAME` makes one"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a readable PEM key"),
        (b"-----BEGIN PRIVATE KEY-----\nMC4C\n-----END PRIVATE KEY-----\n", "is not a readable"),
        (b"\xff\xfe\x00", "is not a readable PEM key"),
        (pem(generate_ec(SECP256R1())), "is ECPrivateKey; expected Ed25519"),
        (
            pem(Ed25519PrivateKey.generate(), encryption=BestAvailableEncryption(b"word")),
            "is not a readable PEM key",
        ),
    ],
    ids=["empty", "cut", "binary", "other-kind", "encrypted"],
)
def test_a_file_that_is_no_ed25519_key_is_refused(tmp_path, content, message):
    path = tmp_path / "signing.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=f"^signing key signing.key {message}"):
        load_signing_key(path)
    assert path.read_bytes() == content


def test_public_keys_are_read_by_site_in_name_order(tmp_path):
    keys = {site: Ed25519PrivateKey.generate().public_key() for site in ("C", "A", "B-2")}
    for site, key in keys.items():
        write_public_key(tmp_path / f"{site}.pub", key)
    (tmp_path / "README.txt").write_text("collected by hand")
    read = read_public_keys(tmp_path)
    assert list(read) == ["A", "B-2", "C"]
    assert read == keys


def test_a_public_key_file_holds_no_private_key(tmp_path, key):
    write_public_key(tmp_path / "A.pub", key.public_key())
    content = (tmp_path / "A.pub").read_bytes()
    assert content.startswith(b"-----BEGIN PUBLIC KEY-----\n")
    assert b"PRIVATE" not in content


@pytest.mark.parametrize("make", [False, True], ids=["missing", "empty"])
def test_a_folder_without_keys_is_refused(tmp_path, make):
    folder = tmp_path / "keys"
    if make:
        folder.mkdir()
    with pytest.raises(ConfigError) as caught:
        read_public_keys(folder)
    expected = "holds no *.pub file" if make else "is not a folder"
    assert str(caught.value) == f"site-keys={folder} {expected}"
    assert "client init" in caught.value.hint


def test_two_sites_with_one_key_are_refused(tmp_path, key):
    for site in ("A", "B"):
        write_public_key(tmp_path / f"{site}.pub", key.public_key())
    with pytest.raises(ConfigError, match=r"^public keys of sites A and B are the same key$"):
        read_public_keys(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a key", "is not a readable PEM key"),
        (pem(Ed25519PrivateKey.generate()), "is not a readable PEM key"),
        (
            generate_ec(SECP256R1())
            .public_key()
            .public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo),
            "is ECPublicKey; expected Ed25519",
        ),
    ],
    ids=["text", "private", "other-kind"],
)
def test_a_public_key_file_that_is_none_is_refused_by_name(tmp_path, key, content, message):
    write_public_key(tmp_path / "A.pub", key.public_key())
    (tmp_path / "B.pub").write_bytes(content)
    with pytest.raises(ConfigError, match=f"^public key B.pub {message}"):
        read_public_keys(tmp_path)


def test_a_public_key_that_cannot_be_read_is_refused_by_name(tmp_path, key):
    write_public_key(tmp_path / "A.pub", key.public_key())
    (tmp_path / "B.pub").mkdir()
    with pytest.raises(ConfigError, match=r"^public key B\.pub"):
        read_public_keys(tmp_path)
