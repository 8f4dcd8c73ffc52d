"""F3: a site's program starts anew in the middle of a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from client.site_config import RESULTS
from fakes.federations import Federation, wait_until
from faults.real_processes import (
    SETTINGS,
    asked,
    repeated,
    require_equal,
    require_intact_logs,
    wait_until_arrived,
    wait_until_asked,
)


@pytest.mark.timeout(600)
@pytest.mark.fault(
    "F3",
    fault="A site starts again in the middle of a run",
    injection="SIGTERM to its program between two rounds, all that it kept is removed, and it is "
    "started again",
    promise="it takes part from the next round on and needs nothing of the process before: the run "
    "ends in the bytes of one that nothing happened to",
)
def test_a_restarted_site_contributes_as_if_it_had_never_stopped(
    federation: Federation, whole: Path
) -> None:
    federation.start_run(**SETTINGS)
    wait_until_asked(federation, "C", 1)
    federation.freeze("C")  # a slow site holds the round
    wait_until_arrived(federation, "A", 1)
    federation.terminate("A")
    wait_until(lambda: not federation.children("A"), "the node of A ends", federation.logs)
    for left in (RESULTS, "flower"):
        shutil.rmtree(federation.state("A") / left)
    federation.start_sites("A")
    federation.thaw("C")

    federation.end("run")
    require_equal(federation, whole)
    assert repeated(federation, "A", 1) == repeated(federation, "A", 2) == 0
    assert [len(asked(federation, "A", n)) for n in (1, 2)] == [1, 1]
    require_intact_logs(federation)
