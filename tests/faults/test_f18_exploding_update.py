"""F18: training that explodes at one site: values far too large, infinite, or not a number."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from client import app as client_app
from client.train import train
from fakes.experiments import make_scenario, model_bytes, site_line, start, statuses
from medmamba.weights import load
from strategies.errors import QuorumError

# A step of AdamW moves every weight by about the learning rate.
LARGE, ENORMOUS = 1e5, 1e37


def exploding(learning_rate: float, local_steps: int, spoil=lambda update: update):
    """Real training with a learning rate that no run may set; ``spoil`` is what no check stops."""

    def explode(site, run, server_round, weights):
        changes = {"learning_rate": learning_rate, "local_steps": local_steps}
        broken = run.model_copy(update={"training": run.training.model_copy(update=changes)})
        result = train(site, broken, server_round, weights)
        said = run.training.learning_rate  # what the site believes it did
        return replace(result, update=spoil(result.update), learning_rate=said)

    return explode


def beyond_float32(update):
    """The infinities that a step further gives."""
    with np.errstate(over="ignore"):
        return {name: value * np.float32(1e10) for name, value in update.items()}


def not_a_number(update):
    """What infinities become in the next sum."""
    with np.errstate(invalid="ignore"):
        return {name: value - value for name, value in beyond_float32(update).items()}


CASES = {
    "too-long": (exploding(LARGE, 1), "dropped", r"update norm=\d\S*: expected at most \d"),
    "infinite": (
        exploding(ENORMOUS, 1, beyond_float32),
        "dropped",
        r"array '\S+' holds values that are not finite",
    ),
    "nan": (
        exploding(ENORMOUS, 1, not_a_number),
        "dropped",
        r"array '\S+' holds values that are not finite",
    ),
    "seen-by-the-site": (
        exploding(ENORMOUS, 4),
        "refused",
        r"loss-not-finite: training stopped: the (loss is|weights are) not finite",
    ),
}


@pytest.mark.fault(
    "F18",
    fault="Training explodes at a site: its update is enormous, infinite or not a number",
    injection="real training at a learning rate of 1e5 and 1e37, at one site and at all of them",
    promise="the site notices and refuses, or the server drops the update with its reason; the "
    "other sites' model is the same as without it",
)
@pytest.mark.parametrize("case", CASES)
def test_an_exploding_site_spoils_nothing(case, tmp_path, monkeypatch):
    explode, status, reason = CASES[case]
    without, path = tmp_path / "without", tmp_path / "run"
    monkeypatch.setattr(client_app, "train", at_site("B", fails))
    start(without, make_scenario())
    monkeypatch.setattr(client_app, "train", at_site("B", explode))
    start(path, make_scenario())
    assert statuses(path, "B") == [status, status]
    assert re.fullmatch(reason + r".*", site_line(path, 1, "B")["reason"])
    assert statuses(path, "A") == statuses(path, "C") == ["ok", "ok"]
    assert model_bytes(path) == model_bytes(without)
    state = load(path / "model.safetensors").state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.fault("F18")
def test_when_all_explode_the_run_ends_and_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(client_app, "train", exploding(LARGE, 1))
    with pytest.raises(QuorumError, match=r"round=1 valid updates=0; .* \(A: update norm=\d") as e:
        start(tmp_path / "run", make_scenario())
    assert "--resume" in e.value.hint
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def at_site(name: str, other):
    """Train otherwise at one site."""

    def choose(site, *arguments):
        return (other if site.name == name else train)(site, *arguments)

    return choose


def fails(*arguments):
    raise RuntimeError
