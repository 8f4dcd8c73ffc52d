"""The best round is chosen on the sites that judged both, so who came or left decides nothing."""

from __future__ import annotations

import numpy as np
import pytest

from server.metrics import improves
from strategies.evaluation import EvaluationSums

LABELS = np.array([0, 1] * 5)


def judged(right: int) -> EvaluationSums:
    """Ten images of which so many are classified correctly."""
    predicted = np.where(np.arange(10) < right, LABELS, 1 - LABELS)
    return EvaluationSums.from_logits(np.eye(2)[predicted], LABELS)


@pytest.mark.parametrize(
    ("now", "best", "better"),
    [
        ({"A": 6, "B": 6}, {}, True),
        ({"A": 7, "B": 6}, {"A": 6, "B": 6}, True),
        ({"A": 6, "B": 6}, {"A": 6, "B": 6}, False),
        ({"A": 7}, {"A": 6, "B": 10}, True),  # B, which found it easy, has left
        ({"A": 5}, {"A": 6, "B": 1}, False),  # B, which found it hard, has left
        ({"A": 5, "B": 10}, {"A": 6}, False),  # B has joined and finds it easy
        ({"A": 7, "B": 1}, {"A": 6}, True),
        ({"B": 10}, {"A": 1}, False),  # nobody judged both
        ({}, {"A": 1}, False),
        ({}, {}, False),
    ],
)
def test_rounds_compare_on_common_sites(now, best, better):
    found, before = ({site: judged(right) for site, right in x.items()} for x in (now, best))
    assert improves(found, before, "accuracy") is better


def test_less_is_better_for_a_loss():
    assert improves({"A": judged(9)}, {"A": judged(5)}, "loss")
    assert not improves({"A": judged(5)}, {"A": judged(9)}, "loss")


def test_a_figure_that_does_not_exist_is_never_better():
    one_class = EvaluationSums.from_logits(np.eye(2)[[0, 0]], np.array([0, 0]))
    assert not improves({"A": one_class}, {}, "auc")
    assert not improves({"A": one_class}, {"A": judged(5)}, "auc")
