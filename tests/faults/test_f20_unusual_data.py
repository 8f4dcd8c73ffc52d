"""F20: sites with no images, images of one class, or fewer images than a batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from client import train as client_train
from client.data.registry import load as load_data
from client.data.source import DataSource
from client.site import registered
from fakes.command_lines import layout
from fakes.experiments import SITES, make_scenario, site_line, start, statuses
from faults.in_process import Here
from medmamba.weights import load
from simulation import experiment
from strategies.errors import DataError


def keep(part, rule):
    """The images of a site for which ``rule`` holds."""
    rows = [row for row, example in enumerate(part.manifest.examples) if rule(row, example)]
    return part.subset(rows)


def federate(path, scenario, **rules):
    """Run with only those images of a site that its rule keeps."""
    data = experiment.prepare(scenario)
    parts = {site: keep(part, rules.get(site, always)) for site, part in data.parts.items()}
    return start(path, scenario, data=replace(data, parts=parts))


def always(row, example) -> bool:
    return True


@pytest.mark.fault(
    "F20",
    fault="A site has no images, images of one class only, or fewer than a batch",
    injection="such sites in a federation; an empty folder, and a file without images",
    promise="no images: an error at the start, or the site sits out with its reason; one class or "
    "a small site: it trains with finite class weights; the others are not held up",
)
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_a_site_without_training_images_sits_out(tmp_path, norm):
    path = tmp_path / "run"
    scenario = make_scenario(run__model__norm=norm)
    summary = federate(path, scenario, B=lambda row, example: example.split != "train")
    assert statuses(path, "B") == ["refused", "refused"]
    assert site_line(path, 1, "B")["reason"] == "no-examples: this site has no training examples"
    assert statuses(path, "A") == statuses(path, "C") == ["ok", "ok"]
    assert set(summary["sites"]) == set(SITES)  # it still judges the model


@pytest.mark.fault("F20")
def test_a_site_without_any_image_is_in_no_figure(tmp_path):
    path = tmp_path / "run"
    summary = federate(path, make_scenario(), B=lambda row, example: False)
    assert statuses(path, "B") == ["refused", "refused"]
    assert site_line(path, 1, "B")["reason"] == "no-examples: this site has no training examples"
    others = sum(np.sum(summary["sites"][site]["confusion"]) for site in ("A", "C"))
    assert np.sum(summary["pooled"]["confusion"]) == others > 0


@pytest.mark.fault("F20")
@pytest.mark.parametrize("weighting", ["inverse-frequency", "effective-number"])
def test_a_site_of_one_class_trains_with_finite_weights(tmp_path, monkeypatch, weighting):
    found = {}
    compute = client_train.class_weights
    here = Here()

    def class_weights(counts, *arguments, **options):
        found[here.site] = counts, compute(counts, *arguments, **options)
        return found[here.site][1]

    monkeypatch.setattr(client_train, "class_weights", class_weights)
    scenario = make_scenario(run__training__class_weights=weighting)
    data = experiment.prepare(scenario)
    part = keep(data.parts["B"], lambda row, example: example.label == 1)
    path = tmp_path / "run"
    parts = {**data.parts, "B": part}
    summary = start(path, scenario, data=replace(data, parts=parts), fault=here)
    counts, weights = found["B"]
    assert np.count_nonzero(counts) == 1
    assert np.isfinite(weights).all()
    assert weights[1] == pytest.approx(1.0)
    assert statuses(path, "B") == ["ok", "ok"]
    assert np.isfinite(site_line(path, 2, "B")["train_loss"])
    assert summary["sites"]["B"]["auc"] is None  # of one class there is none
    assert summary["pooled"]["auc"] is not None
    state = load(path / "model.safetensors").state_dict()
    assert all(torch.isfinite(value).all() for value in state.values())


@pytest.mark.fault("F20")
def test_a_site_smaller_than_a_batch_takes_one_step_with_what_it_has(tmp_path):
    path = tmp_path / "run"
    scenario = make_scenario(run__training__batch_size=64, run__training__local_steps=0)
    few = {"B": 3}

    def three(row, example):
        if example.split == "train":
            few["B"] -= 1
        return example.split != "train" or few["B"] >= 0

    federate(path, scenario, B=three)
    line = site_line(path, 1, "B")
    assert (line["status"], line["num_examples"], line["num_steps"]) == ("ok", 3, 1)
    assert np.isfinite(line["train_loss"])


def empty_folder(folder):
    return DataSource(dataset="npz", file=folder / "images.npz", classes=("no", "yes"))


def no_images(folder):
    np.savez(folder / "images.npz", **layout(num_images=0))
    return empty_folder(folder)


@pytest.mark.fault("F20")
@pytest.mark.parametrize(
    ("source", "said"),
    [
        (empty_folder, "images.npz expected an existing npz file"),
        (no_images, "images.npz train_images=0 expected at least one image"),
    ],
)
def test_a_folder_or_file_without_images(tmp_path, monkeypatch, source, said):
    """Read at the start it is an error; found in a round, the site sits out."""
    declared = source(tmp_path)
    with pytest.raises(DataError, match=said) as error:
        load_data(declared, ["B"])
    assert error.value.exit_code == 2

    here = Here()

    def without_data(site, message):
        if site == "B":
            registered("B").load = lambda: load_data(declared, ["B"])
        return here(site, message)

    path = tmp_path / "run"
    start(path, make_scenario(), fault=without_data)
    assert statuses(path, "B") == ["refused", "refused"]
    assert (
        site_line(path, 1, "B")["reason"] == "no-data: the site's data cannot be read; see its log"
    )
    assert statuses(path, "A") == statuses(path, "C") == ["ok", "ok"]
