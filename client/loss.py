"""Class-reweighted loss whose gradient for one example depends on no other example.

Invariant: the loss of a batch is ``sum_i w[y_i] * l_i / expected_batch_size``. It is never divided
by the batch's sum of weights, so an example's gradient is the same to the bit whoever shares its
batch; per-example clipping relies on that.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

ClassWeights = Literal["none", "inverse-frequency", "effective-number"]


def class_weights(
    counts: NDArray[np.int64], kind: ClassWeights, *, beta: float = 0.999
) -> NDArray[np.float32]:
    """Return one weight per class from a site's own counts, with mean 1 over its examples.

    Args:
        counts: (c,) training examples of each class.
        kind: ``inverse-frequency``: 1 / n_c. ``effective-number``: (1 - beta) / (1 - beta^n_c)
            of Cui et al. (arXiv 1901.05555). ``none``: ones.
        beta: Of the effective number.

    Returns:
        (c,) finite weights. An absent class weighs as if it had one example; no example of the
        site uses that weight.
    """
    present = np.maximum(counts, 1).astype(np.float64)
    if kind == "none" or counts.sum() == 0:
        return np.ones(len(counts), np.float32)
    raw = 1 / present if kind == "inverse-frequency" else (1 - beta) / (1 - beta**present)
    return (raw * counts.sum() / (raw * counts).sum()).astype(np.float32)


def reweighted_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    *,
    expected_batch_size: int,
    focal_gamma: float = 0.0,
) -> Tensor:
    """Return the class-reweighted cross-entropy of a batch, optionally focal.

    Args:
        logits: (b, c).
        labels: (b,) class indices.
        weights: (c,) from :func:`class_weights`.
        expected_batch_size: The divisor; a constant of the round, not of this batch.
        focal_gamma: Exponent of (1 - p_y) (Lin et al., arXiv 1708.02002); 0 is cross-entropy.

    Returns:
        Scalar loss in nats.
    """
    losses = functional.cross_entropy(logits, labels, reduction="none")  # (b,)
    if focal_gamma > 0:
        # 1 - p_y without cancellation; the floor keeps the power's gradient finite at p_y = 1.
        missing = -torch.expm1(-losses)
        losses = missing.clamp_min(torch.finfo(losses.dtype).tiny).pow(focal_gamma) * losses
    return (weights[labels] * losses).sum() / expected_batch_size
