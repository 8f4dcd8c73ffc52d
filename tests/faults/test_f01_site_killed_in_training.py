"""F1: a site's program is killed while it trains, or its machine loses its power."""

from __future__ import annotations

import signal

import pytest

from fakes.federations import Federation, wait_until
from faults.real_processes import (
    SETTINGS,
    answered,
    asked,
    require_intact_logs,
    trained,
    wait_until_asked,
    wait_until_back,
)

DEADLINE = 30


@pytest.mark.timeout(600)
@pytest.mark.fault(
    "F1",
    fault="A site is killed while it trains",
    injection="SIGKILL to its program; later SIGKILL to all processes of another site at once",
    promise="the round ends with the quorum, at once or at its deadline; nothing of the site is "
    "left running, its audit log is intact, and started again it contributes to a later round",
)
def test_a_killed_site_is_done_without_until_it_is_back(federation: Federation) -> None:
    settings = {**SETTINGS, "num_server_rounds": 500, "strategy__min_sites": 2}
    federation.start_run(**settings, strategy__round_timeout_seconds=DEADLINE)

    # Its program alone: what is left of the site says goodbye for it.
    wait_until_asked(federation, "A", 2)
    children = federation.children("A")
    federation.kill("A")
    assert children, "a site has a node of its own"
    wait_until(lambda: not federation.children("A"), "the node of A ends", federation.logs)
    assert (len(asked(federation, "A", 2)), answered(federation, "A", 2)) == (1, [])
    assert trained(federation, "A", 2) == 0, "it was killed while it trained"
    wait_until(lambda: (2, "C") in federation.outcomes(), "round 2 ends", federation.logs)
    assert [federation.outcomes()[2, site] for site in "ABC"] == ["missing", "ok", "ok"]
    # As a rule the goodbye arrives; where it does not, the deadline ends the round.
    assert federation.reasons()[2, "A"].startswith(("Flower error", "no reply within"))
    require_intact_logs(federation)
    federation.start_sites("A")
    wait_until_back(federation, "A", 3, seconds=180)

    # All of it, without a word: the coordinator can only wait for the deadline.
    seen: list[int] = []
    wait_until(
        lambda: seen.append(training(federation, "C")) or seen[-1] > 2,
        "C trains again",
        federation.logs,
    )
    federation.crash("C")
    killed_in = seen[-1]
    assert answered(federation, "C", killed_in) == [], "it was killed while it trained"
    federation.start_sites("C")
    wait_until(lambda: (killed_in, "C") in federation.outcomes(), "it ends", federation.logs)
    assert [federation.outcomes()[killed_in, site] for site in "ABC"] == ["ok", "ok", "missing"]
    assert federation.reasons()[killed_in, "C"] == f"no reply within {DEADLINE} s"
    wait_until_back(federation, "C", killed_in + 1, seconds=180)
    # Flower takes a node that vanished for a minute more; the site waits for that and says so.
    assert "not admitted, revoked, or running elsewhere; trying again" in federation.log("C")

    federation.processes["run"].send_signal(signal.SIGINT)
    federation.end("run", 130)
    require_intact_logs(federation)


def training(federation: Federation, site: str) -> int:
    """Return the round that a site has been asked for and has not answered; 0 where there is none.

    One that it was killed in stays so.
    """
    rounds = range(1, federation.history()[-1]["server_round"] + 2)
    open_ = [n for n in rounds if asked(federation, site, n) and not answered(federation, site, n)]
    return open_[-1] if open_ else 0
