"""A supernode is started with its site's keys, ends with it, and comes back where that helps."""

from __future__ import annotations

import logging
import os
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest

from client import probe
from client import supervisor as module
from client.probe import Answer
from client.site_config import SiteConfig
from client.supervisor import Supervisor, supernode
from fakes import supernodes
from fakes.orders import membership
from fakes.supernodes import FakeProgram, alive
from strategies.errors import ConfigError, FederationError

ADDRESS = "hub.example:443"


@pytest.fixture
def config(tmp_path):
    (tmp_path / "A").mkdir()
    return make_config(tmp_path)


def make_config(folder, **changes):
    return SiteConfig.model_validate(
        {"site": "A", "state-dir": str(folder / "A"), "device": "cpu", "data": {}, **changes}
    )


@pytest.fixture
def member(tmp_path):
    return membership(address=ADDRESS, ca_path=tmp_path / "A" / "ca.pem")


@pytest.fixture
def play(tmp_path, monkeypatch, config, member):
    """Start a program that plays an end."""

    def start(*plan):
        program = FakeProgram(tmp_path / "program", *plan)
        monkeypatch.setattr(module, "PROGRAM", program.command)
        return program, supernode(config, member, 4321, tmp_path / "A" / "executor.secret")

    return start


def wait_until(condition) -> None:
    while not condition():  # pytest's own limit ends a wait without end
        time.sleep(0.01)


# --- the process


def test_a_supernode_has_tls_the_sites_key_and_a_secret(play, tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_TELEMETRY_ENABLED", "1")
    program, node = play(("stays", ""))
    with node as running:
        assert running.port == 4321
        wait_until(program.starts)
    (start,) = program.starts()
    state = tmp_path / "A"
    parent, *words = start["words"]
    assert int(parent) == os.getpid()
    options = dict(zip(words[::2], words[1::2], strict=True))
    assert options == {
        "--superlink": ADDRESS,
        "--root-certificates": str(state / "ca.pem"),
        "--auth-supernode-private-key": str(state / "node.key"),
        "--isolation": "process",
        "--superexec-auth-secret-file": str(state / "executor.secret"),
        "--host": "127.0.0.1",
        "--port": "4321",
        "--node-config": 'site="A"',
    }
    assert start["environment"] == {
        "FLWR_HOME": str(state / "flower"),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
    }


@pytest.mark.parametrize("manner", ["stays", "stubborn"])
def test_a_supernode_is_gone_when_the_site_leaves(play, monkeypatch, manner):
    monkeypatch.setattr(module, "GRACE_SECONDS", 5 if manner == "stays" else 0.05)
    _, node = play((manner, "ready\n"))
    with suppress(SystemExit), node as running:
        wait_until(running.news)
        pid = running._process.pid
        raise SystemExit(0)
    assert running.exit_code == (-15 if manner == "stays" else -9)
    assert not alive(pid)


def test_its_lines_are_read_as_they_come_and_its_last_words_when_it_ends(play):
    _, node = play(supernodes.EXPIRED)
    with node as running:
        wait_until(lambda: running.exit_code is not None)
        assert running.exit_code == 1
        assert any("Uvicorn running" in line for line in running.news())
        assert running.news() == []
    assert "certificate has expired" in running.tail()
    assert "\x1b" not in running.tail()


# --- what a person is told


@pytest.fixture
def clock(monkeypatch):
    """Time that passes when a test says so."""
    now = SimpleNamespace(seconds=1000.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: now.seconds)
    return now


@pytest.fixture
def said(caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    answer = Answer(problem="refuses the connection: nothing listens there")
    monkeypatch.setattr(module, "ask", lambda *words: answer)
    monkeypatch.setattr(module, "ending_soon", lambda *words: [])
    return caplog


class Said:
    """A node's log, and how it ended."""

    def __init__(self, *lines, exit_code=None):
        self._lines, self.exit_code, self._text = list(lines), exit_code, "".join(lines)

    def news(self):
        return [self._lines.pop(0)] if self._lines else []

    def tail(self):
        return self._text


def ended(end):
    code, text = end
    return Said(text, exit_code=code)


@pytest.fixture
def watched(clock, said, config, member):
    return Supervisor(config, member)


def test_a_site_says_once_that_it_is_connected(watched, said):
    node = Said(supernodes.ONLINE, supernodes.ONLINE)
    for _ in range(3):
        watched.listen(node)
    assert said.messages == ["site=A connected"]


def test_a_certificate_that_ends_soon_is_named_once_a_day(watched, said, clock, monkeypatch):
    line = "the certificate of the coordinator's server ends on 2026-12-24: ask them to renew it"
    monkeypatch.setattr(module, "ending_soon", lambda *words: [line])
    watched.listen(Said())
    assert said.messages == [], "nobody answers yet"
    watched.listen(Said(supernodes.ONLINE))
    watched.listen(Said())
    assert said.messages == ["site=A connected", f"site=A {line}"]
    clock.seconds += 86_400
    watched.listen(Said())
    assert said.messages[2:] == [f"site=A {line}"]


@pytest.mark.parametrize(
    ("authority", "server", "named"), [(3650, 200, ""), (20, 200, "authority"), (400, 29, "server")]
)
def test_what_ends_within_thirty_days(tmp_path, monkeypatch, authority, server, named):
    now = datetime.now(UTC)
    path = tmp_path / "ca.pem"
    path.write_bytes(b"PEM")
    monkeypatch.setattr(
        probe.x509,
        "load_pem_x509_certificate",
        lambda data: SimpleNamespace(not_valid_after_utc=now + timedelta(days=authority)),
    )
    answer = Answer(status=200, expiry=now + timedelta(days=server))
    monkeypatch.setattr(probe, "ask", lambda *words: answer)
    lines = probe.ending_soon("hub.example:443", path)
    assert [named in line for line in lines] == [True] * bool(named)


def test_a_certificate_that_cannot_be_read_is_for_others_to_tell(tmp_path):
    assert probe.ending_soon("127.0.0.1:1", tmp_path / "ca.pem") == []


UNREACHABLE = (
    "site=A superlink=hub.example:443 unreachable reason=refuses the connection: nothing listens "
    "there; still trying"
)


def test_a_coordinator_that_is_silent_from_the_start_is_told_once(watched, said, clock):
    watched.listen(Said())
    assert said.messages == []
    for _ in range(3):
        clock.seconds += 11
        watched.listen(Said())
    assert said.messages == [UNREACHABLE]
    watched.listen(Said(supernodes.ONLINE))
    assert said.messages[1:] == ["site=A connected"]


def test_an_outage_in_the_middle_of_life_is_told_once_and_its_end_once(watched, said, clock):
    watched.listen(Said(supernodes.ONLINE))
    clock.seconds += 1000
    watched.listen(Said(supernodes.OFFLINE))
    assert said.messages == ["site=A connected"], "a moment's outage is worth no line"
    for _ in range(3):
        clock.seconds += 11
        watched.listen(Said(supernodes.OFFLINE))
    assert said.messages[1:] == [UNREACHABLE]
    watched.listen(Said(supernodes.AGAIN))
    watched.listen(Said(supernodes.AGAIN))
    assert said.messages[2:] == ["site=A connected again after_seconds=33"]
    watched.listen(Said(supernodes.OFFLINE))
    clock.seconds += 11
    watched.listen(Said(supernodes.OFFLINE))
    assert said.messages[3:] == [UNREACHABLE], "the next one is another"


def test_an_outage_of_a_moment_is_not_told(watched, said, clock):
    watched.listen(Said(supernodes.ONLINE))
    watched.listen(Said(supernodes.OFFLINE))
    clock.seconds += 1
    watched.listen(Said(supernodes.AGAIN))
    clock.seconds += 100
    watched.listen(Said())
    assert said.messages == ["site=A connected"]


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            Answer(problem="shows a certificate that is not accepted", refused="expired"),
            "reason=shows a certificate that is not accepted: expired; still trying",
        ),
        (Answer(status=200), "reason=answers other requests (HTTP 200); still trying"),
    ],
)
def test_the_reason_comes_from_a_look_at_the_coordinator(
    watched, said, clock, monkeypatch, answer, told
):
    monkeypatch.setattr(module, "ask", lambda *words: answer)
    clock.seconds += 11
    watched.tell()
    assert told in said.messages[0]


def test_a_site_gives_up_after_its_own_limit(clock, said, tmp_path, config, member):
    watched = Supervisor(make_config(tmp_path, **{"reconnect-seconds": 60}), member)
    watched.listen(Said(supernodes.ONLINE))
    clock.seconds += 1000
    watched.listen(Said(supernodes.OFFLINE))
    clock.seconds += 59
    watched.listen(Said(supernodes.OFFLINE))
    clock.seconds += 2
    with pytest.raises(FederationError, match="out of reach for 61 s; reconnect-seconds=60") as e:
        watched.listen(Said(supernodes.OFFLINE))
    assert e.value.exit_code == 1
    assert "python -m client check --site A" in e.value.hint


# --- what follows an end


@pytest.mark.parametrize(
    "end",
    [supernodes.OTHER_AUTHORITY, supernodes.OTHER_NAME, supernodes.NO_TLS, supernodes.BAD_KEY],
)
def test_what_a_person_here_must_correct_ends_the_site_at_once(watched, end):
    with pytest.raises(ConfigError, match=r"superlink=hub\.example:443: ") as error:
        watched.ended(ended(end))
    assert error.value.exit_code == 2
    assert error.value.hint


@pytest.mark.parametrize("end", [supernodes.EXPIRED, supernodes.NOT_YET_VALID])
def test_what_nobody_here_can_correct_ends_it_with_another_code(watched, end):
    with pytest.raises(FederationError) as error:
        watched.ended(ended(end))
    assert error.value.exit_code == 1


def test_what_has_worked_before_is_not_this_sites_configuration(watched):
    watched.online()
    with pytest.raises(FederationError, match="its certificate is refused") as error:
        watched.ended(ended(supernodes.LOST_AUTHORITY))
    assert error.value.exit_code == 1


@pytest.mark.parametrize("end", [supernodes.NOT_ADMITTED, supernodes.TURNED_AWAY])
def test_a_site_that_is_turned_away_waits_longer_than_a_lease(watched, said, clock, end):
    for _ in range(5):
        watched.ended(ended(end))
        clock.seconds += 15
    assert clock.seconds - 1000 > 60
    assert len(said.messages) == 1, "the same reason is told once"
    assert said.messages[0].startswith("site=A supernode=ended reason=")
    assert said.messages[0].endswith("; trying again")
    clock.seconds += 30
    with pytest.raises(FederationError, match=r"hub\.example:443 refuses this site: ") as error:
        watched.ended(ended(end))
    assert error.value.exit_code == 1
    assert error.value.hint


def test_a_lease_that_ends_is_forgotten(watched, said, clock):
    for _ in range(3):
        watched.ended(ended(supernodes.NOT_ADMITTED))
        clock.seconds += 80
        watched.online()
        clock.seconds += 5
    assert said.messages[-1] == "site=A connected again after_seconds=80"


def test_any_other_end_is_tried_again_for_ever(watched, said, clock):
    for _ in range(1500):
        assert 0 <= watched.ended(ended(supernodes.NOT_FOUND)) <= module.LONGEST_BACKOFF_SECONDS
        clock.seconds += 60
    assert said.messages == [
        "site=A supernode=ended reason=the coordinator answered 404 Not Found to activate-node; "
        "trying again"
    ]


def test_it_is_not_tried_for_longer_than_the_sites_limit(clock, said, tmp_path, member):
    watched = Supervisor(make_config(tmp_path, **{"reconnect-seconds": 60}), member)
    watched.ended(ended(supernodes.NOT_FOUND))
    clock.seconds += 61
    with pytest.raises(FederationError, match="reconnect-seconds=60"):
        watched.ended(ended(supernodes.NOT_FOUND))


def test_waits_grow_to_a_bound_and_begin_anew_after_a_lasting_connection(
    watched, clock, monkeypatch
):
    monkeypatch.setattr(module.random, "uniform", lambda low, high: (low, high))
    end = ended(supernodes.LOST_CALL)
    waits = [watched.ended(end) for _ in range(6)]
    assert waits == [(0, 2), (0, 4), (0, 8), (0, 16), (0, 30), (0, 30)]
    watched.online()
    clock.seconds += 3
    assert watched.ended(end) == (0, 30), "a connection of a moment is none"
    watched.online()
    clock.seconds += 31
    assert watched.ended(end) == (0, 2)


def test_a_new_reason_is_told(watched, said):
    for end in (supernodes.NOT_FOUND, supernodes.LOST_CALL, supernodes.LOST_CALL):
        watched.ended(ended(end))
    assert [message.split("answered ")[1][:3] for message in said.messages] == ["404", "500"]
