"""``python -m server run``: from options to a hosted run and its report."""

from __future__ import annotations

import logging
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from flwr.app import Context
from flwr.serverapp import Grid

from server.app import run_app
from server.flower_runtime import host_run
from server.metrics import auc_error_text
from server.report import write_report
from server.rounds import Settings, check
from server.run_directory import RunDirectory, provenance, require_new
from strategies.errors import ConfigError
from strategies.identity import fingerprint, read_public_keys
from strategies.run_config import (
    METRIC_NAMES,
    RunConfig,
    flatten,
    parse_assignments,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """The options of one ``server run``."""

    address: str
    secret_file: Path
    site_keys: Path
    federation: str
    run_config: Path | None
    assignments: list[str]
    output: Path | None
    resume: Path | None
    run_uuid: str


def run(request: Request) -> int:
    """Host one run in the foreground, write its directory, print the result."""
    keys = read_public_keys(request.site_keys)
    if request.resume is not None:
        finished = RunDirectory.open(request.resume).summary()
        if finished is not None:  # only the report is missing
            return finish(request.resume, finished)
    open_directory, config, run_uuid, federation = (
        _resumed(request) if request.resume is not None else _new(request, keys)
    )

    def main(grid: Grid, context: Context) -> None:
        # Only now is there something to keep: flower-superlink has taken the run.
        directory = open_directory()
        with directory.session():
            summary = run_app(grid, context, Settings(directory, federation, run_uuid, keys))
        directory.write_summary(summary)
        finish(directory.path, summary)

    host_run(request.address, request.secret_file, config, main)
    return 0


def finish(path: Path, summary: Mapping[str, Any]) -> int:
    """Write a run's report and print its last lines; returns the exit code."""
    write_report(path)
    print(result_lines(summary, path))
    return 0


Plan = tuple[Callable[[], RunDirectory], RunConfig, str, str]


def _new(request: Request, keys: Mapping[str, Ed25519PublicKey]) -> Plan:
    path = request.output
    assert path is not None
    require_new(path)
    config = read_run_config(request.run_config, request.assignments)
    check(config, len(keys))
    document = {
        "run_uuid": request.run_uuid,
        "federation": request.federation,
        "run_config": config.model_dump(by_alias=True),
        "seed": config.seed,
        "sites": {site: fingerprint(key) for site, key in keys.items()},
        **provenance(),
        "provenance": {
            "scan_backend": config.model.scan_backend,
            "simulated": False,
        },
    }
    return (
        lambda: RunDirectory.create(path, document),
        config,
        request.run_uuid,
        request.federation,
    )


def _resumed(request: Request) -> Plan:
    assert request.resume is not None
    if request.run_config or request.assignments:
        raise ConfigError(
            "--resume takes the run's own configuration",
            hint="leave --run-config and --set out",
        )
    directory = RunDirectory.open(request.resume)
    config = RunConfig.parse(directory.stored("run_config", dict))
    run_uuid, federation = (directory.stored(name, str) for name in ("run_uuid", "federation"))
    return lambda: directory, config, run_uuid, federation


def read_run_config(path: Path | None, assignments: list[str]) -> RunConfig:
    """Combine defaults, a TOML file and ``key=value`` words, in that order.

    Raises:
        ConfigError: An unreadable file, an unknown key, a value out of bounds.
    """
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = flatten(tomllib.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ConfigError(f"run-config={path} cannot be read ({error.strerror})") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"run-config={path} is not TOML: {error}") from error
    return RunConfig.parse({**values, **parse_assignments(assignments)})


def result_lines(summary: Mapping[str, Any], path: Path) -> str:
    """Return the last lines of a run: test figures of all sites together and of each."""
    names = ("auc", "balanced_accuracy", "accuracy", "f1")
    assert set(names) <= set(METRIC_NAMES)
    rows = [("pooled", summary["pooled"]), *summary["sites"].items()]
    if "pooled" in summary.get("baselines", {}):
        rows.append(("pooled training", summary["baselines"]["pooled"]))
    width = max(len(auc_error_text(figures)) for _, figures in rows)
    head = f"{'test':<16}{'examples':>9}" + "".join(f"{name:>19}" for name in names)
    lines = [head]
    for name, figures in rows:
        shown = {metric: _shown(figures[metric]) for metric in names}
        # An AUC without an error is padded: decimal points stay below each other.
        shown["auc"] += auc_error_text(figures).ljust(width)
        values = "".join(f"{text:>19}" for text in shown.values())
        lines.append(f"{name:<16}{figures['num_examples']:>9}{values}")
    low, high = summary["pooled"]["auc_low_95"], summary["pooled"]["auc_high_95"]
    if low is not None:
        lines.append(f"pooled AUC 95 % interval {low:.3f} to {high:.3f}")
    lines.append(
        f"round {summary['best_round']} of {summary['num_server_rounds']} chosen on validation "
        f"{summary['selection']['metric']}; privacy={summary['privacy']['mode']} "
        f"encryption={summary['encryption']['mode']}"
    )
    lines.append(f"report {path / 'report.html'}")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"
