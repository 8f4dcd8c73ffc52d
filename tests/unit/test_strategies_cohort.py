"""Whose word counts: the node that the superlink registered for an admitted site of the order."""

from __future__ import annotations

from dataclasses import replace

import pytest
from flwr.app import Error, Message
from flwr.proto.node_pb2 import NodeInfo

from fakes.sites import (
    KEYS,
    NODE_OF,
    NODES,
    PRIVATE,
    SITES,
    Sites,
    assert_same_bits,
    by_site,
    good,
    mean_by_hand,
    signed,
    strategy,
    weights,
)
from strategies.errors import ConfigError, QuorumError

pytestmark = pytest.mark.usefixtures("poll_often")


def statuses(outcomes):
    return {o.site: o.status for o in outcomes}


# --- who answers


@pytest.mark.parametrize("liar", ["A", "C"])
def test_a_node_that_answers_in_anothers_name_is_dropped_and_named(liar):
    """Even with the other's own key, which one program at two sites might have."""

    def as_b(site, message):
        return good("B", message).to_content(PRIVATE["B"])

    found, outcomes = strategy().train(Sites({liar: as_b}), NODE_OF, 1, weights())
    assert_same_bits(found, mean_by_hand(set(SITES) - {liar}))
    outcomes = by_site(outcomes)
    assert outcomes[liar].status == "dropped"
    assert outcomes[liar].reason == "its node answered in the name of site=B"
    assert outcomes["B"].status == "ok"


def test_a_forged_signature_is_dropped_and_the_real_site_counts():
    def as_c(site, message):
        return good("C", message).to_content(PRIVATE["A"])

    found, outcomes = strategy().train(Sites({"A": as_c}), NODE_OF, 1, weights())
    assert_same_bits(found, mean_by_hand("BC"))
    outcomes = by_site(outcomes)
    assert (outcomes["A"].status, outcomes["C"].status) == ("dropped", "ok")
    assert outcomes["A"].reason == "signature does not match the signed content"


def test_a_name_that_nobody_admitted_is_dropped():
    def as_x(site, message):
        return replace(good(site, message), site="X").to_content(PRIVATE[site])

    _, outcomes = strategy().train(Sites({"A": as_x}), NODE_OF, 1, weights())
    assert by_site(outcomes)["A"].reason == "site='X' is not admitted to this federation"


@pytest.mark.parametrize("thief", ["A", "B", "C"])
def test_a_reply_of_an_earlier_round_is_dropped_and_harms_nobody(thief):
    kept = {}

    def keeps(site, message):
        kept[site] = signed(site, message)
        return kept[site]

    rounds = strategy()
    rounds.train(Sites({"B": keeps}), NODE_OF, 1, weights())
    replays = Sites({thief: lambda site, message: kept["B"]})
    found, outcomes = rounds.train(replays, NODE_OF, 2, weights())
    others = [site for site in SITES if site != thief]
    assert [o.site for o in outcomes if o.status == "ok"] == others
    assert_same_bits(found, mean_by_hand(others))
    expected = "the signature covers another instruction"
    if thief != "B":
        expected = "its node answered in the name of site=B"
    assert [o.reason for o in outcomes if o.status == "dropped"] == [expected]


def test_a_reply_to_the_same_question_asked_before_is_dropped():
    """A round that is repeated after a crash asks the same again; only a fresh signature counts."""
    first = {}

    def keeps(site, message):
        first[site] = signed(site, message)
        return first[site]

    strategy().train(Sites({"B": keeps}), NODE_OF, 1, weights())
    again = Sites({"B": lambda site, message: first[site]})
    found, outcomes = strategy().train(again, NODE_OF, 1, weights())
    assert by_site(outcomes)["B"].reason == "the signature covers another instruction"
    assert_same_bits(found, mean_by_hand("AC"))


def test_a_message_that_answers_something_else_is_not_taken(monkeypatch):
    """A superlink that hands over the same reply for everything: the others count as silent."""
    grid, held = Sites(), []
    pull = grid.pull_messages

    def first_of_all(message_ids):
        held.extend(pull(message_ids))
        return held[:1]

    monkeypatch.setattr(grid, "pull_messages", first_of_all)
    rounds = strategy(round_timeout_seconds=0.02)
    outcomes = rounds.evaluate(grid, NODE_OF, 1, weights(), "val")
    assert statuses(outcomes) == {"A": "ok", "B": "missing", "C": "missing"}


# --- who is asked


def test_a_site_that_was_revoked_is_not_asked():
    admitted = dict(KEYS)
    rounds = strategy(admitted=lambda: admitted)
    del admitted["B"]
    grid = Sites()
    found, outcomes = rounds.train(grid, NODE_OF, 1, weights())
    assert [NODES[m.metadata.dst_node_id] for m in grid.instructions] == ["A", "C"]
    assert statuses(outcomes) == {"A": "ok", "C": "ok"}
    assert_same_bits(found, mean_by_hand("AC"))


@pytest.mark.parametrize("task", ["train", "val"])
def test_a_site_that_is_revoked_while_it_works_is_dropped(task):
    admitted = dict(KEYS)

    def revoked_meanwhile(site, message):
        del admitted[site]
        return signed(site, message)

    rounds = strategy(admitted=lambda: admitted)
    grid = Sites({"B": revoked_meanwhile})
    if task == "train":
        found, outcomes = rounds.train(grid, NODE_OF, 1, weights())
        assert_same_bits(found, mean_by_hand("AC"))
    else:
        outcomes = rounds.evaluate(grid, NODE_OF, 1, weights(), "val")
    assert statuses(outcomes) == {"A": "ok", "B": "dropped", "C": "ok"}
    assert by_site(outcomes)["B"].reason == "the site was revoked meanwhile"


def test_a_site_that_enrolled_anew_while_it_worked_must_sign_with_its_new_key():
    admitted = dict(KEYS)

    def new_key(site, message):
        admitted["B"] = KEYS["C"]
        return signed(site, message)

    _, outcomes = strategy(admitted=lambda: admitted).train(
        Sites({"B": new_key}), NODE_OF, 1, weights()
    )
    assert by_site(outcomes)["B"].reason == "signature does not match the signed content"


def test_when_all_are_revoked_nobody_is_asked_and_the_run_ends():
    admitted = dict(KEYS)
    rounds = strategy(admitted=lambda: admitted)
    admitted.clear()
    grid = Sites()
    with pytest.raises(QuorumError, match="valid updates=0"):
        rounds.train(grid, NODE_OF, 1, weights())
    assert grid.instructions == []


def test_a_site_outside_the_cohort_is_not_asked():
    grid = Sites()
    rounds = strategy(sites="AB")
    assert rounds.wait_for_cohort(grid, target=2) == {"A": 11, "B": 12}
    found, outcomes = rounds.train(grid, NODE_OF, 1, weights())
    assert [NODES[m.metadata.dst_node_id] for m in grid.instructions] == ["A", "B"]
    assert_same_bits(found, mean_by_hand("AB"))
    assert statuses(outcomes) == {"A": "ok", "B": "ok"}


def test_a_site_outside_the_cohort_does_not_count_for_another():
    def as_c(site, message):
        return good("C", message).to_content(PRIVATE["C"])

    _, outcomes = strategy(sites="AB", min_sites=1).train(Sites({"B": as_c}), NODE_OF, 1, weights())
    assert by_site(outcomes)["B"].reason == "its node answered in the name of site=C"


def test_a_site_whose_name_two_nodes_have_is_asked_once():
    nodes = {11: "A", 12: "B", 14: "B", 13: "C"}
    grid, rounds = Sites(nodes=nodes), strategy()
    asked = rounds.wait_for_cohort(grid, target=3)
    assert asked["B"] in (12, 14)
    found, outcomes = rounds.train(grid, asked, 1, weights())
    assert len(grid.instructions) == 3
    assert_same_bits(found, mean_by_hand(SITES))
    assert statuses(outcomes) == dict.fromkeys(SITES, "ok")


def test_a_cohort_that_names_a_site_twice_asks_it_once():
    grid = Sites()
    found, outcomes = strategy(sites="ABBC").train(grid, NODE_OF, 1, weights())
    assert len(grid.instructions) == len(outcomes) == 3
    assert_same_bits(found, mean_by_hand(SITES))


def test_two_names_for_one_site_do_not_make_a_quorum():
    with pytest.raises(ConfigError, match="only 1 sites are admitted"):
        strategy(sites="AA")


# --- waiting


def listing(states, monkeypatch, grid):
    """Have the grid list these sites' nodes, one state after the other."""
    remaining = iter(states)
    last = []

    def nodes():
        last[:] = next(remaining, last)
        return [NodeInfo(node_id=NODE_OF.get(name, 99), name=name) for name in last]

    monkeypatch.setattr(grid, "get_nodes", nodes)


def test_the_cohort_is_awaited_until_it_is_there(monkeypatch):
    grid = Sites()
    listing([[], ["A"], ["A"], ["C", "A"]], monkeypatch, grid)
    found = strategy(wait_seconds=30.0).wait_for_cohort(grid, target=2)
    assert list(found.items()) == [("A", 11), ("C", 13)]


def test_strangers_and_nodes_without_a_name_do_not_count(monkeypatch):
    grid = Sites()
    listing([["A", "X", ""]], monkeypatch, grid)
    with pytest.raises(QuorumError, match="connected sites=1"):
        strategy().wait_for_cohort(grid, target=2)


def test_a_revoked_site_is_not_awaited(monkeypatch):
    admitted = dict(KEYS)
    rounds = strategy(admitted=lambda: admitted, wait_seconds=30.0)
    del admitted["B"]
    grid = Sites()
    listing([["A", "B", "C"]], monkeypatch, grid)
    assert rounds.wait_for_cohort(grid, target=3) == {"A": 11, "C": 13}


def test_nobody_is_awaited_when_too_few_are_left_for_the_quorum(monkeypatch):
    admitted = dict(KEYS)
    rounds = strategy(admitted=lambda: admitted, wait_seconds=3600.0, min_sites=2)
    del admitted["B"], admitted["C"]
    grid = Sites()
    listing([["A"]], monkeypatch, grid)
    with pytest.raises(QuorumError, match="admitted sites=1 of this run") as caught:
        rounds.wait_for_cohort(grid, target=2)
    assert caught.value.hint == "begin a new run with the sites that are left"


def test_a_cohort_that_meets_the_quorum_starts_at_the_deadline_and_says_who_is_missing(
    monkeypatch, caplog
):
    grid = Sites()
    listing([["C", "A"]], monkeypatch, grid)
    assert strategy(wait_seconds=0.1).wait_for_cohort(grid, target=3) == {"A": 11, "C": 13}
    assert "continuing without sites=B" in caplog.text


def test_a_cohort_below_the_quorum_is_refused_at_the_deadline(monkeypatch):
    grid = Sites()
    listing([["A"]], monkeypatch, grid)
    with pytest.raises(QuorumError) as caught:
        strategy(wait_seconds=0.05).wait_for_cohort(grid, target=3)
    assert str(caught.value) == (
        "connected sites=1 after 0.05 s; strategy.min-sites=2; not connected: B, C"
    )
    assert "python -m client --site NAME" in caught.value.hint


def test_a_flower_error_in_a_sites_name_is_that_sites(monkeypatch):
    """Flower reports a lost node under the server's node id: the instruction tells whose it is."""

    def lost(site, message):
        reply = Message(Error(5, "Node Unavailable"), reply_to=message)
        reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    _, outcomes = strategy().train(Sites({"B": lost}), NODE_OF, 1, weights())
    outcome = by_site(outcomes)["B"]
    assert (outcome.status, outcome.reason) == ("missing", "Flower error 5: Node Unavailable")
