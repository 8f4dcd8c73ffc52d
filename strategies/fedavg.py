"""FedAvg (McMahan et al., arXiv 1602.05629): the mean of the updates, weighted by examples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from strategies.base import Strategy, weighted_mean_update
from strategies.records import Arrays, Reply


class FedAvg(Strategy):
    """Weighted mean of the sites' updates."""

    name: ClassVar[str] = "fedavg"

    def aggregate(self, weights: Arrays, replies: Sequence[Reply]) -> Arrays:
        """Return the global weights moved by the weighted mean update."""
        return weighted_mean_update(weights, replies)
