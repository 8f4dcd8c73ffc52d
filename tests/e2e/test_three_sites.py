"""Real processes on loopback: flower-superlink, three hospitals, one coordinator, two rounds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from strategies.audit import AuditLog
from strategies.identity import write_public_key

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

SITES = ("A", "B", "C")
RUN_SETTINGS = (
    "num-server-rounds=2",
    "model.size=nano",
    "model.in-channels=1",
    "model.image-size=32",
    "strategy.min-sites=3",
    "strategy.wait-seconds=90",
    "strategy.round-timeout-seconds=120",
)


class Federation:
    """One folder with a coordinator and sites; every process it starts is ended with it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **os.environ,
            "FEDERATION_SITES": str(folder / "sites"),
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == code, f"{words}: {done.stdout}\n{done.stderr}\n{self.logs()}"
        return done

    def start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes.append(process)
        return process

    def start_superlink(self) -> None:
        self.start("superlink", "server", "superlink", "--insecure", "--port", str(self.port))
        self.wait_for("superlink", "Uvicorn running")

    def wait_for(self, name: str, text: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while text not in (self.folder / f"{name}.log").read_text(errors="replace"):
            assert time.monotonic() < deadline, f"{name} never said {text!r}\n{self.logs()}"
            time.sleep(0.1)

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.rglob("*.log"))
        )

    def stop(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
        for process in self.processes:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    federation = Federation(tmp_path)
    try:
        yield federation
    finally:
        federation.stop()


def test_three_hospitals_train_two_rounds_over_real_sockets(federation: Federation) -> None:
    folder = federation.folder
    (folder / "keys").mkdir()
    fingerprints = {}
    for site in SITES:
        said = federation.call("client", "init", "--site", site, "--allow-unprotected").stdout
        fingerprints[site] = said.split("fingerprint")[1].split()[0]
        path = folder / "sites" / f"{site}.toml"
        path.write_text(
            path.read_text()
            .replace("127.0.0.1:8000", f"127.0.0.1:{federation.port}")
            .replace('dataset = "phantom"', 'dataset = "phantom"\npatients-per-site = 8', 1)
        )
        shutil.copy(folder / "sites" / "state" / site / f"{site}.pub", folder / "keys")

    federation.start_superlink()
    clients = {
        site: federation.start(site, "client", "--site", site, "--insecure") for site in SITES
    }

    settings = [word for setting in RUN_SETTINGS for word in ("--set", setting)]
    done = federation.call(
        "server", "run", "--insecure", "--port", str(federation.port),
        "--site-keys", "keys", "--output", "runs/first", *settings,
    )  # fmt: skip

    run = folder / "runs" / "first"
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["sites"]) == set(SITES)
    assert summary["pooled"]["num_examples"] == sum(
        site["num_examples"] for site in summary["sites"].values()
    )
    assert summary["best_round"] in (1, 2)
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    outcomes = [
        (line["server_round"], line["site"], line["status"])
        for line in history
        if line["type"] == "site"
    ]
    assert outcomes == [(round_, site, "ok") for round_ in (1, 2) for site in SITES]
    assert (run / "model.safetensors").stat().st_size > 100_000
    assert "<html" in (run / "report.html").read_text()
    assert json.loads((run / "config.json").read_text())["sites"] == fingerprints
    assert "pooled" in done.stdout

    for site in SITES:
        assert clients[site].poll() is None, "a site stays up after a run"
        log = (folder / f"{site}.log").read_text()
        assert "device=cpu scan_backend=" in log
        assert log.count(f"site={site} loss=") == 2, "one line a round"
        state = folder / "sites" / "state" / site
        entries, _ = AuditLog(state / "audit.jsonl").verify()
        assert entries == 1 + 2 * (2 + 2)  # begun; received and answered
        assert f"{fingerprints[site]}" in log
        # What left this machine's sites is in the run directory and the superlink's database:
        # no file of a site, and none of its folders, is named there.
        for leaked in (run / "log.txt", run / "history.jsonl", run / "report.html"):
            assert str(folder) not in leaked.read_text()

    for site, process in clients.items():
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0, f"{site} leaves when told\n{federation.logs()}"


def test_a_site_whose_key_is_not_admitted_contributes_nothing(federation: Federation) -> None:
    folder = federation.folder
    (folder / "keys").mkdir()
    for site in ("A", "B"):
        federation.call("client", "init", "--site", site, "--allow-unprotected")
        path = folder / "sites" / f"{site}.toml"
        path.write_text(
            path.read_text()
            .replace("127.0.0.1:8000", f"127.0.0.1:{federation.port}")
            .replace('dataset = "phantom"', 'dataset = "phantom"\npatients-per-site = 8', 1)
        )
    shutil.copy(folder / "sites" / "state" / "A" / "A.pub", folder / "keys")
    write_public_key(folder / "keys" / "B.pub", Ed25519PrivateKey.generate().public_key())

    federation.start_superlink()
    for site in ("A", "B"):
        federation.start(site, "client", "--site", site, "--insecure")
    settings = [word for setting in RUN_SETTINGS for word in ("--set", setting)]
    done = federation.call(
        "server", "run", "--insecure", "--port", str(federation.port),
        "--site-keys", "keys", "--output", "runs/first", *settings,
        "--set", "num-server-rounds=1", "--set", "strategy.min-sites=1",
    )  # fmt: skip

    history = (folder / "runs" / "first" / "history.jsonl").read_text().splitlines()
    status = {
        line["site"]: (line["status"], line["reason"])
        for line in map(json.loads, history)
        if line["type"] == "site"
    }
    assert status["A"] == ("ok", "")
    dropped = [reason for site, (state, reason) in status.items() if state == "dropped"]
    assert dropped == ["signature does not match the signed content"]
    assert "signature does not match" in done.stderr


def test_a_hospital_never_connects_in_the_clear_beyond_this_machine(
    federation: Federation,
) -> None:
    federation.call("client", "init", "--site", "A", "--allow-unprotected")
    path = federation.folder / "sites" / "A.toml"
    path.write_text(path.read_text().replace("127.0.0.1:8000", "hospital.example:8000"))
    done = federation.call("client", "--site", "A", "--insecure", code=2)
    assert done.stderr.startswith("error: --insecure with superlink=hospital.example:8000: refused")
    assert "Traceback" not in done.stderr


def test_a_site_without_a_coordinator_says_so_and_a_run_without_a_superlink_too(
    federation: Federation,
) -> None:
    (federation.folder / "keys").mkdir()
    federation.call("client", "init", "--site", "A", "--allow-unprotected")
    state = federation.folder / "sites" / "state" / "A"
    for name in ("A.pub", "B.pub"):
        key = Ed25519PrivateKey.generate().public_key()
        write_public_key(federation.folder / "keys" / name, key)
    assert (state / "signing.key").stat().st_mode & 0o777 == 0o600
    federation.call("server", "superlink", "--insecure", "--print")
    done = federation.call(
        "server", "run", "--insecure", "--port", str(federation.port),
        "--site-keys", "keys", "--output", "runs/first", code=1,
    )  # fmt: skip
    assert f"error: flower-superlink at 127.0.0.1:{federation.port} does not answer" in done.stderr
    assert not (federation.folder / "runs").exists()
