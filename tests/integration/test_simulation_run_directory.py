"""A finished run directory is complete, reproduces its run and can be handed on."""

from __future__ import annotations

import json
import re

import pytest
import torch

from client.site import choose_device
from fakes.experiments import ROUNDS, SITES, history, make_scenario, site_line
from medmamba.config import ModelError
from medmamba.scan import active_backend, is_reproducible
from medmamba.weights import load
from simulation import experiment
from simulation.scenario import parse_scenario
from strategies.audit import AuditLog
from strategies.code import version
from strategies.errors import ConfigError
from strategies.run_config import METRIC_NAMES

pytestmark = pytest.mark.integration


def test_history_has_each_round_and_site_once(finished):
    entries = history(finished)
    keys = [(e["type"], e["server_round"], e.get("site"), e.get("split")) for e in entries]
    assert len(set(keys)) == len(keys)
    for server_round in range(1, ROUNDS + 1):
        assert ("round", server_round, None, None) in keys
        for site in SITES:
            assert ("site", server_round, site, None) in keys
    evaluated = [e["server_round"] for e in entries if e["type"] == "evaluation"]
    assert evaluated == list(range(ROUNDS + 1))


def test_history_names_what_ran_each_sites_scan(finished):
    name = active_backend(choose_device("auto"))
    for server_round in range(1, ROUNDS + 1):
        for site in SITES:
            line = site_line(finished, server_round, site)
            said = line["scan_backend"], line["scan_reproducible"]
            assert said == (name, is_reproducible(name))


def test_history_names_the_code_of_each_site(finished):
    for server_round in range(1, ROUNDS + 1):
        for site in SITES:
            line = site_line(finished, server_round, site)
            assert re.fullmatch("[0-9a-f]{64}", line["code_sha256"])
            assert line["version"] == version()


def test_the_coordinators_log_has_every_outcome(finished):
    log = AuditLog(finished / "audit.jsonl")
    log.verify()
    entries = [json.loads(line) for line in log.path.read_text().splitlines()[1:]]
    found = [
        (e["fields"]["task"], e["fields"]["server_round"], e["fields"]["site"]) for e in entries
    ]
    best = json.loads((finished / "summary.json").read_text())["best_round"]
    asked = [*(("train", n) for n in range(1, ROUNDS + 1)), ("val", ROUNDS), ("test", best)]
    assert found == [(task, n, site) for task, n in asked for site in SITES]
    assert {e["fields"]["status"] for e in entries} == {"ok"}


def test_sites_and_coordinator_tell_the_same_of_each_update(finished):
    """Whoever doubts a round compares the hashes of two logs."""

    def hashes(path, event):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return {
            (e["fields"].get("site", path.parent.name), e["fields"]["server_round"]): e["fields"][
                "arrays_sha256"
            ]
            for e in lines
            if e["event"] == event and e["fields"]["task"] == "train"
        }

    coordinator = hashes(finished / "audit.jsonl", "outcome")
    assert len(coordinator) == ROUNDS * len(SITES)
    for site in SITES:
        for key, value in hashes(finished / "sites" / site / "audit.jsonl", "answered").items():
            assert coordinator[key] == value


def test_pooled_training_stands_beside_with_as_many_steps(finished, summary):
    pooled = history(finished / "baselines" / "pooled")
    for server_round in range(1, ROUNDS + 1):
        together = sum(site_line(finished, server_round, s)["num_steps"] for s in SITES)
        (steps,) = (
            e["num_steps"]
            for e in pooled
            if (e["type"], e["server_round"]) == ("site", server_round)
        )
        assert steps == together == 2 * len(SITES)
    assert set(summary["baselines"]) == {"pooled"}
    assert summary["baselines"]["pooled"]["num_examples"] == summary["pooled"]["num_examples"]


def test_config_json_holds_what_reproduces_the_run(finished):
    config = json.loads((finished / "config.json").read_text())
    assert set(config) == {
        "run_uuid",
        "data",
        "federation",
        "scenario",
        "run_config",
        "seed",
        "git_commit",
        "versions",
        "provenance",
    }
    assert config["run_config"]["training"]["weight-decay"] == 0.05  # resolved, not only changes
    assert {"torch", "flwr", "monai", "numpy"} <= set(config["versions"])
    assert config["git_commit"]
    assert config["provenance"]["simulated"] is True
    assert config["provenance"]["device"] == choose_device("auto").type
    backend = active_backend(config["provenance"]["device"])
    assert config["provenance"]["scan_backend"] == backend


def test_provenance_names_the_scan_backend_that_the_run_forces(tmp_path):
    scenario = make_scenario(run__model__scan_backend="reference")
    directory = experiment.create(
        tmp_path / "run", scenario, experiment.prepare(scenario), "0" * 32
    )
    assert directory.config()["provenance"]["scan_backend"] == "reference"


def test_a_forced_scan_backend_that_is_missing_ends_before_anything_is_made(monkeypatch):
    def missing(device, backend):
        raise ModelError(f"backend={backend} cannot run here: no CUDA device", "install a driver")

    monkeypatch.setattr(experiment, "active_backend", missing)
    with pytest.raises(ConfigError) as error:
        experiment.prepare(make_scenario(run__model__scan_backend="triton"))
    text = "model.scan-backend=triton: backend=triton cannot run here: no CUDA device"
    assert (str(error.value), error.value.hint) == (text, "install a driver")


def test_config_json_read_back_reproduces_the_run(finished, tmp_path):
    stored = json.loads((finished / "config.json").read_text())
    scenario = parse_scenario({**stored["scenario"], "run": stored["run_config"]})
    names = "normal,benign,malignant"  # filled in from the dataset
    assert scenario == make_scenario(federation__baselines=["pooled"], run__classes=names)


def test_summary_json_holds_every_metric_for_all_sites_the_worst_and_the_baseline(summary):
    figures = [
        summary["pooled"],
        summary["worst_site"],
        summary["baselines"]["pooled"],
        *(summary["sites"][site] for site in SITES),
    ]
    for one in figures:
        assert set(METRIC_NAMES) <= set(one)
    assert set(summary["sites"]) == set(SITES)
    assert summary["worst_site"]["site"] in SITES
    assert summary["privacy"] == {"mode": "off"}
    assert summary["encryption"] == {"mode": "off"}
    assert summary["simulated"] is True
    total = sum(site["num_examples"] for site in summary["sites"].values())
    assert summary["pooled"]["num_examples"] == total


def test_the_directory_holds_its_files_and_nothing_temporary(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {
        "config.json",
        "history.jsonl",
        "audit.jsonl",
        "audit.lock",
        "summary.json",
        "partition.json",
        "checkpoints",
        "baselines",
        "sites",
        "model.safetensors",
        "report.html",
    }
    assert not [path for path in finished.rglob(".*")]


def test_no_file_names_the_folder_it_lies_in(finished):
    """A run directory is handed on; paths name people and projects."""
    place = str(finished.parent).encode()
    for path in finished.rglob("*"):
        if path.is_file():
            assert place not in path.read_bytes(), path.name


def test_the_model_loads_and_is_the_runs_architecture(finished):
    model = load(finished / "model.safetensors")
    assert model.config.dims == (8, 16)
    assert model.config.num_classes == 3
    assert torch.isfinite(model.eval()(torch.zeros(1, 1, 32, 32))).all()


def test_the_report_is_one_file_that_loads_nothing(finished):
    html = (finished / "report.html").read_text()
    loads = re.findall(r"""(?:src|href|action|data)\s*=\s*["']?\s*([^"'\s>]+)""", html)
    assert loads
    assert not [target for target in loads if not target.startswith(("data:", "#"))]
    assert not re.findall(r"url\(\s*[\"']?(?!data:|#)", html)
    assert "@import" not in html
    assert "<script src" not in html
    for site in SITES:
        assert site in html
