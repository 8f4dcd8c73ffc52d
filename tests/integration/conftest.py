"""One finished experiment that several files of this folder read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fakes.experiments import make_scenario, start
from server.report import write_report


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
