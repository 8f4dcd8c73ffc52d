"""Each of the sixteen sets, in its official layout, through its own scenario and one round."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from client.data.catalogue import catalogue, entry
from client.data.manifest import SPLITS
from fakes.experiments import history
from fakes.miniatures import miniature

pytestmark = pytest.mark.integration

SIXTEEN = [name for name, facts in catalogue().items() if facts.sixteen]
PRIVATE = [name for name in SIXTEEN if entry(name).access == "private"]
# Of what the scenario says, only the model, the work and the deadlines are made smaller.
SMALL = {
    "num-server-rounds": "1",
    "model.depths": "1,1",
    "model.dims": "8,16",
    "model.image-size": "16",
    "training.local-steps": "1",
    "training.batch-size": "8",
    "strategy.round-timeout-seconds": "0.05",
    "strategy.selection-metric": "loss",
    "federation.min-examples": "1",
}


@pytest.fixture(autouse=True)
def _caches(tmp_path, monkeypatch):
    """Keep what is decoded out of the home folder."""
    (tmp_path / "shared").mkdir()
    monkeypatch.setenv("FEDERATION_DATA", str(tmp_path / "shared"))


def per_class(name: str) -> int:
    return 6 if name == "kvasir" else 12  # the only one of large pictures


def small(name: str, data: Path, output: Path) -> list[object]:
    """Return the command line of a set's scenario on few images."""
    changes = dict(SMALL)
    if not entry(name).file_backed:
        changes["data.allow-altered"] = "true"  # a miniature has not the published MD5
    if name in ("breastmnist", "pneumoniamnist"):
        changes["federation.baselines"] = ""
    settings = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    return ["--scenario", name, "--data-dir", data, "--output", output, *settings]


@pytest.mark.parametrize("name", SIXTEEN)
def test_a_round_of_each_of_the_sixteen(name, run, tmp_path):
    data = miniature(name, tmp_path / "data", per_class=per_class(name))
    result = run(*small(name, data, tmp_path / "run"))
    assert result.code == 0, result.lines
    facts = entry(name)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["pooled"]["confusion"]) == len(facts.classes)
    sites = json.loads((tmp_path / "run" / "partition.json").read_text())["sites"]
    if name == "fetal-planes":
        assert set(sites) == {"Aloka", "Other", "Voluson-E6", "Voluson-S10"}
    elif name == "kvasir":
        assert set(sites) == {"upto-720x576", "upto-1280x1024", "over-1280x1024"}
    else:
        assert set(sites) == {"A", "B", "C"}
    total = sum(sum(site[split]) for site in sites.values() for split in SPLITS)
    assert total == per_class(name) * len(facts.classes) * (1 if facts.file_backed else 3)
    trained = [line for line in history(tmp_path / "run") if line["type"] == "site"]
    assert {(line["site"], line["status"]) for line in trained} == {(s, "ok") for s in sites}
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("name", PRIVATE)
def test_a_private_set_that_is_not_there_fails_with_one_line_on_how_to_get_it(name, run, tmp_path):
    result = run("--scenario", name, "--data-dir", tmp_path, "--output", tmp_path / "run")
    assert result.code == 2
    assert result.error == f"error: dataset={name} is private and not in {tmp_path}"
    assert result.hint == f"hint: {entry(name).how}"
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [name for name in SIXTEEN if name not in PRIVATE])
def test_a_set_that_is_not_there_fails_with_one_line_on_how_to_get_it(name, run, tmp_path):
    result = run("--scenario", name, "--data-dir", tmp_path, "--output", tmp_path / "run")
    assert result.code == 2
    assert "not found in" in result.error
    wanted = f"python -m client data fetch {name} " if entry(name).file_backed else "download"
    assert wanted in result.hint
    assert not (tmp_path / "run").exists()


def test_the_site_column_is_a_choice(run, tmp_path):
    data = miniature("fetal-planes", tmp_path / "data", per_class=24)
    words = small("fetal-planes", data, tmp_path / "run")
    result = run(*words, "--set", "data.site-column=Operator", "--set", "federation.num-sites=4")
    assert result.code == 0, result.lines
    sites = json.loads((tmp_path / "run" / "partition.json").read_text())["sites"]
    assert set(sites) == {"Op-1", "Op-2", "Op-3", "Other"}


def test_no_patient_of_pad_is_in_two_splits_or_at_two_sites(run, tmp_path):
    data = miniature("pad-ufes-20", tmp_path / "data")
    assert run(*small("pad-ufes-20", data, tmp_path / "run")).code == 0
    sites = json.loads((tmp_path / "run" / "partition.json").read_text())["sites"]
    # Two images a patient: every count of a site is even only if none was cut in two.
    assert sum(site["num_patients"] for site in sites.values()) == 6 * 12 / 2
    assert all(sum(site[split]) % 2 == 0 for site in sites.values() for split in SPLITS)
