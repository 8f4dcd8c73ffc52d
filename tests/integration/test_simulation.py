"""Whole experiments on the in-process Grid: reproducible to the byte, resumable, fault-tolerant."""

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message

from client.train import evaluate
from medmamba.weights import load, load_state, to_arrays
from server.metrics import metrics, selection_value
from server.rounds import initial_weights
from server.run_directory import RunDirectory
from simulation import experiment
from simulation.grid import Fault, no_fault
from simulation.scenario import Scenario, parse_scenario
from strategies.audit import AuditLog
from strategies.errors import QuorumError
from strategies.evaluation import EvaluationSums
from strategies.fedavg import FedAvg
from strategies.files import write_atomic
from strategies.identity import load_signing_key
from strategies.records import Arrays, Instruction, Reply, hash_arrays
from strategies.run_config import METRIC_NAMES, unflatten

pytestmark = pytest.mark.integration

SITES = ("A", "B", "C")
ROUNDS = 2
UUID = "0" * 32

TINY = {
    "data.dataset": "phantom",
    "data.patients-per-site": 9,
    "data.image-size": 32,
    "federation.num-sites": len(SITES),
    "federation.partition": "natural",
    "run.dataset": "phantom",
    "run.num-server-rounds": ROUNDS,
    "run.model.depths": "1,1",
    "run.model.dims": "8,16",
    "run.model.image-size": 32,
    "run.model.in-channels": 1,
    "run.training.local-steps": 2,
    "run.training.batch-size": 8,
    "run.training.learning-rate": 3e-3,
    "run.strategy.round-timeout-seconds": 0.05,
    "run.strategy.selection-metric": "loss",
}

OnReply = Callable[[str], None]


class Killed(BaseException):
    """Stands for the process being killed: nothing in the product catches it."""


def kill_after(messages: int) -> OnReply:
    """Kill the run when so many instructions were answered."""
    counter = iter(range(messages - 1, -1, -1))

    def on_reply(site: str) -> None:
        if next(counter) == 0:
            raise Killed

    return on_reply


def make_scenario(**changes) -> Scenario:
    """``run__training__batch_size=2`` stands for ``run.training.batch-size``."""
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return parse_scenario(unflatten({**TINY, **named}))


@pytest.fixture(autouse=True)
def _no_report(monkeypatch) -> None:
    """Drawing figures takes as long as training; `finished`, of a wider scope, draws them once."""
    monkeypatch.setattr(experiment, "write_report", lambda path: None)


def start(
    path: Path,
    scenario: Scenario,
    *,
    fault: Fault = no_fault,
    on_reply: OnReply = lambda site: None,
    data: experiment.Data | None = None,
) -> dict[str, Any]:
    directory = experiment.create(path, scenario, UUID)
    data = experiment.prepare(scenario) if data is None else data
    return experiment.execute(directory, scenario, data, fault=fault, on_reply=on_reply)


def resume(path: Path, on_reply: OnReply = lambda site: None) -> dict[str, Any]:
    """Continue from what the directory holds and nothing else, as the command line does."""
    directory = RunDirectory.open(path)
    stored = directory.config()
    scenario = parse_scenario({**stored["scenario"], "run": stored["run_config"]})
    data = experiment.prepare(scenario)
    return experiment.execute(directory, scenario, data, on_reply=on_reply)


def model_bytes(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def history(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "history.jsonl").read_text().splitlines()]


def untimed(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in entries]


def site_line(path: Path, server_round: int, site: str) -> dict[str, Any]:
    (line,) = (
        entry
        for entry in history(path)
        if (entry["type"], entry["server_round"]) == ("site", server_round)
        and entry["site"] == site
    )
    return line


def statuses(path: Path, site: str) -> list[str]:
    return [site_line(path, n, site)["status"] for n in range(1, ROUNDS + 1)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """One run with everything: baseline and report. Tests only read it."""
    path = tmp_path_factory.mktemp("runs") / "finished"
    start(path, make_scenario(federation__baselines=["pooled"]))
    return path


@pytest.fixture(scope="module")
def summary(finished) -> dict[str, Any]:
    return json.loads((finished / "summary.json").read_text())


# --- reproducible


def test_the_same_seed_gives_the_same_model_to_the_byte(finished, tmp_path):
    start(tmp_path / "again", make_scenario())
    assert model_bytes(tmp_path / "again") == model_bytes(finished)
    assert untimed(history(tmp_path / "again")) == untimed(history(finished))


def test_another_seed_gives_another_model(finished, tmp_path):
    start(tmp_path / "other", make_scenario(run__seed=1))
    assert model_bytes(tmp_path / "other") != model_bytes(finished)


def test_config_json_read_back_reproduces_the_run(finished, tmp_path):
    stored = json.loads((finished / "config.json").read_text())
    scenario = parse_scenario({**stored["scenario"], "run": stored["run_config"]})
    assert scenario == make_scenario(federation__baselines=["pooled"])


# --- interrupted


@pytest.mark.parametrize(
    "messages",
    [2, 3, 5, 8, 11, 14],
    ids=["round-1", "end-of-round-1", "round-2", "validation", "test", "pooled"],
)
def test_an_interrupted_run_ends_in_the_same_bytes(finished, tmp_path, messages):
    path = tmp_path / "run"
    scenario = make_scenario(federation__baselines=["pooled"] if messages > 12 else [])
    with pytest.raises(Killed):
        start(path, scenario, on_reply=kill_after(messages))
    assert not (path / "summary.json").exists()
    result = resume(path)
    assert model_bytes(path) == model_bytes(finished)
    assert untimed(history(path)) == untimed(history(finished))
    expected = json.loads((finished / "summary.json").read_text())
    assert result["pooled"] == expected["pooled"]
    if messages > 12:
        assert result["baselines"] == expected["baselines"]


def test_a_run_killed_again_and_again_ends_in_the_same_bytes(finished, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(Killed):
        start(path, make_scenario(), on_reply=kill_after(1))
    for messages in (4, 2, 5, 5):
        with pytest.raises(Killed):
            resume(path, on_reply=kill_after(messages))
    resume(path)
    assert model_bytes(path) == model_bytes(finished)
    assert untimed(history(path)) == untimed(history(finished))
    for site in SITES:
        AuditLog(path / "sites" / site / "audit.jsonl").verify()


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


# --- faults


def at(site: str, *server_rounds: int, task: str = "train"):
    """Return whether a message is this site's instruction of these rounds."""

    def match(name: str, message: Message) -> bool:
        asked = Instruction.from_content(message.content)
        return name == site and asked.task == task and asked.server_round in server_rounds

    return match


def test_a_lost_reply_is_recorded_and_the_site_is_asked_again(tmp_path):
    path = tmp_path / "run"
    lost = at("B", 2)
    scenario = make_scenario(run__num_server_rounds=3)
    start(path, scenario, fault=lambda s, m: "lose" if lost(s, m) else "deliver")
    assert [site_line(path, n, "B")["status"] for n in (1, 2, 3)] == ["ok", "missing", "ok"]
    line = site_line(path, 2, "B")
    assert line["reason"] == "no reply within 0.05 s"
    assert (line["num_examples"], line["num_steps"], line["train_loss"]) == (None, None, None)
    (round_line,) = (e for e in history(path) if (e["type"], e["server_round"]) == ("round", 2))
    assert round_line["num_sites"] == 2
    assert round_line["num_examples"] == sum(
        site_line(path, 2, site)["num_examples"] for site in ("A", "C")
    )


def test_the_model_is_the_weighted_mean_of_the_updates_that_arrived(tmp_path, monkeypatch):
    path = tmp_path / "run"
    lost = at("B", 1)
    scenario = make_scenario(run__num_server_rounds=1)
    arrived: list[Reply] = []
    aggregate = FedAvg.aggregate

    def spy(self: FedAvg, weights: Arrays, replies: Sequence[Reply]) -> Arrays:
        arrived.extend(replies)
        return aggregate(self, weights, replies)

    monkeypatch.setattr(FedAvg, "aggregate", spy)
    start(path, scenario, fault=lambda s, m: "lose" if lost(s, m) else "deliver")
    assert [reply.site for reply in arrived] == ["A", "C"]
    weights = initial_weights(scenario.run)
    total = sum(reply.num_examples for reply in arrived)
    for name, value in to_arrays(load(path / "model.safetensors")).items():
        mean = sum(reply.num_examples / total * reply.update[name] for reply in arrived)
        np.testing.assert_allclose(value, weights[name] + mean, rtol=1e-5, atol=1e-7)


def signed(path: Path, site: str, message: Message, **values) -> Message:
    """Answer in a site's name, with its own key, as a broken or hostile program there would."""
    asked = Instruction.from_content(message.content)
    reply = Reply(
        **{
            "site": site,
            "federation": asked.federation,
            "run_uuid": asked.run_uuid,
            "server_round": asked.server_round,
            "task": asked.task,
            "message_id": message.metadata.message_id,
            **values,
        }
    )
    key = load_signing_key(path / "sites" / site / "signing.key")
    return Message(reply.to_content(key), reply_to=message)


def nan_update(weights: Arrays) -> Arrays:
    return {name: np.full_like(value, np.nan) for name, value in weights.items()}


def test_an_update_of_nan_is_dropped_and_the_run_goes_on(tmp_path):
    path = tmp_path / "run"

    def fault(site: str, message: Message):
        asked = Instruction.from_content(message.content)
        if site != "B" or asked.task != "train":
            return "deliver"
        return signed(
            path,
            site,
            message,
            num_examples=10**6,
            update=nan_update(asked.weights),
            metrics={
                "train-loss": 1.0,
                "num-steps": 1,
                "seconds": 1.0,
                "learning-rate": 1.0,
                **EvaluationSums.zeros(3).to_metrics("val"),
            },
        )

    start(path, make_scenario(), fault=fault)
    assert statuses(path, "B") == ["dropped"] * ROUNDS
    assert "holds values that are not finite" in site_line(path, 1, "B")["reason"]
    assert statuses(path, "A") == ["ok"] * ROUNDS
    model = load(path / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())


def test_a_site_that_always_refuses_is_recorded_and_the_others_finish(tmp_path):
    path = tmp_path / "run"
    scenario = make_scenario()
    data = experiment.prepare(scenario)
    rows = [
        row
        for row, example in enumerate(data.parts["C"].manifest.examples)
        if example.split != "train"
    ]
    parts = {**data.parts, "C": data.parts["C"].subset(rows)}
    result = start(path, scenario, data=experiment.Data(data.dataset, parts))
    assert statuses(path, "C") == ["refused"] * ROUNDS
    assert site_line(path, 1, "C")["reason"] == "no-examples: this site has no training examples"
    assert set(result["sites"]) == set(SITES)  # it evaluates the model all the same


def test_a_site_that_cannot_write_its_log_sends_nothing_and_the_others_finish(tmp_path):
    path = tmp_path / "run"
    scenario = make_scenario()
    directory = experiment.create(path, scenario, UUID)
    (path / "sites" / "B" / "audit.jsonl").mkdir(parents=True)
    result = experiment.execute(directory, scenario, experiment.prepare(scenario))
    assert statuses(path, "B") == ["missing"] * ROUNDS
    assert statuses(path, "A") == ["ok"] * ROUNDS
    assert set(result["sites"]) == {"A", "C"}
    reasons = " ".join(result["not_tested"].values())
    assert "site=B cannot answer: IsADirectoryError" in reasons


def test_fewer_than_the_quorum_end_the_run_and_it_can_be_resumed(finished, tmp_path):
    path = tmp_path / "run"
    lost = (at("A", 2), at("C", 2))
    with pytest.raises(QuorumError) as error:
        start(
            path,
            make_scenario(),
            fault=lambda s, m: "lose" if any(one(s, m) for one in lost) else "deliver",
        )
    text = str(error.value)
    assert "round=2 valid updates=1; strategy.min-sites=2" in text
    assert "A: no reply within 0.05 s; C: no reply" in text
    assert "--resume" in error.value.hint
    assert not (path / "summary.json").exists()
    resume(path)
    assert model_bytes(path) == model_bytes(finished)
    assert untimed(history(path)) == untimed(history(finished))


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
        evaluate(experiment._site(site, part, path, scenario.run), scenario.run, weights, split)
        for site, part in experiment.prepare(scenario).parts.items()
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


# --- the run directory


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


def test_the_progress_bar_counts_every_message(tmp_path):
    answered: list[str] = []
    scenario = make_scenario(federation__baselines=["pooled"], run__num_server_rounds=1)
    start(tmp_path / "run", scenario, on_reply=answered.append)
    assert len(answered) == experiment.num_messages(scenario)


def test_a_damaged_newest_checkpoint_costs_a_round_not_the_run(finished, tmp_path):
    path = tmp_path / "run"
    with pytest.raises(Killed):
        start(path, make_scenario(), on_reply=kill_after(8))
    newest = path / "checkpoints" / "round_000002.safetensors"
    write_atomic(newest, newest.read_bytes()[:-100])
    resume(path)
    assert model_bytes(path) == model_bytes(finished)
    assert untimed(history(path)) == untimed(history(finished))


def test_a_moved_run_directory_can_be_resumed(finished, tmp_path):
    with pytest.raises(Killed):
        start(tmp_path / "run", make_scenario(), on_reply=kill_after(4))
    shutil.move(tmp_path / "run", tmp_path / "elsewhere")
    resume(tmp_path / "elsewhere")
    assert model_bytes(tmp_path / "elsewhere") == model_bytes(finished)
