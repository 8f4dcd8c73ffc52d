"""flower-superlink's nodes follow the register of sites, whatever happened to either."""

from __future__ import annotations

import json
import logging
import socket
import threading
from contextlib import suppress
from datetime import UTC, datetime

import pytest

import server.nodes
from fakes.coordinators import Coordinator, serving
from fakes.enrolments import Keys, Superlink, request
from server.federation import Federation
from server.flower_control import Control, SuperlinkDownError, SuperlinkRefusalError, _last_seen
from server.nodes import synchronise, synchronise_when_up
from strategies.errors import FederationError


@pytest.fixture
def federation(tmp_path) -> Federation:
    return Federation.create(tmp_path / "state", name="lungs", address="127.0.0.1:8000")


@pytest.fixture
def superlink(monkeypatch) -> Superlink:
    superlink = Superlink()
    monkeypatch.setattr("server.flower_control.Control", superlink.connect)
    return superlink


def recorded(federation: Federation) -> list[str]:
    federation.audit.verify()
    entries = map(json.loads, federation.audit.path.read_text().splitlines())
    return [
        f"{entry['event']} {entry['fields']['name']}"
        for entry in entries
        if entry["event"].startswith("node-")
    ]


def test_admitted_sites_may_connect_under_their_names(federation, superlink):
    keys = Keys()
    federation.admit(keys.request("A"))
    federation.admit(request("B"))
    assert synchronise(federation) == ["registered node A", "registered node B"]
    assert superlink.connectable() == ["A", "B"]
    assert superlink.list[0].public_key == federation.sites()["A"].node_key
    assert recorded(federation) == ["node-registered A", "node-registered B"]


def test_done_again_nothing_changes(federation, superlink):
    federation.admit(request("A"))
    synchronise(federation)
    before = superlink.nodes()
    assert synchronise(federation) == []
    assert superlink.nodes() == before
    assert recorded(federation) == ["node-registered A"]


def test_a_revoked_site_may_not(federation, superlink):
    for name in "AB":
        federation.admit(request(name))
    synchronise(federation)
    federation.revoke("A")
    assert synchronise(federation) == ["unregistered node A"]
    assert superlink.connectable() == ["B"]
    assert synchronise(federation) == []
    assert recorded(federation)[-1] == "node-unregistered A"


def test_a_site_revoked_before_it_was_registered_never_may(federation, superlink):
    federation.admit(request("A"))
    federation.revoke("A")
    assert synchronise(federation) == []
    assert superlink.list == []


def test_with_new_keys_it_may_again(federation, superlink):
    federation.admit(request("A"))
    synchronise(federation)
    federation.revoke("A")
    federation.admit(request("A"))
    assert synchronise(federation) == ["unregistered node A", "registered node A"]
    assert superlink.connectable() == ["A"]


@pytest.mark.parametrize("name", ["", "A", "Z", "two\nlines"])
def test_a_node_that_nobody_admitted_is_removed(federation, superlink, name):
    federation.admit(request("A"))
    superlink.register(name, b"a stranger's key")
    shown = " ".join(name.split()) or "without a name"
    assert synchronise(federation) == [f"unregistered node {shown}", "registered node A"]
    assert [node.public_key for node in superlink.list if not node.unregistered] == [
        federation.sites()["A"].node_key
    ]


def test_after_its_database_was_lost_everybody_is_registered_again(federation, superlink):
    for name in "AB":
        federation.admit(request(name))
    synchronise(federation)
    superlink.list.clear()
    assert synchronise(federation) == ["registered node A", "registered node B"]


def test_a_key_that_flower_takes_no_more_is_told_and_the_others_go_on(federation, superlink):
    for name in "AB":
        federation.admit(request(name))
    superlink.register("A", federation.sites()["A"].node_key)
    superlink.unregister(1)
    with pytest.raises(FederationError, match=r"^site=A: admitted, but somebody unreg") as caught:
        synchronise(federation)
    assert "revoke" in caught.value.hint
    assert superlink.connectable() == ["B"]


def test_a_sites_key_under_another_name_is_no_way_in(federation, superlink):
    for name in "AB":
        federation.admit(request(name))
    superlink.register("B", federation.sites()["A"].node_key)
    with pytest.raises(FederationError, match=r"^site=A: "):
        synchronise(federation)
    assert superlink.connectable() == ["B"]
    [node] = [node for node in superlink.list if not node.unregistered]
    assert node.public_key == federation.sites()["B"].node_key


def test_two_at_once_agree(federation, superlink, monkeypatch):
    both = threading.Barrier(2)
    nodes = superlink.nodes

    def read_together():
        found = nodes()
        with suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)  # without the lock, both have read the empty list here
        return found

    monkeypatch.setattr(superlink, "nodes", read_together)
    federation.admit(request("A"))
    done: list[list[str]] = []
    threads = [
        threading.Thread(target=lambda: done.append(synchronise(federation))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [[], ["registered node A"]]


def test_nothing_is_registered_while_the_register_is_damaged(federation, superlink):
    federation.admit(request("A"))
    (federation.state_dir / "sites" / "A.json").write_text("{")
    with pytest.raises(FederationError, match="damaged"):
        synchronise(federation)
    assert superlink.list == []


# --- at the superlink's start --------------------------------------------------------------------


def test_a_superlink_that_starts_is_waited_for(federation, superlink, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    superlink.running = False
    federation.admit(request("A"))
    waits = []

    class Stop(threading.Event):
        def wait(self, timeout=None):
            waits.append(timeout)
            superlink.running = len(waits) == 3
            return False

    synchronise_when_up(federation, Stop())
    assert len(waits) == 3
    assert superlink.connectable() == ["A"]
    assert caplog.messages == ["registered node A", "admitted=A"]


def test_waiting_ends_when_the_superlink_is_stopped(federation, superlink):
    superlink.running = False
    stop = threading.Event()
    thread = threading.Thread(target=synchronise_when_up, args=(federation, stop))
    thread.start()
    stop.set()
    thread.join(timeout=30)
    assert not thread.is_alive()


class Pauses(threading.Event):
    """Pauses that take no time, of which the last tells the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.left, self.seconds = number, []

    def wait(self, timeout=None):
        self.seconds.append(timeout)
        if len(self.seconds) == self.left:
            self.set()
        return self.is_set()


def test_whatever_fails_is_tried_again_and_each_reason_told_once(
    federation, superlink, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    refusal = FederationError("answered HTTP 500", hint="see its log")
    failures = [refusal, refusal, TimeoutError("too slow"), OSError("disk full"), LookupError("?")]
    nodes = superlink.nodes

    def fail_first():
        if failures:
            raise failures.pop(0)
        return nodes()

    monkeypatch.setattr(superlink, "nodes", fail_first)
    federation.admit(request("A"))
    pauses = Pauses(10)
    synchronise_when_up(federation, pauses)
    assert superlink.connectable() == ["A"]
    assert pauses.seconds == [0.5, 1, 2, 4, 8]
    said = [message.partition("trying again: ")[2] for message in caplog.messages]
    assert said[:4] == [
        "answered HTTP 500; see its log",
        "TimeoutError: too slow",
        "OSError: disk full",
        "LookupError: ?",
    ]
    assert caplog.messages[4:] == ["registered node A", "admitted=A"]


def test_what_cannot_be_done_is_in_the_log_and_ends_with_the_process(federation, superlink, caplog):
    federation.admit(request("A"))
    superlink.register("A", federation.sites()["A"].node_key)
    superlink.unregister(1)
    pauses = Pauses(9)
    synchronise_when_up(federation, pauses)
    assert max(pauses.seconds) == pauses.seconds[-1] == server.nodes.MAX_PAUSE_SECONDS
    [message] = caplog.messages
    assert message.startswith("nodes not synchronised, trying again: site=A: ")
    assert "`python -m server revoke`" in message


# --- the connection ------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_nobody_listening_is_told_from_everything_else(federation):
    with (
        Control(f"127.0.0.1:{free_port()}", federation.ca_file) as control,
        pytest.raises(SuperlinkDownError, match="does not answer") as caught,
    ):
        control.nodes()
    assert caught.value.hint == "start it with `python -m server superlink`"


def test_a_program_without_the_federations_certificate_is_told_nothing(federation, tmp_path):
    with (
        Coordinator().server(tmp_path) as address,
        Control(address, federation.ca_file) as control,
        pytest.raises(FederationError, match=r"is not this federation's flower-superlink") as error,
    ):
        control.register("A", b"key")
    assert not isinstance(error.value, SuperlinkDownError)
    assert "init --renew" in error.value.hint


def test_a_program_without_tls_is_told_nothing(federation):
    with (
        serving() as address,
        Control(address, federation.ca_file) as control,
        pytest.raises(FederationError, match=r"is not this federation's flower-superlink"),
    ):
        control.register("A", b"key")


def test_an_answer_that_is_not_flowers_is_a_refusal(tmp_path):
    coordinator = Coordinator()
    ca_file = tmp_path / "ca.pem"
    ca_file.write_text(coordinator.ca_pem)
    with coordinator.server(tmp_path) as address, Control(address, ca_file) as control:
        for call in (
            control.nodes,
            lambda: control.register("A", b"x"),
            lambda: control.unregister(1),
        ):
            with pytest.raises(SuperlinkRefusalError, match=r"answered HTTP 501") as caught:
                call()
            assert caught.value.code is None
            assert "\n" not in str(caught.value)


class Info:
    """A node as Flower describes it."""

    def __init__(self, status: str, online_until: float) -> None:
        self.status, self.online_until, self.heartbeat_interval = status, online_until, 30.0


@pytest.mark.parametrize(
    ("status", "online_until", "expected"),
    [("registered", 0.0, None), ("online", 1060.0, 1000), ("offline", 1000.0, 1000)],
)
def test_when_a_node_was_last_seen(status, online_until, expected):
    moment = None if expected is None else datetime.fromtimestamp(expected, UTC)
    assert _last_seen(Info(status, online_until)) == moment


def test_the_lock_is_not_the_registers():
    # An admission must not wait for another program to answer.
    assert server.nodes.LOCK != server.federation.LOCK
