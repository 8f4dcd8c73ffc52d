"""Evaluation sums: exact counts, exact addition, and no trust in what a site sends."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
from flwr.app import MetricRecord
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies import evaluation
from strategies.errors import DataError, ProtocolError
from strategies.evaluation import (
    CALIBRATION_BINS,
    QUANTUM,
    SCORE_BINS,
    SCORE_LIMIT,
    SCORE_SCALE,
    EvaluationSums,
    metric_keys,
)

MIDDLE = SCORE_BINS // 2


def bin_of(score: float) -> int:
    """The documented formula, for scores that are not on the edge of a bin."""
    step = math.asinh(SCORE_LIMIT / SCORE_SCALE) / MIDDLE
    return MIDDLE + max(-MIDDLE, min(MIDDLE, round(math.asinh(score / SCORE_SCALE) / step)))


def bins_used(scores: np.ndarray) -> list[int]:
    """The bins of one score each, by way of a binary task."""
    found = [
        EvaluationSums.from_logits(np.array([[0.0, score]]), np.array([1])).scores[1, 1]
        for score in scores
    ]
    return [int(np.flatnonzero(histogram)[0]) for histogram in found]


def draw(seed: int, n: int, c: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.normal(0, 3, (n, c)).astype(np.float32), generator.integers(0, c, n)


def test_counts_a_hand_made_batch():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    sums = EvaluationSums.from_logits(logits, np.array([0, 1, 1]))

    assert sums.num_examples == 3
    assert sums.confusion.tolist() == [[1, 0], [1, 1]]
    # Log-odds of class 1 are -2 (negative), 1 and -3 (positives).
    assert np.flatnonzero(sums.scores[1, 0]).tolist() == [bin_of(-2)]
    assert np.flatnonzero(sums.scores[1, 1]).tolist() == [bin_of(-3), bin_of(1)]
    assert sums.scores.sum(axis=2).tolist() == [[2, 1], [1, 2]]
    expected_loss = math.log1p(math.exp(-2)) + math.log1p(math.exp(-1)) + math.log1p(math.exp(3))
    assert sums.loss_sum == pytest.approx(expected_loss, abs=3 * QUANTUM)
    count, confidence, correct = sums.calibration
    sigmoid = [1 / (1 + math.exp(-margin)) for margin in (2, 1, 3)]
    bins = [int(value * CALIBRATION_BINS) for value in sigmoid]
    assert count.sum() == 3
    assert correct[bins].tolist() == [1, 1, 0]
    assert confidence[bins] == pytest.approx(sigmoid, abs=QUANTUM)


def test_bins_follow_the_documented_formula_and_their_order_that_of_the_scores():
    generator = np.random.default_rng(0)
    scores = np.sort(generator.normal(size=400) * 10.0 ** generator.uniform(-6, 3, 400))
    found = bins_used(scores)
    assert found == [bin_of(score) for score in scores]
    assert found == sorted(found)
    assert bins_used(np.array([-1e30, -0.0, 0.0, 1e30])) == [0, MIDDLE, MIDDLE, SCORE_BINS - 1]


def test_bins_are_as_narrow_as_documented():
    scores = 10.0 ** np.random.default_rng(1).uniform(-6, 1.75, 400)
    assert bins_used(np.array([-5e-5, 5e-5])) == [MIDDLE - 1, MIDDLE + 1]
    assert all(np.diff(np.stack([bins_used(scores), bins_used(1e-4 + 1.045 * scores)]), axis=0)[0])


def test_edges_mirror_each_other_and_lie_on_nine_decimals():
    edges = evaluation._EDGES
    assert [edges[0], edges[-1]] == [4.3232e-05, 62.631513081]
    assert bins_used(-edges[::50]) == [SCORE_BINS - 1 - found for found in bins_used(edges[::50])]


def test_a_model_that_prefers_no_class_scores_zero_whatever_the_number_of_classes():
    for c in (2, 3, 9):
        scores = EvaluationSums.from_logits(np.zeros((c, c)), np.arange(c)).scores
        assert scores[:, :, MIDDLE].sum() == c * c


def test_scores_of_three_classes_rank_as_the_softmax_probability():
    logits = np.array([[0.3, -0.7, 1.1]])
    probability = np.exp(logits[0]) / np.exp(logits[0]).sum()
    sums = EvaluationSums.from_logits(logits, np.array([2]))
    for k, p in enumerate(probability):
        assert np.flatnonzero(sums.scores[k].sum(axis=0)).tolist() == [
            bin_of(math.log(p / (1 - p)) + math.log(2))
        ]


@given(st.integers(0, 2**32), st.integers(0, 40), st.integers(2, 5), st.data())
@settings(max_examples=50, deadline=None)
def test_sums_of_sites_equal_the_pooled_sums_in_any_order(seed, n, c, data):
    logits, labels = draw(seed, n, c)
    site = np.array(data.draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)), int)
    parts = [EvaluationSums.from_logits(logits[site == k], labels[site == k]) for k in range(4)]
    pooled = EvaluationSums.from_logits(logits, labels)
    for order in (parts, parts[::-1]):
        assert sum(order, EvaluationSums.zeros(c)) == pooled


@given(st.integers(0, 2**32), st.integers(0, 20), st.integers(2, 4))
@settings(max_examples=30, deadline=None)
def test_survive_the_way_through_a_flower_record(seed, n, c):
    sums = EvaluationSums.from_logits(*draw(seed, n, c))
    record = MetricRecord(sums.to_metrics("val"))
    assert tuple(record) == metric_keys("val")
    assert EvaluationSums.from_metrics("val", {**record, "train-loss": 1.0}, c) == sums


def test_two_classes_are_exact_mirror_images():
    logits, labels = draw(0, 500, 2)
    logits[:100] /= 1e4
    logits[:10] = 0.0
    scores = EvaluationSums.from_logits(logits, labels).scores
    assert np.array_equal(scores[0], scores[1, ::-1, ::-1])


@pytest.mark.parametrize("shift", [-1024, 1024])
def test_shifting_all_logits_changes_nothing(shift):
    logits, labels = draw(1, 50, 3)
    logits = np.round(logits * 8) / 8
    expected = EvaluationSums.from_logits(logits, labels)
    assert EvaluationSums.from_logits(logits + shift, labels) == expected


def test_extreme_logits_stay_finite_and_land_in_the_outer_bins():
    largest = float(np.finfo(np.float32).max)
    sums = EvaluationSums.from_logits(np.array([[largest, -largest, 0.0]]), np.array([1]))
    assert math.isfinite(sums.loss_sum)
    assert sums.scores[0, 0, -1] == 1
    assert sums.scores[1, 1, 0] == 1
    assert sums.calibration[:, -1].tolist() == [1, 1, 0]


def test_an_empty_batch_is_zero():
    empty = EvaluationSums.from_logits(np.zeros((0, 3), np.float32), np.zeros(0, np.int64))
    assert empty == EvaluationSums.zeros(3)
    assert EvaluationSums.from_metrics("val", empty.to_metrics("val"), 3) == empty


def test_equality_looks_at_every_part():
    sums = EvaluationSums.from_logits(*draw(2, 9, 2))
    assert sums == replace(sums, confusion=sums.confusion.copy())
    for field in fields(sums):
        assert sums != replace(sums, **{field.name: getattr(sums, field.name) + 1})
    assert sums != "sums"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
def test_logits_that_are_not_finite_are_refused(value):
    logits = np.zeros((4, 2))
    logits[2, 1] = value
    with pytest.raises(ProtocolError, match="in 1 of 4 examples: expected finite float32") as error:
        EvaluationSums.from_logits(logits, np.zeros(4, int))
    assert "learning-rate" in error.value.hint


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 2, 2)])
def test_logits_of_another_shape_are_refused(shape):
    with pytest.raises(ProtocolError, match="expected \\(examples, classes >= 2\\)"):
        EvaluationSums.from_logits(np.zeros(shape), np.zeros(4, int))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 3]), "label=3: expected 0 to 2"),
        (np.array([0, -1, 2]), "label=-1: expected 0 to 2"),
        (np.array([0, 1]), "expected 3 integers"),
        (np.array([0.0, 1.0, 2.0]), "dtype=float64: expected 3 integers"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        EvaluationSums.from_logits(np.zeros((3, 3)), labels)


def test_sums_of_different_classes_do_not_add():
    with pytest.raises(ProtocolError, match="classes=2 and 3: expected the same number"):
        EvaluationSums.zeros(2) + EvaluationSums.zeros(3)


def altered(key: str, *changes: tuple[int, float]) -> dict:
    values = EvaluationSums.from_logits(*draw(3, 30, 2)).to_metrics("val")
    values[key] = list(values[key])
    for index, change in changes:
        values[key][index] += change
    return values


@pytest.mark.parametrize("key", metric_keys("val"))
@pytest.mark.parametrize("value", [None, "7", True, -1, math.nan, math.inf, 10**400, [1.5], [], {}])
def test_a_value_of_the_wrong_kind_is_refused_by_name(key, value):
    values = EvaluationSums.from_logits(*draw(3, 30, 2)).to_metrics("val")
    with pytest.raises(ProtocolError, match=f"^{key}"):
        EvaluationSums.from_metrics("val", {**values, key: value}, 2)
    del values[key]
    with pytest.raises(ProtocolError, match=f"^{key} is missing"):
        EvaluationSums.from_metrics("val", values, 2)


@pytest.mark.parametrize("key", ["val-confusion", "val-scores", "val-calibration"])
@pytest.mark.parametrize("element", [None, "7", True, -1, math.nan, math.inf, 10**400, [1]])
def test_an_element_of_the_wrong_kind_is_refused_by_name(key, element):
    values = EvaluationSums.from_logits(*draw(3, 30, 2)).to_metrics("val")
    with pytest.raises(ProtocolError, match=f"^{key}="):
        EvaluationSums.from_metrics("val", {**values, key: [element, *values[key][1:]]}, 2)


def test_sums_of_another_number_of_classes_are_refused():
    values = EvaluationSums.from_logits(*draw(3, 30, 3)).to_metrics("val")
    with pytest.raises(ProtocolError, match=r"^val-confusion has 9 values; expected 4"):
        EvaluationSums.from_metrics("val", values, 2)


@pytest.mark.parametrize(
    ("key", "index", "change", "message"),
    [
        ("val-confusion", 0, 1, "val-confusion counts 31 examples; expected val-num-examples=30"),
        ("val-scores", 0, 1, "val-scores of class 0 counts .* as in val-confusion"),
        ("val-scores", -1, 1, "val-scores of class 1 counts .* as in val-confusion"),
        ("val-calibration", 14, 1, "val-calibration counts 31 examples"),
        ("val-calibration", 14, 0.5, "val-calibration counts 30.5 examples"),
        ("val-calibration", CALIBRATION_BINS, 1, "mean confidence or accuracy above 1"),
        ("val-calibration", 2 * CALIBRATION_BINS, 1, "mean confidence or accuracy above 1"),
        ("val-calibration", -1, -1, "val-calibration counts .* correct; expected .* as in"),
    ],
)
def test_totals_that_contradict_each_other_are_refused(key, index, change, message):
    with pytest.raises(ProtocolError, match=message):
        EvaluationSums.from_metrics("val", altered(key, (index, change)), 2)


@pytest.mark.parametrize(("row", "message"), [(0, "examples"), (2, "correct")])
def test_counts_of_calibration_are_whole(row, message):
    first = row * CALIBRATION_BINS + CALIBRATION_BINS - 2
    values = altered("val-calibration", (first, -0.5), (first + 1, 0.5))
    with pytest.raises(ProtocolError, match=f"val-calibration counts .*{message}"):
        EvaluationSums.from_metrics("val", values, 2)


def test_a_loss_of_no_examples_is_refused():
    values = EvaluationSums.zeros(2).to_metrics("val") | {"val-loss-sum": 1.0}
    with pytest.raises(ProtocolError, match=r"val-loss-sum=1.0: expected 0 for no examples"):
        EvaluationSums.from_metrics("val", values, 2)
