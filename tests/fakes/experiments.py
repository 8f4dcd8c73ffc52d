"""Small experiments on the in-process Grid: start, kill and resume them, read what they wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from server.run_directory import RunDirectory
from simulation import experiment
from simulation.grid import Fault, no_fault
from simulation.scenario import Scenario, parse_scenario
from strategies.run_config import unflatten

SITES = ("A", "B", "C")
ROUNDS = 2
UUID = "0" * 32

TINY = {
    "data.dataset": "phantom",
    "data.patients-per-site": 9,
    "data.image-size": 32,
    "federation.num-sites": len(SITES),
    "federation.partition": "natural",
    "run.dataset": "phantom",
    "run.num-server-rounds": ROUNDS,
    "run.model.depths": "1,1",
    "run.model.dims": "8,16",
    "run.model.image-size": 32,
    "run.model.in-channels": 1,
    "run.training.local-steps": 2,
    "run.training.batch-size": 8,
    "run.training.learning-rate": 3e-3,
    "run.strategy.round-timeout-seconds": 0.05,
    "run.strategy.selection-metric": "loss",
}

OnReply = Callable[[str], None]


class Killed(BaseException):
    """Stands for the process being killed: nothing in the product catches it."""


def kill_after(messages: int) -> OnReply:
    """Kill the run when so many instructions were answered."""
    counter = iter(range(messages - 1, -1, -1))

    def on_reply(site: str) -> None:
        if next(counter) == 0:
            raise Killed

    return on_reply


def make_scenario(**changes) -> Scenario:
    """``run__training__batch_size=2`` stands for ``run.training.batch-size``."""
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return parse_scenario(unflatten({**TINY, **named}))


def start(
    path: Path,
    scenario: Scenario,
    *,
    fault: Fault = no_fault,
    on_reply: OnReply = lambda site: None,
    data: experiment.Data | None = None,
) -> dict[str, Any]:
    data = experiment.prepare(scenario) if data is None else data
    directory = experiment.create(path, scenario, data, UUID)
    return experiment.execute(directory, scenario, data, fault=fault, on_reply=on_reply)


def resume(path: Path, on_reply: OnReply = lambda site: None) -> dict[str, Any]:
    """Continue from what the directory holds and nothing else, as the command line does."""
    directory = RunDirectory.open(path)
    stored = directory.config()
    scenario = parse_scenario({**stored["scenario"], "run": stored["run_config"]})
    data = experiment.prepare(scenario)
    return experiment.execute(directory, scenario, data, on_reply=on_reply)


def model_bytes(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def history(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]


def untimed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def site_line(path: Path, server_round: int, site: str) -> dict[str, Any]:
    (line,) = (
        entry
        for entry in history(path)
        if (entry["type"], entry["server_round"]) == ("site", server_round)
        and entry["site"] == site
    )
    return line


def statuses(path: Path, site: str) -> list[str]:
    return [site_line(path, n, site)["status"] for n in range(1, ROUNDS + 1)]
