"""A round: the exact weighted mean of enough sites, each counted once, by its own signature."""

from __future__ import annotations

import numpy as np
import pytest
from flwr.app import RecordDict

from fakes.sites import (
    CAP,
    NODES,
    PRIVATE,
    SITES,
    Sites,
    assert_same_bits,
    by_site,
    good,
    mean_by_hand,
    poke,
    signed,
    strategy,
    sums,
    weights,
)
from medmamba import MedMamba
from medmamba.weights import to_arrays
from strategies.errors import ConfigError, FederationError, QuorumError
from strategies.evaluation import EvaluationSums
from strategies.records import Instruction

pytestmark = pytest.mark.usefixtures("poll_often")


def test_the_next_weights_are_the_weighted_mean():
    found, outcomes = strategy().train(Sites(), list(NODES), 1, weights())
    assert_same_bits(found, mean_by_hand(SITES))
    assert [(o.site, o.status, o.reason) for o in outcomes] == [(s, "ok", "") for s in SITES]
    assert [o.reply.num_examples for o in outcomes] == [10, 300, 7]
    assert [o.sums == sums(o.site) for o in outcomes] == [True, True, True]


def test_the_sites_get_exactly_the_instruction():
    grid = Sites()
    strategy(round_timeout_seconds=12.0).train(grid, list(NODES), 4, weights())
    assert [m.metadata.dst_node_id for m in grid.instructions] == list(NODES)
    for message in grid.instructions:
        sent = Instruction.from_content(message.content)
        assert (sent.federation, sent.run_uuid, sent.server_round) == ("lung", "a1b2", 4)
        assert sent.task == "train"
        assert_same_bits(sent.weights, weights())
        assert message.metadata.message_type == "train"
        # The instruction dies with the round: a site that comes back later must not work on it.
        assert message.metadata.ttl == 12.0


@pytest.mark.parametrize("arrival", ["ABC", "CBA", "BCA"])
@pytest.mark.parametrize("nodes", [NODES, {3: "C", 5: "A", 9: "B"}])
def test_who_answers_first_does_not_change_a_bit(arrival, nodes):
    grid = Sites(nodes=nodes, delays={site: 0.02 * place for place, site in enumerate(arrival)})
    found, outcomes = strategy().train(grid, list(nodes), 1, weights())
    assert_same_bits(found, mean_by_hand(SITES))
    assert [o.site for o in outcomes] == list(SITES)


def test_a_forged_signature_is_dropped_and_the_real_site_counts():
    def as_c(site, message):
        return good("C", message).to_content(PRIVATE["A"])

    found, outcomes = strategy().train(Sites({"A": as_c}), list(NODES), 1, weights())
    assert_same_bits(found, mean_by_hand("BC"))
    outcomes = by_site(outcomes)
    assert outcomes["node 11"].status == "dropped"
    assert outcomes["node 11"].reason == "signature does not match the signed content"
    assert outcomes["C"].status == "ok"
    assert (outcomes["A"].status, outcomes["A"].reason) == ("missing", "not connected")


def test_a_reply_signed_by_a_key_that_nobody_admitted_is_dropped():
    grid = Sites(nodes={11: "A", 12: "B", 13: "C"})
    found, outcomes = strategy(sites="AB").train(grid, list(NODES), 1, weights())
    assert_same_bits(found, mean_by_hand("AB"))
    assert by_site(outcomes)["node 13"].reason == "site='C' is not admitted to this federation"


@pytest.mark.parametrize("thief", ["A", "C"])
def test_a_replayed_reply_is_dropped_and_harms_nobody(thief):
    kept = {}

    def keeps(site, message):
        kept[site] = good("B", message).to_content(PRIVATE["B"])
        return signed(site, message)

    rounds = strategy()
    rounds.train(Sites({"B": keeps}), list(NODES), 1, weights())
    replays = Sites({thief: lambda site, message: kept["B"]})
    found, outcomes = rounds.train(replays, list(NODES), 2, weights())
    others = [site for site in SITES if site != thief]
    assert [o.site for o in outcomes if o.status == "ok"] == others
    assert_same_bits(found, mean_by_hand(others))
    assert [o.reason for o in outcomes if o.status == "dropped"] == [
        "the signature covers another instruction"
    ]


def test_a_replayed_reply_of_a_site_not_seen_before_harms_nobody():
    def from_earlier(site, message):
        return good("B", message, message_id="of an earlier run").to_content(PRIVATE["B"])

    found, outcomes = strategy().train(Sites({"A": from_earlier}), list(NODES), 1, weights())
    assert [o.site for o in outcomes if o.status == "ok"] == ["B", "C"]
    assert_same_bits(found, mean_by_hand("BC"))


def test_a_site_counts_once_a_round():
    grid = Sites(nodes={11: "A", 12: "B", 13: "A"})
    found, outcomes = strategy(sites="AB").train(grid, [11, 12, 13], 1, weights())
    assert_same_bits(found, mean_by_hand("AB"))
    second = by_site(outcomes)["node 13"]
    assert second.status == "dropped"
    assert second.reason == "a second reply for site A in this round"
    assert second.reply is None


def test_too_few_valid_updates_end_the_run_and_name_the_sites():
    rounds = strategy()
    rounds.train(Sites(), list(NODES), 1, weights())
    before = weights()
    grid = Sites({"A": poke(np.nan), "C": lambda s, m: signed(s, m, num_examples=0)})
    with pytest.raises(QuorumError) as caught:
        rounds.train(grid, list(NODES), 2, before)
    assert str(caught.value) == (
        "round=2 valid updates=1; strategy.min-sites=2 (A: array 'stem.weight' holds values that "
        f"are not finite; C: num-examples=0: expected 1 to {CAP})"
    )
    assert caught.value.hint == "mend the sites named here, then continue with --resume"
    assert_same_bits(before, weights())


def test_the_quorum_is_exact():
    bad = {"A": poke(np.nan)}
    strategy(min_sites=2).train(Sites(bad), list(NODES), 1, weights())
    with pytest.raises(QuorumError, match=r"valid updates=2; strategy\.min-sites=3"):
        strategy(min_sites=3).train(Sites(bad), list(NODES), 1, weights())


def test_a_quorum_that_can_never_be_met_is_refused_at_the_start():
    with pytest.raises(ConfigError) as caught:
        strategy(sites="AB", min_sites=3)
    assert str(caught.value) == "strategy.min-sites=3: only 2 sites are admitted"
    assert caught.value.hint == "admit more sites or lower strategy.min-sites"


def test_instructions_that_cannot_be_sent_end_the_run_in_one_line(monkeypatch):
    # What Flower's grid does with messages that its hub finds too large.
    grid = Sites()
    monkeypatch.setattr(grid, "push_messages", lambda messages: [])
    with pytest.raises(FederationError):
        strategy().train(grid, list(NODES), 1, weights())


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_brings_each_sites_sums(split):
    grid = Sites()
    outcomes = strategy().evaluate(grid, list(NODES), 0, weights(), split)
    assert [(o.site, o.status, o.sums == sums(o.site)) for o in outcomes] == [
        (site, "ok", True) for site in SITES
    ]
    assert [m.metadata.message_type for m in grid.instructions] == ["evaluate"] * 3
    assert Instruction.from_content(grid.instructions[0].content).task == split


def test_an_evaluation_of_no_examples_is_no_failure():
    def nothing(site, message):
        metrics = EvaluationSums.zeros(3).to_metrics("val")
        return signed(site, message, num_examples=0, metrics=metrics)

    outcomes = strategy().evaluate(Sites({"B": nothing}), list(NODES), 0, weights(), "val")
    assert [(o.status, o.sums.num_examples) for o in outcomes] == [("ok", 5), ("ok", 0), ("ok", 5)]


def test_an_evaluation_needs_no_quorum():
    grid = Sites({site: lambda s, m: RecordDict() for site in SITES})
    outcomes = strategy().evaluate(grid, list(NODES), 0, weights(), "val")
    assert {o.status for o in outcomes} == {"dropped", "missing"}


def test_integer_buffers_never_travel():
    model = MedMamba.from_name("nano", 3, norm="batch")
    travels = to_arrays(model)
    assert {value.dtype for value in travels.values()} == {np.dtype(np.float32)}
    assert any(name.endswith("running_mean") for name in travels)
    assert any(name.endswith("num_batches_tracked") for name in model.state_dict())
    assert not any(name.endswith("num_batches_tracked") for name in travels)
    # All that is left at the site is the integer buffers.
    stays = model.state_dict().keys() - travels.keys()
    assert {name.rpartition(".")[2] for name in stays} == {"num_batches_tracked"}
