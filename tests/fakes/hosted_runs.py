"""A coordinator's state folder with admitted sites, and runs of it that need no superlink."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fakes.enrolments import request
from server.federation import Federation
from server.rounds import Settings
from strategies.enrolment import FederationPolicy


def federation(state_dir: Path, *sites: str, **policy: int) -> Federation:
    """A federation that has admitted these sites."""
    made = Federation.create(
        state_dir,
        name="lungs",
        address="127.0.0.1:8000",
        policy=FederationPolicy(**policy),  # type: ignore[arg-type]
    )
    for site in sites:
        made.admit(request(site))
    return made


def audited(federation: Federation) -> list[tuple[str, dict[str, Any]]]:
    """Events and fields of the coordinator's log, which must be intact."""
    federation.audit.verify()
    entries = map(json.loads, federation.audit.path.read_text().splitlines())
    return [(entry["event"], entry["fields"]) for entry in entries]


def round_lines(
    server_round: int, *, status: str = "ok", sites: tuple[str, ...] = ("A", "B")
) -> list[dict[str, Any]]:
    """What a round adds to the history: its line, validation, and a line a site."""
    ok = status == "ok"
    lines: list[dict[str, Any]] = [
        {
            "type": "evaluation",
            "server_round": server_round - 1,
            "split": "val",
            "pooled": {"auc": 0.5 + server_round / 100, "loss": 1.0},
            "sites": {},
        },
        {
            "type": "round",
            "server_round": server_round,
            "seconds": 10.0 * server_round,
            "num_sites": len(sites),
            "num_examples": 30,
            "train_loss": 1 / server_round,
        },
    ]
    for site in sites:
        last = site == sites[-1]
        lines.append(
            {
                "type": "site",
                "server_round": server_round,
                "site": site,
                "status": status if last else "ok",
                "reason": "" if ok or not last else "not connected",
                "version": "0.1.0" if ok or not last else None,
                "code_sha256": "c0de" * 16 if ok or not last else None,
            }
        )
    return lines


class Runs:
    """In place of the rounds: remembers what the ServerApp was given, and does what a test says.

    Attributes:
        settings: Of every sitting, in order.
        act: Called in place of the rounds.
    """

    def __init__(self, act: Callable[[Settings], object] = lambda settings: None) -> None:
        self.settings: list[Settings] = []
        self.act = act

    def __call__(self, grid: object, context: object, settings: Settings) -> dict[str, Any]:
        return self.execute(grid, settings)

    def execute(self, grid: object, settings: Settings) -> dict[str, Any]:
        """In place of :func:`server.rounds.execute`."""
        self.settings.append(settings)
        self.act(settings)
        return {"best_round": 1}
