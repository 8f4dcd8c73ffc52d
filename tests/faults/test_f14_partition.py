"""F14: a site's line is cut, for a moment or for longer than its node's lease, and works again."""

from __future__ import annotations

import re
import time

import pytest

from fakes.federations import Federation, wait_until
from faults.real_processes import (
    SETTINGS,
    asked,
    require_equal,
    require_intact_logs,
    trained,
    wait_until_asked,
    wait_until_back,
)

pytestmark = pytest.mark.timeout(600)

MOMENT, MINUTE = 12, 65


@pytest.mark.fault(
    "F14",
    fault="The network between a site and the coordinator is cut, for seconds or for a minute",
    injection=f"a proxy resets the site's connections and refuses new ones for {MOMENT} s, in "
    f"another run for {MINUTE} s, in a third lets nothing through for as long without a word, "
    "while the site trains; then it lets them through",
    promise="the site goes on training, says that and why the coordinator is out of reach, tries "
    "again at growing random intervals, and connects by itself; after a moment its update counts "
    "in the same round, after a minute it is back in a later one, and the run completes",
)
def test_after_a_moment_the_update_counts_in_the_same_round(federation: Federation, whole) -> None:
    federation.start_run(**SETTINGS)
    wait_until_asked(federation, "C", 1)
    federation.links["C"].cut()
    wait_until(lambda: trained(federation, "C", 1) == 1, "C trains on", federation.logs)
    time.sleep(MOMENT)
    federation.links["C"].heal()

    federation.end("run")
    require_equal(federation, whole)
    assert federation.links["C"].refused > 0
    require_intact_logs(federation)


@pytest.mark.fault("F14")
def test_after_a_minute_the_site_is_back_by_itself(federation: Federation) -> None:
    link = federation.links["C"]
    children, refused = federation.children("C"), link.refused
    settings = {**SETTINGS, "num_server_rounds": 500, "strategy__min_sites": 2}
    federation.start_run(**settings)
    wait_until_asked(federation, "C", 2)
    link.cut()
    began = time.monotonic()
    federation.wait_for("C", "unreachable reason=")
    time.sleep(max(0, began + MINUTE - time.monotonic()))
    tried = link.refused - refused
    link.heal()

    federation.wait_for("C", "connected again after_seconds=")
    last = max(server_round for server_round, _ in federation.outcomes())
    wait_until_back(federation, "C", last + 1)
    outcomes, reasons = federation.outcomes(), federation.reasons()
    missed = sorted(
        n for (n, site), status in outcomes.items() if (site, status) == ("C", "missing")
    )
    assert missed
    assert missed[0] == 2, "the round in which the line was cut"
    assert reasons[2, "C"].startswith("Flower error 5: "), reasons[2, "C"]
    assert "Node Unavailable" in reasons[2, "C"]
    assert all(outcomes[n, site] == "ok" for n in missed for site in "AB")

    # Not a hot loop: Flower's own intervals double up to 20 s, each a random part of that.
    assert 2 <= tried <= MINUTE
    said = (federation.state("C") / "supernode.log").read_text()
    waits = [float(text) for text in re.findall(r"retrying in ([\d.]+) seconds", said)]
    assert len(set(waits)) >= 2, "random"
    assert max(waits) <= 20
    assert federation.log("C").count("unreachable reason=") == 1, "it is said once"
    assert "unreachable reason=ends the connection" in federation.log("C")
    assert federation.children("C") == children, "the same node, not a new one"
    assert len(asked(federation, "C", 2)) == 1
    assert trained(federation, "C", 2) == 1, "what it was asked for it worked out"
    require_intact_logs(federation)
    federation.terminate("run", 130)


@pytest.mark.fault("F14")
def test_a_line_that_is_dead_without_a_word_is_no_end_either(federation: Federation) -> None:
    link, children = federation.links["C"], federation.children("C")
    settings = {**SETTINGS, "num_server_rounds": 500, "strategy__min_sites": 2}
    federation.start_run(**settings)
    wait_until_asked(federation, "C", 2)
    link.silence()
    time.sleep(MINUTE)
    link.heal()
    last = max(server_round for server_round, _ in federation.outcomes())
    wait_until_back(federation, "C", last + 1)
    outcomes = federation.outcomes()
    assert outcomes[2, "C"] == "missing", "the round in which the line died"
    assert all(outcomes[n, site] == "ok" for n in range(1, last) for site in "AB")
    assert federation.children("C") == children, "the same node, not a new one"
    assert trained(federation, "C", 2) == 1, "what it was asked for it worked out"
    require_intact_logs(federation)
    federation.terminate("run", 130)
