"""Metrics against hand-made values and a pair-counting AUC that shares no code with ours."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.metrics import auc_interval, metrics, selection_value, worst_site
from strategies.errors import ConfigError
from strategies.evaluation import EvaluationSums
from strategies.run_config import METRIC_NAMES


def pair_auc(scores: np.ndarray, own: np.ndarray) -> float:
    """P(positive above negative) + P(tie) / 2, by looking at every pair."""
    difference = scores[own][:, None] - scores[~own][None, :]
    return float(((difference > 0) + 0.5 * (difference == 0)).mean())


def predictions(true: list[int], predicted: list[int], c: int) -> EvaluationSums:
    """Sums of a model that puts a margin of 4 on its prediction."""
    return EvaluationSums.from_logits(4.0 * np.eye(c)[predicted], np.array(true))


def separated(seed: int, n: int, c: int, margin: float = 1.5) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, c, n)
    logits = generator.normal(size=(n, c))
    logits[np.arange(n), labels] += margin
    return logits, labels


def test_three_classes_by_hand():
    # true 0: 2 right, 1 as class 1; true 1: 1 right, 1 as class 2; true 2: 1 right.
    figures = metrics(predictions([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 2], 3))
    assert figures["accuracy"] == pytest.approx(4 / 6)
    assert figures["precision"] == pytest.approx((1 + 1 / 2 + 1 / 2) / 3)
    assert figures["sensitivity"] == pytest.approx((2 / 3 + 1 / 2 + 1) / 3)
    assert figures["balanced_accuracy"] == figures["sensitivity"]
    assert figures["specificity"] == pytest.approx((3 / 3 + 3 / 4 + 4 / 5) / 3)
    assert figures["f1"] == pytest.approx((4 / 5 + 2 / 4 + 2 / 3) / 3)
    confidence = math.exp(4) / (math.exp(4) + 2)
    assert figures["ece"] == pytest.approx(abs(4 / 6 - confidence), abs=1e-6)
    right, wrong = -math.log(confidence), 4 - math.log(confidence)
    assert figures["loss"] == pytest.approx((4 * right + 2 * wrong) / 6, abs=1e-6)
    assert figures["num_examples"] == 6
    assert figures["num_classes_present"] == 3
    assert set(METRIC_NAMES) < set(figures)


def test_every_value_is_a_plain_number_that_json_takes():
    for value in metrics(predictions([0, 1], [0, 0], 2)).values():
        assert type(value) in (int, float)


def test_a_class_that_is_never_predicted_has_precision_and_f1_of_zero():
    figures = metrics(predictions([0, 0, 1], [0, 0, 0], 2))
    assert figures["precision"] == pytest.approx((2 / 3 + 0) / 2)
    assert figures["f1"] == pytest.approx((4 / 5 + 0) / 2)


def test_a_class_without_examples_is_left_out_and_counted():
    # Class 2 never occurs and is predicted once.
    figures = metrics(predictions([0, 0, 1, 1], [0, 0, 1, 2], 3))
    assert figures["num_classes_present"] == 2
    assert figures["sensitivity"] == pytest.approx((1 + 1 / 2) / 2)
    assert figures["precision"] == pytest.approx(1)
    assert figures["specificity"] == pytest.approx(1)
    assert figures["f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert figures["auc"] is not None


def test_one_class_has_no_auc_and_no_specificity():
    sums = predictions([1, 1, 1], [1, 1, 0], 2)
    figures = metrics(sums)
    assert figures["auc"] is figures["specificity"] is figures["auc_max_error"] is None
    assert figures["sensitivity"] == pytest.approx(2 / 3)
    assert figures["num_classes_present"] == 1
    assert auc_interval(sums) is None


def test_no_examples_have_no_metrics():
    figures = metrics(EvaluationSums.zeros(3))
    assert figures["num_examples"] == 0
    assert figures["num_classes_present"] == 0
    assert all(figures[name] is None for name in METRIC_NAMES)
    assert auc_interval(EvaluationSums.zeros(3)) is None


@given(
    st.integers(0, 2**32),
    st.integers(2, 4),
    st.sampled_from([1e-4, 0.01, 0.1, 1.0, 10.0, 100.0]),
    st.sampled_from([0.0, 0.02, -1.5]),
)
@settings(max_examples=100, deadline=None)
def test_auc_is_within_its_stated_error_of_the_pair_count(seed, c, scale, bias):
    logits, labels = separated(seed, 60, c)
    logits = logits * scale
    logits[:, 0] += bias
    labels[:c] = np.arange(c)
    figures = metrics(EvaluationSums.from_logits(logits, labels))
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    exact = []
    for k in range(c):
        rest = np.delete(shifted, k, axis=1).sum(axis=1)
        with np.errstate(divide="ignore"):
            log_odds = np.log(shifted[:, k]) - np.log(rest)
        exact.append(pair_auc(np.clip(log_odds, -700, 700), labels == k))
    assert abs(figures["auc"] - np.mean(exact)) <= figures["auc_max_error"] + 1e-12


def test_auc_of_two_classes_is_the_usual_one():
    # Log-odds of class 1 far apart or equal, so nothing is lost: one of four pairs is a tie.
    logits = np.array([[0.0, -1.0], [0.0, 0.5], [0.0, 0.5], [0.0, 2.0]])
    figures = metrics(EvaluationSums.from_logits(logits, np.array([0, 0, 1, 1])))
    assert figures["auc"] == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert figures["auc_max_error"] == pytest.approx(0.25 / 2)


def test_a_model_that_says_the_same_of_all_has_an_auc_of_one_half():
    figures = metrics(EvaluationSums.from_logits(np.zeros((9, 3)), np.arange(9) % 3))
    assert figures["auc"] == 0.5


@pytest.mark.parametrize("c", [2, 5])
@pytest.mark.parametrize("margin", [0.0, 0.5, 2.5])
@pytest.mark.parametrize("spread", [0.001, 0.01, 0.1, 1.0, 10.0])
def test_the_bins_are_fine_enough_for_a_barely_and_a_fully_trained_model(c, margin, spread):
    logits, labels = separated(5, 1000, c, margin)
    logits *= spread / 1.4  # log-odds of two independent unit normals have standard deviation 1.4
    figures = metrics(EvaluationSums.from_logits(logits, labels))
    exact = []
    for k in range(c):
        rest = np.logaddexp.reduce(np.delete(logits, k, axis=1), axis=1)
        exact.append(pair_auc(logits[:, k] - rest, labels == k))
    assert abs(figures["auc"] - np.mean(exact)) < 0.002
    assert figures["auc_max_error"] < 0.02


def test_scores_that_crowd_far_from_zero_are_reported_as_uncertain():
    logits, labels = separated(5, 1000, 2)
    logits *= 0.001
    logits[:, 1] += 2.0
    assert metrics(EvaluationSums.from_logits(logits, labels))["auc_max_error"] > 0.1


def test_counts_of_a_very_large_federation_do_not_overflow():
    sums = EvaluationSums.from_logits(*separated(0, 100, 2))
    large = EvaluationSums(
        sums.confusion * 2**32,
        sums.scores * 2**32,
        sums.calibration * 2**32,
        sums.loss_sum * 2**32,
        sums.num_examples * 2**32,
    )
    assert metrics(large)["auc"] == pytest.approx(metrics(sums)["auc"])
    assert metrics(large)["specificity"] == pytest.approx(metrics(sums)["specificity"])


def test_interval_of_two_classes_agrees_with_a_bootstrap_over_images():
    logits, labels = separated(1, 400, 2, margin=1.0)
    low, high = auc_interval(EvaluationSums.from_logits(logits, labels))
    score = logits[:, 1] - logits[:, 0]
    generator = np.random.default_rng(2)
    positives, negatives = score[labels == 1], score[labels == 0]
    draws = []
    for _ in range(600):
        drawn_positives = generator.choice(positives, len(positives))
        drawn_negatives = generator.choice(negatives, len(negatives))
        draws.append(
            pair_auc(
                np.concatenate([drawn_positives, drawn_negatives]),
                np.arange(len(score)) < len(positives),
            )
        )
    expected = np.quantile(draws, [0.025, 0.975])
    assert [low, high] == pytest.approx(expected, abs=0.006)


def test_interval_holds_the_auc_and_narrows_with_images_and_level():
    small = EvaluationSums.from_logits(*separated(3, 60, 4))
    large = EvaluationSums.from_logits(*separated(3, 1500, 4))

    def width(sums: EvaluationSums, level: float = 0.95) -> float:
        low, high = auc_interval(sums, level=level, resamples=400)
        assert low < metrics(sums)["auc"] < high
        return high - low

    assert width(large) < width(small) / 2
    assert width(small, level=0.5) < width(small) / 2


@pytest.mark.parametrize(("c", "few", "exists"), [(2, 5, True), (2, 4, False), (3, 4, False)])
def test_an_interval_needs_five_images_of_every_class_that_is_present(c, few, exists):
    labels = np.array([1] * few + [0] * 40)
    logits = np.random.default_rng(7).normal(size=(len(labels), c))
    sums = EvaluationSums.from_logits(logits, labels)
    assert (auc_interval(sums, resamples=50) is not None) == exists
    assert metrics(sums)["auc"] is not None


def test_a_class_without_images_does_not_stop_the_interval():
    logits, labels = separated(8, 60, 3)
    labels[labels == 2] = 0
    assert auc_interval(EvaluationSums.from_logits(logits, labels), resamples=50) is not None


def test_interval_of_more_classes_is_wider_than_a_resampling_of_the_images():
    logits, labels = separated(9, 400, 4)
    low, high = auc_interval(EvaluationSums.from_logits(logits, labels), resamples=300)
    generator = np.random.default_rng(10)
    draws = []
    for _ in range(300):
        drawn = np.concatenate(
            [
                generator.choice(own, len(own))
                for own in (np.flatnonzero(labels == k) for k in range(4))
            ]
        )
        draws.append(metrics(EvaluationSums.from_logits(logits[drawn], labels[drawn]))["auc"])
    joint_low, joint_high = np.quantile(draws, [0.025, 0.975])
    assert low < joint_low < joint_high < high


def test_interval_is_reproducible_and_follows_its_seed():
    sums = EvaluationSums.from_logits(*separated(4, 80, 3))
    assert auc_interval(sums, resamples=50) == auc_interval(sums, resamples=50)
    assert auc_interval(sums, resamples=50) != auc_interval(sums, resamples=50, seed=1)


def test_interval_of_more_classes_is_the_mean_of_the_classes_ends():
    # Three classes where only class 0 is hard to tell: a joint resampling would narrow the ends.
    logits, labels = separated(6, 300, 3)
    sums = EvaluationSums.from_logits(logits, labels)
    low, high = auc_interval(sums)
    ends = []
    for k in range(3):
        own = sums.scores[k].sum(axis=1)
        binary = EvaluationSums(
            np.diag(own), np.stack([sums.scores[k, ::-1, ::-1], sums.scores[k]]), None, 0.0, 300
        )
        ends.append(auc_interval(binary))
    assert [low, high] == pytest.approx(np.mean(ends, axis=0), abs=0.004)


def test_worst_site_is_named_with_its_metrics():
    sites = {
        "B": {"balanced_accuracy": 0.5, "loss": 0.2},
        "A": {"balanced_accuracy": 0.5, "loss": 0.9},
        "C": {"balanced_accuracy": 0.8, "loss": 1.4},
        "D": {"balanced_accuracy": None, "loss": None},
    }
    assert worst_site(sites) == {"site": "A", "balanced_accuracy": 0.5, "loss": 0.9}
    assert worst_site(sites, "loss")["site"] == "C"
    assert worst_site({"D": sites["D"]}) is None
    assert worst_site({}) is None


def test_selection_is_larger_for_better():
    figures = {"auc": 0.7, "loss": 0.4, "ece": 0.1, "f1": None}
    assert selection_value(figures, "auc") == 0.7
    assert selection_value(figures, "loss") == -0.4
    assert selection_value(figures, "ece") == -0.1
    assert selection_value(figures, "f1") == -math.inf
    assert selection_value(figures, "accuracy") == -math.inf


def test_an_unknown_metric_names_the_nearest():
    with pytest.raises(ConfigError, match="metric=balanced-accuracy is not known") as error:
        selection_value({}, "balanced-accuracy")
    assert error.value.hint == "did you mean balanced_accuracy?"
