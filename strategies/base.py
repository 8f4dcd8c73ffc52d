"""One round with unreliable sites: wait, ask, check every reply, aggregate.

Invariant: a bad reply is dropped with its reason and never ends a run; only fewer valid replies
than the quorum does. A node speaks for the site whose name the superlink registered with its key,
and for no other; its replies are matched by the instruction they answer (Flower reports a lost
node's error under the server's own node id). Replies are taken and added one at a time in site
order, so the result does not depend on who answers first and memory not on how many sites there
are. Only float32 arrays travel: integer buffers stay where they are.
"""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from flwr.app import Message
from flwr.serverapp import Grid

from strategies.arrays import Arrays, hash_arrays, num_bytes
from strategies.audit import AuditLog
from strategies.checks import check_refusal, check_reply
from strategies.cli import one_line
from strategies.errors import ConfigError, FederationError, ProtocolError, QuorumError
from strategies.evaluation import EvaluationSums
from strategies.orders import Order
from strategies.records import REASON_LENGTH, Instruction, Reply
from strategies.run_config import StrategySection

log = logging.getLogger(__name__)

POLL_SECONDS = 0.25
# Replies wait at the superlink until their turn, which may come after the deadline.
GRACE_SECONDS, GRACE_SECONDS_PER_SITE = 120.0, 5.0

SiteKeys = Mapping[str, Ed25519PublicKey]


@dataclass(frozen=True)
class Outcome:
    """What became of one site in one round.

    Attributes:
        site: Site name.
        status: ``ok``; ``refused`` by the site's policy; ``dropped`` by a check here; ``missing``
            when no reply came.
        reason: Why not ``ok``; empty otherwise.
        reply: The verified reply when ``ok``, without its update.
        sums: Evaluation sums of an ``ok`` reply; of the weights it started from when it trained.
        version: Of the site's code, as it signed; empty without a verified reply.
        code_sha256: Likewise.
    """

    site: str
    status: Literal["ok", "refused", "dropped", "missing"]
    reason: str = ""
    reply: Reply | None = None
    sums: EvaluationSums | None = None
    version: str = ""
    code_sha256: str = ""


class Aggregation(ABC):
    """One round's aggregate while replies come in."""

    @abstractmethod
    def add(self, reply: Reply) -> None:
        """Take one valid training reply; called in site order."""

    @abstractmethod
    def result(self) -> Arrays:
        """Return the next global weights, after at least one reply."""


class Strategy(ABC):
    """Base of every algorithm: the round protocol is here, the arithmetic in subclasses.

    Attributes:
        name: Its name in RunConfig.
        buffer_rule: What happens to floating-point normalisation buffers (BatchNorm's running
            statistics): ``averaged`` like parameters. Integer buffers never travel.

    Args:
        order: The run, as the sites get it.
        order_key: Signs every instruction.
        sites: Gives the public keys of the sites that are admitted now, by name; asked again for
            every message, so that a revoked site is out at once.
        audit: The coordinator's log; an outcome that cannot be written ends the run.
    """

    name: ClassVar[str]
    buffer_rule: ClassVar[Literal["averaged"]] = "averaged"

    def __init__(
        self,
        order: Order,
        *,
        order_key: Ed25519PrivateKey,
        sites: Callable[[], SiteKeys],
        audit: AuditLog,
    ) -> None:
        self.order, self.config = order, order.run
        self._order_key, self._admitted, self._audit = order_key, sites, audit
        require_quorum(self.config.strategy, len(self.cohort()))

    @abstractmethod
    def aggregation(self, weights: Arrays) -> Aggregation:
        """Begin the aggregate of a round.

        Args:
            weights: The weights the sites start from.
        """

    def cohort(self) -> SiteKeys:
        """Return the run's sites that are admitted now, in name order."""
        admitted = self._admitted()
        return {
            site: admitted[site] for site in sorted(self.order.manifest.cohort) if site in admitted
        }

    def wait_for_cohort(self, grid: Grid, *, target: int) -> dict[str, int]:
        """Wait until ``target`` sites are connected, or the deadline passes.

        Returns:
            Site to node id, in name order; at least the quorum, possibly fewer than ``target``.

        Raises:
            QuorumError: Fewer sites than the quorum at the deadline; the missing ones are named. Or
                so many were revoked meanwhile that it cannot be met any more.
        """
        settings = self.config.strategy
        deadline = time.monotonic() + settings.wait_seconds
        told: set[str] = set()
        while True:
            cohort = self.cohort()
            nodes = {node.name: node.node_id for node in grid.get_nodes() if node.name in cohort}
            missing = [site for site in cohort if site not in nodes]
            if len(nodes) >= min(target, len(cohort)) and len(nodes) >= settings.min_sites:
                break
            if len(cohort) < settings.min_sites:
                raise QuorumError(
                    f"admitted sites={len(cohort)} of this run; "
                    f"strategy.min-sites={settings.min_sites}: the others were revoked",
                    hint="begin a new run with the sites that are left",
                )
            if time.monotonic() >= deadline:
                break
            if set(missing) != told:
                log.info("waiting for sites=%s connected=%d", ",".join(missing), len(nodes))
                told = set(missing)
            time.sleep(POLL_SECONDS)
        if len(nodes) < settings.min_sites:
            raise QuorumError(
                f"connected sites={len(nodes)} after {settings.wait_seconds:g} s; "
                f"strategy.min-sites={settings.min_sites}; not connected: {', '.join(missing)}",
                hint="start `python -m client --site NAME` at the sites, or raise "
                "strategy.wait-seconds",
            )
        if missing:
            log.warning("continuing without sites=%s", ",".join(missing))
        return dict(sorted(nodes.items()))

    def train(
        self, grid: Grid, nodes: Mapping[str, int], server_round: int, weights: Arrays
    ) -> tuple[Arrays, list[Outcome]]:
        """Run one training round.

        Returns:
            The next global weights, and every site's outcome in site order.

        Raises:
            QuorumError: Fewer valid updates than the quorum; ``weights`` are unchanged.
        """
        aggregation = self.aggregation(weights)
        instruction = Instruction(self.order, server_round, "train", weights)
        outcomes = self.ask(grid, nodes, instruction, aggregation.add)
        valid = sum(outcome.status == "ok" for outcome in outcomes)
        if valid < self.config.strategy.min_sites:
            reasons = "; ".join(f"{o.site}: {o.reason}" for o in outcomes if o.status != "ok")
            raise QuorumError(
                f"round={server_round} valid updates={valid}; "
                f"strategy.min-sites={self.config.strategy.min_sites} ({reasons})",
                hint="mend the sites named here, then continue with --resume",
            )
        return aggregation.result(), outcomes

    def evaluate(
        self,
        grid: Grid,
        nodes: Mapping[str, int],
        server_round: int,
        weights: Arrays,
        split: Literal["val", "test"],
    ) -> list[Outcome]:
        """Ask the sites to evaluate ``weights``; outcomes in site order."""
        return self.ask(grid, nodes, Instruction(self.order, server_round, split, weights))

    def ask(
        self,
        grid: Grid,
        nodes: Mapping[str, int],
        instruction: Instruction,
        take: Callable[[Reply], None] = lambda reply: None,
    ) -> list[Outcome]:
        """Send one instruction to every node and judge what comes back before the deadline.

        Args:
            grid: Carries the messages.
            nodes: Site to node id.
            instruction: What to ask.
            take: Is given every valid reply, in site order; only here does it have its update.
        """
        timeout = self.config.strategy.round_timeout_seconds
        cohort = self.cohort()
        nodes = {site: nodes[site] for site in cohort if site in nodes}
        instruction = replace(instruction, flower_run=grid.run.run_id)
        messages = self._messages(nodes, instruction)
        message_ids = list(grid.push_messages(messages))
        if len(message_ids) != len(messages):
            raise FederationError(
                f"round={instruction.server_round} task={instruction.task}: flower-superlink did "
                "not take the instructions",
                hint="its log says why; weights too large for it are the usual reason",
            )
        sent = dict(zip(nodes, message_ids, strict=True))
        deadline = time.monotonic() + timeout
        outcomes: list[Outcome] = []
        for site in cohort:
            message_id = sent.get(site)
            if not message_id:  # flower-superlink's way to say that the node has gone
                outcome = Outcome(site, "missing", "not connected")
            else:
                outcome = self._judge(grid, site, message_id, deadline, instruction)
            if outcome.reply is not None:
                take(outcome.reply)
            outcomes.append(self._recorded(outcome, instruction))
        return outcomes

    def _messages(self, nodes: Mapping[str, int], instruction: Instruction) -> list[Message]:
        content = instruction.to_content(self._order_key)
        kind = "train" if instruction.task == "train" else "evaluate"
        ttl = self.config.strategy.round_timeout_seconds + grace_seconds(len(nodes))
        group = str(instruction.server_round)
        return [Message(content, node, kind, ttl=ttl, group_id=group) for node in nodes.values()]

    def _judge(
        self, grid: Grid, site: str, message_id: str, deadline: float, instruction: Instruction
    ) -> Outcome:
        """Wait for one site's answer and decide what it is worth."""
        try:
            message = _reply_to(grid, message_id, deadline)
        except ProtocolError as error:
            return Outcome(site, "dropped", str(error))
        if message is None:
            seconds = self.config.strategy.round_timeout_seconds
            return Outcome(site, "missing", f"no reply within {seconds:g} s")
        if message.has_error():
            error = message.error
            return Outcome(site, "missing", f"Flower error {error.code}: {error.reason}")
        keys = self._admitted()  # where it cannot be read, the run ends: no site is to blame
        if site not in keys:
            return Outcome(site, "dropped", "the site was revoked meanwhile")
        version = code = ""
        try:
            reply = Reply.from_content(message.content, keys)
            if reply.site != site:
                raise ProtocolError(f"its node answered in the name of site={reply.site}")
            # Only a fresh signature counts: an old one can be replayed by anybody.
            if reply.message_id != message_id:
                raise ProtocolError("the signature covers another instruction")
            version, code = reply.version, reply.code_sha256
            if reply.status == "refused":
                check_refusal(reply)
                return Outcome(site, "refused", reply.reason, None, None, version, code)
            sums = check_reply(reply, instruction)
        except FederationError as error:
            return Outcome(site, "dropped", str(error), None, None, version, code)
        return Outcome(site, "ok", "", reply, sums, version, code)

    def _recorded(self, outcome: Outcome, instruction: Instruction) -> Outcome:
        """Write an outcome into the audit log; returns it without the update."""
        # What a stranger wrote must not forge a line of the log or fill the history.
        outcome = replace(outcome, reason=one_line(outcome.reason, limit=REASON_LENGTH))
        reply = outcome.reply
        self._audit.append(
            "outcome",
            run_uuid=instruction.run_uuid,
            server_round=instruction.server_round,
            task=instruction.task,
            site=outcome.site,
            status=outcome.status,
            reason=outcome.reason,
            code_sha256=outcome.code_sha256,
            bytes=num_bytes(reply.update) if reply else 0,
            arrays_sha256=hash_arrays(reply.update) if reply else "",
        )
        if outcome.status != "ok":
            log.warning(
                "round=%d task=%s site=%s status=%s reason=%s",
                instruction.server_round,
                instruction.task,
                outcome.site,
                outcome.status,
                outcome.reason,
            )
        return replace(outcome, reply=replace(reply, update={})) if reply else outcome


def grace_seconds(num_sites: int) -> float:
    """Return how much longer than the round an instruction and its reply are kept."""
    return GRACE_SECONDS + GRACE_SECONDS_PER_SITE * num_sites


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


def _reply_to(grid: Grid, message_id: str, deadline: float) -> Message | None:
    """Wait for one reply; those that came before it wait at the superlink, not in memory.

    Raises:
        ProtocolError: What the site sent is no message of Flower's.
    """
    while True:
        try:
            found = list(grid.pull_messages([message_id]))
        except ProtocolError:
            raise
        except Exception as error:  # Flower unpacks what a site wrote, and raises what happens
            # A connection or run that has ended raises here again, and is not the site's fault.
            list(grid.get_nodes())
            raise ProtocolError(f"its reply is not readable ({type(error).__name__})") from error
        for message in found:
            if message.metadata.reply_to_message_id == message_id:
                return message
        if time.monotonic() >= deadline:
            return None
        time.sleep(POLL_SECONDS)
