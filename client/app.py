"""The ClientApp: the same handlers in a hospital's node and in the simulation.

Invariant: this is the only error boundary of a site. Flower forwards an exception's text to the
server, so nothing is raised past it: a refusal leaves as a signed reply with its declared reason,
any other failure as its class name alone; the full text stays in the site's log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.policy import check_run
from client.site import Site, registered
from client.train import check_scan_backend, evaluate, train
from strategies.arrays import hash_arrays
from strategies.errors import FederationError, ProtocolError, RefusalError
from strategies.records import Instruction, Reply
from strategies.run_config import SCAN_BACKENDS, RunConfig

log = logging.getLogger(__name__)

app = ClientApp()


@app.train()
def handle_train(message: Message, context: Context) -> Message:
    """Train one round; the reply also evaluates the weights it started from on validation data."""
    return _answer(message, context, _train)


@app.evaluate()
def handle_evaluate(message: Message, context: Context) -> Message:
    """Evaluate weights on the split that the instruction names."""
    return _answer(message, context, _evaluate)


def _train(site: Site, run: RunConfig, instruction: Instruction, message_id: str) -> Reply:
    if instruction.task != "train":
        raise ProtocolError(f"task={instruction.task} in a train message")
    started = time.monotonic()
    sums = evaluate(site, run, instruction.weights, "val")
    result = train(site, run, instruction.server_round, instruction.weights)
    seconds = time.monotonic() - started
    log.info(
        "round=%d site=%s loss=%.4f num_examples=%d steps=%d seconds=%.1f privacy=%s encryption=%s",
        instruction.server_round,
        site.name,
        result.loss,
        result.num_examples,
        result.num_steps,
        seconds,
        run.privacy.mode,
        run.encryption.mode,
    )
    return Reply(
        site=site.name,
        federation=instruction.federation,
        run_uuid=instruction.run_uuid,
        server_round=instruction.server_round,
        task="train",
        message_id=message_id,
        num_examples=result.num_examples,
        update=result.update,
        metrics={
            "train-loss": result.loss,
            "num-steps": result.num_steps,
            "seconds": seconds,
            "learning-rate": result.learning_rate,
            "scan-backend": SCAN_BACKENDS.index(result.scan_backend),
            **sums.to_metrics("val"),
        },
    )


def _evaluate(site: Site, run: RunConfig, instruction: Instruction, message_id: str) -> Reply:
    if instruction.task == "train":
        raise ProtocolError("task=train in an evaluate message")
    if instruction.task == "test":
        site.read_test_once(instruction.run_uuid, hash_arrays(instruction.weights))
    sums = evaluate(site, run, instruction.weights, instruction.task)
    log.info(
        "round=%d site=%s evaluated=%s num_examples=%d",
        instruction.server_round,
        site.name,
        instruction.task,
        sums.num_examples,
    )
    return Reply(
        site=site.name,
        federation=instruction.federation,
        run_uuid=instruction.run_uuid,
        server_round=instruction.server_round,
        task=instruction.task,
        message_id=message_id,
        num_examples=sums.num_examples,
        metrics=sums.to_metrics(instruction.task),
    )


def _answer(
    message: Message,
    context: Context,
    work: Callable[[Site, RunConfig, Instruction, str], Reply],
) -> Message:
    """Check, work, sign; turn every failure into a signed refusal."""
    site = registered(context.node_config.get("site"))
    try:
        instruction = Instruction.from_content(message.content)
        reply = _reply(site, instruction, message.metadata.message_id, context, work)
        site.audit.append(
            "answered",
            run_uuid=reply.run_uuid,
            server_round=reply.server_round,
            task=reply.task,
            status=reply.status,
            reason=reply.reason,
            num_examples=reply.num_examples,
            arrays_sha256=hash_arrays(reply.update),
        )
        return Message(reply.to_content(site.signing_key), reply_to=message)
    except Exception as error:
        log.exception("site=%s cannot answer", site.name)
        raise FederationError(f"site={site.name} cannot answer: {type(error).__name__}") from None


def _reply(
    site: Site,
    instruction: Instruction,
    message_id: str,
    context: Context,
    work: Callable[[Site, RunConfig, Instruction, str], Reply],
) -> Reply:
    """Work within the site's policy, or say why not.

    The audit entry comes before the work: a site that cannot write its log does not train.
    """
    site.audit.append(
        "received",
        run_uuid=instruction.run_uuid,
        server_round=instruction.server_round,
        task=instruction.task,
        message_id=message_id,
    )
    try:
        run = RunConfig.parse(context.run_config)
        check_run(site.config, run, instruction)
        site.check_classes(run.model.num_classes)
        check_scan_backend(site, run)
        return work(site, run, instruction, message_id)
    except RefusalError as error:
        log.warning(
            "round=%d site=%s refused=%s: %s",
            instruction.server_round,
            site.name,
            error.code,
            error,
        )
        reason = f"{error.code}: {error}"
    except Exception as error:
        log.exception("round=%d site=%s failed", instruction.server_round, site.name)
        reason = f"failed: {type(error).__name__}, see the site's log"
    return Reply(
        site=site.name,
        federation=instruction.federation,
        run_uuid=instruction.run_uuid,
        server_round=instruction.server_round,
        task=instruction.task,
        message_id=message_id,
        status="refused",
        reason=reason,
    )
