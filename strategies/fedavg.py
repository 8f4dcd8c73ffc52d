"""FedAvg (McMahan et al., arXiv 1602.05629): the mean of the updates, weighted by examples."""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from strategies.arrays import Arrays
from strategies.base import Aggregation, Strategy
from strategies.records import Reply


class FedAvg(Strategy):
    """Weighted mean of the sites' updates."""

    name: ClassVar[str] = "fedavg"

    def aggregation(self, weights: Arrays) -> Aggregation:
        """Begin a weighted mean."""
        return WeightedMean(weights)


class WeightedMean(Aggregation):
    """``w + sum_k (n_k / n) u_k`` as a running sum in float64, in the order of :meth:`add`.

    Source: McMahan et al., algorithm 1, in terms of updates.
    """

    def __init__(self, weights: Arrays) -> None:
        self._weights = weights
        self._sums = {name: np.zeros(value.shape) for name, value in weights.items()}
        self._total = 0

    def add(self, reply: Reply) -> None:
        """Add one site's update, weighted by its examples."""
        self._total += reply.num_examples
        for name, total in self._sums.items():
            total += np.multiply(reply.update[name], reply.num_examples, dtype=np.float64)

    def result(self) -> Arrays:
        """Return the weights moved by the mean update."""
        return {
            name: (value + self._sums[name] / self._total).astype(np.float32)
            for name, value in self._weights.items()
        }
