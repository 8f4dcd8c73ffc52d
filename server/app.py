"""The ServerApp: the same object under ``python -m server run`` and in the simulation.

Invariant: what it needs beside the run configuration (directory, admitted keys) is registered by
the process that hosts it, never sent over the wire.
"""

from __future__ import annotations

from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from server.rounds import Settings, execute
from strategies.errors import ConfigError
from strategies.run_config import RunConfig

app = ServerApp()


class _Host:
    """What the hosting process registered, and what the run gave back."""

    settings: Settings | None = None
    summary: dict[str, Any] | None = None


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Validate the run configuration and execute the run."""
    if _Host.settings is None:
        raise ConfigError("this process hosts no run", hint="start it with `python -m server run`")
    _Host.summary = execute(grid, RunConfig.parse(context.run_config), _Host.settings)


def run_app(grid: Grid, context: Context, settings: Settings) -> dict[str, Any]:
    """Call the ServerApp with ``settings`` and return the run's summary."""
    _Host.settings, _Host.summary = settings, None
    try:
        app(grid, context)
    finally:
        _Host.settings = None
    assert _Host.summary is not None
    return _Host.summary
