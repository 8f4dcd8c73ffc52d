"""Evaluation as sums that sites add up: every figure of the pooled set, without the images.

A site counts its examples into a confusion matrix, one-vs-rest score histograms and calibration
bins; the sum over sites is what one evaluation of all images in one place would have counted.

Invariant: adding is exact, in any order. Counts are integers; losses and confidences are rounded to
``QUANTUM`` first, so their float64 sums have no rounding error while they stay below
``2**53 * QUANTUM``, half a billion examples or nats.

A score is the log-odds of one class against the mean of the others, ``z_c - logmeanexp(z_others)``:
monotone in the softmax probability, so the AUC is the same; resolved where probabilities crowd at 0
and 1; and 0 where a model prefers no class, however many there are.

Bin ``i`` from -256 to 256 holds the scores that ``asinh(score / SCORE_SCALE) / step`` rounds to
``i``, with ``step = asinh(SCORE_LIMIT / SCORE_SCALE) / 256``; the outermost hold all beyond, too.
At a score ``s`` they are about ``step * sqrt(s**2 + SCORE_SCALE**2)`` wide: less than 0.0001 at 0,
where the scores of a lightly trained model crowd and bins of equal width would see only ties, and
less than 4.5 % of the score far from it. Their number is odd so that -s falls into the mirror image
of s's bin and the two classes of a binary task have the same AUC. Scores that crowd far from 0
stay unresolved; the reported bound on the AUC's error (server/metrics.py) says so.

Shapes: ``n`` examples, ``c`` classes.

Leaves the site: everything in :meth:`EvaluationSums.to_metrics`. Exact counts of a small validation
set say something about single patients; differential privacy of the weights does not cover them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from strategies.errors import DataError, ProtocolError

SCORE_BINS = 513
SCORE_LIMIT = 64.0
SCORE_SCALE = 0.002
CALIBRATION_BINS = 15
QUANTUM = 2.0**-24
# Bounds what one site may claim, so that int64 sums over millions of sites cannot overflow.
MAX_EXAMPLES = 2**40

_MAX_LOGIT = float(np.finfo(np.float32).max)
_MAX_SUM = 2 * _MAX_LOGIT * MAX_EXAMPLES
_MIDDLE = SCORE_BINS // 2
_STEP = math.asinh(SCORE_LIMIT / SCORE_SCALE) / _MIDDLE
# Upper ends of the bins 0 to 255. Comparing with them is monotone, which asinh and a division need
# not be; rounded, they are the same on every machine although its sinh may differ in the last bit.
_EDGES = np.array([round(SCORE_SCALE * math.sinh((i + 0.5) * _STEP), 9) for i in range(_MIDDLE)])
_FIELDS = ("confusion", "scores", "calibration", "loss-sum", "num-examples")


def metric_keys(prefix: str) -> tuple[str, ...]:
    """Return the record keys of one split's sums.

    >>> metric_keys("val")
    ('val-confusion', 'val-scores', 'val-calibration', 'val-loss-sum', 'val-num-examples')
    """
    return tuple(f"{prefix}-{field}" for field in _FIELDS)


@dataclass(frozen=True, eq=False)
class EvaluationSums:
    """Sufficient sums of one evaluation set.

    Attributes:
        confusion: Counts by true class, then predicted class. Shape ``(c, c)``.
        scores: Per class, histograms of its score among the examples of other classes
            (index 0) and its own (index 1). Shape ``(c, 2, SCORE_BINS)``.
        calibration: By equal-width bins of the top-label confidence: examples, sum of
            confidences, correct predictions. Shape ``(3, CALIBRATION_BINS)``.
        loss_sum: Sum of the unweighted cross-entropy, in nats.
        num_examples: Examples counted.
    """

    confusion: NDArray[np.int64]
    scores: NDArray[np.int64]
    calibration: NDArray[np.float64]
    loss_sum: float
    num_examples: int

    @property
    def num_classes(self) -> int:
        """Number of classes, present or not."""
        return len(self.confusion)

    @classmethod
    def zeros(cls, num_classes: int) -> EvaluationSums:
        """Return the sums of no examples."""
        return cls(
            confusion=np.zeros((num_classes, num_classes), np.int64),
            scores=np.zeros((num_classes, 2, SCORE_BINS), np.int64),
            calibration=np.zeros((3, CALIBRATION_BINS)),
            loss_sum=0.0,
            num_examples=0,
        )

    @classmethod
    def from_logits(
        cls, logits: NDArray[np.floating[Any]], labels: NDArray[np.integer[Any]]
    ) -> EvaluationSums:
        """Count a batch, in float64. Of equal logits the first class is predicted.

        Args:
            logits: Class scores of the model, finite in float32. Shape ``(n, c)``, ``c >= 2``.
            labels: True classes. Shape ``(n,)``.

        Raises:
            ProtocolError: Logits of another shape, or not finite.
            DataError: Labels that are not whole numbers from 0 to ``c - 1``, one per example.
        """
        z = np.asarray(logits, dtype=np.float64)
        y = np.asarray(labels)
        if z.ndim != 2 or z.shape[1] < 2:
            raise ProtocolError(f"logits shape={z.shape}: expected (examples, classes >= 2)")
        usable = np.abs(z) <= _MAX_LOGIT  # false for NaN too
        if not usable.all():
            bad = int((~usable.all(axis=1)).sum())
            raise ProtocolError(
                f"logits={z[~usable][0]} in {bad} of {len(z)} examples: expected finite float32",
                hint="the weights have diverged; lower training.learning-rate",
            )
        n, c = z.shape
        if y.shape != (n,) or not np.issubdtype(y.dtype, np.integer):
            raise DataError(f"labels shape={y.shape} dtype={y.dtype}: expected {n} integers")
        outside = y[(y < 0) | (y >= c)]
        if outside.size:
            raise DataError(f"label={outside[0]}: expected 0 to {c - 1}")
        return cls._count(z, y.astype(np.int64))

    @classmethod
    def _count(cls, z: NDArray[np.float64], y: NDArray[np.int64]) -> EvaluationSums:
        n, c = z.shape
        predicted = z.argmax(axis=1)
        shifted = z - z.max(axis=1, keepdims=True)
        total = np.exp(shifted).sum(axis=1)
        losses = _quantize(np.log(total) - shifted[np.arange(n), y])
        confidence = _quantize(1.0 / total)
        cell = np.minimum((confidence * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
        per_cell = (np.ones(n), confidence, (predicted == y).astype(np.float64))
        scores = [_histogram(_score(z, k), y == k) for k in range(c)]
        return cls(
            confusion=np.bincount(y * c + predicted, minlength=c * c).reshape(c, c),
            scores=np.stack(scores),
            calibration=np.stack(
                [np.bincount(cell, weights=w, minlength=CALIBRATION_BINS) for w in per_cell]
            ).astype(np.float64),
            loss_sum=float(losses.sum()),
            num_examples=n,
        )

    def __add__(self, other: EvaluationSums) -> EvaluationSums:
        if self.num_classes != other.num_classes:
            raise ProtocolError(
                f"classes={self.num_classes} and {other.num_classes}: expected the same number"
            )
        return EvaluationSums(
            confusion=self.confusion + other.confusion,
            scores=self.scores + other.scores,
            calibration=self.calibration + other.calibration,
            loss_sum=self.loss_sum + other.loss_sum,
            num_examples=self.num_examples + other.num_examples,
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, EvaluationSums):
            return NotImplemented
        return (
            np.array_equal(self.confusion, other.confusion)
            and np.array_equal(self.scores, other.scores)
            and np.array_equal(self.calibration, other.calibration)
            and self.loss_sum == other.loss_sum
            and self.num_examples == other.num_examples
        )

    def to_metrics(self, prefix: str) -> dict[str, int | float | list[int] | list[float]]:
        """Return the sums under :func:`metric_keys`, flattened for a Flower MetricRecord.

        Args:
            prefix: The split: ``val`` or ``test``.
        """
        values = (
            [int(count) for count in self.confusion.ravel()],
            [int(count) for count in self.scores.ravel()],
            [float(value) for value in self.calibration.ravel()],
            self.loss_sum,
            self.num_examples,
        )
        return dict(zip(metric_keys(prefix), values, strict=True))

    @classmethod
    def from_metrics(
        cls, prefix: str, metrics: Mapping[str, object], num_classes: int
    ) -> EvaluationSums:
        """Read and check what :meth:`to_metrics` wrote; other keys are left alone.

        Args:
            prefix: The split: ``val`` or ``test``.
            metrics: Values from a site, not trusted.
            num_classes: Classes of the run.

        Raises:
            ProtocolError: A key is missing, has another type, length or range, or the totals
                contradict each other. The message names the key.
        """
        confusion_key, scores_key, calibration_key, loss_key, num_key = metric_keys(prefix)
        c = num_classes
        counts = _whole_numbers(metrics, confusion_key, c * c)
        histogram = _whole_numbers(metrics, scores_key, c * 2 * SCORE_BINS)
        calibration = _amounts(metrics, calibration_key, 3 * CALIBRATION_BINS)
        loss = _amount(loss_key, _get(metrics, loss_key))
        sums = cls(
            confusion=np.array(counts, np.int64).reshape(c, c),
            scores=np.array(histogram, np.int64).reshape(c, 2, SCORE_BINS),
            calibration=np.array(calibration).reshape(3, CALIBRATION_BINS),
            loss_sum=loss,
            num_examples=_whole_number(num_key, _get(metrics, num_key)),
        )
        sums._check_totals(prefix)
        return sums

    def _check_totals(self, prefix: str) -> None:
        """Check that all parts count the same examples."""
        n = self.num_examples
        confusion_key, scores_key, calibration_key, loss_key, num_key = metric_keys(prefix)
        if int(self.confusion.sum()) != n:
            raise ProtocolError(
                f"{confusion_key} counts {self.confusion.sum()} examples; expected {num_key}={n}"
            )
        per_class = self.confusion.sum(axis=1)  # (c,)
        expected = np.stack([n - per_class, per_class], axis=1)  # (c, 2)
        found = self.scores.sum(axis=2)  # (c, 2)
        for k in range(self.num_classes):
            if not np.array_equal(found[k], expected[k]):
                raise ProtocolError(
                    f"{scores_key} of class {k} counts {found[k].tolist()} negatives and "
                    f"positives; expected {expected[k].tolist()} as in {confusion_key}"
                )
        count, confidence, correct = self.calibration
        if (count % 1).any() or count.sum() != n:
            raise ProtocolError(
                f"{calibration_key} counts {count.sum():g} examples; expected {num_key}={n}"
            )
        if (confidence > count).any() or (correct > count).any():
            raise ProtocolError(f"{calibration_key} has a mean confidence or accuracy above 1")
        if (correct % 1).any() or correct.sum() != np.trace(self.confusion):
            raise ProtocolError(
                f"{calibration_key} counts {correct.sum():g} correct; expected "
                f"{np.trace(self.confusion)} as in {confusion_key}"
            )
        if n == 0 and self.loss_sum:
            raise ProtocolError(f"{loss_key}={self.loss_sum}: expected 0 for no examples")


def _score(z: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """Return class k's log-odds against the others; exact for two classes. ``(n, c) -> (n,)``."""
    rest = np.delete(z, k, axis=1)  # (n, c - 1)
    top = rest.max(axis=1)  # (n,)
    return z[:, k] - (top + np.log(np.exp(rest - top[:, None]).mean(axis=1)))


def _histogram(score: NDArray[np.float64], own: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Count scores of negatives and positives. ``(n,), (n,) -> (2, SCORE_BINS)``."""
    # By size and sign apart, so that bins mirror each other exactly. No value, not even NaN, leads
    # outside the histogram.
    size = np.searchsorted(_EDGES, np.abs(score))
    index = _MIDDLE + np.where(score < 0, -size, size)
    flat = np.bincount(own * SCORE_BINS + index, minlength=2 * SCORE_BINS)
    return flat.reshape(2, SCORE_BINS)


def _quantize(values: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.rint(values / QUANTUM) * QUANTUM


def _get(metrics: Mapping[str, object], key: str) -> object:
    if key not in metrics:
        raise ProtocolError(f"{key} is missing")
    return metrics[key]


def _list(metrics: Mapping[str, object], key: str, length: int) -> Sequence[object]:
    values = _get(metrics, key)
    if not isinstance(values, list):
        raise ProtocolError(f"{key} is of type {type(values).__name__}; expected a list")
    items = cast("list[object]", values)
    if len(items) != length:
        raise ProtocolError(f"{key} has {len(items)} values; expected {length}")
    return items


def _whole_numbers(metrics: Mapping[str, object], key: str, length: int) -> list[int]:
    return [_whole_number(key, value) for value in _list(metrics, key, length)]


def _amounts(metrics: Mapping[str, object], key: str, length: int) -> list[float]:
    return [_amount(key, value) for value in _list(metrics, key, length)]


def _whole_number(key: str, value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_EXAMPLES:
        raise ProtocolError(f"{key}={value!r}: expected a whole number from 0 to {MAX_EXAMPLES}")
    return value


def _amount(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= _MAX_SUM:
        raise ProtocolError(f"{key}={value!r}: expected a finite number of at least 0")
    return float(value)
