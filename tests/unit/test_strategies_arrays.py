"""Arrays arrive to the bit, equal arrays have one spelling, and foreign bytes are refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.replies import NAMED_ARRAYS, assert_same_arrays
from strategies.arrays import BLOB, hash_arrays, hash_blob, parse, serialise, to_record
from strategies.errors import ProtocolError


@given(NAMED_ARRAYS)
def test_any_float32_arrays_come_back_to_the_bit(arrays):
    # NaN and infinity too: whether they are usable is the strategy's question.
    data = serialise(arrays)
    assert_same_arrays(arrays, parse(data))
    assert hash_blob(data) == hash_arrays(arrays)


def test_order_and_layout_are_no_content():
    first = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(1, np.float32)}
    second = {"b": first["b"], "a": np.asfortranarray(first["a"])}
    assert serialise(first) == serialise(second)


def test_all_arrays_travel_as_one_object_of_their_own_size():
    """Flower asks for every array by itself, so one a parameter makes a small round slow."""
    record = to_record(serialise({str(k): np.ones(1000, np.float32) for k in range(100)}))
    assert len(record) == 1
    assert record[BLOB].shape[0] < 100 * 1000 * 4 * 1.02


def save(value: np.ndarray, **metadata: str) -> bytes:
    return safetensors.numpy.save({"w": value}, metadata or None)


class _Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle from the network was executed",))


def header(**changes) -> bytes:
    """Three numbers whose header says something else."""
    entry = {"dtype": "F32", "shape": [3], "data_offsets": [0, 12], **changes}
    text = json.dumps({"w": entry}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(12)


WHOLE = save(np.ones(3, np.float32))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (save(np.ones(3)), "^array 'w' has dtype=float64; expected float32$"),
        (save(np.ones(3, np.int64)), "^array 'w' has dtype=int64; expected float32$"),
        (save(np.ones(3, np.float16)), "^array 'w' has dtype=float16; expected float32$"),
        (header(dtype="BF16", data_offsets=[0, 6]), "is not readable|has dtype="),
        (b"", "is not readable"),
        (bytes(64), "is not readable"),
        (WHOLE[:-1], "is not readable"),
        (WHOLE + b"x", "is not readable"),
        (pickle.dumps(_Bomb()), "is not readable"),
        (header(shape=[10**15]), "is not readable"),
        (header(shape=[-3]), "is not readable"),
        (header(data_offsets=[0, 10**15]), "is not readable"),
        ((2**63).to_bytes(8, "little") + bytes(64), "is not readable"),
        (save(np.ones(3, np.float32), patient="61"), "holds more than its arrays"),
        (header(), "holds more than its arrays"),  # no padding: another spelling of the same
    ],
    ids=[
        "float64", "int64", "float16", "bfloat16", "empty", "zeros", "cut", "longer", "pickle",
        "huge", "negative", "beyond", "header", "metadata", "spelling",
    ],
)  # fmt: skip
def test_bytes_that_are_not_just_float32_arrays_are_refused(data, message):
    with pytest.raises(ProtocolError, match=message):
        parse(data)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_give_a_protocol_error(data):
    with pytest.raises(ProtocolError):
        parse(data)
