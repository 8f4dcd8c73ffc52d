"""An experiment outlasts lost and bad replies; killed, it goes on and ends in the same bytes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message

from client import app as app_module
from client.site import Site
from fakes.experiments import (
    ROUNDS,
    SITES,
    UUID,
    Killed,
    history,
    kill_after,
    make_scenario,
    model_bytes,
    resume,
    site_line,
    start,
    statuses,
    untimed,
)
from fakes.orders import unverified
from medmamba.weights import load, to_arrays
from server.rounds import initial_weights
from simulation import experiment
from strategies.arrays import Arrays
from strategies.audit import AuditLog
from strategies.errors import QuorumError
from strategies.evaluation import EvaluationSums
from strategies.fedavg import WeightedMean
from strategies.files import write_atomic
from strategies.identity import load_signing_key
from strategies.records import Reply

pytestmark = pytest.mark.integration


# --- faults


def at(site: str, *server_rounds: int, task: str = "train"):
    """Return whether a message is this site's instruction of these rounds."""

    def match(name: str, message: Message) -> bool:
        asked = unverified(message.content)
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
    add = WeightedMean.add

    def spy(self: WeightedMean, reply: Reply) -> None:
        arrived.append(reply)
        add(self, reply)

    monkeypatch.setattr(WeightedMean, "add", spy)
    start(path, scenario, fault=lambda s, m: "lose" if lost(s, m) else "deliver")
    assert [reply.site for reply in arrived] == ["A", "C"]
    weights = initial_weights(scenario.run)
    total = sum(reply.num_examples for reply in arrived)
    for name, value in to_arrays(load(path / "model.safetensors")).items():
        mean = sum(reply.num_examples / total * reply.update[name] for reply in arrived)
        np.testing.assert_allclose(value, weights[name] + mean, rtol=1e-5, atol=1e-7)


def signed(path: Path, site: str, message: Message, **values) -> Message:
    """Answer in a site's name, with its own key, as a broken or hostile program there would."""
    asked = unverified(message.content)
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
        asked = unverified(message.content)
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
                "scan-backend": 0,
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
    data = experiment.prepare(scenario)
    directory = experiment.create(path, scenario, data, UUID)
    (path / "sites" / "B" / "audit.jsonl").mkdir(parents=True)
    result = experiment.execute(directory, scenario, data)
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


# --- interrupted


def test_the_choice_outlives_the_process(finished, tmp_path):
    """Test may have been read for it, so it is not made again."""
    path = tmp_path / "run"
    training, validation = ROUNDS * len(SITES), len(SITES)
    with pytest.raises(Killed):
        start(path, make_scenario(), on_reply=kill_after(training + validation + 1))
    asked = []
    resume(path, on_reply=asked.append)
    assert asked == list(SITES)  # for test, and nothing else
    assert model_bytes(path) == model_bytes(finished)
    assert untimed(history(path)) == untimed(history(finished))


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


def test_a_run_goes_on_though_the_clock_was_set_back(finished, tmp_path):
    """Each session has an order key of its own: earlier orders are another coordinator's."""
    path = tmp_path / "run"
    with pytest.raises(Killed):
        start(path, make_scenario(), on_reply=kill_after(4))
    for orders in path.glob("sites/*/orders.json"):
        ahead = {**json.loads(orders.read_text()), "issued_ms": 2**52}
        orders.write_text(json.dumps(ahead))
    resume(path)
    assert model_bytes(path) == model_bytes(finished)


@pytest.mark.parametrize("messages", [1, 2, 3, 5, 8])
def test_sites_that_keep_their_answers_train_each_round_once(
    finished, tmp_path, monkeypatch, messages
):
    """As in hospitals: a killed coordinator asks again, and is sent what was worked out."""

    def keeping(*arguments, **options):
        return Site(*arguments, **{**options, "keep_results": True})

    monkeypatch.setattr(experiment, "Site", keeping)
    trained: list[tuple[str, int]] = []
    train = app_module.train

    def spy(site, run, server_round, weights):
        trained.append((site.name, server_round))
        return train(site, run, server_round, weights)

    monkeypatch.setattr(app_module, "train", spy)
    path = tmp_path / "run"
    with pytest.raises(Killed):
        start(path, make_scenario(), on_reply=kill_after(messages))
    resume(path)
    assert trained == [(site, n) for n in range(1, ROUNDS + 1) for site in SITES]
    assert model_bytes(path) == model_bytes(finished)


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
