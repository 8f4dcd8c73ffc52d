"""A round: the exact weighted mean of enough sites, each asked once and counted once."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
from flwr.app import RecordDict

from fakes.orders import FEDERATION, ORDER_KEY
from fakes.sites import (
    CAP,
    NODE_OF,
    NODES,
    SITES,
    Sites,
    assert_same_bits,
    by_site,
    mean_by_hand,
    poke,
    signed,
    strategy,
    sums,
    weights,
)
from medmamba import MedMamba
from medmamba.weights import to_arrays
from strategies.base import grace_seconds
from strategies.errors import ConfigError, FederationError, QuorumError
from strategies.evaluation import EvaluationSums
from strategies.fedavg import FedAvg, WeightedMean
from strategies.records import Instruction, Reply

pytestmark = pytest.mark.usefixtures("poll_often")


def received(message) -> Instruction:
    """What a site reads."""
    return Instruction.from_content(message.content, ORDER_KEY.public_key(), federation=FEDERATION)


def test_the_next_weights_are_the_weighted_mean():
    found, outcomes = strategy().train(Sites(), NODE_OF, 1, weights())
    assert_same_bits(found, mean_by_hand(SITES))
    assert [(o.site, o.status, o.reason) for o in outcomes] == [(s, "ok", "") for s in SITES]
    assert [o.reply.num_examples for o in outcomes] == [10, 300, 7]
    assert [o.sums == sums(o.site) for o in outcomes] == [True, True, True]


def test_the_sites_get_exactly_the_signed_instruction():
    grid = Sites()
    rounds = strategy(round_timeout_seconds=12.0)
    rounds.train(grid, NODE_OF, 4, weights())
    assert [m.metadata.dst_node_id for m in grid.instructions] == list(NODES)
    for message in grid.instructions:
        sent = received(message)
        assert sent.order == rounds.order
        assert (sent.federation, sent.run_uuid, sent.server_round) == (FEDERATION, "a1b2", 4)
        assert sent.task == "train"
        assert_same_bits(sent.weights, weights())
        assert message.metadata.message_type == "train"
        # It dies soon after the round: a site that comes back later must not work on it.
        assert message.metadata.ttl == 12.0 + grace_seconds(len(NODES))


@pytest.mark.parametrize("arrival", ["ABC", "CBA", "BCA"])
@pytest.mark.parametrize("nodes", [NODES, {3: "C", 5: "A", 9: "B"}])
def test_who_answers_first_does_not_change_a_bit(arrival, nodes):
    grid = Sites(nodes=nodes, delays={site: 0.02 * place for place, site in enumerate(arrival)})
    asked = {site: node for node, site in nodes.items()}
    found, outcomes = strategy().train(grid, asked, 1, weights())
    assert_same_bits(found, mean_by_hand(SITES))
    assert [o.site for o in outcomes] == list(SITES)


def test_too_few_valid_updates_end_the_run_and_name_the_sites():
    rounds = strategy()
    before = weights()
    grid = Sites({"A": poke(np.nan), "C": lambda s, m: signed(s, m, num_examples=0)})
    with pytest.raises(QuorumError) as caught:
        rounds.train(grid, NODE_OF, 2, before)
    assert str(caught.value) == (
        "round=2 valid updates=1; strategy.min-sites=2 (A: array 'stem.weight' holds values that "
        f"are not finite; C: num-examples=0: expected 1 to {CAP})"
    )
    assert caught.value.hint == "mend the sites named here, then continue with --resume"
    assert_same_bits(before, weights())


def test_the_quorum_is_exact():
    bad = {"A": poke(np.nan)}
    strategy(min_sites=2).train(Sites(bad), NODE_OF, 1, weights())
    with pytest.raises(QuorumError, match=r"valid updates=2; strategy\.min-sites=3"):
        strategy(min_sites=3).train(Sites(bad), NODE_OF, 1, weights())


def test_a_round_of_nothing_but_bad_updates_is_a_missing_quorum():
    grid = Sites({site: poke(np.nan) for site in SITES})
    with pytest.raises(QuorumError, match="valid updates=0"):
        strategy(min_sites=1).train(grid, NODE_OF, 1, weights())


def test_a_quorum_that_can_never_be_met_is_refused_at_the_start():
    with pytest.raises(ConfigError) as caught:
        strategy(sites="AB", min_sites=3)
    assert str(caught.value) == "strategy.min-sites=3: only 2 sites are admitted"
    assert caught.value.hint == "admit more sites or lower strategy.min-sites"


def test_instructions_that_cannot_be_sent_end_the_run_in_one_line(monkeypatch):
    # What Flower's grid does with messages that its hub finds too large.
    grid = Sites()
    monkeypatch.setattr(grid, "push_messages", lambda messages: [])
    with pytest.raises(FederationError, match="did not take the instructions"):
        strategy().train(grid, NODE_OF, 1, weights())


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_brings_each_sites_sums(split):
    grid = Sites()
    outcomes = strategy().evaluate(grid, NODE_OF, 0, weights(), split)
    assert [(o.site, o.status, o.sums == sums(o.site)) for o in outcomes] == [
        (site, "ok", True) for site in SITES
    ]
    assert [m.metadata.message_type for m in grid.instructions] == ["evaluate"] * 3
    assert received(grid.instructions[0]).task == split


def test_an_evaluation_of_no_examples_is_no_failure():
    def nothing(site, message):
        metrics = EvaluationSums.zeros(3).to_metrics("val")
        return signed(site, message, num_examples=0, metrics=metrics)

    outcomes = strategy().evaluate(Sites({"B": nothing}), NODE_OF, 0, weights(), "val")
    assert [(o.status, o.sums.num_examples) for o in outcomes] == [("ok", 5), ("ok", 0), ("ok", 5)]


def test_an_evaluation_needs_no_quorum():
    grid = Sites({site: lambda s, m: RecordDict() for site in SITES})
    outcomes = strategy().evaluate(grid, NODE_OF, 0, weights(), "val")
    assert {o.status for o in outcomes} == {"dropped"}


# --- memory


def test_only_one_update_is_in_memory_at_a_time():
    """Peak memory is the model's and one update's, however many sites there are."""
    added: list[weakref.ref] = []
    alive: list[int] = []

    class Watched(WeightedMean):
        def add(self, reply: Reply) -> None:
            gc.collect()
            alive.append(sum(one() is not None for one in added))
            super().add(reply)
            added.append(weakref.ref(reply.update["stem.weight"]))

    class Watching(FedAvg):
        def aggregation(self, weights):
            return Watched(weights)

    found, outcomes = strategy(Watching).train(Sites(), NODE_OF, 1, weights())
    assert alive == [0, 0, 0]
    gc.collect()
    assert [one() for one in added] == [None] * 3
    assert [o.reply.update for o in outcomes] == [{}] * 3
    assert_same_bits(found, mean_by_hand(SITES))


def test_a_reply_is_asked_for_when_its_turn_comes():
    """Those that are early wait at the superlink."""
    worked: list[str] = []
    taken: list[str] = []

    def work(site, message):
        worked.append(site)
        assert taken == worked[:-1]
        return signed(site, message)

    rounds = strategy()
    instruction = Instruction(rounds.order, 1, "train", weights())
    grid = Sites(dict.fromkeys(SITES, work))
    rounds.ask(grid, NODE_OF, instruction, lambda reply: taken.append(reply.site))
    assert taken == worked == list(SITES)


def test_the_outcomes_are_in_site_order_whatever_the_order_names_first():
    outcomes = strategy(sites="CAB").evaluate(Sites(), NODE_OF, 0, weights(), "val")
    assert list(by_site(outcomes)) == list(SITES)


# --- what travels


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
