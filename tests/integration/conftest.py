"""One finished experiment, and the researcher's command line, for the files of this folder."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes.command_lines import TINY, Result, layout
from fakes.experiments import make_scenario, start
from server.report import write_report
from simulation.run import command
from strategies import cli


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """One run with everything: baseline and report. Tests only read it."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    start(path, make_scenario(federation__baselines=["pooled"]))
    write_report(path)
    return path


@pytest.fixture(scope="session")
def summary(finished) -> dict[str, Any]:
    return json.loads((finished / "summary.json").read_text())


@pytest.fixture
def run(capsys, caplog):
    """Run a command line in this process, exit code and standard error included."""
    caplog.set_level(logging.INFO)  # as the command line sets it where nothing else did
    handlers = list(logging.getLogger().handlers)
    filters = {handler: list(handler.filters) for handler in handlers}

    def _run(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as exit_:
            cli.run(command, [str(argument) for argument in arguments])
        assert isinstance(exit_.value.code, int)
        return Result(exit_.value.code, capsys.readouterr().err.splitlines())

    yield _run
    for handler in handlers:
        handler.filters = filters[handler]


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write an npz file and a scenario that uses it; returns both."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # keeps its images

    def _own(arrays: dict | None = None) -> tuple[Path, Path]:
        file = tmp_path / "own.npz"
        np.savez(file, **(layout() if arrays is None else arrays))
        scenario = tmp_path / "own.toml"
        data = f'[data]\ndataset = "npz"\nfile = "{file}"\nclasses = ["no", "yes"]\n'
        scenario.write_text(data + TINY)
        return file, scenario

    return _own
