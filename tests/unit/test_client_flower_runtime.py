"""A site's node is one process, outlives tasks that fail, and stops work that nobody waits for."""

from __future__ import annotations

import errno
import logging
import os
import signal
import threading
import time
from types import SimpleNamespace

import httpx
import pytest

from client import flower_runtime, supervisor
from client.__main__ import command as main
from client.enrol import read_request
from client.flower_runtime import _execute, _heartbeat, _leaving_on_sigterm, _RunWatch, run_node
from client.site_config import NODE_KEY, read_site_config
from fakes import supernodes
from fakes.coordinators import Coordinator
from fakes.orders import membership
from fakes.supernodes import FakeProgram
from fakes.training import site_in
from strategies.errors import ConfigError, FederationError
from strategies.files import held, write_atomic
from strategies.identity import create_node_key


@pytest.fixture
def site(tmp_path):
    return site_in(tmp_path)


def status_error(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "https://hub.example/v1/fleet/get-run")
    return httpx.HTTPStatusError("refused", request=request, response=httpx.Response(code))


def wait_until(condition) -> None:
    while not condition():  # pytest's own limit ends a wait without end
        time.sleep(0.005)


# --- the node

WAIT = 0.0123


@pytest.fixture
def enrolled(site, tmp_path, monkeypatch):
    """A site with a node key and an authority, and a supernode that plays ends."""
    state = site.config.state_dir
    create_node_key(state / NODE_KEY)
    (state / "ca.pem").write_text(Coordinator().ca_pem)
    site.membership = membership(ca_path=state / "ca.pem")
    waits, sleep = [], time.sleep
    monkeypatch.setattr(supervisor.random, "uniform", lambda low, high: WAIT)
    monkeypatch.setattr(time, "sleep", lambda seconds: (waits.append(seconds), sleep(0.01))[1])
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")

    def play(*plan):
        program = FakeProgram(tmp_path / "program", *plan)
        monkeypatch.setattr(supervisor, "PROGRAM", program.command)
        return program

    return SimpleNamespace(site=site, play=play, waits=waits)


def test_a_second_process_of_a_site_is_refused(site, monkeypatch):
    monkeypatch.setattr(flower_runtime, "supernode", lambda *words: pytest.fail("connected"))
    first = held(site.config.state_dir / "node.lock", ConfigError("first"))
    with first, pytest.raises(ConfigError, match="is in use: this site is running already"):
        run_node(site)


def test_a_supernode_that_ends_is_started_again_until_that_is_hopeless(enrolled, caplog):
    caplog.set_level(logging.INFO)
    program = enrolled.play(supernodes.NOT_FOUND, supernodes.NOT_ADMITTED, supernodes.EXPIRED)
    with pytest.raises(FederationError, match="certificate has expired"):
        run_node(enrolled.site)
    starts = program.starts()
    assert len(starts) == 3
    assert enrolled.waits.count(WAIT) == 2
    assert os.environ["NO_PROXY"] == "127.0.0.1", "its local port is no proxy's business"
    ports = {words[words.index("--port") + 1] for words in (start["words"] for start in starts)}
    assert ports != {"0"}
    assert caplog.messages == [
        "site=A connecting superlink=127.0.0.1:1",
        "site=A supernode=ended reason=the coordinator answered 404 Not Found to activate-node; "
        "trying again",
        "site=A supernode=ended reason=not admitted, revoked, or running elsewhere; trying again",
    ]


def test_an_end_without_an_error_is_a_failure_too(enrolled, caplog):
    enrolled.play(supernodes.TURNED_AWAY, supernodes.EXPIRED)
    with pytest.raises(FederationError):
        run_node(enrolled.site)
    assert "supernode=ended reason=turned away (HTTP 401)" in caplog.text


def test_a_node_that_cannot_be_started_is_tried_again(enrolled, monkeypatch, caplog):
    """As on a full disk, which somebody will clear."""
    program, fail = enrolled.play(supernodes.EXPIRED), [True]

    def write(path, content, mode):
        if fail.pop() if fail else False:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_atomic(path, content, mode=mode)

    monkeypatch.setattr(flower_runtime, "write_atomic", write)
    with pytest.raises(FederationError, match="certificate has expired"):
        run_node(enrolled.site)
    assert len(program.starts()) == 1
    assert flower_runtime.RESTART_SECONDS in enrolled.waits
    assert "site=A node not started reason=No space left on device; trying again" in caplog.text


def test_a_site_without_a_node_key_says_so(enrolled):
    (enrolled.site.config.state_dir / NODE_KEY).unlink()
    enrolled.play(("stays", ""))
    with pytest.raises(ConfigError, match=r"node\.key cannot be read"):
        run_node(enrolled.site)


def test_the_lock_is_free_and_the_supernode_gone_after_sigterm(enrolled):
    program = enrolled.play(("stays", supernodes.START))

    def leave():
        wait_until(program.starts)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=leave).start()
    with pytest.raises(SystemExit) as left:
        run_node(enrolled.site)
    assert left.value.code == 0
    assert signal.getsignal(signal.SIGTERM) is before
    with held(enrolled.site.config.state_dir / "node.lock", ConfigError("still held")):
        pass


def work_until_told_to_leave():
    with _leaving_on_sigterm():
        for step in range(10_000):
            try:
                if step == 100:
                    os.kill(os.getpid(), signal.SIGTERM)
            except Exception:
                pytest.fail("a step must not swallow it")


def test_sigterm_ends_the_process_in_the_middle_of_a_step():
    with pytest.raises(SystemExit) as left:
        work_until_told_to_leave()
    assert left.value.code == 0


@pytest.mark.parametrize(
    ("lower", "upper", "expected"),
    [
        (None, None, "127.0.0.1"),
        (None, "hub.example", "hub.example,127.0.0.1"),
        ("a.example", "b.example", "a.example,127.0.0.1"),
    ],
)
def test_what_stays_on_this_machine_goes_through_no_proxy(monkeypatch, lower, upper, expected):
    for name, value in (("no_proxy", lower), ("NO_PROXY", upper)):
        monkeypatch.setenv(name, "")
        if value:
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.delenv(name)
    monkeypatch.setenv("http_proxy", "http://proxy.example:3128")
    flower_runtime._use_no_proxy_for("127.0.0.1")
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == expected
    patterns = httpx._utils.get_environment_proxies()
    assert patterns["http://"] == "http://proxy.example:3128"
    assert patterns["all://127.0.0.1"] is None


# --- a task


@pytest.fixture
def task(site, monkeypatch):
    """What a task did: with which patience each call went out, and how it was reported."""
    seen = SimpleNamespace(patience=[], reported=[], retries=None)
    idle = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(flower_runtime, "HeartbeatSender", lambda function: idle)

    def report(client, request):
        seen.patience.append(client._retry_invoker.max_time)
        seen.reported.append(request.sub_status)

    monkeypatch.setattr(flower_runtime.RuntimeHttpClient, "PushTaskOutput", report)

    def run(error):
        def pull(client):
            seen.patience.append(client._retry_invoker.max_time)
            raise error

        monkeypatch.setattr(flower_runtime, "pull_task_input", pull)
        _execute(site, 1, "token", SimpleNamespace())
        return seen

    return run


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("No messages received"), "RuntimeError"),
        (OSError("reset"), "OSError"),
        (status_error(401), "HTTP 401"),
    ],
)
def test_a_task_that_cannot_be_fetched_does_not_end_the_site(task, caplog, error, reason):
    assert task(error).reported == ["failed"]
    assert caplog.messages == [f"site=A reply not delivered reason={reason}"]


def test_retries_towards_the_supernode_end_so_that_the_site_can(task):
    """A SuperNode that dies in a task must not hold its site for ever."""
    seen = task(RuntimeError()).patience
    assert seen == [flower_runtime.RETRY_SECONDS, flower_runtime.GOODBYE_SECONDS]


def test_a_supernode_that_refuses_a_token_does_not_interrupt_the_site(site, monkeypatch):
    """Flower's own retries answer 401 with a SIGINT to the process, and every 403 with an exit."""
    idle = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(flower_runtime, "HeartbeatSender", lambda function: idle)
    monkeypatch.setattr(os, "kill", lambda *words: pytest.fail("interrupted"))
    sent = []

    def refuse(client, request, **words):
        sent.append(request.url.path)
        return httpx.Response(401 + 2 * (len(sent) > 2), request=request)

    monkeypatch.setattr(httpx.Client, "send", refuse)
    for _ in range(2):
        _execute(site, 1, "token", SimpleNamespace())
    calls = ["/v1/runtime/pull-task-input", "/v1/runtime/push-task-output"]
    assert sent == calls * 2, "an answer is final"


@pytest.mark.parametrize(
    ("answer", "alive", "aborted"),
    [
        (True, True, False),
        (False, True, True),
        (status_error(401), True, True),
        (status_error(503), True, False),
        (httpx.ConnectError("refused"), False, False),
    ],
)
def test_a_heartbeat_that_is_refused_aborts_the_task_not_the_site(
    site, monkeypatch, answer, alive, aborted
):
    def send(request):
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(success=answer)

    reasons = []
    monkeypatch.setattr(type(site), "abort", lambda self, reason: reasons.append(reason))
    monkeypatch.setattr(signal, "raise_signal", lambda number: pytest.fail("interrupted"))
    beat = _heartbeat(SimpleNamespace(SendTaskHeartbeat=send), site)
    assert beat() is alive
    assert reasons == (["this site's node has given the task up"] if aborted else [])


# --- the run that a task is of


class Watched:
    """A coordinator that answers as told, and what was heard from it."""

    def __init__(self, *answers):
        self.answers, self.asked, self.reasons = list(answers), [], []
        self.name = "A"

    def GetRun(self, request):  # noqa: N802
        self.asked.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if callable(answer):
            answer()

    def abort(self, reason):
        self.reasons.append(reason)


@pytest.fixture
def watch(monkeypatch):
    monkeypatch.setattr(flower_runtime, "WATCH_SECONDS", 0.01)

    def begin(*answers):
        seen = Watched(*answers)
        return seen, _RunWatch(seen, seen).during(run_id=7, node_id=3)

    return begin


def threads() -> int:
    return sum(thread.name == "run-watch" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (403, "the coordinator ended the run"),
        (401, "the coordinator turns this site away"),
    ],
)
def test_work_for_a_run_that_is_over_is_aborted(watch, caplog, code, reason):
    seen, during = watch(None, None, status_error(code))
    with during:
        wait_until(lambda: len(seen.reasons) > 2)  # again each time: work may only then begin
    wait_until(lambda: not threads())
    assert set(seen.reasons) == {reason}
    assert {(request.run_id, request.node.node_id) for request in seen.asked} == {(7, 3)}
    assert caplog.messages == [f"site=A work=aborted reason={reason}"], "told once"


@pytest.mark.parametrize(
    "answer",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("silent"),
        status_error(502),
        status_error(404),
        ValueError("Invalid protobuf response payload"),
    ],
)
def test_a_coordinator_out_of_reach_is_no_reason_to_stop(watch, answer):
    seen, during = watch(answer)
    with during:
        wait_until(lambda: len(seen.asked) > 3)
    wait_until(lambda: not threads())
    assert seen.reasons == []


def test_a_late_answer_aborts_nothing_that_begins_later(watch):
    asked, release = threading.Event(), threading.Event()

    def late():
        asked.set()
        release.wait()
        raise status_error(403)

    seen, during = watch(late)
    with during:
        asked.wait()
    release.set()
    wait_until(lambda: not threads())
    assert seen.reasons == []


def test_nobody_is_asked_before_the_first_interval_is_over(watch, monkeypatch):
    monkeypatch.setattr(flower_runtime, "WATCH_SECONDS", 60)
    seen, during = watch(None)
    with during:
        assert threads() == 1
    wait_until(lambda: not threads())
    assert seen.asked == []


# --- the command


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command line of a site that has joined; nothing may connect."""
    monkeypatch.setenv("FEDERATION_SITES", str(tmp_path))
    monkeypatch.setattr(flower_runtime, "run_node", lambda site: pytest.fail("connected"))
    main(["init", "--site", "A"])
    request = read_request(read_site_config(tmp_path / "A.toml"))
    (tmp_path / "A.join.json").write_text(Coordinator().admit(request).to_json())
    main(["join", str(tmp_path / "A.join.json"), "--site", "A"])
    return main


def test_a_damaged_audit_log_keeps_a_site_from_starting(command, tmp_path):
    log = tmp_path / "state" / "A" / "audit.jsonl"
    log.write_text(log.read_text().replace("created", "other"))
    with pytest.raises(FederationError, match="content and hash do not agree"):
        command(["--site", "A"])


@pytest.mark.parametrize("options", [[], ["--verify"]])
def test_an_audit_log_that_is_gone_is_told(command, tmp_path, options):
    (tmp_path / "state" / "A" / "audit.jsonl").unlink()
    with pytest.raises(FederationError, match="is missing or empty"):
        command(["audit", "--site", "A", *options])
