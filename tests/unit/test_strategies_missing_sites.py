"""Sites that leave, return, refuse, fail or are late cost a round only their own update."""

from __future__ import annotations

from dataclasses import replace

import pytest
from flwr.app import Error, Message

from fakes.sites import (
    NODE_OF,
    NODES,
    PRIVATE,
    SITES,
    Sites,
    assert_same_bits,
    by_site,
    good,
    mean_by_hand,
    silent,
    strategy,
    weights,
)
from strategies.errors import FederationError

pytestmark = pytest.mark.usefixtures("poll_often")


@pytest.mark.parametrize("gone", [{"B"}, {"B", "C"}])
def test_a_node_that_left_before_the_instruction_was_sent_is_missing(gone, monkeypatch):
    # Flower's grid has an empty id for a message whose node is not registered any more.
    rounds = strategy(min_sites=1)
    grid = Sites({site: silent for site in gone})
    push = grid.push_messages

    def push_some(messages):
        return [
            "" if site in gone else key
            for key, site in zip(push(messages), NODES.values(), strict=True)
        ]

    monkeypatch.setattr(grid, "push_messages", push_some)
    found, outcomes = rounds.train(grid, NODE_OF, 2, weights())
    assert_same_bits(found, mean_by_hand(set(SITES) - gone))
    assert {o.site for o in outcomes if o.status == "missing"} == gone


def test_a_flower_error_is_a_missing_reply_with_its_reason():
    def lost(site, message):
        return Message(Error(3, "Node Unavailable"), reply_to=message)

    found, outcomes = strategy().train(Sites({"B": lost}), NODE_OF, 2, weights())
    assert_same_bits(found, mean_by_hand("AC"))
    outcome = by_site(outcomes)["B"]
    assert (outcome.status, outcome.reason) == ("missing", "Flower error 3: Node Unavailable")


def test_an_exception_in_a_site_is_a_missing_reply():
    def fails(site, message):
        raise FederationError("site=B cannot answer: KeyError")

    found, outcomes = strategy().train(Sites({"B": fails}), NODE_OF, 1, weights())
    assert_same_bits(found, mean_by_hand("AC"))
    assert by_site(outcomes)["B"].reason.endswith("site=B cannot answer: KeyError")


class Unreadable(Sites):
    """Flower cannot unpack what B sent, or cannot reach the superlink any more.

    Attributes:
        gone: Whether the superlink is.
    """

    gone = False

    def pull_messages(self, message_ids):
        (reply,) = super().pull_messages(message_ids)
        if NODES[reply.metadata.src_node_id] == "B":
            raise AttributeError("'ArrayRecord' object has no attribute 'metadata'")
        return [reply]

    def get_nodes(self):
        if self.gone:
            raise ConnectionError("flower-superlink does not answer")
        return super().get_nodes()


def test_what_flower_cannot_unpack_is_that_sites_bad_reply():
    found, outcomes = strategy().train(Unreadable(), NODE_OF, 1, weights())
    assert_same_bits(found, mean_by_hand("AC"))
    outcome = by_site(outcomes)["B"]
    assert outcome.status == "dropped"
    assert outcome.reason == "its reply is not readable (AttributeError)"


def test_a_connection_that_ended_is_no_bad_reply():
    grid = Unreadable()
    grid.gone = True
    with pytest.raises(ConnectionError):
        strategy().train(grid, NODE_OF, 1, weights())


def test_a_refusal_is_told_apart_from_a_failure():
    def refuses(site, message):
        reply = good(site, message, status="refused", reason="too-much-work: limit 3")
        return replace(reply, num_examples=0, update={}, metrics={}).to_content(PRIVATE[site])

    found, outcomes = strategy().train(Sites({"C": refuses}), NODE_OF, 1, weights())
    assert_same_bits(found, mean_by_hand("AB"))
    refused = by_site(outcomes)["C"]
    assert (refused.status, refused.reason) == ("refused", "too-much-work: limit 3")
    assert (refused.reply, refused.sums) == (None, None)


@pytest.mark.parametrize("late", [60.0, None], ids=["late", "never"])
def test_the_deadline_ends_a_round_without_the_late(late):
    grid = Sites({"B": silent}) if late is None else Sites(delays={"B": late})
    found, outcomes = strategy(round_timeout_seconds=0.15).train(grid, NODE_OF, 1, weights())
    assert_same_bits(found, mean_by_hand("AC"))
    outcome = by_site(outcomes)["B"]
    assert (outcome.status, outcome.reason) == ("missing", "no reply within 0.15 s")


def test_replies_that_wait_at_the_superlink_count_after_the_deadline_too():
    """A, asked first, uses up the time; B and C have answered long ago."""
    rounds = strategy(round_timeout_seconds=0.05)
    found, outcomes = rounds.train(Sites({"A": silent}), NODE_OF, 1, weights())
    assert [o.status for o in outcomes] == ["missing", "ok", "ok"]
    assert_same_bits(found, mean_by_hand("BC"))


def test_a_round_ends_when_all_have_answered():
    """And does not sit out its deadline."""
    rounds = strategy(round_timeout_seconds=86_400.0)
    _, outcomes = rounds.train(Sites(delays={"A": 0.05}), NODE_OF, 1, weights())
    assert [o.status for o in outcomes] == ["ok"] * 3


def test_a_site_without_a_node_is_missing():
    _, outcomes = strategy().train(Sites(), {"A": 11, "B": 12}, 1, weights())
    assert (outcomes[2].site, outcomes[2].status, outcomes[2].reason) == (
        "C",
        "missing",
        "not connected",
    )
