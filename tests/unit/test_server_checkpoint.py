"""Checkpoints: what was saved comes back, and nothing damaged is used."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
from safetensors.numpy import load, save

from server.checkpoint import State, check_shapes, load_checkpoint, save_checkpoint
from strategies.arrays import Arrays
from strategies.errors import CheckpointError

UUID = "a1b2"


def state(server_round: int, **changes) -> State:
    values = {
        "run_uuid": UUID,
        "server_round": server_round,
        "history_bytes": 100 * server_round,
        "best_round": max(server_round - 1, 0),
        "best_sums": {"A": {"val-num-examples": 3, "val-loss-sum": 0.1}},
        "chosen": False,
        "best_value": 0.1 + 0.2,
        "seconds": 1.5,
    }
    return State(**{**values, **changes})


def arrays(seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    return {
        "stem.weight": generator.normal(size=(3, 2)).astype(np.float32),
        "best.bias": generator.normal(size=5).astype(np.float32),
        "weights.scale": np.array([0.0, -0.0, 1e-45, 3e38], np.float32),
    }


def assert_same(first: Arrays, second: Arrays) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert (second[name].shape, second[name].dtype) == (value.shape, np.float32)
        assert second[name].tobytes() == value.tobytes(), name


@pytest.fixture
def three(tmp_path):
    """A folder after three rounds."""
    for server_round in (1, 2, 3):
        save_checkpoint(tmp_path, state(server_round), arrays(server_round), arrays(0))
    return tmp_path


def newest(folder):
    return folder / "round_000003.safetensors"


@pytest.mark.parametrize("best_value", [0.1 + 0.2, None, -1.25])
def test_a_checkpoint_comes_back_to_the_bit(tmp_path, best_value):
    saved = state(7, best_value=best_value)
    save_checkpoint(tmp_path, saved, arrays(1), arrays(2))
    found, weights, best = load_checkpoint(tmp_path, UUID)
    assert found == saved
    assert_same(arrays(1), weights)
    assert_same(arrays(2), best)


def test_a_run_that_finished_no_round_has_no_checkpoint(tmp_path):
    assert load_checkpoint(tmp_path, UUID) is None


def test_the_newest_two_are_kept(three):
    assert sorted(path.name for path in three.iterdir()) == [
        "round_000002.safetensors",
        "round_000003.safetensors",
    ]
    assert load_checkpoint(three, UUID)[0].server_round == 3


def test_round_ten_is_newer_than_round_nine(tmp_path):
    for server_round in (9, 10):
        save_checkpoint(tmp_path, state(server_round), arrays(1), arrays(2))
    assert load_checkpoint(tmp_path, UUID)[0].server_round == 10


def test_a_checkpoint_that_cannot_be_written_leaves_those_before(three, monkeypatch):
    def fails(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(three, state(4), arrays(4), arrays(0))
    monkeypatch.undo()
    assert len(list(three.iterdir())) == 2
    assert load_checkpoint(three, UUID)[0].server_round == 3


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flip(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


def edit_state(content: bytes) -> bytes:
    # Same length: in the header only the round number changes.
    assert content.count(b'\\"server_round\\": 3') == 1
    return content.replace(b'\\"server_round\\": 3', b'\\"server_round\\": 9')


def other_metadata(content: bytes) -> bytes:
    return save(load(content), metadata={"state": "[1, 2]", "sha256": "0"})


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut, "it is not readable"),
        (lambda content: b"", "it is not readable"),
        (lambda content: b"\xff" * 64, "it is not readable"),
        (lambda content: save(load(content)), "it is not readable"),
        (other_metadata, "it is not readable"),
        (flip, "its content and its hash do not agree"),
        (edit_state, "its content and its hash do not agree"),
    ],
    ids=["cut", "empty", "garbage", "no-state", "odd-state", "flipped-bit", "edited-state"],
)
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(three, caplog, damage, reason):
    newest(three).write_bytes(damage(newest(three).read_bytes()))
    with caplog.at_level(logging.WARNING):
        found, weights, best = load_checkpoint(three, UUID)
    assert found == state(2)
    assert_same(arrays(2), weights)
    assert_same(arrays(0), best)
    assert caplog.messages == [f"checkpoint=round_000003.safetensors not used: {reason}"]


def test_an_intact_checkpoint_is_used_without_a_warning(three, caplog):
    load_checkpoint(three, UUID)
    assert caplog.messages == []


def test_when_all_are_damaged_the_run_is_not_started_over_in_silence(three):
    for path in three.iterdir():
        path.write_bytes(flip(path.read_bytes()))
    with pytest.raises(CheckpointError, match=r"^no checkpoint is usable$") as caught:
        load_checkpoint(three, UUID)
    assert caught.value.hint == "start the run again with another --output"
    assert caught.value.exit_code == 2


def test_a_checkpoint_of_another_run_is_refused(three, caplog):
    with pytest.raises(CheckpointError, match="no checkpoint is usable"):
        load_checkpoint(three, "ffff")
    assert caplog.messages == [
        f"checkpoint=round_00000{n}.safetensors not used: it belongs to run_uuid={UUID}"
        for n in (3, 2)
    ]


def test_the_model_of_the_run_fits():
    check_shapes(arrays(1), arrays(2))


def test_another_shape_is_refused_and_both_are_shown():
    other = {**arrays(1), "stem.weight": np.zeros((3, 7), np.float32)}
    with pytest.raises(CheckpointError) as caught:
        check_shapes(arrays(1), other)
    assert str(caught.value) == (
        "the checkpoint is of another architecture: stem.weight has shape=(3, 2) in it and "
        "shape=(3, 7) in this run's model"
    )
    assert caught.value.hint == "resume with the configuration the run was started with"


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_array_is_refused_by_name(which):
    pair = [arrays(1), arrays(1)]
    del pair[which]["stem.weight"]
    shapes = ["(3, 2)", "(3, 2)"]
    shapes[which] = "absent"
    with pytest.raises(CheckpointError) as caught:
        check_shapes(*pair)
    assert f"stem.weight has shape={shapes[0]} in it and shape={shapes[1]}" in str(caught.value)
