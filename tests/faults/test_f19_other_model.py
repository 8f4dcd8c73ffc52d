"""F19: a site whose program is of another version: other architecture, classes or wire format."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from flwr.app import Message

from client import app as client_app
from client.data.manifest import ImageDataset, Manifest
from client.train import train
from fakes.experiments import SITES, make_scenario, model_bytes, site_line, start, statuses
from faults.in_process import GRID
from server.rounds import initial_weights
from simulation import experiment
from simulation.grid import LocalGrid
from strategies import records

OLDER = records.SCHEMA_VERSION - 1


def other_model(site, run, server_round, weights):
    """B's program builds a wider network from the run's settings, and gets the run's weights."""
    return train(site, wider(run) if site.name == "B" else run, server_round, weights)


def own_model(site, run, server_round, weights):
    """B's program trains a wider network of its own."""
    if site.name == "B":
        run, weights = wider(run), initial_weights(wider(run))
    return train(site, run, server_round, weights)


def wider(run):
    return run.model_copy(update={"model": run.model.model_copy(update={"dims": "16,32"})})


@pytest.mark.fault(
    "F19",
    fault="A site's program is of another version: architecture, classes or wire format differ",
    injection="one site's program builds another network, has data of other classes, or speaks "
    "the wire format of an older version",
    promise="the site refuses, or its answer is dropped, in round 1, and the reason shows both "
    "sides' shape, number of classes or version; nothing is cut or broadcast to fit",
)
@pytest.mark.parametrize(
    ("program", "status", "reason"),
    [
        (
            other_model,
            "refused",
            r"other-architecture: \S+\.shape=\(8, .*\) in the given weights expected \(16, .*\) .*",
        ),
        (
            own_model,
            "dropped",
            r"array '\S+' has shape=\([\d, ]+\); expected \([\d, ]+\)",
        ),
    ],
)
def test_another_architecture(tmp_path, monkeypatch, program, status, reason):
    monkeypatch.setattr(client_app, "train", program)
    path = tmp_path / "run"
    start(path, make_scenario())
    assert statuses(path, "B") == [status, status]
    assert re.fullmatch(reason, site_line(path, 1, "B")["reason"])
    assert statuses(path, "A") == statuses(path, "C") == ["ok", "ok"]


@pytest.mark.fault("F19")
def test_other_classes(tmp_path):
    scenario = make_scenario()
    data = experiment.prepare(scenario)
    whole = data.parts["B"]
    kept = [row for row, example in enumerate(whole.manifest.examples) if example.label < 2]
    part = whole.subset(kept)
    two = Manifest(part.manifest.dataset, ("left", "right"), part.manifest.examples)
    parts = {**data.parts, "B": ImageDataset(two, part.images)}
    path = tmp_path / "run"
    start(path, scenario, data=replace(data, parts=parts))
    assert statuses(path, "B") == ["refused", "refused"]
    assert site_line(path, 1, "B")["reason"] == (
        "other-classes: 2 of this site's 2 classes match none of the run's"
    )
    assert statuses(path, "A") == statuses(path, "C") == ["ok", "ok"]


@pytest.mark.fault("F19")
def test_another_wire_format(tmp_path, monkeypatch, caplog):
    """The site and the server refuse each other's messages, each with both versions."""

    class Mixed(LocalGrid):
        def _deliver(self, site: str, message: Message) -> Message | None:
            with monkeypatch.context() as patch:
                if site == "B":
                    patch.setattr(records, "SCHEMA_VERSION", OLDER)
                return super()._deliver(site, message)

    monkeypatch.setattr(GRID, Mixed)
    path = tmp_path / "run"
    start(path, make_scenario())
    assert statuses(path, "B") == ["dropped", "dropped"]
    assert site_line(path, 1, "B")["reason"] == (f"schema-version={OLDER}; expected {OLDER + 1}")
    assert f"site=B refused=bad-instruction: schema-version={OLDER + 1}; expected {OLDER}" in (
        caplog.text
    )
    for site in set(SITES) - {"B"}:
        assert statuses(path, site) == ["ok", "ok"]
    assert model_bytes(path)
