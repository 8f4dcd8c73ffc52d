"""F16: real, signed answers that come a second time, from their site or from another node."""

from __future__ import annotations

import pytest
from flwr.app import Message

from fakes.experiments import SITES, make_scenario, model_bytes, site_line, start, statuses
from fakes.orders import unverified
from faults.in_process import GRID, Replaying, audited


def in_round(message: Message, server_round: int) -> bool:
    asked = unverified(message.content)
    return (asked.task, asked.server_round) == ("train", server_round)


def of_last_round(site, message, reply, heard):
    """B answers round 2 with its signed answer to round 1."""
    if site == "B" and in_round(message, 2):
        return [Message(heard["B", "train", 1].content, reply_to=message)]
    return [reply]


def of_another_site(site, message, reply, heard):
    """C's node answers with B's signed answer, so that B would count twice."""
    if site == "C" and in_round(message, 2):
        return [Message(heard["B", "train", 2].content, reply_to=message)]
    return [reply]


def edited(site, message, reply, heard):
    """B's link makes the answer to round 1 name the message of round 2."""
    if site != "B" or not in_round(message, 2):
        return [reply]
    content = heard["B", "train", 1].content
    content.config_records["envelope"]["message-id"] = message.metadata.message_id
    content.config_records["envelope"]["server-round"] = 2
    return [Message(content, reply_to=message)]


def twice(site, message, reply, heard):
    """B's answers arrive twice."""
    return [reply, reply] if site == "B" else [reply]


@pytest.fixture
def federate(tmp_path, monkeypatch):
    def _federate(send):
        class Grid(Replaying):
            pass

        Grid.send = staticmethod(send)
        monkeypatch.setattr(GRID, Grid)
        path = tmp_path / send.__name__
        start(path, make_scenario())
        return path

    return _federate


def lost(of: str):
    def send(site, message, reply, heard):
        return [] if site == of and in_round(message, 2) else [reply]

    return send


@pytest.mark.fault(
    "F16",
    fault="An answer is replayed or duplicated",
    injection="a site's real signed answer to round 1 is sent in round 2; another node sends it; "
    "its message id is edited; it arrives twice",
    promise="each answer counts once and for its own instruction, site and round; the rest is "
    "dropped with its reason, in the history and in the coordinator's audit log",
)
@pytest.mark.parametrize(
    ("send", "site", "reason"),
    [
        (of_last_round, "B", "the signature covers another instruction"),
        (of_another_site, "C", "its node answered in the name of site=B"),
        (edited, "B", "signature does not match"),
    ],
)
def test_a_replayed_answer_is_dropped_with_its_reason(federate, send, site, reason):
    path, without = federate(send), federate(lost(site))
    assert statuses(path, site) == ["ok", "dropped"]
    assert reason in site_line(path, 2, site)["reason"]
    for other in set(SITES) - {site}:
        assert statuses(path, other) == ["ok", "ok"]
    assert model_bytes(path) == model_bytes(without)
    entries = audited(path / "audit.jsonl", "outcome")
    (entry,) = (e for e in entries if e["status"] != "ok")
    assert (entry["site"], entry["server_round"], entry["status"]) == (site, 2, "dropped")
    assert reason in entry["reason"]


@pytest.mark.fault("F16")
def test_an_answer_that_arrives_twice_counts_once(federate):
    path, once = federate(twice), federate(lambda site, message, reply, heard: [reply])
    assert statuses(path, "B") == ["ok", "ok"]
    assert model_bytes(path) == model_bytes(once)
