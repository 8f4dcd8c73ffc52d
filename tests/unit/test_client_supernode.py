"""The child is connected, trying to be, or gone: it never stays behind as a process of no use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import httpx
import pytest
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ConfirmMessageReceivedResponse,
    PushObjectRequest,
    PushObjectResponse,
)
from flwr.supercore.run import RunNotRunningException
from flwr.supernode import fleet_http_connection

from client import supernode

# Flower takes a second to import, and is played here.
CHILD = """
import os, signal, sys, threading, time, types

def play(name, **members):
    sys.modules[name] = types.ModuleType(name)
    vars(sys.modules[name]).update(members)

retries = dict(make_simple_http_retry_invoker=object())
client = dict(FleetHttpClient=object)
names = ("PushObjectRequest", "PushObjectResponse")
names += ("ConfirmMessageReceivedRequest", "ConfirmMessageReceivedResponse")
play("flwr.proto.message_pb2", **dict.fromkeys(names, object))
play("flwr.supercore.retry", RetryInvoker=object, **retries)
play("flwr.supercore.run", RunNotRunningException=BaseException)
play("flwr.supernode.fleet_http_client", **client)
play("flwr.supernode.fleet_http_connection", **retries, **client)
fleet = sys.modules["flwr.supernode.fleet_http_connection"]
play("flwr.supernode", fleet_http_connection=fleet)
play("flwr.supernode.cli", flower_supernode=None)
play("flwr")
play("flwr.proto")
play("flwr.supercore")
from client import supernode
sys.argv = ["supernode", sys.argv[1], "--superlink", "hub.example:1"]
signal.signal(signal.SIGTERM, lambda *words: sys.exit(0))

def leave_a_thread():
    threading.Thread(target=time.sleep, args=(600,)).start()

def fail():
    raise {error}

def run():
    assert sys.argv[1:] == ["--superlink", "hub.example:1"]
    print("running", flush=True)
    leave_a_thread() if {stays} else None
    {body}

supernode.flower_supernode = run
supernode.main()
"""


def start(body: str, *, error: str = "OSError", stays: bool = True, parent: int | None = None):
    code = CHILD.format(body=body, error=error, stays=stays)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(os.getpid() if parent is None else parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ("return", 1, ""),  # the main loop is over, another thread keeps the process
        ("fail()", 1, "OSError"),
        ("sys.exit(3)", 3, ""),
    ],
)
def test_a_node_whose_main_loop_is_over_ends(body, code, said):
    child = start(body, stays=code == 1)
    _, errors = child.communicate()
    assert child.returncode == code
    assert said in errors


def test_a_stopped_run_that_flower_takes_for_no_exception_ends_it_too():
    child = start("fail()", error="BaseException('run not running')")
    _, errors = child.communicate()
    assert child.returncode == 1
    assert "run not running" in errors


def test_a_node_whose_heartbeats_ended_leaves_and_that_is_a_failure():
    child = start("threading.Thread(target=fail).start(); time.sleep(600)", stays=False)
    _, errors = child.communicate()
    assert child.returncode == 1
    assert "OSError" in errors, "with the reason"


def test_a_node_does_not_start_for_a_parent_that_is_gone():
    child = start("time.sleep(600)", parent=1)
    output, _ = child.communicate()
    assert (child.returncode, output) == (1, "")


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is told by Linux alone")
def test_a_node_leaves_when_its_parent_is_killed(tmp_path):
    code = CHILD.format(body="time.sleep(600)", error="OSError", stays=False)
    (tmp_path / "child.py").write_text(code.replace("sys.exit(0)", "(print('left'), sys.exit(0))"))
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, subprocess, sys, time\n"
            f"out = open({str(tmp_path / 'said')!r}, 'w')\n"
            f"word = [sys.executable, {str(tmp_path / 'child.py')!r}, str(os.getpid())]\n"
            "child = subprocess.Popen(word, stdout=out)\n"
            "print(child.pid, flush=True)\n"
            "time.sleep(600)\n",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    said = tmp_path / "said"
    with parent.stdout as output:
        output.readline()
        while "running" not in said.read_text():
            time.sleep(0.01)
        parent.kill()
        parent.wait()
    while "left" not in said.read_text():  # SIGTERM: it can tell the coordinator that it goes
        time.sleep(0.01)


# --- which failures of a connection are tried again


def give_up(error: Exception) -> bool:
    check = supernode.patient_retries().should_giveup
    assert check is not None
    return check(error)


@pytest.mark.parametrize(
    ("error", "hopeless"),
    [
        (httpx.ConnectError("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred (_ssl.c:1006)"), 0),
        (httpx.ConnectTimeout("_ssl.c:989: The handshake operation timed out"), 0),
        (httpx.ConnectError("[Errno 111] Connection refused"), 0),
        (httpx.ReadTimeout("The read operation timed out"), 0),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] certificate has expired"), 1),
        (httpx.ConnectError("[SSL: WRONG_VERSION_NUMBER] wrong version number"), 1),
    ],
)
def test_a_cut_handshake_is_no_wrong_certificate(error, hopeless):
    assert give_up(error) is bool(hopeless)


def status(code: int, call: str = "pull-messages") -> httpx.HTTPStatusError:
    request = httpx.Request("POST", f"https://hub.example/v1/fleet/{call}")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(code, text="{}"))


def test_answers_of_the_coordinator_mean_what_flower_says():
    assert give_up(status(502)) is False
    assert give_up(status(500)) is True
    with pytest.raises(RunNotRunningException):
        give_up(status(403))


def test_a_message_whose_run_ends_while_it_is_fetched_is_forgotten():
    """As Flower forgets one that it fails to fetch: by an Exception, which that one is not."""
    with pytest.raises(ConnectionAbortedError):
        give_up(status(403, "pull-object"))
    assert give_up(status(502, "pull-object")) is False


def client_of(answer) -> supernode.PatientClient:
    client = supernode.PatientClient.from_server_address("hub.example:1", True, None, [])
    client._client = httpx.Client(transport=httpx.MockTransport(answer))
    return client


@pytest.mark.parametrize("codes", [[403], [502, 403], [200]])
def test_an_instruction_that_has_come_as_its_run_ended_is_answered_all_the_same(codes):
    """Its answer is on the way, and would else be sent in place of the next one."""
    left = list(codes)
    with client_of(lambda request: httpx.Response(left.pop(0), text="{}" * (len(left) > 0))) as it:
        retries = supernode.patient_retries()
        retries.wait_gen_factory = lambda: iter([0.0] * 9)
        response = retries.invoke(it.ConfirmMessageReceived, ConfirmMessageReceivedRequest())
    assert response == ConfirmMessageReceivedResponse()
    assert left == []


@pytest.mark.parametrize(
    ("lost", "stored", "sent"),
    [
        (False, True, True),
        (False, False, False),  # refused: the session is over
        (True, False, True),  # it had arrived, and is taken no second time
        (True, True, True),
    ],
)
def test_a_piece_whose_receipt_was_lost_was_sent(lost, stored, sent):
    first, waits = [lost], []

    def answer(request: httpx.Request) -> httpx.Response:
        waits.append(request.extensions["timeout"]["read"])
        if first.pop() if first else False:
            raise httpx.ReadError("Connection reset by peer", request=request)
        content = PushObjectResponse(stored=stored).SerializeToString()
        return httpx.Response(200, content=content)

    client = client_of(answer)
    request = PushObjectRequest(session_id="s", object_id="f" * 64, object_content=b"piece")
    with client:
        response = supernode.patient_retries().invoke(client.PushObject, request)
        assert response.stored is sent
        again = PushObjectRequest(session_id="later", object_id="f" * 64)
        assert client.PushObject(again).stored is stored
    assert set(waits) == {supernode.PIECE_SECONDS}, "as long as it may take on a slow line"


def test_the_node_really_uses_these(monkeypatch):
    """Flower's own, in place of ours, would be found nowhere but in an outage."""
    used = []

    def run():
        used.extend(getattr(fleet_http_connection, name) for name in supernode.OURS)
        raise SystemExit(0)

    monkeypatch.setattr(supernode, "flower_supernode", run)
    monkeypatch.setattr(sys, "argv", ["supernode", str(os.getppid())])
    monkeypatch.setattr(supernode, "die_with", lambda parent: None)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    for name in supernode.OURS:
        monkeypatch.setattr(fleet_http_connection, name, getattr(fleet_http_connection, name))
    with pytest.raises(SystemExit):
        supernode.main()
    assert used == list(supernode.OURS.values())
    assert signal.getsignal(signal.SIGTERM) is not None
