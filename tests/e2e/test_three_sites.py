"""Real processes on loopback: enrolled hospitals, TLS, node keys, signed orders, two rounds."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from fakes.federations import SITES, Federation, federation_in
from server.checkpoint import load_checkpoint
from strategies.audit import AuditLog
from strategies.identity import fingerprint

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    with federation_in(tmp_path) as federation:
        yield federation


def test_three_hospitals_train_two_rounds_over_tls(federation: Federation) -> None:
    federation.start_superlink()
    federation.start_sites()
    said = federation.call(*federation.run_words(strategy__min_sites=3)).stdout

    run = federation.run_dir
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["sites"]) == set(SITES)
    assert summary["pooled"]["num_examples"] == sum(
        site["num_examples"] for site in summary["sites"].values()
    )
    assert summary["best_round"] in (1, 2)
    assert federation.outcomes() == {
        (server_round, site): "ok" for server_round in (1, 2) for site in SITES
    }
    assert (run / "model.safetensors").stat().st_size > 10_000
    assert "<html" in (run / "report.html").read_text()
    config = json.loads((run / "config.json").read_text())
    coordinator = federation.coordinator()
    fingerprints = {site: fingerprint(key) for site, key in coordinator.admitted().items()}
    assert config["sites"] == fingerprints
    found = load_checkpoint(run / "checkpoints", config["run_uuid"])
    assert found is not None
    assert found[0].server_round == 2
    assert "pooled" in said
    for site in SITES:
        assert f"{site}  ●●  2 of 2 rounds" in said

    order = [e for e in federation.audit(federation.server_state) if e["event"] == "order-issued"]
    assert len(order) == 1
    for site in SITES:
        assert federation.processes[site].poll() is None, "a site stays up after a run"
        log = federation.log(site)
        assert "device=cpu scan_backend=" in log
        assert log.count(f"site={site} loss=") == 2, "one line a round"
        assert f"public_key={fingerprints[site]}" in log
        state = federation.state(site)
        AuditLog(state / "audit.jsonl").verify()
        events = [entry["event"] for entry in federation.audit(state)]
        # Two rounds of training, the last weights' validation, the chosen ones' test.
        asked = ["received", "answered"]
        followed = ["received", "order-followed", "answered"]
        assert events == ["created", "keys-created", "joined", *followed, *asked * 3]
        followed_order = federation.audit(state)[4]["fields"]["order_sha256"]
        assert followed_order == order[0]["fields"]["order"]
        # What left this machine's sites is in the run directory and the superlink's database:
        # no file of a site, and none of its folders, is named there.
        for leaked in (run / "log.txt", run / "history.jsonl", run / "report.html"):
            assert str(federation.folder) not in leaked.read_text()
        for path in federation.server_state.glob("superlink.sqlite*"):
            assert str(state).encode() not in path.read_bytes()
    for path in federation.folder.rglob("*.key"):
        assert path.stat().st_mode & 0o777 == 0o600

    for site in SITES:
        process = federation.processes[site]
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, f"{site} leaves when told\n{federation.logs()}"


def test_who_has_not_joined_and_who_has_no_superlink_is_told(tmp_path: Path) -> None:
    federation = Federation(tmp_path)
    federation.call("client", "init", "--site", "A", "--allow-unprotected")
    done = federation.call("client", "--site", "A", code=2)
    assert done.stderr.splitlines()[0] == (
        "error: site=A has joined no federation: join.json is missing"
    )

    federation.call(
        "server", "init", "--address", f"127.0.0.1:{federation.port}", "--port",
        str(federation.port), "--min-cohort", "1",
    )  # fmt: skip
    federation.call("server", "admit", str(federation.state("A") / "A.enroll.json"))
    done = federation.call(*federation.run_words(strategy__min_sites=1), code=1)
    assert done.stderr.splitlines() == [
        f"error: flower-superlink at 127.0.0.1:{federation.port} does not answer",
        "hint: start it with `python -m server superlink`",
    ]
    assert not federation.run_dir.exists()
