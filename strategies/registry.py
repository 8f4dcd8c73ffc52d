"""Name to strategy: the only place with the list."""

from __future__ import annotations

from strategies.base import Strategy
from strategies.fedavg import FedAvg
from strategies.fedprox import FedProx

STRATEGIES: dict[str, type[Strategy]] = {strategy.name: strategy for strategy in (FedAvg, FedProx)}
