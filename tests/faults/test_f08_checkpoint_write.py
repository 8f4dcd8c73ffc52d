"""F8: a server that dies while it writes a checkpoint, and a checkpoint that is damaged later."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fakes.experiments import (
    Killed,
    history,
    kill_after,
    make_scenario,
    model_bytes,
    resume,
    start,
    untimed,
)
from faults import checkpoint_writer as writer
from server.checkpoint import load_checkpoint

KILLS = 20


@pytest.fixture
def killed_writer(tmp_path, environment):
    """Start the writer, and kill it some time after a new file is seen in its folder.

    Returns the last round that it called written.
    """

    def _killed(seconds: float) -> int:
        process = subprocess.Popen(
            [sys.executable, writer.__file__, tmp_path],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        with process:
            lines = [process.stdout.readline()]
            before = set(os.listdir(tmp_path))
            while set(os.listdir(tmp_path)) <= before:
                assert process.poll() is None, "the writer ended by itself"
            time.sleep(seconds)
            process.kill()
            lines += process.stdout.readlines()
        return int([line for line in lines if line.endswith("\n")][-1])

    return _killed


@pytest.mark.timeout(300)
@pytest.mark.fault(
    "F8",
    fault="The server dies while it writes a checkpoint, or the newest checkpoint is damaged",
    injection=f"{KILLS} times SIGKILL to a process that writes checkpoints; bytes changed on disk",
    promise="the newest checkpoint under its name is always whole; a damaged one is told and "
    "gives way to the one before, and the run ends in the same bytes; parts of cut writes do not "
    "pile up",
)
def test_a_writer_killed_at_any_moment_leaves_a_whole_newest_checkpoint(
    killed_writer, tmp_path, caplog
):
    moments = random.Random(0)
    cut_short = 0
    for _ in range(KILLS):
        before = set(tmp_path.iterdir())
        written = killed_writer(0.05 * moments.random() ** 3)
        found = load_checkpoint(tmp_path, writer.RUN_UUID)
        assert found is not None
        state, weights, best = found
        # The one it had announced, or the one it was killed in before it could.
        assert state.server_round in (written, written + 1)
        for arrays, value in ((weights, state.server_round), (best, -state.server_round)):
            assert len(arrays) == writer.ARRAYS
            assert all(np.array_equal(a, np.full(writer.LENGTH, value)) for a in arrays.values())
        parts = {path for path in tmp_path.iterdir() if path.name.startswith(".")}
        assert len(parts) <= 1  # what one killed write left, the next removes
        cut_short += len(parts - before)
    assert caplog.messages == []  # nothing under a checkpoint's name was ever damaged
    assert cut_short, "no kill hit a write"


@pytest.mark.fault("F8")
def test_a_damaged_newest_checkpoint_is_told_and_the_run_ends_in_the_same_bytes(tmp_path, caplog):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    start(whole, make_scenario())
    with pytest.raises(Killed):
        start(broken, make_scenario(), on_reply=kill_after(8))
    damage(broken / "checkpoints" / "round_000002.safetensors")
    with caplog.at_level(logging.WARNING, "server.checkpoint"):
        resume(broken)
    assert caplog.messages == [
        "checkpoint=round_000002.safetensors not used: its content and its hash do not agree"
    ]
    assert model_bytes(broken) == model_bytes(whole)
    assert untimed(history(broken)) == untimed(history(whole))


def damage(path: Path) -> None:
    """Change one bit in the middle of the arrays, as a bad disk does."""
    content = bytearray(path.read_bytes())
    content[-len(content) // 4] ^= 1
    path.write_bytes(bytes(content))
