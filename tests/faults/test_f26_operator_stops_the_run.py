"""F26: a person or a service manager stops the server while sites train."""

from __future__ import annotations

import math
import signal
from pathlib import Path

import pytest

from fakes.federations import Federation, wait_until
from faults.real_processes import (
    SETTINGS,
    SLOW_LINE,
    answered,
    asked,
    fetched,
    repeated,
    require_equal,
    require_intact_logs,
    trained,
    wait_until_asked,
)
from server.checkpoint import load_checkpoint
from strategies.errors import StoppedError

pytestmark = pytest.mark.timeout(600)

# A site looks every 10 s whether its run goes on: a round of C has to be longer.
SECONDS, LEAST_STEPS = 20, 1400
BATCH_SIZE = SETTINGS["training__batch_size"]


@pytest.mark.fault(
    "F26",
    fault="The operator stops the run",
    injection="Ctrl-C (SIGINT) at the server while a site trains; the same by SIGTERM",
    promise="the site stops before its round's end and says why, finished rounds and answers are "
    "kept, the exit code is 130, and --resume completes the run",
)
def test_a_run_that_is_stopped_stops_the_sites_and_goes_on_later(
    federation: Federation, whole: Path
) -> None:
    epochs = epochs_of_a_long_round(federation, whole)
    settings = {**SETTINGS, "training__local_steps": 0, "training__local_epochs": epochs}
    sites = dict(federation.processes)

    federation.start_run(**settings)
    stop_in_round_2(federation, "run", signal.SIGINT, times=1)
    federation.start_resumed()
    stop_in_round_2(federation, "resumed", signal.SIGTERM, times=2)
    assert trained(federation, "C", 2) == 0
    for site in federation.sites:
        assert federation.processes[site] is sites[site]
        assert federation.is_up(site), "a site stays up when its run is stopped"

    federation.start_resumed()
    said = federation.end("resumed")
    assert said.count("resumed after round=1") == 2
    assert [trained(federation, site, n) for site in "ABC" for n in (1, 2)] == [1] * 6
    assert repeated(federation, "C", 2) == 0
    assert set(federation.outcomes().values()) == {"ok"}
    require_intact_logs(federation)


@pytest.mark.fault("F26")
def test_a_site_that_still_fetches_its_instruction_is_free_for_the_next_run(
    federation: Federation, whole: Path
) -> None:
    federation.start_run(**SETTINGS)
    wait_until(lambda: bool(answered(federation, "C", 1)), "C has done round 1", federation.logs)
    messages = fetched(federation, "C")
    federation.links["C"].bytes_per_second = SLOW_LINE
    wait_until(lambda: fetched(federation, "C") > messages, "C fetches round 2", federation.logs)
    federation.processes["run"].send_signal(signal.SIGINT)
    federation.end("run", StoppedError.exit_code)
    assert asked(federation, "C", 2) == [], "it had not come yet"
    federation.links["C"].heal()

    federation.start_resumed()
    federation.end("resumed")
    require_equal(federation, whole)


def stop_in_round_2(federation: Federation, name: str, number: signal.Signals, times: int) -> None:
    """Stop the server while C trains, and require that C stops and the state is kept."""
    wait_until_asked(federation, "C", 2, times)
    federation.processes[name].send_signal(number)
    said = federation.end(name, StoppedError.exit_code)
    assert "stopping: telling the sites" in said
    assert f"stopped; continue with --resume {federation.run}" in said
    wait_until(
        lambda: len(answered(federation, "C", 2)) == times, "C stops", federation.logs, seconds=180
    )
    assert len(asked(federation, "C", 2)) == times
    last = answered(federation, "C", 2)[-1]
    assert (last["status"], last["reason"]) == ("refused", "stopped: the coordinator ended the run")
    said = federation.log("C")
    assert said.count("work=aborted reason=the coordinator ended the run") == times
    stopped = federation.decisions(federation.server_state, "run-stopped")
    assert len(stopped) == times
    found = load_checkpoint(federation.run_dir / "checkpoints", stopped[-1]["run_uuid"])
    assert found is not None
    assert found[0].server_round == 1


def epochs_of_a_long_round(federation: Federation, whole: Path) -> int:
    """Return passes over C's images that take long enough, going by the fastest round of ``whole``.

    A and B have far fewer images and are done long before.
    """
    lines = federation.history(whole)
    speed = max(line["num_steps"] / line["seconds"] for line in lines if line["type"] == "site")
    (num_examples,) = {
        line["num_examples"] for line in lines if (line["type"], line.get("site")) == ("site", "C")
    }
    steps = max(LEAST_STEPS, SECONDS * speed)
    return math.ceil(steps / (num_examples // BATCH_SIZE))
