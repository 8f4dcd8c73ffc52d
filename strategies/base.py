"""One round with unreliable sites: wait, ask, check every reply, aggregate.

Invariant: a bad reply is dropped with its reason and never ends a run; only fewer valid replies
than the quorum does. Replies are matched by the instruction they answer (Flower reports a lost
node's error under the server's own node id) and aggregated in site order, so the result does not
depend on who answers first. Only float32 arrays travel: integer buffers stay where they are.
"""

from __future__ import annotations

import logging
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Message
from flwr.serverapp import Grid

from strategies.arrays import Arrays
from strategies.cli import one_line
from strategies.errors import ConfigError, FederationError, ProtocolError, QuorumError
from strategies.evaluation import EvaluationSums
from strategies.records import Instruction, Reply
from strategies.run_config import RunConfig, StrategySection

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
REASON_LENGTH = 200
# An update this many times as long as the weights is a fault, and one of them ends all learning.
MAX_UPDATE_RATIO = 100.0
# When two nodes speak for one site, the outcome that says more stands.
_WORTH = {"missing": 0, "dropped": 1, "refused": 2, "ok": 3}


@dataclass(frozen=True)
class Outcome:
    """What became of one site in one round.

    Attributes:
        site: Site name, or ``node <id>`` when no verified reply ever named the node's site.
        status: ``ok``; ``refused`` by the site's policy; ``dropped`` by a check here; ``missing``
            when no reply came.
        reason: Why not ``ok``; empty otherwise.
        reply: The verified reply when ``ok``.
        sums: Evaluation sums of an ``ok`` reply; of the weights it started from when it trained.
    """

    site: str
    status: Literal["ok", "refused", "dropped", "missing"]
    reason: str = ""
    reply: Reply | None = None
    sums: EvaluationSums | None = None


class Strategy(ABC):
    """Base of every algorithm: the round protocol is here, the arithmetic in subclasses.

    Attributes:
        name: Its name in RunConfig.
        buffer_rule: What happens to floating-point normalisation buffers (BatchNorm's running
            statistics): ``averaged`` like parameters. Integer buffers never travel.
    """

    name: ClassVar[str]
    buffer_rule: ClassVar[Literal["averaged"]] = "averaged"

    def __init__(
        self,
        config: RunConfig,
        *,
        federation: str,
        run_uuid: str,
        site_keys: Mapping[str, Ed25519PublicKey],
    ) -> None:
        require_quorum(config.strategy, len(site_keys))
        self.config = config
        self.federation = federation
        self.run_uuid = run_uuid
        self.site_keys = dict(site_keys)
        self._site_of_node: dict[int, str] = {}

    @abstractmethod
    def aggregate(self, weights: Arrays, replies: Sequence[Reply]) -> Arrays:
        """Return the next global weights.

        Args:
            weights: The weights the sites started from.
            replies: At least one valid training reply, in site order.
        """

    def wait_for_cohort(self, grid: Grid, *, target: int) -> list[int]:
        """Wait until ``target`` nodes are connected, or the deadline passes.

        Returns:
            Node ids in numeric order; at least the quorum, possibly fewer than ``target``.

        Raises:
            QuorumError: Fewer nodes than the quorum at the deadline.
        """
        settings = self.config.strategy
        deadline = time.monotonic() + settings.wait_seconds
        told = False
        while True:
            nodes = sorted(grid.get_node_ids())
            if len(nodes) >= target:
                return nodes
            if time.monotonic() >= deadline:
                break
            if not told:
                log.info("waiting for sites connected=%d expected=%d", len(nodes), target)
                told = True
            time.sleep(POLL_SECONDS)
        if len(nodes) >= settings.min_sites:
            log.warning("continuing with connected=%d expected=%d", len(nodes), target)
            return nodes
        raise QuorumError(
            f"connected sites={len(nodes)} after {settings.wait_seconds:g} s; "
            f"strategy.min-sites={settings.min_sites}",
            hint="start `python -m client --site NAME` at the sites, or raise "
            "strategy.wait-seconds",
        )

    def train(
        self, grid: Grid, nodes: Sequence[int], server_round: int, weights: Arrays
    ) -> tuple[Arrays, list[Outcome]]:
        """Run one training round.

        Returns:
            The next global weights, and every site's outcome in site order.

        Raises:
            QuorumError: Fewer valid updates than the quorum; ``weights`` are unchanged.
        """
        outcomes = self.ask(grid, nodes, self._instruction("train", server_round, weights))
        replies = [outcome.reply for outcome in outcomes if outcome.reply is not None]
        if len(replies) < self.config.strategy.min_sites:
            reasons = "; ".join(f"{o.site}: {o.reason}" for o in outcomes if o.status != "ok")
            raise QuorumError(
                f"round={server_round} valid updates={len(replies)}; "
                f"strategy.min-sites={self.config.strategy.min_sites} ({reasons})",
                hint="mend the sites named here, then continue with --resume",
            )
        return self.aggregate(weights, replies), outcomes

    def evaluate(
        self,
        grid: Grid,
        nodes: Sequence[int],
        server_round: int,
        weights: Arrays,
        split: Literal["val", "test"],
    ) -> list[Outcome]:
        """Ask the sites to evaluate ``weights``; outcomes in site order."""
        return self.ask(grid, nodes, self._instruction(split, server_round, weights))

    def ask(self, grid: Grid, nodes: Sequence[int], instruction: Instruction) -> list[Outcome]:
        """Send one instruction to every node and judge what comes back before the deadline."""
        timeout = self.config.strategy.round_timeout_seconds
        content = instruction.to_content()
        kind = "train" if instruction.task == "train" else "evaluate"
        group = str(instruction.server_round)
        messages = [Message(content, node, kind, ttl=timeout, group_id=group) for node in nodes]
        message_ids = list(grid.push_messages(messages))
        if len(message_ids) != len(messages):
            raise FederationError(
                f"round={instruction.server_round} task={instruction.task}: flower-superlink did "
                "not take the instructions",
                hint="its log says why; weights too large for it are the usual reason",
            )
        pending = {message_id for message_id in message_ids if message_id}
        answers = self._collect(grid, pending, time.monotonic() + timeout)
        outcomes: dict[str, Outcome] = {}
        for node, message_id in zip(nodes, message_ids, strict=True):
            outcome = self._judge(node, message_id, answers.get(message_id), instruction)
            # What a stranger wrote must not forge a line of the log or fill the history.
            outcome = replace(outcome, reason=one_line(outcome.reason, limit=REASON_LENGTH))
            earlier = outcomes.get(outcome.site)
            if earlier is not None and earlier.status == outcome.status == "ok":
                site = f"node {node}"
                reason = f"a second reply for site {outcome.site} in this round"
                outcomes[site] = Outcome(site, "dropped", reason)
            elif earlier is None or _WORTH[outcome.status] > _WORTH[earlier.status]:
                # A restarted site is a new node, and its old one may still be listed.
                outcomes[outcome.site] = outcome
        for site in self.site_keys:
            outcomes.setdefault(site, Outcome(site, "missing", "not connected"))
        ordered = [outcomes[site] for site in sorted(outcomes)]
        for outcome in ordered:
            if outcome.status != "ok":
                log.warning(
                    "round=%d task=%s site=%s status=%s reason=%s",
                    instruction.server_round,
                    instruction.task,
                    outcome.site,
                    outcome.status,
                    outcome.reason,
                )
        return ordered

    def _instruction(
        self, task: Literal["train", "val", "test"], server_round: int, weights: Arrays
    ) -> Instruction:
        return Instruction(self.federation, self.run_uuid, server_round, task, weights)

    @staticmethod
    def _collect(grid: Grid, pending: set[str], deadline: float) -> dict[str, Message]:
        answers: dict[str, Message] = {}
        while True:
            for message in grid.pull_messages(sorted(pending)):
                message_id = message.metadata.reply_to_message_id
                if message_id in pending:
                    pending.discard(message_id)
                    answers[message_id] = message
            if not pending or time.monotonic() >= deadline:
                return answers
            time.sleep(POLL_SECONDS)

    def _judge(
        self, node: int, message_id: str, message: Message | None, instruction: Instruction
    ) -> Outcome:
        """Decide what one node's answer is worth."""
        site = self._site_of_node.get(node, f"node {node}")
        if not message_id:  # how flower-superlink says so
            return Outcome(site, "missing", "not connected")
        if message is None:
            seconds = self.config.strategy.round_timeout_seconds
            return Outcome(site, "missing", f"no reply within {seconds:g} s")
        if message.has_error():
            error = message.error
            return Outcome(site, "missing", f"Flower error {error.code}: {error.reason}")
        try:
            reply = Reply.from_content(message.content, self.site_keys)
            # Only a fresh signature tells who the node is: an old one can be replayed by anybody.
            if reply.message_id != message_id:
                raise ProtocolError("the signature covers another instruction")
            self._site_of_node[node] = site = reply.site
            _check_answers(reply, instruction)
            if reply.status == "refused":
                return Outcome(site, "refused", reply.reason)
            sums = self._check_content(reply, instruction)
        except FederationError as error:
            return Outcome(site, "dropped", str(error))
        return Outcome(site, "ok", reply=reply, sums=sums)

    def _check_content(self, reply: Reply, instruction: Instruction) -> EvaluationSums:
        """Check what an ``ok`` reply carries and return its evaluation sums.

        Raises:
            ProtocolError: Its numbers or arrays are not usable.
        """
        cap = self.config.strategy.max_num_examples
        smallest = 1 if reply.task == "train" else 0
        if not smallest <= reply.num_examples <= cap:
            raise ProtocolError(f"num-examples={reply.num_examples}: expected {smallest} to {cap}")
        prefix = "val" if reply.task == "train" else reply.task
        sums = EvaluationSums.from_metrics(prefix, reply.metrics, self.config.model.num_classes)
        if sums.num_examples > cap:
            raise ProtocolError(f"{prefix}-num-examples={sums.num_examples}: expected 0 to {cap}")
        if reply.task == "train":
            _check_update(reply.update, instruction.weights)
        elif sums.num_examples != reply.num_examples:
            raise ProtocolError(
                f"num-examples={reply.num_examples} but {sums.num_examples} were evaluated"
            )
        return sums


def require_quorum(settings: StrategySection, num_sites: int) -> None:
    """Refuse a quorum that the admitted sites can never reach.

    Raises:
        ConfigError: With both numbers.
    """
    if num_sites < settings.min_sites:
        raise ConfigError(
            f"strategy.min-sites={settings.min_sites}: only {num_sites} sites are admitted",
            hint="admit more sites or lower strategy.min-sites",
        )


def weighted_mean_update(weights: Arrays, replies: Sequence[Reply]) -> Arrays:
    """Return ``w + sum_k (n_k / n) u_k``, summed in float64 in the order given.

    Source: McMahan et al., FedAvg (arXiv 1602.05629), algorithm 1, in terms of updates.
    """
    total = sum(reply.num_examples for reply in replies)
    result: Arrays = {}
    for name, value in weights.items():
        mean = value.astype(np.float64)
        for reply in replies:
            mean += (reply.num_examples / total) * reply.update[name].astype(np.float64)
        result[name] = mean.astype(np.float32)
    return result


def _check_answers(reply: Reply, instruction: Instruction) -> None:
    for name in ("federation", "run_uuid", "server_round", "task"):
        if getattr(reply, name) != getattr(instruction, name):
            raise ProtocolError(
                f"{name}={getattr(reply, name)!r}: expected {getattr(instruction, name)!r}"
            )


def _check_update(update: Arrays, weights: Arrays) -> None:
    if update.keys() != weights.keys():
        odd = sorted(update.keys() ^ weights.keys())
        raise ProtocolError(f"arrays {', '.join(odd[:3])} are missing or unknown ({len(odd)})")
    for name, value in update.items():
        if value.shape != weights[name].shape:
            raise ProtocolError(
                f"array {name!r} has shape={value.shape}; expected {weights[name].shape}"
            )
        if not np.isfinite(value).all():
            raise ProtocolError(f"array {name!r} holds values that are not finite")
    length, limit = _norm(update), MAX_UPDATE_RATIO * max(_norm(weights), 1.0)
    if length > limit:
        raise ProtocolError(f"update norm={length:.3g}: expected at most {limit:.3g}")


def _norm(arrays: Arrays) -> float:
    squares = (float(np.square(value, dtype=np.float64).sum()) for value in arrays.values())
    return math.sqrt(sum(squares))
