"""Who said it: private keys in files, and signatures over canonical JSON.

Invariant: a private key is created where it is used, lies in a file only its owner can read, and
is never part of a record. What is signed is the canonical JSON of a flat document, so that both
ends hash the same bytes. Three kinds, by the ``cryptography`` package: Ed25519 signs (RFC 8032),
X25519 will wrap encryption keys (RFC 7748), EC P-384 is what Flower's node authentication takes.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
)

from strategies.errors import ConfigError, SignatureError
from strategies.files import write_atomic


def canonical(document: Mapping[str, object]) -> bytes:
    """Return the one byte string that stands for ``document``: sorted keys, no spaces, ASCII.

    Raises:
        ValueError: A value is NaN or infinite, which JSON cannot express.
    """
    return json.dumps(
        document, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False
    ).encode()


def sign(key: Ed25519PrivateKey, document: Mapping[str, object]) -> bytes:
    """Sign the canonical form of ``document``; 64 bytes."""
    return key.sign(canonical(document))


def verify(key: Ed25519PublicKey, document: Mapping[str, object], signature: bytes) -> None:
    """Check a signature made by :func:`sign`.

    Raises:
        SignatureError: The signature was not made by this key over this document.
    """
    try:
        data = canonical(document)
    except ValueError as error:
        raise SignatureError("signature does not match the signed content") from error
    verify_bytes(key, data, signature)


def verify_bytes(key: Ed25519PublicKey, data: bytes, signature: bytes) -> None:
    """Check a signature over bytes that nobody has read yet.

    Raises:
        SignatureError: The signature was not made by this key over these bytes.
    """
    try:
        key.verify(signature, data)
    except InvalidSignature as error:
        raise SignatureError("signature does not match the signed content") from error


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return 80 bits of the key's SHA-256 in groups of four, for two people on the telephone."""
    digest = hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:20]
    return "-".join(digest[start : start + 4] for start in range(0, len(digest), 4))


def same_fingerprint(told: str, expected: str) -> bool:
    """Compare a fingerprint as a person typed it, in any case and with any grouping."""
    return _hex_digits(told) == _hex_digits(expected)


def _hex_digits(text: str) -> str:
    return "".join(text.split()).replace("-", "").lower()


def create_signing_key(path: Path) -> Ed25519PrivateKey:
    """Make a signing key at ``path`` (mode 0600), unless there is one, and return it.

    Raises:
        ConfigError: What is there is not usable.
    """
    _create(path, Ed25519PrivateKey.generate, PrivateFormat.PKCS8)
    return load_signing_key(path)


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read a signing key.

    Raises:
        ConfigError: It is missing, is of another kind, or others than its owner may read it.
    """
    return _load(path, Ed25519PrivateKey, load_pem_private_key)


def create_wrap_key(path: Path) -> X25519PrivateKey:
    """Make a wrap key as :func:`create_signing_key` makes a signing key."""
    _create(path, X25519PrivateKey.generate, PrivateFormat.PKCS8)
    return load_wrap_key(path)


def load_wrap_key(path: Path) -> X25519PrivateKey:
    """Read a wrap key as :func:`load_signing_key` reads a signing key."""
    return _load(path, X25519PrivateKey, load_pem_private_key)


def create_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Make the key of a Flower node, in the OpenSSH format that ``flower-supernode`` reads."""
    _create(path, lambda: ec.generate_private_key(ec.SECP384R1()), PrivateFormat.OpenSSH)
    return load_node_key(path)


def load_node_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Read a node key as :func:`load_signing_key` reads a signing key."""
    return _load(path, ec.EllipticCurvePrivateKey, load_ssh_private_key)


PrivateKey = Ed25519PrivateKey | X25519PrivateKey | ec.EllipticCurvePrivateKey
Kind = TypeVar("Kind", Ed25519PrivateKey, X25519PrivateKey, ec.EllipticCurvePrivateKey)


def _create(path: Path, generate: Callable[[], PrivateKey], form: PrivateFormat) -> None:
    if not path.exists():
        pem = generate().private_bytes(Encoding.PEM, form, NoEncryption())
        write_atomic(path, pem, mode=0o600)


def _load(path: Path, kind: type[Kind], read: Callable[..., object]) -> Kind:
    content = read_secret(path)
    try:
        key = read(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"private key {path.name} is not a readable key file") from error
    if not isinstance(key, kind):
        raise ConfigError(
            f"private key {path.name} is {type(key).__name__}; expected {kind.__name__}"
        )
    return key


def read_secret(path: Path) -> bytes:
    """Read a file that only its owner may read.

    Raises:
        ConfigError: It is missing, or others may read it.
    """
    try:
        mode, content = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"secret file {path.name} cannot be read ({error.strerror})",
            hint="`init` makes it; restore it from a backup where it was lost",
        ) from error
    if mode & 0o077:
        raise ConfigError(
            f"secret file {path.name} has mode {mode:04o}: others may read it; expected 0600",
            hint=f"chmod 600 {path.name}; if others may have read it, make a new one",
        )
    return content
