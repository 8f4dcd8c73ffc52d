"""The ClientApp: the same handlers in a hospital's node and in the simulation.

Invariant: this is the only error boundary of a site. Flower forwards an exception's text to the
server, so nothing is raised past it: a refusal leaves as a signed reply with its declared reason,
any other failure as its class name alone, with the system's words for a full disk and the like;
the full text stays in the site's log.
"""

from __future__ import annotations

import logging
import os
import time
from dataclasses import replace

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from client.policy import check_run, check_steps
from client.site import Site, registered
from client.train import check_scan_backend, evaluate, train
from strategies.arrays import hash_arrays, num_bytes
from strategies.cli import one_line
from strategies.errors import (
    DataError,
    FederationError,
    ProtocolError,
    RefusalError,
    SignatureError,
)
from strategies.records import REASON_LENGTH, Instruction, MetricValue, Reply, Task
from strategies.run_config import SCAN_BACKENDS

log = logging.getLogger(__name__)

app = ClientApp()

TASKS: dict[str, tuple[Task, ...]] = {"train": ("train",), "evaluate": ("val", "test")}


@app.train()
def handle_train(message: Message, context: Context) -> Message:
    """Train one round; the reply also evaluates the weights it started from on validation data."""
    return _answer(message, context, "train")


@app.evaluate()
def handle_evaluate(message: Message, context: Context) -> Message:
    """Evaluate weights on the split that the instruction names."""
    return _answer(message, context, "evaluate")


def _answer(message: Message, context: Context, kind: str) -> Message:
    """Verify, check, work, sign; turn every failure into a signed refusal."""
    site = registered(context.node_config.get("site"))
    site.begin_work()
    try:
        reply = replace(_reply(site, message, kind), message_id=message.metadata.message_id)
        site.audit.append(
            "answered",
            run_uuid=reply.run_uuid,
            server_round=reply.server_round,
            task=reply.task,
            status=reply.status,
            reason=reply.reason,
            num_examples=reply.num_examples,
            bytes=num_bytes(reply.update),
            # What an update gives away about one patient: without differential privacy, no limit.
            epsilon="unbounded" if reply.update else "none",
            arrays_sha256=hash_arrays(reply.update),
            code_sha256=reply.code_sha256,
        )
        return Message(reply.to_content(site.signing_key), reply_to=message)
    except Exception as error:
        log.exception("site=%s cannot answer", site.name)
        raise FederationError(f"site={site.name} cannot answer: {_kind(error)}") from None


def _kind(error: Exception) -> str:
    """Name a failure without its text, which may hold a path."""
    name = type(error).__name__
    if isinstance(error, OSError) and error.errno is not None:
        return f"{name} ({os.strerror(error.errno)})"
    return name


def _reply(site: Site, message: Message, kind: str) -> Reply:
    """Answer an instruction within the site's policy, or say why not.

    The audit entry comes before the work: a site that cannot write its log does not train.
    """
    federation = site.membership.federation
    reply = Reply(site.name, federation, "", 0, TASKS[kind][0], "")
    try:
        instruction = Instruction.from_content(
            message.content, site.membership.order_key, federation=federation
        )
        # The answer names the run from here on; before, nobody had proved that there is one.
        reply = replace(
            reply,
            run_uuid=instruction.run_uuid,
            server_round=instruction.server_round,
            task=instruction.task,
        )
        if instruction.flower_run != message.metadata.run_id:
            raise RefusalError("other-run", "the instruction was recorded in another Flower run")
        if instruction.task not in TASKS[kind]:
            raise ProtocolError(f"task={instruction.task} in a message of kind {kind}")
        site.audit.append(
            "received",
            run_uuid=instruction.run_uuid,
            server_round=instruction.server_round,
            task=instruction.task,
            message_id=message.metadata.message_id,
            order_sha256=instruction.order.sha256,
            weights_sha256=hash_arrays(instruction.weights),
        )
        return _allowed(site, instruction, reply)
    except RefusalError as error:
        code, text = error.code, str(error)
    except (ProtocolError, SignatureError) as error:
        code, text = "bad-instruction", str(error)
    except DataError:
        log.exception("site=%s data not readable", site.name)
        site.forget_data()
        code, text = "no-data", "the site's data cannot be read; see its log"
    except torch.OutOfMemoryError:
        log.exception("site=%s out of GPU memory", site.name)
        code, text = "out-of-memory", "the GPU has too little memory for this run"
    except Exception as error:
        log.exception("site=%s failed", site.name)
        code, text = "failed", f"{_kind(error)}, see the site's log"
    # What a stranger wrote must not forge a line of the site's log or fill its disk.
    reason = one_line(f"{code}: {text}", limit=REASON_LENGTH)
    log.warning("round=%d site=%s refused=%s", reply.server_round, site.name, reason)
    return replace(reply, status="refused", reason=reason)


def _allowed(site: Site, instruction: Instruction, reply: Reply) -> Reply:
    """Return the kept answer to an instruction that the site's limits allow, or work it out."""
    run = instruction.order.run
    check_run(site.config, run)
    site.follow(instruction.order)
    site.check_classes(run)
    site.check_images(run.model)
    check_steps(site.config, run, int(site.class_counts().sum()))
    check_scan_backend(site, run)
    kept = site.results.find(instruction) if site.results else None
    if kept is not None:
        log.info(
            "round=%d site=%s task=%s answered again, not worked out again",
            instruction.server_round,
            site.name,
            instruction.task,
        )
        return kept
    if site.results and instruction.task == "train":
        site.begin_round(instruction.run_uuid, instruction.server_round)
    work = _train if instruction.task == "train" else _evaluate
    answer = work(site, instruction, reply)
    if site.results:
        if instruction.task == "train":
            site.finish_round(instruction.run_uuid)
        site.results.keep(instruction, answer)
    return answer


def _train(site: Site, instruction: Instruction, reply: Reply) -> Reply:
    run = instruction.order.run
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
    metrics: dict[str, MetricValue] = {
        "train-loss": result.loss,
        "num-steps": result.num_steps,
        "seconds": seconds,
        "learning-rate": result.learning_rate,
        "scan-backend": SCAN_BACKENDS.index(result.scan_backend),
        **sums.to_metrics("val"),
    }
    return replace(reply, num_examples=result.num_examples, update=result.update, metrics=metrics)


def _evaluate(site: Site, instruction: Instruction, reply: Reply) -> Reply:
    if instruction.task == "test":
        site.read_test_once(instruction.run_uuid, hash_arrays(instruction.weights))
    sums = evaluate(site, instruction.order.run, instruction.weights, instruction.task)
    log.info(
        "round=%d site=%s evaluated=%s num_examples=%d",
        instruction.server_round,
        site.name,
        instruction.task,
        sums.num_examples,
    )
    return replace(reply, num_examples=sums.num_examples, metrics=sums.to_metrics(instruction.task))
