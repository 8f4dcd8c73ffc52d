"""A site's node is one process, says whether it is connected, and outlives a task that failed."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from client import flower_runtime
from client.__main__ import command as main
from client.flower_runtime import _Connection, _execute, run_node
from fakes.training import site_in
from strategies.errors import ConfigError, FederationError
from strategies.files import held


@pytest.fixture
def site(tmp_path):
    return site_in(tmp_path)


def test_a_second_process_of_a_site_is_refused(site, monkeypatch):
    monkeypatch.setattr(flower_runtime, "_supernode", lambda *words: pytest.fail("connected"))
    first = held(site.config.state_dir / "node.lock", ConfigError("first"))
    with first, pytest.raises(ConfigError, match="is in use: this site is running already"):
        run_node(site)


def test_it_says_once_that_it_waits_and_once_that_it_is_connected(
    site, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    log = tmp_path / "supernode.log"
    log.write_text("Starting Flower SuperNode\n")
    connection = _Connection(site, log)
    connection.tell()
    assert caplog.messages == []
    monkeypatch.setattr(flower_runtime, "PATIENCE_SECONDS", -1)
    connection.tell()
    connection.tell()
    assert caplog.messages == ["site=A superlink=127.0.0.1:8000 does not answer yet; still trying"]
    log.write_text("SuperNode ID: 7\n")
    connection.tell()
    connection.tell()
    assert caplog.messages[1:] == ["site=A connected"]


@pytest.mark.parametrize("error", [RuntimeError("No messages received"), OSError("reset")])
def test_a_task_that_cannot_be_fetched_does_not_end_the_site(site, monkeypatch, caplog, error):
    def pull(client):
        raise error

    idle = SimpleNamespace(start=lambda: None, stop=lambda: None)
    ended = []
    monkeypatch.setattr(flower_runtime, "pull_task_input", pull)
    monkeypatch.setattr(flower_runtime, "HeartbeatSender", lambda function: idle)
    monkeypatch.setattr(flower_runtime, "push_task_output", lambda *words: ended.append(words[2]))
    _execute(site, 1, "token")
    assert ended == ["failed"]
    assert f"site=A reply not delivered: {type(error).__name__}" in caplog.text


def test_retries_towards_the_supernode_end_so_that_the_site_can(site, monkeypatch):
    """A SuperNode that dies in a task must not hold its site for ever."""
    retries = SimpleNamespace(max_time=None)
    seen = []

    def note(client, *words):
        seen.append(retries.max_time)
        raise RuntimeError

    def note_end(*words):
        seen.append(retries.max_time)

    idle = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(flower_runtime, "make_simple_http_retry_invoker", lambda: retries)
    monkeypatch.setattr(flower_runtime, "pull_task_input", note)
    monkeypatch.setattr(flower_runtime, "HeartbeatSender", lambda function: idle)
    monkeypatch.setattr(flower_runtime, "push_task_output", note_end)
    _execute(site, 1, "token")
    assert seen == [flower_runtime.RETRY_SECONDS, flower_runtime.GOODBYE_SECONDS]


def test_the_last_line_of_flowers_log_has_no_colours(tmp_path):
    log = tmp_path / "supernode.log"
    log.write_text("first\n\x1b[92mINFO \x1b[0m:      Received\n\n")
    assert flower_runtime._last_line(log) == "INFO :      Received"


# --- the command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A new site's command line; nothing may connect."""
    monkeypatch.setenv("FEDERATION_SITES", str(tmp_path))
    monkeypatch.setattr(flower_runtime, "run_node", lambda site: pytest.fail("connected"))
    main(["init", "--site", "A"])
    return main


def test_a_damaged_audit_log_keeps_a_site_from_starting(command, tmp_path):
    log = tmp_path / "state" / "A" / "audit.jsonl"
    log.write_text(log.read_text().replace("created", "other"))
    with pytest.raises(FederationError, match="content and hash do not agree"):
        command(["--site", "A", "--insecure"])


@pytest.mark.parametrize("options", [[], ["--verify"]])
def test_an_audit_log_that_is_gone_is_told(command, tmp_path, options):
    (tmp_path / "state" / "A" / "audit.jsonl").unlink()
    with pytest.raises(FederationError, match="is missing or empty"):
        command(["audit", "--site", "A", *options])
