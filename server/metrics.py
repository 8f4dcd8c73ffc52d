"""Metrics from evaluation sums: one definition for sites, pooled sets, simulation and report.

Invariant: every figure is a function of :class:`EvaluationSums`, so the pooled figure of summed
counts is the figure of all images in one place. Names and macro averages follow the MedMamba table
(arXiv 2403.03849): the mean over classes, one class against the rest.

Conventions: a class without examples in the evaluation set is left out of every macro average, even
when it was predicted, and ``num_classes_present`` counts the others. The precision and F1 of a
class that was never predicted are 0 (scikit-learn's ``zero_division=0``). A figure that does not
exist is None: all of them for an empty set, AUC and specificity below two classes. Macro
sensitivity and balanced accuracy are the same number under two names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from strategies.cli import nearest
from strategies.errors import ConfigError
from strategies.evaluation import EvaluationSums
from strategies.run_config import METRIC_NAMES

Metrics = dict[str, float | int | None]

LOWER_IS_BETTER = frozenset({"ece", "loss"})
# With fewer images of a class, resampling them hardly varies what they happened to be.
MIN_INTERVAL_IMAGES = 5
SHOWN_AUC_ERROR = 0.01


def metrics(sums: EvaluationSums) -> Metrics:
    """Return every metric of ``METRIC_NAMES`` and what qualifies them.

    Returns:
        Beside the metrics: ``num_examples``; ``num_classes_present``; ``auc_max_error``, the most
        by which the histogram's AUC can differ from the exact one (scores within a bin count as
        ties, so half of the tied pairs).
    """
    n = sums.num_examples
    confusion = sums.confusion.astype(np.float64)
    support = confusion.sum(axis=1)  # (c,)
    present = support > 0
    result: Metrics = dict.fromkeys((*METRIC_NAMES, "auc_max_error"))
    result |= {"num_examples": n, "num_classes_present": int(present.sum())}
    if n == 0:
        return result
    hits = np.diagonal(confusion)[present]
    support, predicted = support[present], confusion.sum(axis=0)[present]
    sensitivity = float((hits / support).mean())
    _, confidence, correct = sums.calibration
    result |= {
        "precision": float((hits / np.maximum(predicted, 1)).mean()),
        "sensitivity": sensitivity,
        "f1": float((2 * hits / (support + predicted)).mean()),
        "accuracy": float(np.trace(confusion) / n),
        "balanced_accuracy": sensitivity,
        "ece": float(np.abs(correct - confidence).sum() / n),
        "loss": sums.loss_sum / n,
    }
    if len(support) >= 2:
        specificity = 1 - (predicted - hits) / (n - support)
        negatives, positives = _histograms(sums)
        result["specificity"] = float(specificity.mean())
        result["auc"] = float(_auc(negatives, positives).mean())
        result["auc_max_error"] = float((_tied_pairs(negatives, positives) / 2).mean())
    return result


def auc_interval(
    sums: EvaluationSums, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float] | None:
    """Return a percentile bootstrap interval of the macro AUC over images.

    Each class's positives and negatives are drawn again from their histograms with their numbers
    fixed. It assumes that images are independent: several images of one patient make it too
    narrow, as does having few sites if other hospitals are meant. It says nothing about training
    again. Complete separation gives an interval of width 0, whatever the number of images.

    Histograms do not tell how the AUCs of different classes vary together, so the ends are the
    means of the classes' ends, as if all erred together: exact for two classes, whose AUCs are one
    number, and wider than a resampling of the images for more.

    Args:
        sums: One evaluation set.
        level: Share of resamples inside the interval.
        resamples: Bootstrap draws.
        seed: Of the draws; the interval is reproducible.

    Returns:
        Low and high end, or None where there is no AUC or a class that is present has fewer than
        ``MIN_INTERVAL_IMAGES`` images.
    """
    support = sums.confusion.sum(axis=1)
    support = support[support > 0]
    if len(support) < 2 or support.min() < MIN_INTERVAL_IMAGES:
        return None
    generator = np.random.default_rng(seed)
    tail = (1 - level) / 2
    negatives, positives = _histograms(sums)
    # The two classes of a binary task mirror each other exactly: one of them says it all.
    classes = [1] if sums.num_classes == 2 else range(len(positives))
    ends = [
        np.quantile(
            _auc(
                _resample(negatives[k], resamples, generator),
                _resample(positives[k], resamples, generator),
            ),
            [tail, 1 - tail],
        )
        for k in classes
    ]
    low, high = np.mean(ends, axis=0)
    return float(low), float(high)


def auc_error_text(figures: Mapping[str, object]) -> str:
    """Return what to write behind an AUC that its histogram leaves uncertain, mostly nothing.

    >>> auc_error_text({"auc": 0.553, "auc_max_error": 0.0131})
    '±0.02'
    >>> auc_error_text({"auc": 0.553, "auc_max_error": 0.01})
    ''
    """
    error = figures.get("auc_max_error")
    if figures.get("auc") is None or not isinstance(error, float) or error <= SHOWN_AUC_ERROR:
        return ""
    # Up, since it is a bound; the inner rounding takes the noise of binary fractions away.
    return f"\N{PLUS-MINUS SIGN}{math.ceil(round(100 * error, 6)) / 100:.2f}"


def worst_site(
    per_site: Mapping[str, Metrics], metric: str = "balanced_accuracy"
) -> dict[str, float | int | str | None] | None:
    """Return the site with the worst value of ``metric``, as ``{"site": name, **its metrics}``.

    Sites without that metric do not take part; of equal sites the first by name is returned, and
    None when no site has it.

    Raises:
        ConfigError: An unknown metric.
    """
    values = {site: selection_value(figures, metric) for site, figures in per_site.items()}
    rated = sorted((value, site) for site, value in values.items() if value > -math.inf)
    if not rated:
        return None
    site = rated[0][1]
    return {"site": site, **per_site[site]}


def selection_value(figures: Metrics, name: str) -> float:
    """Return a metric so that more is better: the negative of loss and ece, the others as they are.

    A metric that does not exist in ``figures`` is minus infinity, worse than any value.

    Raises:
        ConfigError: An unknown metric.
    """
    if name not in METRIC_NAMES:
        raise ConfigError(f"metric={name} is not known", hint=nearest(name, METRIC_NAMES))
    value = figures.get(name)
    if value is None:
        return -math.inf
    return -value if name in LOWER_IS_BETTER else value


def _histograms(sums: EvaluationSums) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return negatives and positives of the classes present. Each ``(classes, bins)``."""
    present = sums.confusion.sum(axis=1) > 0
    scores = sums.scores[present].astype(np.float64)  # (classes, 2, bins)
    return scores[:, 0], scores[:, 1]


def _auc(negatives: NDArray[np.float64], positives: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return P(positive above negative) + P(tie) / 2. ``(..., bins), (..., bins) -> (...)``."""
    below = np.cumsum(negatives, axis=-1) - negatives
    return (positives * (below + negatives / 2)).sum(axis=-1) / _pairs(negatives, positives)


def _tied_pairs(
    negatives: NDArray[np.float64], positives: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return the share of pairs within one bin. ``(..., bins), (..., bins) -> (...)``."""
    return (positives * negatives).sum(axis=-1) / _pairs(negatives, positives)


def _pairs(negatives: NDArray[np.float64], positives: NDArray[np.float64]) -> NDArray[np.float64]:
    return positives.sum(axis=-1) * negatives.sum(axis=-1)


def _resample(
    histogram: NDArray[np.float64], resamples: int, generator: np.random.Generator
) -> NDArray[np.float64]:
    """Draw the histogram's examples again with replacement. ``(bins,) -> (resamples, bins)``."""
    total = int(histogram.sum())
    drawn = np.zeros((resamples, len(histogram)))
    used = np.flatnonzero(histogram)  # multinomial costs one draw per bin, empty or not
    drawn[:, used] = generator.multinomial(total, histogram[used] / total, size=resamples)
    return drawn


def pool(sums: Mapping[str, EvaluationSums], num_classes: int) -> EvaluationSums:
    """Add the sums of all sites; zeros where there is none."""
    return sum(sums.values(), start=EvaluationSums.zeros(num_classes))


def improves(
    sums: Mapping[str, EvaluationSums], best: Mapping[str, EvaluationSums], metric: str
) -> bool:
    """Say whether validation sums by site are better than those of the best round so far.

    Both are pooled over the sites that judged both: figures with and without one hospital are
    different quantities. A site that leaves or joins therefore decides nothing by that alone.

    Args:
        sums: Of the round in question.
        best: Of the best round; empty when there is none yet.
        metric: ``strategy.selection-metric``.
    """
    common = sums.keys() & best.keys() if best else sums.keys()
    if not common:
        return False
    num_classes = next(iter(sums.values())).num_classes
    found, before = (
        selection_value(metrics(pool({s: part[s] for s in common}, num_classes)), metric)
        if part
        else -math.inf
        for part in (sums, best)
    )
    return found > before


def final_figures(sums: EvaluationSums) -> dict[str, Any]:
    """Return a set's metrics with the AUC's 95 % interval and the confusion matrix."""
    low, high = auc_interval(sums) or (None, None)
    return {
        **metrics(sums),
        "auc_low_95": low,
        "auc_high_95": high,
        "confusion": sums.confusion.tolist(),
    }
