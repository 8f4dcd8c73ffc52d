"""Local training and evaluation at a site: one round, start to end, in one visible flow.

Invariant: the result depends on the global weights, the site's data, the run configuration and
(seed, site, round) alone. The optimiser starts anew each round, so a restarted site gives the same
update as one that never stopped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from client.data.transforms import augment_batch, augmentation, normalise
from client.loss import class_weights, reweighted_loss
from client.site import Site
from medmamba.config import MedMambaConfig, ModelError
from medmamba.model import MedMamba, no_weight_decay
from medmamba.scan import active_backend
from medmamba.weights import load_arrays, to_arrays
from strategies.arrays import Arrays
from strategies.errors import RefusalError
from strategies.evaluation import EvaluationSums
from strategies.run_config import RunConfig, TrainingSection
from strategies.seeds import derive_seed

log = logging.getLogger(__name__)

EVALUATION_BATCH = 256


@dataclass(frozen=True)
class TrainResult:
    """What one round of local training gives.

    Attributes:
        update: Local minus global weights, by parameter name.
        num_examples: Training examples of the site.
        num_steps: Optimiser steps taken.
        loss: Mean class-reweighted loss over the examples seen, in nats.
        learning_rate: Of this round.
        scan_backend: What ran the selective scan.
    """

    update: Arrays
    num_examples: int
    num_steps: int
    loss: float
    learning_rate: float
    scan_backend: str


def train(site: Site, run: RunConfig, server_round: int, weights: Arrays) -> TrainResult:
    """Train one round from the global weights.

    Args:
        site: Whose data to train on.
        run: The run's configuration, already admitted by the site's policy.
        server_round: From 1; decides learning rate and random order.
        weights: Global weights, by parameter name.

    Raises:
        RefusalError: The site has no training examples, the loss stopped being finite, or the work
            was aborted or took too long.
    """
    settings = run.training
    split = site.split("train", run.model)
    num_examples = len(split.labels)
    if num_examples == 0:
        raise RefusalError("no-examples", "this site has no training examples")
    if num_examples == 1 and run.model.norm == "batch":
        raise RefusalError("too-few-examples", "model.norm=batch needs two training examples")
    model = _model_of(site, run)
    _set_weights(model, weights)
    model.train()
    torch.manual_seed(derive_seed(run.seed, "train", site.name, server_round))
    rate = learning_rate(settings, server_round, run.num_server_rounds)
    optimiser = _optimiser(model, settings, rate)
    per_class = torch.from_numpy(
        class_weights(
            site.class_counts(), settings.class_weights, beta=settings.effective_number_beta
        )
    ).to(site.device)
    transform = augmentation(
        image_size=run.model.image_size,
        seed=derive_seed(run.seed, "augment", site.name, server_round),
    )
    anchor = [parameter.detach().clone() for parameter in model.parameters()]
    expected_batch_size = min(settings.batch_size, num_examples)
    loss_sum, seen, steps = 0.0, 0, 0
    order_seed = derive_seed(run.seed, "order", site.name, server_round)
    for rows in batches(num_examples, settings, seed=order_seed):
        site.check_work()
        images = split.batch(rows).to(site.device)  # (b, c, s, s)
        if settings.augment:
            images = augment_batch(images, transform)
        loss = reweighted_loss(
            model(normalise(images)),
            split.labels[rows].to(site.device),
            per_class,
            expected_batch_size=expected_batch_size,
            focal_gamma=settings.focal_gamma,
        )
        value = loss.item()
        if not math.isfinite(value):
            raise RefusalError("loss-not-finite", "training stopped: the loss is not finite")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        add_proximal_gradient(model, anchor, run.strategy.proximal_mu)
        optimiser.step()
        loss_sum += value * expected_batch_size
        seen += len(rows)
        steps += 1
    local = to_arrays(model)
    update = {name: local[name] - weights[name] for name in weights}
    if not all(np.isfinite(value).all() for value in update.values()):
        raise RefusalError("loss-not-finite", "training stopped: the weights are not finite")
    return TrainResult(
        update=update,
        num_examples=num_examples,
        num_steps=steps,
        loss=loss_sum / seen,
        learning_rate=rate,
        scan_backend=active_backend(site.device, run.model.forced_scan_backend),
    )


def add_proximal_gradient(model: torch.nn.Module, anchor: list[Tensor], proximal_mu: float) -> None:
    """Add the gradient of ``mu / 2 * ||w - w_global||^2`` (FedProx, arXiv 1812.06127, eq. 2).

    It is added to the gradients rather than to the loss because it is a term of the parameters
    alone: under per-example clipping it must come after clip and noise. With ``mu = 0`` nothing is
    computed, so the run equals FedAvg to the bit.
    """
    if proximal_mu == 0:
        return
    with torch.no_grad():
        for parameter, start in zip(model.parameters(), anchor, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter - start, alpha=proximal_mu)


@torch.no_grad()
def evaluate(site: Site, run: RunConfig, weights: Arrays, split_name: str) -> EvaluationSums:
    """Return the exact sums of the global weights on one split of the site; zeros without examples.

    Raises:
        RefusalError: The network's output is not finite, or the work was aborted or took too long.
    """
    split = site.split(split_name, run.model)
    model = _model_of(site, run)
    _set_weights(model, weights)
    model.eval()
    sums = EvaluationSums.zeros(run.model.num_classes)
    for start in range(0, len(split.labels), EVALUATION_BATCH):
        site.check_work()
        rows = torch.arange(start, min(start + EVALUATION_BATCH, len(split.labels)))
        images = split.batch(rows).to(site.device)
        logits = model(normalise(images))  # (b, num_classes)
        if not torch.isfinite(logits).all():
            raise RefusalError("output-not-finite", "the model's output is not finite")
        sums = sums + EvaluationSums.from_logits(logits.cpu().numpy(), split.labels[rows].numpy())
    return sums


def learning_rate(settings: TrainingSection, server_round: int, num_server_rounds: int) -> float:
    """Return a round's learning rate: half a cosine from the first round to after the last."""
    if settings.schedule == "constant":
        return settings.learning_rate
    progress = (server_round - 1) / num_server_rounds
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))


def batches(num_examples: int, settings: TrainingSection, *, seed: int) -> Iterator[torch.Tensor]:
    """Yield the rows of each step: shuffled passes, cut after ``local_steps`` when that is set.

    A last batch of one example is joined to the batch before it: BatchNorm has no variance of one
    value.
    """
    generator = np.random.default_rng(seed)
    steps = 0
    epoch = 0
    while settings.local_steps > 0 or epoch < settings.local_epochs:
        order = torch.from_numpy(generator.permutation(num_examples))
        starts = list(range(0, num_examples, settings.batch_size))
        if len(starts) > 1 and num_examples - starts[-1] == 1:
            starts.pop()
        for start, end in zip(starts, [*starts[1:], num_examples], strict=True):
            yield order[start:end]
            steps += 1
            if steps == settings.local_steps:
                return
        epoch += 1


def check_scan_backend(site: Site, run: RunConfig) -> None:
    """Refuse a run whose scan cannot run here; what runs it is logged, once in a process.

    Raises:
        RefusalError: The backend that the run (or this site's environment) forces is missing. What
            is missing stays in the site's log.
    """
    try:
        active_backend(site.device, run.model.forced_scan_backend)
    except ModelError as error:
        log.warning("site=%s %s; %s", site.name, error, error.hint)
        raise RefusalError(
            "scan-backend-missing",
            f"model.scan-backend={run.model.scan_backend} cannot run at this site",
        ) from None


def _set_weights(model: MedMamba, weights: Arrays) -> None:
    """Set the global weights; a coordinator of another version may have other ones.

    Raises:
        RefusalError: Names or shapes are not this model's. Leaves the site: both shapes.
    """
    try:
        load_arrays(model, weights)
    except ModelError as error:
        raise RefusalError("other-architecture", str(error)) from None


def _model_of(site: Site, run: RunConfig) -> MedMamba:
    architecture = MedMambaConfig.from_name(run.model.size, **run.model.architecture)
    return _model(
        architecture,
        site.device,
        run.model.forced_scan_backend,
        run.training.activation_checkpointing,
    )


@lru_cache(maxsize=1)
def _model(
    config: MedMambaConfig,
    device: torch.device,
    scan_backend: str | None,
    activation_checkpointing: bool,
) -> MedMamba:
    """Build the network once a process: its weights are overwritten at every use."""
    return MedMamba(
        config, scan_backend=scan_backend, activation_checkpointing=activation_checkpointing
    ).to(device)


def _optimiser(model: MedMamba, settings: TrainingSection, rate: float) -> torch.optim.AdamW:
    exempt = no_weight_decay(model)
    named = dict(model.named_parameters())
    groups = [
        {
            "params": [value for name, value in named.items() if name not in exempt],
            "weight_decay": settings.weight_decay,
        },
        {"params": [named[name] for name in sorted(exempt)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, fused=True)
