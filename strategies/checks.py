"""What a verified reply must hold before it is counted.

Invariant: a signature says who spoke, not that it makes sense. Everything that would spoil the
weights or the figures of all sites is caught here: other rounds, counts beyond the cap, names and
shapes that are not the model's, numbers that are not finite or far too large.
"""

from __future__ import annotations

import math

import numpy as np

from strategies.arrays import Arrays
from strategies.errors import ProtocolError
from strategies.evaluation import EvaluationSums
from strategies.records import Instruction, Reply

# An update this many times as long as the weights is a fault, and one of them ends all learning.
MAX_UPDATE_RATIO = 100.0


def check_reply(reply: Reply, instruction: Instruction) -> EvaluationSums:
    """Check an ``ok`` reply against the instruction it answers and return its evaluation sums.

    Raises:
        ProtocolError: It answers something else, or its numbers or arrays are not usable.
    """
    for name in ("federation", "run_uuid", "server_round", "task"):
        if getattr(reply, name) != getattr(instruction, name):
            raise ProtocolError(
                f"{name}={getattr(reply, name)!r}: expected {getattr(instruction, name)!r}"
            )
    run = instruction.order.run
    cap, num_classes = run.strategy.max_num_examples, run.model.num_classes
    smallest = 1 if reply.task == "train" else 0
    if not smallest <= reply.num_examples <= cap:
        raise ProtocolError(f"num-examples={reply.num_examples}: expected {smallest} to {cap}")
    prefix = "val" if reply.task == "train" else reply.task
    sums = EvaluationSums.from_metrics(prefix, reply.metrics, num_classes)
    if sums.num_examples > cap:
        raise ProtocolError(f"{prefix}-num-examples={sums.num_examples}: expected 0 to {cap}")
    if reply.key_epoch != 0:
        raise ProtocolError(f"key-epoch={reply.key_epoch}: expected 0, nothing is encrypted")
    if reply.reason:
        raise ProtocolError("reason: expected none where status is ok")
    if reply.task == "train":
        _check_update(reply.update, instruction.weights)
    elif reply.update:
        raise ProtocolError(f"arrays={len(reply.update)}: expected none, this is an evaluation")
    elif sums.num_examples != reply.num_examples:
        raise ProtocolError(
            f"num-examples={reply.num_examples} but {sums.num_examples} were evaluated"
        )
    return sums


def check_refusal(reply: Reply) -> None:
    """Check that a ``refused`` reply brings nothing but its reason.

    Raises:
        ProtocolError: It brings more.
    """
    if reply.update or reply.num_examples or reply.key_epoch:
        raise ProtocolError("a refusal that brings arrays or examples: expected its reason alone")


def _check_update(update: Arrays, weights: Arrays) -> None:
    if update.keys() != weights.keys():
        odd = sorted(update.keys() ^ weights.keys())
        raise ProtocolError(f"arrays {', '.join(odd[:3])} are missing or unknown ({len(odd)})")
    for name, value in sorted(update.items()):
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
