"""F23: two programs for one site, on one machine and on two."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fakes.federations import Federation
from faults.real_processes import SETTINGS, require_equal, require_intact_logs, trained
from strategies.audit import AuditLog

pytestmark = pytest.mark.timeout(600)


@pytest.mark.fault(
    "F23",
    fault="Two programs run for one site",
    injection="start a second one beside the first; start a third one on a copy of the site's "
    "files, as on another machine",
    promise="the second is refused by the lock on the state folder, the third by the coordinator's "
    "superlink, each with a plain reason; neither trains nor writes into a log, the first takes "
    "part in every round, and the third takes its place only once it has left",
)
def test_one_program_at_a_time_is_a_site(
    federation: Federation, whole: Path, tmp_path: Path
) -> None:
    audit = federation.state("A") / "audit.jsonl"
    before = audit.read_bytes()
    done = federation.call("client", "--site", "A", code=2)
    assert done.stderr.splitlines()[-2:] == [
        f"error: state-dir={federation.state('A')} is in use: this site is running already",
        "hint: stop the other `python -m client` first",
    ]
    assert audit.read_bytes() == before

    # Everything but what the running programs hold.
    shutil.copytree(federation.folder / "sites", tmp_path / "sites", copy_function=shutil.copy)
    copied = tmp_path / "sites" / "state" / "A"
    copy = ["client", "--site", "A", "--config", str(tmp_path / "sites" / "A.toml")]
    federation.start("copy", *copy)
    refused = "not admitted, revoked, or running elsewhere"
    federation.wait_for("copy", refused)
    federation.start_run(**SETTINGS)
    federation.end("run")
    require_equal(federation, whole)
    require_intact_logs(federation)
    assert trained(federation, "A", 1) == trained(federation, "A", 2) == 1
    assert "round=" not in federation.log("copy")
    assert "connected" not in federation.log("copy")
    assert (copied / "audit.jsonl").read_bytes() == before

    # The superlink's refusal is for the second of two, not for the copy.
    federation.terminate("A")
    if federation.is_up("copy"):
        federation.wait_for("copy", "site=A connected")
    else:  # it had waited for as long as a dead node counts as active
        assert refused in federation.end("copy", 1)
        federation.start("copy", *copy)
        federation.wait_for("copy", "site=A connected")
    AuditLog(copied / "audit.jsonl").verify()
    federation.terminate("copy")
