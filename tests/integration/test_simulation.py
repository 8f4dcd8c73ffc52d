"""Whole experiments on the in-process Grid: reproducible to the byte, the best round chosen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client.train import evaluate
from fakes.experiments import (
    ROUNDS,
    SITES,
    UUID,
    history,
    make_scenario,
    model_bytes,
    start,
    statuses,
    untimed,
)
from medmamba.weights import load, load_state, to_arrays
from server.metrics import metrics, selection_value
from server.rounds import initial_weights
from simulation import experiment
from simulation.scenario import Scenario
from strategies.arrays import hash_arrays
from strategies.audit import AuditLog
from strategies.evaluation import EvaluationSums

pytestmark = pytest.mark.integration


# --- reproducible


def test_the_same_seed_gives_the_same_model_to_the_byte(finished, tmp_path):
    start(tmp_path / "again", make_scenario())
    assert model_bytes(tmp_path / "again") == model_bytes(finished)
    assert untimed(history(tmp_path / "again")) == untimed(history(finished))


def test_another_seed_gives_another_model(finished, tmp_path):
    start(tmp_path / "other", make_scenario(run__seed=1))
    assert model_bytes(tmp_path / "other") != model_bytes(finished)


# --- what is chosen and tested


def test_the_test_split_is_read_once_per_site_and_for_the_chosen_model(finished):
    weights_hash = hash_arrays(to_arrays(load(finished / "model.safetensors")))
    for site in SITES:
        folder = finished / "sites" / site
        AuditLog(folder / "audit.jsonl").verify()
        lines = (folder / "audit.jsonl").read_text().splitlines()
        entries = [json.loads(line) for line in lines]
        tasks = [e["fields"]["task"] for e in entries if e["event"] == "answered"]
        assert tasks == ["train"] * ROUNDS + ["val", "test"]
        assert json.loads((folder / "test-reads.json").read_text()) == {UUID: weights_hash}


@pytest.mark.parametrize("metric", ["loss", "balanced_accuracy"])
def test_the_best_round_is_the_best_on_validation(tmp_path, metric):
    path = tmp_path / "run"
    scenario = make_scenario(
        run__num_server_rounds=4,
        run__training__learning_rate=0.05,  # too large: it gets worse before the last round
        run__strategy__selection_metric=metric,
    )
    result = start(path, scenario)
    values = {
        entry["server_round"]: selection_value(entry["pooled"], metric)
        for entry in history(path)
        if entry["type"] == "evaluation" and entry["server_round"] > 0
    }
    assert sorted(values) == [1, 2, 3, 4]
    best = max(values.values())
    assert result["best_round"] == min(n for n, value in values.items() if value == best)
    assert result["best_round"] < 4
    assert result["selection"] == {"metric": metric, "split": "val", "value": abs(best)}
    # The model on disk is that round's: its validation figures are the ones in the history.
    pooled = metrics(evaluated(path, scenario, "val"))
    assert selection_value(pooled, metric) == best


def evaluated(path: Path, scenario: Scenario, split: str) -> EvaluationSums:
    """Evaluate a run's model on every site's images, without the federation."""
    weights = to_arrays(load(path / "model.safetensors"))
    sums: Iterator[EvaluationSums] = (
        evaluate(site, scenario.run, weights, split)
        for site in (
            experiment._site(name, part, path, scenario.run.dataset, Ed25519PrivateKey.generate())
            for name, part in experiment.prepare(scenario).parts.items()
        )
    )
    return reduce(EvaluationSums.__add__, sums)


def test_the_summary_holds_the_chosen_models_test_figures(finished, summary):
    sums = evaluated(finished, make_scenario(), "test")
    assert summary["pooled"]["confusion"] == sums.confusion.tolist()
    expected = metrics(sums)
    assert {name: summary["pooled"][name] for name in expected} == expected


# --- strategies and norms


def test_fedprox_without_mu_is_fedavg_to_the_bit(finished, tmp_path):
    path = tmp_path / "run"
    start(path, make_scenario(run__strategy__name="fedprox", run__strategy__proximal_mu=0.0))
    for state, other in zip(
        load_state(path / "model.safetensors")[1].items(),
        load_state(finished / "model.safetensors")[1].items(),
        strict=True,
    ):
        assert state[0] == other[0]
        assert torch.equal(state[1], other[1])


def test_fedprox_runs_and_mu_changes_the_model(finished, tmp_path):
    path = tmp_path / "run"
    result = start(path, make_scenario(run__strategy__name="fedprox", run__strategy__proximal_mu=1))
    assert result["strategy"] == "fedprox"
    assert model_bytes(path) != model_bytes(finished)


def test_batch_norm_runs_and_its_statistics_are_averaged(tmp_path):
    path = tmp_path / "run"
    scenario = make_scenario(run__model__norm="batch")
    start(path, scenario)
    assert [statuses(path, site) for site in SITES] == [["ok"] * ROUNDS] * 3
    state = load_state(path / "model.safetensors")[1]
    start_weights = initial_weights(scenario.run)
    moved = [
        name
        for name, value in state.items()
        if name.endswith("running_mean") and not np.array_equal(value, start_weights[name])
    ]
    assert moved == [name for name in state if name.endswith("running_mean")]
    assert moved


# --- progress


def test_the_progress_bar_counts_every_message(tmp_path):
    answered: list[str] = []
    scenario = make_scenario(federation__baselines=["pooled"], run__num_server_rounds=1)
    start(tmp_path / "run", scenario, on_reply=answered.append)
    assert len(answered) == experiment.num_messages(scenario)
