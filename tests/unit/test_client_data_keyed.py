"""A patient's hash is the same everywhere under one key and tells nothing without it."""

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.keyed import DATA_KEY, keyed_hash, site_data_key
from strategies.errors import ConfigError


def test_the_hash_of_a_patient_follows_from_key_purpose_and_name():
    first = keyed_hash(b"key", "patient", "Smith")
    assert first == keyed_hash(b"key", "patient", "Smith")
    others = {
        keyed_hash(b"other", "patient", "Smith"),
        keyed_hash(b"key", "example", "Smith"),
        keyed_hash(b"key", "patient", "Smyth"),
    }
    assert first not in others
    assert len(others) == 3
    assert len(first) == 16
    assert int(first, 16) >= 0


parts = st.lists(st.text(max_size=3), max_size=4)


@given(parts, parts)
def test_no_two_lists_of_parts_run_together(one, other):
    hashes = keyed_hash(b"key", "p", *one), keyed_hash(b"key", "p", *other)
    assert (hashes[0] == hashes[1]) == (one == other)


def test_a_name_that_is_not_unicode_has_a_hash():
    assert len(keyed_hash(b"key", "patient", b"M\xfcller".decode("utf-8", "surrogateescape"))) == 16


def test_a_site_makes_its_key_once_for_its_owner_alone(tmp_path):
    state = tmp_path / "state"
    key = site_data_key(state)
    assert len(key) == 32
    assert site_data_key(state) == key
    assert site_data_key(tmp_path / "other") != key
    assert stat.S_IMODE((state / DATA_KEY).stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert [path.name for path in state.iterdir()] == [DATA_KEY]


def test_a_key_that_others_may_read_or_that_is_damaged_is_refused(tmp_path):
    site_data_key(tmp_path)
    (tmp_path / DATA_KEY).chmod(0o644)
    with pytest.raises(ConfigError, match=r"data\.key has mode 0644"):
        site_data_key(tmp_path)
    (tmp_path / DATA_KEY).chmod(0o600)
    (tmp_path / DATA_KEY).write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"data\.key has 5 bytes; expected 32") as error:
        site_data_key(tmp_path)
    assert "backup" in error.value.hint
