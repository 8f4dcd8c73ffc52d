"""The same ServerApp is hosted by us and by Flower, and runs the installed code in both."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest

from fakes.hosted_runs import Runs, audited, federation
from server import app as server_app
from server.app import CODE_VARIABLE, PACKAGES, STATE_VARIABLE, host, run_app
from server.hosting import current_run, hosting
from server.superlink import executor_environment
from strategies.errors import ConfigError, QuorumError
from strategies.run_config import RunConfig

CONTEXT = SimpleNamespace(run_config={**RunConfig().flatten(), "num-server-rounds": 2})


@pytest.fixture
def lungs(tmp_path):
    return federation(tmp_path / "state", "A", "B")


@pytest.fixture
def runs(monkeypatch):
    runs = Runs()
    monkeypatch.setattr("server.rounds.execute", runs.execute)
    monkeypatch.setattr("server.console.finish", lambda path, summary: 0)
    return runs


def test_a_host_registers_what_the_run_needs(runs):
    settings = SimpleNamespace()
    assert run_app(SimpleNamespace(), CONTEXT, settings) == {"best_round": 1}
    assert runs.settings == [settings]


def test_a_failed_run_leaves_nothing_registered(runs, monkeypatch):
    monkeypatch.delenv(STATE_VARIABLE, raising=False)

    def act(settings):
        raise QuorumError("too few")

    runs.act = act
    with pytest.raises(QuorumError):
        run_app(SimpleNamespace(), CONTEXT, SimpleNamespace())
    with pytest.raises(ConfigError, match="this process hosts no run") as caught:
        server_app.main(SimpleNamespace(), CONTEXT)
    assert "--executor" in caught.value.hint


def test_under_flower_it_hosts_the_run_by_itself(runs, lungs, monkeypatch, repository):
    monkeypatch.setenv(STATE_VARIABLE, str(lungs.state_dir))
    monkeypatch.setenv(CODE_VARIABLE, str(repository))
    server_app.main(SimpleNamespace(), CONTEXT)
    [settings] = runs.settings
    manifest = settings.order.manifest
    assert manifest.run_config["num-server-rounds"] == 2
    assert manifest.cohort == ("A", "B")
    directory = lungs.state_dir / "runs" / manifest.run_uuid
    assert settings.directory.path == directory
    assert json.loads((directory / "summary.json").read_text()) == {"best_round": 1}
    assert current_run(lungs).directory == str(directory)
    assert [event for event, _ in audited(lungs)][-2:] == ["order-issued", "run-complete"]


def test_under_flower_too_there_is_one_run_at_a_time(runs, lungs, monkeypatch):
    monkeypatch.setattr("server.hosting.PATIENCE_SECONDS", 0.01)
    with hosting(lungs), pytest.raises(ConfigError, match="hosts a run already"):
        host(SimpleNamespace(), CONTEXT, lungs.state_dir)
    assert not (lungs.state_dir / "runs").exists()


def test_under_flower_too_what_cannot_run_is_refused_first(runs, lungs):
    lungs.revoke("A")
    with pytest.raises(ConfigError, match="admitted sites=1"):
        host(SimpleNamespace(), CONTEXT, lungs.state_dir)
    assert not (lungs.state_dir / "runs").exists()


def test_the_exit_that_flower_asks_for_is_noted(runs, lungs):
    def act(settings):
        raise SystemExit(0)

    runs.act = act
    with pytest.raises(SystemExit):
        host(SimpleNamespace(), CONTEXT, lungs.state_dir)
    event, fields = audited(lungs)[-1]
    assert (event, fields["reason"]) == ("run-stopped", "SystemExit")


def test_the_environment_of_the_executor_is_what_is_read(lungs, repository):
    environment = executor_environment(lungs)
    assert environment[STATE_VARIABLE] == str(lungs.state_dir)
    assert environment[CODE_VARIABLE] == str(repository)


def test_without_knowing_what_is_installed_nothing_runs(runs, lungs, monkeypatch):
    monkeypatch.setenv(STATE_VARIABLE, str(lungs.state_dir))
    monkeypatch.delenv(CODE_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="nobody says what code to trust"):
        server_app.main(SimpleNamespace(), CONTEXT)
    assert runs.settings == []


def test_the_bundles_code_is_not_what_hosts(repository, tmp_path):
    """Flower unpacks what `flwr run` sent, puts it first on the path and imports from it."""
    bundle = tmp_path / "bundle"
    for package in PACKAGES:
        shutil.copytree(
            repository / package, bundle / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    # What a stranger sent.
    (bundle / "server" / "hosting.py").write_text("raise SystemExit('stranger')")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from server.app import main\n"
        "print(main.__globals__['__file__'])\n"
        "from types import SimpleNamespace\n"
        "main(None, SimpleNamespace(run_config={}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(bundle)],
        cwd=tmp_path,
        env={
            **os.environ,
            STATE_VARIABLE: str(tmp_path / "none"),
            CODE_VARIABLE: str(repository),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == str(bundle / "server" / "app.py")
    assert f"{repository}/server/app.py" in done.stderr
    assert "has no federation" in done.stderr
    assert "stranger" not in done.stderr
