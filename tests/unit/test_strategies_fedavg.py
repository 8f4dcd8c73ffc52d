"""FedAvg and FedProx: the weighted mean of the updates, in float64, rounded once."""

from __future__ import annotations

import weakref
from fractions import Fraction
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fakes.sites import strategy
from strategies.arrays import Arrays
from strategies.base import Strategy
from strategies.fedavg import FedAvg
from strategies.fedprox import FedProx
from strategies.records import Reply
from strategies.registry import STRATEGIES
from strategies.run_config import StrategySection


def reply(site: str, num_examples: int, update: Arrays) -> Reply:
    return Reply(
        site=site,
        federation="lung",
        run_uuid="a1b2",
        server_round=1,
        task="train",
        message_id=f"m-{site}",
        num_examples=num_examples,
        update=update,
    )


def make(kind: type[Strategy]) -> Strategy:
    mu = 0.1 if kind is FedProx else 0.0
    return strategy(kind, sites="A", name=kind.name, min_sites=1, proximal_mu=mu)


def aggregate(weights: Arrays, replies: list[Reply], kind: type[Strategy] = FedAvg) -> Arrays:
    aggregation = make(kind).aggregation(weights)
    for one in replies:
        aggregation.add(one)
    return aggregation.result()


@st.composite
def rounds(draw) -> tuple[Arrays, list[Reply]]:
    """Weights and up to five sites' updates."""
    floats = st.floats(-1e6, 1e6, width=32)
    shapes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))

    def arrays() -> Arrays:
        return {
            f"p{i}": np.array(draw(st.lists(floats, min_size=n, max_size=n)), np.float32)
            for i, n in enumerate(shapes)
        }

    counts = draw(st.lists(st.integers(1, 10**6), min_size=1, max_size=5))
    return arrays(), [reply(f"S{i}", count, arrays()) for i, count in enumerate(counts)]


def test_a_hand_made_mean():
    weights = {"w": np.array([1.0, 2.0], np.float32)}
    replies = [
        reply("A", 1, {"w": np.array([4.0, 0.0], np.float32)}),
        reply("B", 3, {"w": np.array([0.0, -4.0], np.float32)}),
    ]
    found = aggregate(weights, replies)
    assert found["w"].tolist() == [2.0, -1.0]
    assert found["w"].dtype == np.float32
    assert weights["w"].tolist() == [1.0, 2.0]
    assert replies[0].update["w"].tolist() == [4.0, 0.0]


def test_the_sum_is_rounded_once_and_not_at_every_site():
    # In float32 adding 2**-25 to 1 is lost each time; sixteen of them are 2**-21.
    weights = {"w": np.array([1.0], np.float32)}
    step = {"w": np.array([2.0**-21], np.float32)}
    found = aggregate(weights, [reply(f"S{i}", 1, step) for i in range(16)])
    assert found["w"][0] == np.float32(1 + 2.0**-21)


def test_the_weights_move_once_and_the_result_can_be_asked_for_again():
    weights = {"w": np.array([1.0], np.float32)}
    aggregation = make(FedAvg).aggregation(weights)
    aggregation.add(reply("A", 2, {"w": np.array([3.0], np.float32)}))
    assert aggregation.result()["w"].tolist() == aggregation.result()["w"].tolist() == [4.0]
    aggregation.add(reply("B", 2, {"w": np.array([-3.0], np.float32)}))
    assert aggregation.result()["w"].tolist() == [1.0]


def test_two_rounds_share_nothing():
    kind = make(FedAvg)
    weights = {"w": np.zeros(1, np.float32)}
    first = kind.aggregation(weights)
    first.add(reply("A", 1, {"w": np.ones(1, np.float32)}))
    second = kind.aggregation(weights)
    second.add(reply("A", 1, {"w": -np.ones(1, np.float32)}))
    assert (first.result()["w"], second.result()["w"]) == (1.0, -1.0)


def test_an_aggregate_keeps_no_update():
    """A running sum: memory does not grow with the sites."""
    weights = {"w": np.zeros(3, np.float32)}
    aggregation = make(FedAvg).aggregation(weights)
    one = reply("A", 1, {"w": np.ones(3, np.float32)})
    gone = weakref.ref(one.update["w"])
    aggregation.add(one)
    del one
    assert gone() is None


def test_shapes_and_scalars_stay():
    weights = {"a": np.zeros((2, 0, 3), np.float32), "b": np.float32(1).reshape(())}
    found = aggregate(weights, [reply("A", 2, weights)])
    assert {name: value.shape for name, value in found.items()} == {"a": (2, 0, 3), "b": ()}


@settings(max_examples=60)
@given(rounds())
def test_the_mean_is_the_exact_one_up_to_rounding(drawn):
    weights, replies = drawn
    total = sum(r.num_examples for r in replies)
    found = aggregate(weights, replies)
    for name, value in weights.items():
        for i, start in enumerate(value):
            exact = Fraction(float(start)) + sum(
                Fraction(r.num_examples, total) * Fraction(float(r.update[name][i]))
                for r in replies
            )
            assert found[name][i] == pytest.approx(float(exact), rel=2**-23, abs=1e-8)


@settings(max_examples=40)
@given(rounds())
def test_equal_updates_are_the_mean_whatever_the_weights(drawn):
    weights, replies = drawn
    same = [reply(r.site, r.num_examples, replies[0].update) for r in replies]
    found = aggregate(weights, same)
    for name, value in weights.items():
        expected = value.astype(np.float64) + replies[0].update[name]
        np.testing.assert_allclose(found[name], expected, rtol=2**-22, atol=1e-8)


@settings(max_examples=40)
@given(rounds())
def test_fedprox_aggregates_like_fedavg_to_the_bit(drawn):
    weights, replies = drawn
    plain = aggregate(weights, replies)
    proximal = aggregate(weights, replies, FedProx)
    assert plain.keys() == proximal.keys()
    for name, value in plain.items():
        assert value.tobytes() == proximal[name].tobytes()


def test_the_registry_has_the_names_that_a_run_may_ask_for():
    allowed = get_args(StrategySection.model_fields["name"].annotation)
    assert tuple(STRATEGIES) == allowed
    assert [STRATEGIES[name].name for name in allowed] == list(allowed)


@pytest.mark.parametrize("kind", STRATEGIES.values())
def test_every_strategy_says_what_it_does_to_buffers(kind):
    assert kind.buffer_rule == "averaged"
    assert isinstance(make(kind), Strategy)
