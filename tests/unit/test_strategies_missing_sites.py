"""Sites that leave, return, refuse, fail or are late cost a round only their own update."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Error, Message

from fakes.sites import (
    NODES,
    PRIVATE,
    SITES,
    Sites,
    assert_same_bits,
    by_site,
    good,
    mean_by_hand,
    poke,
    silent,
    strategy,
    weights,
)
from strategies.errors import FederationError, QuorumError

pytestmark = pytest.mark.usefixtures("poll_often")


@pytest.mark.parametrize("new", [10, 14])
@pytest.mark.parametrize("silence", ["nothing", "error"])
def test_a_site_that_came_back_as_another_node_counts(new, silence):
    rounds = strategy(round_timeout_seconds=0.1)
    rounds.train(Sites(), list(NODES), 1, weights())
    # A was restarted: its old node 11 is still listed and will never answer again.
    nodes = {11: "gone", 12: "B", 13: "C", new: "A"}

    def unavailable(site, message):
        return Message(Error(3, "Node Unavailable"), reply_to=message)

    grid = Sites({"gone": unavailable if silence == "error" else silent}, nodes)
    found, outcomes = rounds.train(grid, sorted(nodes), 2, weights())
    assert [o.site for o in outcomes if o.status == "ok"] == list(SITES)
    assert_same_bits(found, mean_by_hand(SITES))


@pytest.mark.parametrize("gone", [{"B"}, {"B", "C"}])
def test_a_node_that_left_before_the_instruction_was_sent_is_missing(gone, monkeypatch):
    # Flower's grid has an empty id for a message whose node is not registered any more.
    rounds = strategy(min_sites=1)
    rounds.train(Sites(), list(NODES), 1, weights())
    grid = Sites({site: silent for site in gone})
    push = grid.push_messages

    def push_some(messages):
        return [
            "" if site in gone else key
            for key, site in zip(push(messages), NODES.values(), strict=True)
        ]

    monkeypatch.setattr(grid, "push_messages", push_some)
    found, outcomes = rounds.train(grid, list(NODES), 2, weights())
    assert_same_bits(found, mean_by_hand(set(SITES) - gone))
    assert {o.site for o in outcomes if o.status == "missing"} == gone


def test_a_dropped_reply_keeps_its_reason_when_an_old_node_is_silent():
    rounds = strategy(round_timeout_seconds=0.1)
    rounds.train(Sites(), list(NODES), 1, weights())
    grid = Sites({"gone": silent, "A": poke(np.nan)}, {10: "A", 11: "gone", 12: "B", 13: "C"})
    _, outcomes = rounds.train(grid, [10, 11, 12, 13], 2, weights())
    outcome = by_site(outcomes)["A"]
    assert (outcome.status, "not finite" in outcome.reason) == ("dropped", True)


def test_a_flower_error_is_a_missing_reply_with_its_reason():
    def lost(site, message):
        return Message(Error(3, "Node Unavailable"), reply_to=message)

    rounds = strategy()
    rounds.train(Sites(), list(NODES), 1, weights())
    found, outcomes = rounds.train(Sites({"B": lost}), list(NODES), 2, weights())
    assert_same_bits(found, mean_by_hand("AC"))
    outcome = by_site(outcomes)["B"]
    assert (outcome.status, outcome.reason) == ("missing", "Flower error 3: Node Unavailable")


def test_an_exception_in_a_site_is_a_missing_reply():
    def fails(site, message):
        raise FederationError("site=B cannot answer: KeyError")

    found, outcomes = strategy().train(Sites({"B": fails}), list(NODES), 1, weights())
    assert_same_bits(found, mean_by_hand("AC"))
    assert by_site(outcomes)["node 12"].reason.endswith("site=B cannot answer: KeyError")


def test_a_refusal_is_told_apart_from_a_failure():
    def refuses(site, message):
        reply = good(site, message, status="refused", reason="too-much-work: limit 3")
        return replace(reply, num_examples=0, update={}, metrics={}).to_content(PRIVATE[site])

    found, outcomes = strategy().train(Sites({"C": refuses}), list(NODES), 1, weights())
    assert_same_bits(found, mean_by_hand("AB"))
    refused = by_site(outcomes)["C"]
    assert (refused.status, refused.reason) == ("refused", "too-much-work: limit 3")
    assert (refused.reply, refused.sums) == (None, None)


@pytest.mark.parametrize("late", [0.5, None], ids=["late", "never"])
def test_the_deadline_ends_a_round_without_the_late(late):
    grid = Sites({"B": silent}) if late is None else Sites(delays={"B": late})
    rounds = strategy(round_timeout_seconds=0.15)
    began = time.monotonic()
    found, outcomes = rounds.train(grid, list(NODES), 1, weights())
    assert 0.15 <= time.monotonic() - began < 0.45
    assert_same_bits(found, mean_by_hand("AC"))
    outcome = by_site(outcomes)["node 12"]
    assert (outcome.status, outcome.reason) == ("missing", "no reply within 0.15 s")


def test_a_round_ends_when_all_have_answered():
    began = time.monotonic()
    strategy(round_timeout_seconds=30.0).train(Sites(delays={"A": 0.05}), list(NODES), 1, weights())
    assert time.monotonic() - began < 5


def test_a_site_without_a_node_is_missing():
    _, outcomes = strategy().train(Sites(), [11, 12], 1, weights())
    assert (outcomes[2].site, outcomes[2].status, outcomes[2].reason) == (
        "C",
        "missing",
        "not connected",
    )


def test_the_cohort_is_awaited_until_it_is_there(monkeypatch):
    grid = Sites()
    states = iter([[], [11], [11], [13, 11]])
    monkeypatch.setattr(grid, "get_node_ids", lambda: next(states))
    assert strategy(wait_seconds=30.0).wait_for_cohort(grid, target=2) == [11, 13]


def test_a_cohort_that_meets_the_quorum_starts_at_the_deadline(monkeypatch, caplog):
    grid = Sites()
    monkeypatch.setattr(grid, "get_node_ids", lambda: [12, 11])
    began = time.monotonic()
    assert strategy(wait_seconds=0.1).wait_for_cohort(grid, target=3) == [11, 12]
    assert 0.1 <= time.monotonic() - began < 1
    assert "continuing with connected=2 expected=3" in caplog.text


def test_a_cohort_below_the_quorum_is_refused_at_the_deadline(monkeypatch):
    grid = Sites()
    monkeypatch.setattr(grid, "get_node_ids", lambda: [11])
    with pytest.raises(QuorumError) as caught:
        strategy(wait_seconds=0.05).wait_for_cohort(grid, target=3)
    assert str(caught.value) == "connected sites=1 after 0.05 s; strategy.min-sites=2"
    assert "python -m client --site NAME" in caught.value.hint
