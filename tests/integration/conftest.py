"""One finished experiment that several files of this folder read, and runs without figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fakes.experiments import make_scenario, start
from simulation import experiment


@pytest.fixture
def no_report(monkeypatch) -> None:
    """Drawing figures takes as long as training; `finished`, of a wider scope, draws them once."""
    monkeypatch.setattr(experiment, "write_report", lambda path: None)


@pytest.fixture(scope="session")
def finished(tmp_path_factory) -> Path:
    """One run with everything: baseline and report. Tests only read it."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    start(path, make_scenario(federation__baselines=["pooled"]))
    return path


@pytest.fixture(scope="session")
def summary(finished) -> dict[str, Any]:
    return json.loads((finished / "summary.json").read_text())
