"""F7: the server is killed when it has some of a round's updates."""

from __future__ import annotations

from pathlib import Path

import pytest

from fakes.federations import Federation
from faults.real_processes import (
    SETTINGS,
    answered,
    repeated,
    require_equal,
    require_intact_logs,
    wait_until_arrived,
    wait_until_asked,
)


@pytest.mark.timeout(600)
@pytest.mark.fault(
    "F7",
    fault="The server is killed in the middle of a round",
    injection="SIGKILL when it has taken one site's update and another still trains",
    promise="--resume asks the round again in a new Flower run; sites send what they kept and do "
    "not train again; weights and history are those of a run that nothing happened to, to the byte",
)
def test_a_server_killed_in_a_round_asks_it_again_and_no_site_trains_twice(
    federation: Federation, whole: Path
) -> None:
    federation.start_run(**SETTINGS)
    wait_until_asked(federation, "C", 2)
    federation.freeze("C")  # a slow site holds the round
    wait_until_arrived(federation, "A", 2)
    federation.kill("run")
    federation.thaw("C")

    federation.start_resumed()
    said = federation.end("resumed")
    assert "resumed after round=1" in said
    flower_runs = [log.count("submitted flower_run_id=") for log in (federation.log("run"), said)]
    assert flower_runs == [1, 1]
    require_equal(federation, whole)  # each site has trained each round once
    assert repeated(federation, "A", 2) == 1
    first, second = answered(federation, "A", 2)
    assert first["status"] == second["status"] == "ok"
    assert first["arrays_sha256"] == second["arrays_sha256"]
    require_intact_logs(federation)
