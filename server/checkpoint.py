"""Checkpoints: after each round, one file that is all a killed server needs to go on.

Invariant: a checkpoint is written whole (temporary file, fsync, rename) and checked by its hash
when read; the one before it is kept, and used with a warning when the newest is damaged. It holds
the global weights, the best weights so far and the state as JSON.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from strategies.arrays import Arrays, hash_arrays
from strategies.errors import CheckpointError
from strategies.files import write_atomic
from strategies.records import MetricValue

log = logging.getLogger(__name__)

KEEP = 2


@dataclass(frozen=True)
class State:
    """Where a run stands after a round.

    Attributes:
        server_round: The last complete round.
        history_bytes: Length of the history at that moment.
        best_round: Round of the best weights on validation so far; 0: none judged yet.
        best_value: Their selection value, larger is better.
        best_sums: Validation sums behind it, by site, as :meth:`EvaluationSums.to_metrics` says.
        chosen: Whether the best weights are final; test may have been read.
        seconds: Time spent so far.
    """

    run_uuid: str
    server_round: int
    history_bytes: int
    best_round: int
    best_value: float | None
    best_sums: dict[str, dict[str, MetricValue]]
    chosen: bool
    seconds: float


def save_checkpoint(folder: Path, state: State, weights: Arrays, best: Arrays) -> None:
    """Write the checkpoint of ``state.server_round`` and drop all but the newest two."""
    tensors = {f"weights.{name}": value for name, value in weights.items()}
    tensors |= {f"best.{name}": value for name, value in best.items()}
    metadata = {"state": json.dumps(asdict(state)), "sha256": _digest(state, tensors)}
    path = folder / f"round_{state.server_round:06d}.safetensors"
    for left in folder.glob(".round_*"):  # by a process that was killed while it wrote
        left.unlink()
    write_atomic(path, save(tensors, metadata=metadata))
    for old in sorted(folder.glob("round_*.safetensors"))[:-KEEP]:
        old.unlink()


def load_checkpoint(folder: Path, run_uuid: str) -> tuple[State, Arrays, Arrays] | None:
    """Read the newest undamaged checkpoint.

    Returns:
        State, global weights and best weights; None when the run had not finished a round.

    Raises:
        CheckpointError: There are checkpoints and none is usable.
    """
    paths = sorted(folder.glob("round_*.safetensors"), reverse=True)
    for path in paths:
        try:
            return _read(path, run_uuid)
        except CheckpointError as error:
            log.warning("checkpoint=%s not used: %s", path.name, error)
    if paths:
        raise CheckpointError(
            "no checkpoint is usable", hint="start the run again with another --output"
        )
    return None


def check_shapes(weights: Arrays, expected: Arrays) -> None:
    """Compare a checkpoint with the model of the run.

    Raises:
        CheckpointError: Names or shapes differ; both shapes are shown.
    """
    for name in sorted(weights.keys() | expected.keys()):
        found = weights[name].shape if name in weights else "absent"
        wanted = expected[name].shape if name in expected else "absent"
        if found != wanted:
            raise CheckpointError(
                f"the checkpoint is of another architecture: {name} has shape={found} in it and "
                f"shape={wanted} in this run's model",
                hint="resume with the configuration the run was started with",
            )


def _read(path: Path, run_uuid: str) -> tuple[State, Arrays, Arrays]:
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        state = State(**json.loads(metadata["state"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError("it is not readable") from error
    if metadata.get("sha256") != _digest(state, tensors):
        raise CheckpointError("its content and its hash do not agree")
    if state.run_uuid != run_uuid:
        raise CheckpointError(f"it belongs to run_uuid={state.run_uuid}")
    return state, _part(tensors, "weights."), _part(tensors, "best.")


def _part(tensors: Arrays, prefix: str) -> Arrays:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _digest(state: State, tensors: Arrays) -> str:
    text = json.dumps(asdict(state), sort_keys=True) + hash_arrays(tensors)
    return hashlib.sha256(text.encode()).hexdigest()
