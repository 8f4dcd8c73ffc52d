"""F12: fewer sites than the run needs, from the start or from the second round on."""

from __future__ import annotations

import pytest

from fakes.experiments import SITES, history, make_scenario, model_bytes, resume, start, untimed
from faults.in_process import GRID, Absent, Here
from strategies.errors import QuorumError

WAIT = 0.3


@pytest.fixture
def connected(monkeypatch):
    """Say which sites are connected; returns what links see."""

    def _connected(rule) -> Here:
        here = Here()

        class Grid(Absent):
            connected = staticmethod(lambda site: rule(site, here))

        monkeypatch.setattr(GRID, Grid)
        return here

    return _connected


def scenario():
    return make_scenario(run__strategy__wait_seconds=WAIT)


@pytest.mark.fault(
    "F12",
    fault="Fewer sites than the quorum join, or stay",
    injection="one of three sites is connected: from the start; from the second round on",
    promise="the wait ends at its deadline with an error that names the missing sites; finished "
    "rounds are kept, and --resume with the sites back ends in the same bytes",
)
def test_one_site_alone_is_waited_with_and_then_named_are_the_missing(connected, tmp_path):
    here = connected(lambda site, here: site == "A")
    with pytest.raises(QuorumError) as error:
        start(tmp_path / "run", scenario(), fault=here)
    assert str(error.value) == (
        f"connected sites=1 after {WAIT:g} s; strategy.min-sites=2; not connected: B, C"
    )
    assert error.value.exit_code != 0
    assert here.seen == []  # the one site was not put to work for nothing


@pytest.mark.fault("F12")
def test_sites_that_leave_end_the_run_and_it_goes_on_when_they_are_back(
    connected, tmp_path, monkeypatch
):
    whole, path = tmp_path / "whole", tmp_path / "run"
    start(whole, scenario())
    here = connected(lambda site, here: site == "B" or len(here.seen) < 3)
    with pytest.raises(QuorumError, match="not connected: A, C"):
        start(path, scenario(), fault=here)
    assert [n for _, _, n in here.seen] == [1, 1, 1]
    monkeypatch.undo()
    asked = []
    resume(path, on_reply=asked.append)
    assert len(asked) == 3 * len(SITES)  # round 2, validation, test: round 1 was kept
    assert model_bytes(path) == model_bytes(whole)
    assert untimed(history(path)) == untimed(history(whole))
