"""How far a run is and who contributed when, from its ``history.jsonl``.

Invariant: reads a run that another process is writing; its last line may be half there. A resumed
run cut what it did twice, so every round is there once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from server.run_directory import HISTORY, RunDirectory
from strategies.errors import CheckpointError


@dataclass(frozen=True)
class SiteRound:
    """What a site did in one round.

    Attributes:
        status: ``ok``, ``refused``, ``dropped`` or ``missing``.
        reason: Why not ``ok``.
        code_sha256: Of the site's code as it signed; None when no reply counted.
        version: Likewise.
    """

    status: str
    reason: str
    code_sha256: str | None
    version: str | None


@dataclass
class Progress:
    """A run so far.

    Attributes:
        rounds: Round to its line: ``seconds``, ``num_sites``, ``num_examples``, ``train_loss``.
        validation: Round to the pooled validation metrics of its result.
        sites: Site to round to what it did, sites in name order.
    """

    rounds: dict[int, dict[str, Any]] = field(default_factory=dict)
    validation: dict[int, dict[str, Any]] = field(default_factory=dict)
    sites: dict[str, dict[int, SiteRound]] = field(default_factory=dict)

    @property
    def last_round(self) -> int:
        """The newest complete round; 0 before the first."""
        return max(self.rounds, default=0)


def read_progress(directory: RunDirectory) -> Progress:
    """Read a run's history; one that has none has done nothing.

    Raises:
        CheckpointError: A line of it is damaged.
    """
    path = directory.path / HISTORY
    progress = Progress()
    lines = path.read_bytes().split(b"\n") if path.exists() else [b""]
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline: being written
        try:
            _take(progress, json.loads(line))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path} line {number} is damaged") from error
    progress.sites = dict(sorted(progress.sites.items()))
    return progress


def _take(progress: Progress, line: dict[str, Any]) -> None:
    where = line["server_round"]
    if line["type"] == "round":
        progress.rounds[where] = line
    elif line["type"] == "evaluation" and line["split"] == "val":
        progress.validation[where] = line["pooled"]
    elif line["type"] == "site":
        done = SiteRound(
            line["status"], line["reason"], line.get("code_sha256"), line.get("version")
        )
        progress.sites.setdefault(line["site"], {})[where] = done
