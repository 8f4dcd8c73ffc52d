"""F2: a site is killed when it has trained and not yet sent its update."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from client.site_config import RESULTS
from fakes.federations import Federation, wait_until
from faults.real_processes import (
    SETTINGS,
    repeated,
    require_equal,
    require_intact_logs,
    wait_until_asked,
)


@pytest.mark.timeout(600)
@pytest.mark.fault(
    "F2",
    fault="A site is killed after training, before its update is sent",
    injection="its node is stopped so that it takes nothing; SIGKILL as soon as the site's answer "
    "is on disk",
    promise="asked again, the site sends the answer it kept and does not train again; the run ends "
    "in the bytes of one that nothing happened to",
)
def test_a_site_that_was_killed_before_its_upload_sends_what_it_kept(
    federation: Federation, whole: Path
) -> None:
    federation.start_run(**SETTINGS)
    wait_until_asked(federation, "A", 2)
    before = kept(federation)
    (node,) = federation.children("A")
    os.kill(node, signal.SIGSTOP)
    wait_until(lambda: bool(kept(federation) - before), "A keeps its answer", federation.logs)
    federation.kill("A")
    federation.thaw("A")
    wait_until(lambda: not federation.children("A"), "the node of A ends", federation.logs)

    # All three are needed, so the round is asked again when the site is back.
    said = federation.end("run", 3)
    assert "round=2 valid updates=2; strategy.min-sites=3 (A: Flower error" in said
    assert "continue with --resume" in said
    federation.start_sites("A")
    federation.start_resumed()
    federation.end("resumed")
    require_equal(federation, whole)  # each site has trained each round once
    assert [repeated(federation, site, 2) for site in "ABC"] == [1, 1, 1]
    assert federation.outcomes()[2, "A"] == "ok"
    require_intact_logs(federation)


def kept(federation: Federation) -> set[str]:
    """Answers that A has on disk."""
    folder = federation.state("A") / RESULTS
    return {path.name for path in folder.glob("*") if not path.name.startswith(".")}
