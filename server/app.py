"""The ServerApp: the same object under ``python -m server run``, in the simulation and in Flower.

The first two register what it needs beside the run configuration, and call it. Flower's executor
(``python -m server superlink --executor``) calls it for what ``flwr run . hospitals`` submits; then
it opens the coordinator's state folder, which the executor's environment names, and hosts a run by
itself.

Invariant: what it needs is on this machine, never sent over the wire; and what hosts a run is what
is installed here, although Flower unpacks a bundle of code with each run and puts it first.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from server.rounds import Settings

log = logging.getLogger(__name__)

# Set by `python -m server superlink --executor`: the coordinator's state folder, and where this
# project is installed.
STATE_VARIABLE, CODE_VARIABLE = "FEDERATION_STATE", "FEDERATION_CODE"
PACKAGES = ("client", "medmamba", "server", "strategies")
RUNS = "runs"

app = ServerApp()


class _Host:
    """What the hosting process registered, and what the run gave back."""

    settings: Settings | None = None
    summary: dict[str, Any] | None = None


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Execute the run that this process hosts, or host the one that Flower submitted."""
    if _Host.settings is not None:
        from server.rounds import execute

        _Host.summary = execute(grid, _Host.settings)
    elif state := os.environ.get(STATE_VARIABLE):
        _use_installed_code()
        importlib.import_module("server.app").host(grid, context, Path(state))
    else:
        raise ConfigError(
            f"this process hosts no run, and {STATE_VARIABLE} names no state folder",
            hint="`python -m server run`, or `flwr run` with `python -m server superlink "
            "--executor` running",
        )


def run_app(grid: Grid, context: Context, settings: Settings) -> dict[str, Any]:
    """Call the ServerApp with ``settings`` and return the run's summary."""
    _Host.settings, _Host.summary = settings, None
    try:
        app(grid, context)
    finally:
        _Host.settings = None
    assert _Host.summary is not None
    return _Host.summary


def host(grid: Grid, context: Context, state_dir: Path) -> Path:
    """Host the run of a Flower task, in ``runs/<run_uuid>`` of the coordinator's state folder.

    Args:
        grid: The task's.
        context: The task's; its run configuration is the run's.
        state_dir: The coordinator's state folder.

    Returns:
        The run's directory, with its report.

    Raises:
        ConfigError: No such folder, another run is hosted, or the run could never work.
        QuorumError: Too few sites; ``python -m server run --resume`` continues the run.
    """
    from server.console import finish, shown_rounds
    from server.federation import Federation
    from server.hosting import hosting
    from server.rounds import execute
    from server.session import begin, check_federation, create_directory, noted
    from strategies.run_config import RunConfig

    # The lines that `flwr log` shows; Flower has its own for its own.
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("flwr").propagate = False
    logging.getLogger("httpx").setLevel(logging.WARNING)
    federation = Federation.open(state_dir)
    for warning in federation.certificates().warnings():
        log.warning("%s", warning)
    run, run_uuid = RunConfig.parse(context.run_config), uuid.uuid4().hex
    path = federation.state_dir / RUNS / run_uuid
    with hosting(federation), shown_rounds(run) as show:
        check_federation(federation, run)
        directory = create_directory(federation, run_uuid, run, path)
        with directory.session(), noted(federation, run_uuid):
            settings = begin(federation, directory, run_uuid, run, show)
            summary = execute(grid, settings)
            directory.write_summary(summary)
    finish(path, summary)
    return path


def _use_installed_code() -> None:
    """Forget the bundle that this module was loaded from, so that imports find what is installed.

    Nothing that counts has been imported from it: this module imports what it needs when it runs.

    Raises:
        ConfigError: The environment does not say where that is.
    """
    installed = os.environ.get(CODE_VARIABLE)
    if not installed:
        raise ConfigError(
            f"{STATE_VARIABLE} without {CODE_VARIABLE}: nobody says what code to trust",
            hint="start the executor with `python -m server superlink --executor`",
        )
    bundle = Path(__file__).resolve().parent.parent
    if bundle != Path(installed):
        sys.path[:] = [installed, *(p for p in sys.path if Path(p).resolve() != bundle)]
        for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
            del sys.modules[name]
