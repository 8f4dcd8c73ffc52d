"""Who said it: Ed25519 signing keys of sites, and signatures over canonical JSON.

Invariant: a private key is created at the site, lies in a file only its owner can read, and is
never part of a record. What is signed is the canonical JSON of a flat document, so that both ends
hash the same bytes. Source: RFC 8032 (Ed25519), by the ``cryptography`` package.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Mapping
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from strategies.errors import ConfigError, SignatureError
from strategies.files import write_atomic

PUBLIC_KEY_SUFFIX = ".pub"


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
        key.verify(signature, canonical(document))
    except (InvalidSignature, ValueError) as error:
        raise SignatureError("signature does not match the signed content") from error


def fingerprint(key: Ed25519PublicKey) -> str:
    """Return 80 bits of the key's SHA-256 in groups of four, for two people on the telephone."""
    digest = hashlib.sha256(key.public_bytes(Encoding.Raw, PublicFormat.Raw)).hexdigest()[:20]
    return "-".join(digest[start : start + 4] for start in range(0, len(digest), 4))


def create_signing_key(path: Path) -> Ed25519PrivateKey:
    """Make a private key at ``path`` (mode 0600), unless there is one, and return it.

    Raises:
        ConfigError: What is there is not usable.
    """
    if not path.exists():
        key = Ed25519PrivateKey.generate()
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_atomic(path, pem, mode=0o600)
    return load_signing_key(path)


def load_signing_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key.

    Raises:
        ConfigError: It is missing, is not an Ed25519 key, or others than its owner may read it.
    """
    try:
        mode, content = stat.S_IMODE(path.stat().st_mode), path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"signing key {path.name} cannot be read ({error.strerror})",
            hint="`python -m client init --site NAME` makes one",
        ) from error
    if mode & 0o077:
        raise ConfigError(
            f"signing key {path.name} has mode {mode:04o}: others may read it; expected 0600",
            hint=f"chmod 600 {path.name}, or remove it and run init for a new one",
        )
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"signing key {path.name} is not a readable PEM key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ConfigError(f"signing key {path.name} is {type(key).__name__}; expected Ed25519")
    return key


def write_public_key(path: Path, key: Ed25519PublicKey) -> None:
    """Write a public key as PEM."""
    write_atomic(path, key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def read_public_keys(folder: Path) -> dict[str, Ed25519PublicKey]:
    """Read every ``<site>.pub`` of a folder: the sites that a coordinator admits.

    Returns:
        Site name to public key, in name order.

    Raises:
        ConfigError: The folder is missing or holds no key, or a file is not an Ed25519 public
            key, or two sites share one key.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"site-keys={folder} is not a folder",
            hint="collect each site's <site>.pub there; `python -m client init` writes it",
        )
    keys: dict[str, Ed25519PublicKey] = {}
    for path in sorted(folder.glob(f"*{PUBLIC_KEY_SUFFIX}")):
        try:
            key = load_pem_public_key(path.read_bytes())
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError(f"public key {path.name} is not a readable PEM key") from error
        if not isinstance(key, Ed25519PublicKey):
            raise ConfigError(f"public key {path.name} is {type(key).__name__}; expected Ed25519")
        twin = next((site for site, other in keys.items() if other == key), None)
        if twin is not None:
            raise ConfigError(f"public keys of sites {twin} and {path.stem} are the same key")
        keys[path.stem] = key
    if not keys:
        raise ConfigError(
            f"site-keys={folder} holds no *{PUBLIC_KEY_SUFFIX} file",
            hint="collect each site's <site>.pub there; `python -m client init` writes it",
        )
    return keys
