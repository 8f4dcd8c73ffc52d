"""Which order a site follows: the newest it has seen of the federation it joined.

Invariant: a site that has followed an order follows no older one, whoever sends it, also after a
restart; a run's settings never change under its name, also with other runs in between; and a round
that a run has left behind is not trained again. What cannot be read is not followed, and what
cannot be recorded neither.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from strategies.errors import RefusalError
from strategies.files import write_atomic
from strategies.identity import canonical
from strategies.orders import Order

# Far more than crashes of a coordinator in one round.
MOST_REPEATS = 10


class _Followed(BaseModel):
    """What a site remembers of orders.

    Attributes:
        order_sha256: Names the newest.
        issued_ms: When it was issued.
        runs: Every run's name and the hash of its settings.
        rounds: Every run's newest round that was trained here.
        trained: How many updates came of that round, or of the one before when asked for again.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    order_sha256: str = ""
    issued_ms: int = -1
    runs: dict[str, str] = {}
    rounds: dict[str, int] = {}
    trained: dict[str, int] = {}


def follow(path: Path, order: Order, record: Callable[[], object]) -> None:
    """Take an order for the newest, unless it is that already.

    Args:
        path: Where the site remembers orders.
        order: Verified, and allowed by the site.
        record: Writes a new order into the audit log, before it is followed.

    Raises:
        RefusalError: The site follows a newer order, or this run had other settings before, or the
            file cannot be read.
    """
    manifest = order.manifest
    followed = _read(path)
    if followed.order_sha256 == order.sha256:
        return
    if followed.issued_ms >= manifest.issued_ms:
        raise RefusalError("order-superseded", "this site follows a newer order")
    settings = hashlib.sha256(canonical(manifest.run_config)).hexdigest()
    if followed.runs.get(manifest.run_uuid, settings) != settings:
        raise RefusalError("run-changed", "this run began with other settings")
    if not path.exists():
        # Before the log mentions an order: a site that dies in between has lost nothing.
        _write(path, followed)
    record()
    changes = {
        "order_sha256": order.sha256,
        "issued_ms": manifest.issued_ms,
        "runs": {**followed.runs, manifest.run_uuid: settings},
    }
    _write(path, followed.model_copy(update=changes))


def begin_round(path: Path, run_uuid: str, server_round: int) -> None:
    """Note that a round is trained now, unless its run has left it behind.

    A coordinator that is killed asks again for its last round, and for the one before where its
    newest checkpoint is damaged. Whoever asks for older ones has recorded them, and whoever asks
    again and again wants more trainings than the run has rounds. What ended without an update (no
    memory, a stop, a crash) has told nobody anything and does not count.

    Raises:
        RefusalError: The run is further, or the round was trained too often, or the file cannot be
            read.
    """
    followed = _read(path)
    newest = followed.rounds.get(run_uuid, 0)
    trained = followed.trained.get(run_uuid, 0) if server_round <= newest else 0
    if server_round < newest - 1:
        raise RefusalError("round-passed", f"round={server_round}: the run is at {newest} here")
    if trained > MOST_REPEATS:
        raise RefusalError(
            "round-repeated", f"round={server_round}: trained again {MOST_REPEATS} times here"
        )
    changes = {
        "rounds": {**followed.rounds, run_uuid: max(newest, server_round)},
        "trained": {**followed.trained, run_uuid: trained},
    }
    _write(path, followed.model_copy(update=changes))


def finish_round(path: Path, run_uuid: str) -> None:
    """Count an update of the round begun last, before it is kept or sent.

    Raises:
        RefusalError: The file cannot be read.
    """
    followed = _read(path)
    trained = {**followed.trained, run_uuid: followed.trained.get(run_uuid, 0) + 1}
    _write(path, followed.model_copy(update={"trained": trained}))


def forget(path: Path) -> None:
    """Begin anew, for a site whose coordinator has a new key: no earlier order is one of its."""
    _write(path, _Followed())


def _write(path: Path, followed: _Followed) -> None:
    write_atomic(path, followed.model_dump_json(indent=1))


def _read(path: Path) -> _Followed:
    try:
        return _Followed.model_validate_json(path.read_bytes()) if path.exists() else _Followed()
    except (OSError, ValidationError) as error:
        raise RefusalError(
            "state-unreadable", "the site cannot read which order it follows"
        ) from error
