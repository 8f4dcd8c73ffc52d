"""FedProx (Li et al., arXiv 1812.06127): FedAvg whose sites are held near the global weights.

The server's part is FedAvg's. Each site adds ``proximal_mu / 2 * ||w - w_global||^2`` to its loss
(client/train.py reads ``strategy.proximal-mu`` from the run configuration); with
``proximal_mu = 0`` that term is not computed and the run equals FedAvg to the bit.
"""

from __future__ import annotations

from typing import ClassVar

from strategies.fedavg import FedAvg


class FedProx(FedAvg):
    """FedAvg's aggregation; the proximal term is in the sites' loss."""

    name: ClassVar[str] = "fedprox"
