"""F24: a site whose program calls a metric by another name."""

from __future__ import annotations

import pytest

from fakes.experiments import SITES, history, make_scenario, site_line, start, statuses
from faults.in_process import Here
from strategies.errors import QuorumError
from strategies.evaluation import EvaluationSums

RENAMED = "metrics val-loss, val-loss-sum are missing or not declared"


@pytest.fixture
def renamed(monkeypatch):
    """Rename a metric in the program of some sites; returns what links see."""

    def _renamed(*sites: str) -> Here:
        here, to_metrics = Here(), EvaluationSums.to_metrics

        def other_name(self, prefix):
            metrics = to_metrics(self, prefix)
            if any(here.at(site) for site in sites):
                metrics["val-loss"] = metrics.pop("val-loss-sum")
            return metrics

        monkeypatch.setattr(EvaluationSums, "to_metrics", other_name)
        return here

    return _renamed


@pytest.mark.fault(
    "F24",
    fault="A metric is missing from a site's answer",
    injection="the program of one site, then of all, calls a metric by another name",
    promise="dropped in round 1 with the metric's name; no round is chosen on figures that are "
    "not there, and a run without any figures ends in round 1",
)
def test_an_answer_without_a_metric_is_dropped_in_round_1(tmp_path, renamed):
    path = tmp_path / "run"
    summary = start(path, make_scenario(), fault=renamed("B"))
    assert statuses(path, "B") == ["dropped", "dropped"]
    assert site_line(path, 1, "B")["reason"] == RENAMED
    first = next(entry for entry in history(path) if entry["type"] == "evaluation")
    assert set(first["sites"]) == {"A", "C"}
    assert summary["best_round"] > 0
    assert summary["selection"]["value"] is not None


@pytest.mark.fault("F24")
def test_a_run_without_a_metric_ends_in_round_1(tmp_path, renamed):
    path = tmp_path / "run"
    with pytest.raises(QuorumError) as error:
        start(path, make_scenario(), fault=renamed(*SITES))
    assert str(error.value).startswith("round=1 valid updates=0; ")
    assert all(f"{site}: {RENAMED}" in str(error.value) for site in SITES)
    assert not (path / "model.safetensors").exists()
