"""Keyed hashes that stand for patients and examples, and the site's key for them.

Invariant: without the key a hash tells nothing, not even by trying every patient number; with the
same key a patient's name has the same hash in every data set and run, so that a privacy ledger
knows whom it has charged. A reader that learns more of a patient (DICOM: an issuer, a second
number) may choose another name for them; a ledger has to take both for one person. The key never
leaves the site's state folder. BLAKE2b in its keyed mode (RFC 7693).
"""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path

from strategies.errors import ConfigError
from strategies.files import make_folder, write_atomic
from strategies.identity import read_secret

DATA_KEY = "data.key"
KEY_BYTES = 32
# 64 bits: among a million hashes, two are equal with a chance of 3 in 100 million.
HASH_BYTES = 8
# For published data: hashes that everybody can compare, and that hide nothing.
PUBLIC_KEY = b"public data, nothing to hide"


def keyed_hash(key: bytes, purpose: str, *parts: str | int) -> str:
    """Return 16 hexadecimal digits for some parts; another purpose gives unrelated ones.

    >>> keyed_hash(b"key", "patient", "12") == keyed_hash(b"key", "patient", "1", "2")
    False
    """
    digest = hashlib.blake2b(key=key, digest_size=HASH_BYTES)
    for part in (purpose, *parts):
        text = str(part).encode("utf-8", "surrogateescape")  # a name in any encoding
        digest.update(len(text).to_bytes(8, "big") + text)
    return digest.hexdigest()


def site_data_key(state_dir: Path) -> bytes:
    """Return the site's key for its data; made at the first call, from the system's randomness.

    Raises:
        ConfigError: Others than its owner may read it, it is damaged, or it cannot be made.
    """
    path = state_dir / DATA_KEY
    make_folder(state_dir, secret=True)
    try:
        if not path.exists():
            _create(path)
    except OSError as error:
        raise ConfigError(f"data key in {state_dir} cannot be made ({error.strerror})") from error
    key = read_secret(path)
    if len(key) != KEY_BYTES:
        raise ConfigError(
            f"{DATA_KEY} has {len(key)} bytes; expected {KEY_BYTES}",
            hint="restore it from a backup; with another key every patient counts as a new one",
        )
    return key


def _create(path: Path) -> None:
    """Make the key unless another process does so at the same time: the first one stays."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    write_atomic(fresh, secrets.token_bytes(KEY_BYTES), mode=0o600)
    try:
        os.link(fresh, path)
    except FileExistsError:
        pass
    finally:
        fresh.unlink()
