"""Named arrays on the wire: one safetensors blob, one spelling of every content.

Invariant: equal arrays have equal bytes and equal hashes, and bytes that are not exactly what
:func:`serialise` would write are refused, so nothing undeclared travels beside the numbers.
"""

from __future__ import annotations

import hashlib

import numpy as np
import safetensors.numpy
from flwr.app import Array, ArrayRecord, RecordDict
from numpy.typing import NDArray

from strategies.errors import ProtocolError

Arrays = dict[str, NDArray[np.float32]]

ARRAYS = "arrays"  # name of the record
BLOB = "safetensors"  # name and kind of its only array


def serialise(arrays: Arrays) -> bytes:
    """Return the safetensors file of named arrays; their order and memory layout do not matter."""
    return safetensors.numpy.save({k: np.asarray(v, order="C") for k, v in arrays.items()})


def hash_arrays(arrays: Arrays) -> str:
    """Return the SHA-256 of names, shapes and values."""
    return hash_blob(serialise(arrays))


def num_bytes(arrays: Arrays) -> int:
    """Return the size of the numbers alone."""
    return sum(value.nbytes for value in arrays.values())


def hash_blob(data: bytes) -> str:
    """Return the hash that :func:`hash_arrays` gives for the arrays in a blob."""
    return hashlib.sha256(data).hexdigest()


def to_record(data: bytes) -> ArrayRecord:
    """Put a blob into a Flower record.

    Flower moves every array as objects of their own, a request each, through two processes: with
    one blob a round of nano over sockets takes 5 s, with one array a parameter 28 s.
    """
    return ArrayRecord({BLOB: Array("uint8", (len(data),), BLOB, data)})


def from_record(content: RecordDict) -> bytes:
    """Return the blob of a message, unread.

    Raises:
        ProtocolError: The record is missing or is not one blob.
    """
    record = content.array_records.get(ARRAYS)
    if record is None:
        raise ProtocolError(f"record {ARRAYS!r} is missing")
    if list(record) != [BLOB]:
        raise ProtocolError(f"record {ARRAYS!r} has {len(record)} arrays; expected {BLOB} alone")
    array = record[BLOB]
    if (array.dtype, array.shape, array.stype) != ("uint8", (len(array.data),), BLOB):
        raise ProtocolError(f"record {ARRAYS!r} does not describe its bytes")
    return array.data


def parse(data: bytes) -> Arrays:
    """Read a blob.

    Raises:
        ProtocolError: It is not what :func:`serialise` writes for float32 arrays.
    """
    try:
        # The blob's alignment must not decide how later sums are vectorised: copy.
        arrays = {k: np.array(v) for k, v in safetensors.numpy.load(data).items()}
    except Exception as error:  # its reader raises several kinds on foreign bytes
        raise ProtocolError(f"record {ARRAYS!r} is not readable") from error
    for name, value in arrays.items():
        if value.dtype != np.float32:
            raise ProtocolError(f"array {name!r} has dtype={value.dtype}; expected float32")
    if serialise(arrays) != data:
        raise ProtocolError(f"record {ARRAYS!r} holds more than its arrays")
    return arrays
