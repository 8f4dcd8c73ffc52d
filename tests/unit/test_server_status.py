"""``server status``: who is there and how far the run is, also when flower-superlink is not."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest

from fakes.enrolments import Superlink
from fakes.hosted_runs import federation, round_lines
from server import status as server_status
from server.hosting import CURRENT_RUN, hosting, record_run
from server.run_directory import RunDirectory
from server.session import create_directory
from server.status import describe, lines, status
from strategies.errors import ConfigError
from strategies.run_config import METRIC_NAMES, RunConfig

SEEN = datetime(2026, 11, 21, 20, 45, 10, tzinfo=UTC)
RUN = RunConfig.parse({"num-server-rounds": 10})


@pytest.fixture
def lungs(tmp_path):
    return federation(tmp_path / "state", "A", "B", "C")


@pytest.fixture
def superlink(lungs, monkeypatch) -> Superlink:
    """Site A is online, B has gone, C was never there."""
    superlink = Superlink()
    monkeypatch.setattr(server_status, "Control", superlink.connect)
    for site in lungs.sites().values():
        superlink.register(site.name, site.node_key)
    for index, state in enumerate(("online", "offline")):
        superlink.list[index] = replace(superlink.list[index], status=state, last_seen=SEEN)
    return superlink


def begun(lungs, path: Path, rounds: int) -> RunDirectory:
    """A run with so many rounds; B missed the last one."""
    directory = create_directory(lungs, "a1b2", RUN, path)
    record_run(lungs, "a1b2", path)
    for server_round in range(1, rounds + 1):
        last = server_round == rounds
        for line in round_lines(server_round, status="missing" if last else "ok"):
            directory.append(line)
    return directory


def sites(found) -> dict[str, dict]:
    return {site["name"]: site for site in found["sites"]}


def test_sites_without_a_run(lungs, superlink):
    found = describe(lungs)
    assert found["superlink"] == {"address": "127.0.0.1:8000", "online": True, "reason": ""}
    assert found["federation"] == {"id": lungs.id, "name": "lungs", "address": "127.0.0.1:8000"}
    assert found["run"] is None
    assert {name: site["state"] for name, site in sites(found).items()} == {
        "A": "online",
        "B": "offline",
        "C": "offline",
    }
    assert sites(found)["B"]["last_seen"] == "2026-11-21T20:45:10+00:00"
    assert sites(found)["C"]["last_seen"] is None
    text = lines(found)
    assert "run          none yet" in text
    assert next(line for line in text if line.startswith("C ")).split()[1:3] == ["offline", "never"]


def test_a_revoked_site_is_shown_as_such(lungs, superlink):
    lungs.revoke("A")
    site = sites(describe(lungs))["A"]
    assert (site["state"], bool(site["revoked_at"])) == ("revoked", True)


def test_a_node_of_that_name_with_another_key_is_not_the_site(lungs, superlink):
    superlink.list[0] = replace(superlink.list[0], public_key=b"another")
    assert sites(describe(lungs))["A"]["state"] == "offline"


def test_a_superlink_that_is_down(lungs, superlink, tmp_path, capsys):
    superlink.running = False
    begun(lungs, tmp_path / "out", 2)
    found = describe(lungs)
    assert found["superlink"]["online"] is False
    assert {site["state"] for site in found["sites"]} == {"unknown"}
    assert found["run"]["round"] == 2
    assert status(lungs, as_json=False) == 0
    assert "is down: 127.0.0.1:8000 does not answer" in capsys.readouterr().out


def test_a_run_under_way(lungs, superlink, tmp_path):
    begun(lungs, tmp_path / "out", 4)
    with hosting(lungs):
        found = describe(lungs)
    run = found["run"]
    assert (run["state"], run["round"], run["num_server_rounds"]) == ("running", 4, 10)
    assert (run["run_uuid"], run["directory"]) == ("a1b2", str(tmp_path / "out"))
    assert (run["train_loss"], run["num_examples"]) == (0.25, 30)
    # Validation of round 3's weights came with round 4.
    assert (run["validation"]["round"], run["validation"]["auc"]) == (3, 0.54)
    assert run["eta_seconds"] == 6 * 30  # the last three took 20, 30 and 40 s
    found_sites = sites(found)
    assert [found_sites[site]["rounds_contributed"] for site in "ABC"] == [4, 3, 0]
    assert [found_sites[site]["rounds_asked"] for site in "ABC"] == [4, 4, 0]
    b = found_sites["B"]
    assert (b["last_round"], b["last_status"], b["last_reason"]) == (4, "missing", "not connected")
    assert (b["version"], b["code_sha256"]) == ("0.1.0", "c0de" * 16)
    [line] = [line for line in lines(found) if line.startswith("B ")]
    assert line.split() == [
        *("B", "offline", "2026-11-21T20:45:10+00:00", "3/4", "0.1.0", "c0dec0dec0de"),
        *("4", "missing:", "not", "connected"),
    ]
    [line] = [line for line in lines(found) if line.startswith("run ")]
    for part in ("running, round 4 of 10", "train loss 0.2500", "val auc 0.5400 after round 3"):
        assert part in line
    assert line.endswith("about 0:03:00 left")


def test_a_run_that_no_process_hosts(lungs, superlink, tmp_path):
    begun(lungs, tmp_path / "out", 1)
    run = describe(lungs)["run"]
    assert (run["state"], run["eta_seconds"]) == ("stopped", None)


def test_a_run_that_waits_for_its_first_round(lungs, superlink, tmp_path):
    begun(lungs, tmp_path / "out", 0)
    with hosting(lungs):
        found = describe(lungs)
    run = found["run"]
    assert (run["round"], run["validation"], run["eta_seconds"]) == (0, None, None)
    assert any("running, round 0 of 10" in line for line in lines(found))


def test_a_complete_run(lungs, superlink, tmp_path):
    directory = begun(lungs, tmp_path / "out", 10)
    directory.write_summary({"pooled": {"auc": 0.9, "confusion": [[1]]}})
    found = describe(lungs)
    assert found["run"]["state"] == "complete"
    assert found["run"]["result"]["auc"] == 0.9
    assert set(found["run"]["result"]) == set(METRIC_NAMES)
    assert any(line.endswith("test auc 0.9000") for line in lines(found))


def test_a_run_directory_that_is_gone_or_damaged(lungs, superlink, tmp_path):
    directory = begun(lungs, tmp_path / "out", 2)
    history = directory.path / "history.jsonl"
    history.write_text("{\n" + history.read_text())
    found = describe(lungs)
    assert "history.jsonl line 1 is damaged" in found["run"]["problem"]
    assert any("line 1 is damaged" in line for line in lines(found))
    (directory.path / "config.json").unlink()
    assert "config.json is not readable" in describe(lungs)["run"]["problem"]


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"run_uuid": 1}'])
def test_a_damaged_note_of_the_current_run(lungs, superlink, content):
    (lungs.state_dir / CURRENT_RUN).write_text(content)
    with pytest.raises(ConfigError, match=rf"{CURRENT_RUN} is damaged"):
        describe(lungs)


def test_certificates_that_cannot_be_read_hide_nothing_else(lungs, superlink):
    certificate = describe(lungs)["certificate"]
    assert certificate["expires"].startswith("20")
    assert certificate["warnings"] == []
    lungs.server_certificate_file.unlink()
    found = describe(lungs)
    assert found["certificate"]["expires"] is None
    assert any("certificate  valid until unknown" in line for line in lines(found))
    assert len(found["sites"]) == 3


def test_the_form_for_machines(lungs, superlink, tmp_path, capsys):
    """Whoever reads it relies on these names."""
    begun(lungs, tmp_path / "out", 2)
    assert status(lungs, as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert {name: set(found[name]) for name in found if isinstance(found[name], dict)} == {
        "federation": {"id", "name", "address"},
        "superlink": {"address", "online", "reason"},
        "certificate": {"expires", "warnings"},
        "run": {
            *("run_uuid", "directory", "started", "state", "problem", "round"),
            *("num_server_rounds", "num_examples", "train_loss", "validation"),
            *("selection_metric", "result", "eta_seconds"),
        },
    }
    assert set(found["sites"][0]) == {
        *("name", "state", "last_seen", "admitted_at", "revoked_at", "fingerprint"),
        *("rounds_contributed", "rounds_asked", "last_round", "last_status", "last_reason"),
        *("version", "code_sha256"),
    }


def test_no_site_at_all(tmp_path, monkeypatch):
    superlink = Superlink()
    monkeypatch.setattr(server_status, "Control", superlink.connect)
    found = describe(federation(tmp_path / "state"))
    assert found["sites"] == []
    assert lines(found)[-1].startswith("site  state")
