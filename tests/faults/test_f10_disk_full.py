"""F10: a full disk under a site's state folder, and under the coordinator's run directory."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest

from client.site_config import AUDIT_LOG
from fakes.disks import small_disk
from fakes.federations import Federation, wait_until
from faults.real_processes import (
    SETTINGS,
    require_equal,
    require_intact_logs,
    trained,
    wait_until_asked,
)
from server.checkpoint import load_checkpoint
from server.run_directory import CHECKPOINTS, HISTORY, RunDirectory
from strategies.errors import FederationError, StoppedError

pytestmark = pytest.mark.timeout(600)

FULL = [os.strerror(number) for number in (errno.ENOSPC, errno.EFBIG)]


@pytest.mark.fault(
    "F10",
    fault="The disk is full",
    injection="a small file system under a site's state folder, then under the coordinator's run "
    "directory, is filled up while the sites train",
    promise="the site does not train what it cannot write down and says why; the server ends with "
    "one clear line and exit code 1, and its last checkpoint is whole; nothing written before is "
    "damaged, and both go on when there is room",
)
def test_a_site_with_a_full_disk_does_not_train(federation: Federation) -> None:
    settings = {**SETTINGS, "num_server_rounds": 500, "training__local_steps": 20}
    state = federation.state("A")
    federation.terminate("A")
    with small_disk(state, state / AUDIT_LOG) as disk:
        try:
            federation.start_sites("A")
            federation.start_run(**{**settings, "strategy__min_sites": 2})
            wait_until(lambda: "ok" in of_site(federation, "A"), "A contributes", federation.logs)

            disk.fill(federation.processes["A"])
            # The log's last block may have room for some lines yet; no other file has.
            wait_until(
                lambda: "missing" in of_site(federation, "A"),
                "A cannot even sign a refusal",
                federation.logs,
            )
            disk.free(federation.processes["A"])
            require_intact_logs(federation)
            wait_until(lambda: of_site(federation, "A")[-1] == "ok", "A is back", federation.logs)
            require_said_and_not_trained(federation)
            assert set(of_site(federation, "B")) == {"ok"}, "the others go on"
            federation.processes["run"].send_signal(signal.SIGINT)
            federation.end("run", StoppedError.exit_code)
            require_intact_logs(federation)
        finally:
            federation.terminate("A")
    require_intact_logs(federation)


@pytest.mark.fault("F10")
def test_a_server_with_a_full_disk_keeps_its_last_checkpoint(
    federation: Federation, whole: Path
) -> None:
    folder = federation.run_dir
    federation.run = f"{federation.run}/run"
    with small_disk(folder, federation.run_dir / HISTORY) as disk:
        federation.start_run(**SETTINGS)
        wait_until_asked(federation, "C", 2)
        disk.fill(federation.processes["run"])
        said = federation.end("run", FederationError.exit_code)
        error, hint = said.splitlines()[-2:]
        problem = f"error: output={federation.run}: cannot write there or in the state folder"
        assert error in [f"{problem} ({reason})" for reason in FULL]
        assert hint == f"hint: make room; continue with --resume {federation.run}"
        assert "Traceback" not in said
        run_uuid = RunDirectory(federation.run_dir).stored("run_uuid", str)
        found = load_checkpoint(federation.run_dir / CHECKPOINTS, run_uuid)
        assert found is not None
        assert found[0].server_round == 1
        disk.free(federation.processes["run"])
        federation.start_resumed()
        federation.end("resumed")
        require_equal(federation, whole)
        require_intact_logs(federation)


def require_said_and_not_trained(federation: Federation) -> None:
    """Require that A said why it did not contribute to a round, and did not train in it."""
    reasons = federation.reasons()
    missed = [
        n for (n, site), status in federation.outcomes().items() if site == "A" and status != "ok"
    ]
    assert missed
    for n in missed:
        assert trained(federation, "A", n) == 0
        assert any(f"OSError ({reason})" in reasons[n, "A"] for reason in FULL), reasons[n, "A"]


def of_site(federation: Federation, site: str) -> list[str]:
    """A site's status in the rounds so far."""
    return [status for (_, who), status in sorted(federation.outcomes().items()) if who == site]
