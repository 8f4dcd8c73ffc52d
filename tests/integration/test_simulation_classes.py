"""A simulated run names its classes: the scenario's, or else the dataset's."""

import json

import pytest

from fakes.experiments import make_scenario, start
from simulation import experiment
from strategies.errors import ConfigError

pytestmark = pytest.mark.integration


def stored(path) -> dict:
    return json.loads((path / "config.json").read_text())["run_config"]


def test_without_a_word_they_are_the_datasets(tmp_path):
    path = tmp_path / "run"
    summary = start(path, make_scenario())
    assert stored(path)["classes"] == "normal,benign,malignant"
    assert summary["classes"] == ["normal", "benign", "malignant"]


def test_a_run_declares_another_order_and_other_names(tmp_path):
    path = tmp_path / "run"
    plain = experiment.prepare(make_scenario())
    scenario = make_scenario(
        run__classes='"malignant, sure",benign,normal',
        data__label_map={"malignant": "Malignant, SURE"},
    )
    data = experiment.prepare(scenario)
    assert data.dataset.manifest.class_counts().tolist() == (
        plain.dataset.manifest.class_counts()[::-1].tolist()
    )
    summary = start(path, scenario, data=data)
    assert stored(path)["classes"] == '"malignant, sure",benign,normal'
    assert summary["classes"] == ["malignant, sure", "benign", "normal"]


def test_mapped_names_are_the_classes_of_a_run_that_names_none():
    scenario = make_scenario(
        data__label_map={"benign": "lesion", "malignant": "lesion"}, run__model__num_classes=2
    )
    data = experiment.prepare(scenario)
    assert data.dataset.manifest.classes == ("normal", "lesion")
    assert experiment.declared(scenario.run, data).class_names == ("normal", "lesion")


def test_a_class_that_matches_none_of_the_runs_is_refused():
    with pytest.raises(ConfigError, match="classes not mapped: malignant; the run has") as error:
        experiment.prepare(make_scenario(run__classes="normal,benign,bad"))
    assert '"malignant" = ' in error.value.hint
