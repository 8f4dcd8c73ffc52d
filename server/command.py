"""``python -m server run``: from options to a hosted run and its report."""

from __future__ import annotations

import errno
import sys
import tomllib
import uuid
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid

from server.app import run_app
from server.console import finish, shown_rounds
from server.federation import Federation
from server.flower_runtime import host_run
from server.hosting import hosting
from server.run_directory import CONFIG, RunDirectory, require_new
from server.session import begin, check_federation, create_directory, noted
from strategies.errors import ConfigError, FederationError, StoppedError
from strategies.run_config import RunConfig, flatten, parse_assignments

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


@dataclass(frozen=True)
class Request:
    """The options of one ``server run``: ``output`` for a new run, or the one to ``resume``."""

    federation: Federation
    run_config: Path | None = None
    assignments: list[str] = field(default_factory=list)
    output: Path | None = None
    resume: Path | None = None


@dataclass(frozen=True)
class Plan:
    """A run that can start.

    Attributes:
        path: Its directory.
        directory: The one that is there, of a run that goes on.
    """

    run_uuid: str
    run: RunConfig
    path: Path
    directory: RunDirectory | None = None


def run(request: Request) -> int:
    """Host one run in the foreground, write its directory, print the result.

    Returns:
        0: complete. 130: a person stopped it; its directory has what was reached.

    Raises:
        QuorumError: Too few sites; the run can be resumed.
    """
    if request.resume is not None:
        finished = RunDirectory.open(request.resume).summary()
        if finished is not None:  # only the report is missing
            with _explained(request.resume):
                return finish(request.resume, finished)
    federation = request.federation
    with hosting(federation):
        plan = _resumed(request) if request.resume is not None else _new(request)
        check_federation(federation, plan.run)
        try:
            with _explained(plan.path), noted(federation, plan.run_uuid):
                summary = _host(federation, plan)
        except StoppedError as stopped:
            print(f"{stopped}\nstopped; {_what_is_left(plan.path)}", file=sys.stderr)
            return stopped.exit_code
    with _explained(plan.path):
        return finish(plan.path, summary)


def _host(federation: Federation, plan: Plan) -> dict[str, Any]:
    """Be the run's ServerApp until it is complete; returns its summary."""
    directory, summary = plan.directory, {}

    def main(grid: Grid, context: Context) -> None:
        nonlocal directory, summary
        if directory is None:  # only now: flower-superlink has taken the run
            directory = create_directory(federation, plan.run_uuid, plan.run, plan.path)
        with directory.session():
            settings = begin(federation, directory, plan.run_uuid, plan.run, show)
            summary = run_app(grid, context, settings)
            directory.write_summary(summary)

    with shown_rounds(plan.run) as show:
        host_run(
            address=federation.superlink_address,
            ca_file=federation.ca_file,
            secret_file=federation.secret_file,
            run=plan.run,
            main=main,
        )
    return summary


@contextmanager
def _explained(path: Path) -> Generator[None]:
    """Say with a failure how the run goes on once its cause is mended."""
    try:
        yield
    except ConfigError:
        raise
    except FederationError as error:
        if (path / CONFIG).exists() and "--resume" not in error.hint:
            error.hint = f"{error.hint}; " * bool(error.hint) + _what_is_left(path)
        raise
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        raise FederationError(
            f"output={path}: cannot write there or in the state folder ({error.strerror})",
            hint=f"make room; {_what_is_left(path)}",
        ) from error


def _what_is_left(path: Path) -> str:
    begun = (path / CONFIG).exists()
    return f"continue with --resume {path}" if begun else "nothing was begun"


def _new(request: Request) -> Plan:
    assert request.output is not None
    require_new(request.output)
    config = read_run_config(request.run_config, request.assignments)
    return Plan(uuid.uuid4().hex, config, request.output)


def _resumed(request: Request) -> Plan:
    assert request.resume is not None
    if request.run_config or request.assignments:
        raise ConfigError(
            "--resume takes the run's own configuration",
            hint="leave --run-config and --set out",
        )
    directory = RunDirectory.open(request.resume)
    config = RunConfig.parse(directory.stored("run_config", dict))
    return Plan(directory.stored("run_uuid", str), config, request.resume, directory)


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
