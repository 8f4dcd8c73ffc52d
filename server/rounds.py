"""A run from first weights to final figures, whoever provides the Grid.

Invariant: every choice (which round's weights are the result) is made on validation figures; the
test split is read once, after the choice. After each round everything needed to go on is on disk,
and a resumed run ends in the same bytes as one that was never interrupted.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.serverapp import Grid

from medmamba.config import MedMambaConfig
from medmamba.model import MedMamba
from medmamba.scan import is_reproducible
from medmamba.weights import load_arrays, save, to_arrays
from server.checkpoint import State, check_shapes, load_checkpoint, save_checkpoint
from server.metrics import final_figures, improves, metrics, pool, selection_value, worst_site
from server.run_directory import CHECKPOINTS, MODEL, RunDirectory
from strategies.arrays import Arrays
from strategies.audit import AuditLog
from strategies.base import Outcome, SiteKeys, Strategy, require_quorum
from strategies.evaluation import EvaluationSums
from strategies.orders import Order
from strategies.registry import STRATEGIES
from strategies.run_config import RunConfig
from strategies.seeds import derive_seed

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What the ServerApp needs beside the run configuration.

    Attributes:
        directory: Where the run is kept.
        order: The run's settings and cohort, signed.
        order_key: Signs every instruction.
        sites: Gives the public keys of the sites that are admitted now, by name.
        audit: The coordinator's log.
        classes: Class names for people, in label order; empty: the run's, else the labels.
        simulated: Whether the sites are partitions on one machine.
        on_round: Called with each round when its record is on disk.
    """

    directory: RunDirectory
    order: Order
    order_key: Ed25519PrivateKey
    sites: Callable[[], SiteKeys]
    audit: AuditLog
    classes: Sequence[str] = ()
    simulated: bool = False
    on_round: Callable[[RoundResult], None] = lambda result: None


@dataclass(frozen=True)
class RoundResult:
    """One finished round.

    Attributes:
        outcomes: Every site's, in site order.
        validation: Pooled metrics of the weights that the round began with.
    """

    server_round: int
    outcomes: Sequence[Outcome]
    num_examples: int
    train_loss: float
    seconds: float
    validation: Mapping[str, Any]


def execute(grid: Grid, settings: Settings) -> dict[str, Any]:
    """Run all rounds, choose on validation, read test once, write the model.

    Returns:
        The content of ``summary.json``, for the caller to complete and write.

    Raises:
        QuorumError: Too few sites or valid updates; the run can be resumed.
        CheckpointError: A checkpoint that does not fit this run.
    """
    return _Run(grid, settings).execute()


def check(run: RunConfig, num_sites: int) -> None:
    """Refuse what could never run, before anything is written or sent.

    Raises:
        ConfigError: A quorum of more sites than there are.
        ModelError: Settings of the model that do not fit together.
    """
    require_quorum(run.strategy, num_sites)
    MedMambaConfig.from_name(run.model.size, **run.model.architecture)


def initial_weights(run: RunConfig) -> Arrays:
    """Return the global weights before round 1, from the run's seed."""
    torch.manual_seed(derive_seed(run.seed, "initial-weights"))
    return to_arrays(_model(run))


class _Run:
    """The state of one run while it executes."""

    def __init__(self, grid: Grid, settings: Settings) -> None:
        self.grid, self.settings = grid, settings
        self.run, self.run_uuid = settings.order.run, settings.order.manifest.run_uuid
        self.directory = settings.directory
        self.strategy: Strategy = STRATEGIES[self.run.strategy.name](
            settings.order,
            order_key=settings.order_key,
            sites=settings.sites,
            audit=settings.audit,
        )
        self.weights = initial_weights(self.run)
        self.best, self.best_round, self.best_value = self.weights, 0, -math.inf
        self.best_sums: dict[str, EvaluationSums] = {}
        self.chosen = False
        self.first_round, self.earlier_seconds = 1, 0.0
        self.started = time.monotonic()
        self._resume()

    def execute(self) -> dict[str, Any]:
        """Train, choose, test, write."""
        nodes = self.strategy.wait_for_cohort(self.grid, target=len(self.strategy.cohort()))
        for server_round in range(self.first_round, self.run.num_server_rounds + 1):
            if server_round > self.first_round:
                nodes = self.strategy.wait_for_cohort(self.grid, target=self.run.strategy.min_sites)
            self._round(server_round, nodes)
        # A site that came back during the last round judges and tests too.
        nodes = self.strategy.wait_for_cohort(self.grid, target=self.run.strategy.min_sites)
        if not self.chosen:
            self._choose(nodes)
        outcomes = self.strategy.evaluate(self.grid, nodes, self.best_round, self.best, "test")
        model = _model(self.run)
        load_arrays(model, self.best)
        save(model, self.directory.path / MODEL)
        return self._summary(outcomes)

    def _choose(self, nodes: Mapping[str, int]) -> None:
        """Judge the last round's weights too; keep the choice before anybody reads test."""
        last = self.run.num_server_rounds
        outcomes = self.strategy.evaluate(self.grid, nodes, last, self.weights, "val")
        self._judge(last, outcomes)
        if self.best_round == 0:
            log.warning("no validation figures: the last round's weights are the result")
            self.best, self.best_round = self.weights, last
        self.chosen = True
        self._save(last)

    def _resume(self) -> None:
        found = load_checkpoint(self.directory.path / CHECKPOINTS, self.run_uuid)
        if found is None:
            self.directory.restart_history()
            return
        state, weights, best = found
        check_shapes(weights, self.weights)
        self.weights, self.best = weights, best
        self.best_round = state.best_round
        self.best_value = -math.inf if state.best_value is None else state.best_value
        self.best_sums = {
            site: EvaluationSums.from_metrics("val", sums, self.run.model.num_classes)
            for site, sums in state.best_sums.items()
        }
        self.chosen = state.chosen
        self.first_round, self.earlier_seconds = state.server_round + 1, state.seconds
        self.directory.cut_history(state.history_bytes)
        log.info("resumed after round=%d run_uuid=%s", state.server_round, state.run_uuid)

    def _round(self, server_round: int, nodes: Mapping[str, int]) -> None:
        began = time.monotonic()
        before = self.weights
        weights, outcomes = self.strategy.train(self.grid, nodes, server_round, before)
        # Replies to round r carry validation figures of the weights that round r - 1 gave.
        validation = self._judge(server_round - 1, outcomes)
        self.weights = weights
        seconds = time.monotonic() - began
        result = self._record_round(server_round, outcomes, seconds, validation)
        self._save(server_round)
        self.settings.on_round(result)

    def _save(self, server_round: int) -> None:
        state = State(
            run_uuid=self.run_uuid,
            server_round=server_round,
            history_bytes=self.directory.history_bytes(),
            best_round=self.best_round,
            best_value=self.best_value if math.isfinite(self.best_value) else None,
            best_sums={site: sums.to_metrics("val") for site, sums in self.best_sums.items()},
            chosen=self.chosen,
            seconds=self._seconds(),
        )
        save_checkpoint(self.directory.path / CHECKPOINTS, state, self.weights, self.best)

    def _judge(self, server_round: int, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        """Record validation figures of the current weights and keep them if they are the best."""
        sums = _sums_by_site(outcomes)
        pooled = metrics(pool(sums, self.run.model.num_classes))
        self.directory.append(
            {
                "type": "evaluation",
                "server_round": server_round,
                "split": "val",
                "pooled": pooled,
                "sites": {site: metrics(part) for site, part in sums.items()},
            }
        )
        metric = self.run.strategy.selection_metric
        if server_round > 0 and improves(sums, self.best_sums, metric):
            self.best, self.best_round, self.best_sums = self.weights, server_round, sums
            self.best_value = selection_value(pooled, metric)
        return pooled

    def _record_round(
        self,
        server_round: int,
        outcomes: Sequence[Outcome],
        seconds: float,
        validation: Mapping[str, Any],
    ) -> RoundResult:
        replies = {o.site: o.reply for o in outcomes if o.reply is not None}
        num_examples = sum(reply.num_examples for reply in replies.values())
        losses = {site: reply.number("train-loss") for site, reply in replies.items()}
        loss = sum(losses[site] * replies[site].num_examples for site in replies) / num_examples
        self.directory.append(
            {
                "type": "round",
                "server_round": server_round,
                "seconds": seconds,
                "num_sites": len(replies),
                "num_examples": num_examples,
                "train_loss": loss,
            }
        )
        for outcome in outcomes:
            reply = outcome.reply
            self.directory.append(
                {
                    "type": "site",
                    "server_round": server_round,
                    "site": outcome.site,
                    "status": outcome.status,
                    "reason": outcome.reason,
                    "num_examples": reply.num_examples if reply else None,
                    "num_steps": reply.number("num-steps") if reply else None,
                    "train_loss": losses.get(outcome.site),
                    "seconds": reply.number("seconds") if reply else None,
                    "version": outcome.version or None,
                    "code_sha256": outcome.code_sha256 or None,
                    "scan_backend": reply.scan_backend if reply else None,
                    "scan_reproducible": is_reproducible(reply.scan_backend) if reply else None,
                }
            )
        log.info(
            "round=%d/%d sites=%d/%d num_examples=%d train_loss=%.4f seconds=%.1f privacy=%s "
            "encryption=%s",
            server_round,
            self.run.num_server_rounds,
            len(replies),
            len(outcomes),
            num_examples,
            loss,
            seconds,
            self.run.privacy.mode,
            self.run.encryption.mode,
        )
        return RoundResult(server_round, outcomes, num_examples, loss, seconds, validation)

    def _summary(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        sums = _sums_by_site(outcomes)
        sites = {site: final_figures(part) for site, part in sums.items()}
        selected = self.best_value if math.isfinite(self.best_value) else None
        metric = self.run.strategy.selection_metric
        classes = [*(self.settings.classes or self.run.class_names)] or [
            str(label) for label in range(self.run.model.num_classes)
        ]
        return {
            "run_uuid": self.run_uuid,
            "dataset": self.run.dataset,
            "classes": classes,
            "strategy": self.run.strategy.name,
            "num_server_rounds": self.run.num_server_rounds,
            "best_round": self.best_round,
            "selection": {
                "metric": metric,
                "split": "val",
                "value": abs(selected) if selected is not None else None,
            },
            "pooled": final_figures(pool(sums, self.run.model.num_classes)),
            "sites": sites,
            "worst_site": worst_site({site: _metrics_only(part) for site, part in sites.items()}),
            "not_tested": {o.site: o.reason for o in outcomes if o.status != "ok"},
            "privacy": {"mode": self.run.privacy.mode},
            "encryption": {"mode": self.run.encryption.mode},
            "seconds": self._seconds(),
            "simulated": self.settings.simulated,
        }

    def _seconds(self) -> float:
        return self.earlier_seconds + time.monotonic() - self.started


def _metrics_only(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in figures.items() if name != "confusion"}


def _sums_by_site(outcomes: Sequence[Outcome]) -> dict[str, EvaluationSums]:
    return {o.site: o.sums for o in outcomes if o.sums is not None}


def _model(run: RunConfig) -> MedMamba:
    return MedMamba.from_name(run.model.size, **run.model.architecture)
