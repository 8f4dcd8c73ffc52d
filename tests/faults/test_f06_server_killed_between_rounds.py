"""F6: the server is killed when it has finished a round."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from fakes.federations import Federation
from faults.real_processes import SETTINGS, require_equal, require_intact_logs


@pytest.mark.timeout(600)
@pytest.mark.fault(
    "F6",
    fault="The server is killed between rounds",
    injection="SIGKILL as soon as the checkpoint of a round is on disk",
    promise="--resume goes on with the next round; weights and history are those of a run that "
    "nothing happened to, to the byte, and no site trains a round twice",
)
def test_a_server_killed_between_rounds_goes_on_with_the_next(
    federation: Federation, whole: Path
) -> None:
    federation.start_run(**SETTINGS)
    checkpoints = federation.run_dir / "checkpoints"
    wait_for_file(checkpoints / "round_000001.safetensors")
    federation.kill("run")
    assert {n for n, _ in federation.outcomes()} == {1}

    federation.start_resumed()
    said = federation.end("resumed")
    assert "resumed after round=1" in said
    require_equal(federation, whole)
    require_intact_logs(federation)


def wait_for_file(path: Path) -> None:
    """Wait for a file without losing the moment after it."""
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, f"never: {path}"
        time.sleep(0.002)
