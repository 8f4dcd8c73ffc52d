"""The catalogue says what is published of each set, and nothing where nothing is."""

import csv
import re
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from client.data.catalogue import (
    Entry,
    catalogue,
    entry,
    file_backed_names,
    names,
)
from client.data.layouts import located
from client.data.medmnist import SIZES, medmnist_facts, record_url
from simulation.scenario import names as scenario_names
from simulation.scenario import read_scenario
from strategies.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
LAYOUTS = ROOT.parent / "shared" / "data" / "layouts"
needs_layouts = pytest.mark.skipif(
    not LAYOUTS.is_dir(), reason="the official layouts' files (shared/data) are not on this disk"
)

# Set, images, classes: from the record pages, MedMamba's README and medmnist 3.0.2.
PUBLISHED = {
    "pad-ufes-20": (2298, 6),
    "cervical-us": (3392, 4),
    "fetal-planes": (12400, 6),
    "cpn-xray": (5228, 3),
    "kvasir": (4000, 8),
    "otoscopy2024": (22581, 9),
    "pathmnist": (107180, 9),
    "dermamnist": (10015, 7),
    "octmnist": (109309, 4),
    "pneumoniamnist": (5856, 2),
    "retinamnist": (1600, 5),
    "breastmnist": (780, 2),
    "bloodmnist": (17092, 8),
    "organamnist": (58830, 11),
    "organcmnist": (23583, 11),
    "organsmnist": (25211, 11),
}
BESIDE = {"kvasir-v2": (8000, 8), "chestmnist": (112120, 14), "tissuemnist": (236386, 8)}


def test_the_sixteen_and_three_more_with_their_published_counts():
    found = {n: (e.images, len(e.classes)) for n, e in catalogue().items() if e.sixteen}
    assert found == PUBLISHED
    assert {n: (e.images, len(e.classes)) for n, e in catalogue().items()} == PUBLISHED | BESIDE
    assert set(names()) == PUBLISHED.keys() | BESIDE.keys()
    assert set(file_backed_names()) == set(names()) - medmnist_facts().keys()


@pytest.mark.parametrize("name", names())
def test_an_entry_agrees_with_itself(name):
    facts = entry(name)
    assert facts.name == name
    assert len(set(facts.classes)) == len(facts.classes) >= 2
    assert tuple(facts.class_counts) in ((), facts.classes)
    assert not facts.default_site_column or facts.default_site_column in facts.site_columns
    assert (facts.access == "private") == bool(facts.how)
    assert facts.file_backed == bool(facts.folder)
    if facts.access == "open" and facts.file_backed:
        assert facts.download.removesuffix("?download=1").endswith(f"/{facts.archive}")
    assert facts.url.startswith("https://")
    assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in facts.md5.values())


def test_who_may_earn_money_with_a_set():
    commercial = {name: facts.commercial for name, facts in catalogue().items()}
    assert Counter(commercial.values()) == {
        "yes": 2 + 11,
        "no": 1,
        "with written permission": 2,
        "not verified": 1,
        "not published": 2,
    }
    assert commercial["dermamnist"] == "no"
    assert commercial["kvasir"] == commercial["kvasir-v2"] == "with written permission"
    assert entry("cpn-xray").licence == "not verified"


def test_the_private_sets_say_whom_to_ask():
    private = {name for name, facts in catalogue().items() if facts.access == "private"}
    assert private == {"otoscopy2024", "cervical-us"}
    assert all("https://github.com/YubiaoYue/MedMamba" in entry(name).how for name in private)


def test_medmnist_sets_carry_the_md5_of_every_size_and_no_count_per_class():
    for name, info in medmnist_facts().items():
        facts = entry(name)
        assert facts.md5 == {info.file_name(size): info.md5[size] for size in SIZES}
        assert facts.class_counts == {}
        assert facts.examples == info.examples
        assert facts.url in record_url()


def test_the_multi_label_set_has_a_loss_and_metrics_of_its_own():
    (chest,) = (facts for facts in catalogue().values() if facts.multi_label)
    assert chest.name == "chestmnist"
    assert "binary cross-entropy of each finding" in chest.loss
    assert "averaged over the findings" in chest.metrics
    assert entry("breastmnist").loss == "cross-entropy weighted by class"


def test_which_splits_are_official():
    for facts in catalogue().values():
        if not facts.file_backed:
            assert (facts.official_split, facts.split[:8]) == ("train, val and test", "official")
    assert entry("fetal-planes").split == "official test; val drawn by patient from train"
    assert entry("pad-ufes-20").split == "seeded by patient"
    for name in ("cpn-xray", "kvasir", "kvasir-v2", "otoscopy2024", "cervical-us"):
        assert entry(name).split == "seeded by image (no patient ids)"


def test_a_mistyped_name_gets_a_suggestion():
    with pytest.raises(DataError, match="dataset=kvaser expected one of pad-ufes-20,") as error:
        entry("kvaser")
    assert error.value.hint == "did you mean kvasir?"


def test_an_unknown_fact_in_the_table_is_refused():
    with pytest.raises(ValidationError, match="colour"):
        Entry.model_validate({**entry("kvasir").model_dump(), "colour": "red"})


@needs_layouts
def test_the_counts_of_pad_are_those_of_its_own_table():
    with (LAYOUTS / "pad_ufes_20" / "metadata.csv").open() as file:
        rows = list(csv.DictReader(file))
    facts = entry("pad-ufes-20")
    assert Counter(row["diagnostic"] for row in rows) == facts.class_counts
    assert len({row["patient_id"] for row in rows}) == facts.patients
    assert set(facts.site_columns) < set(rows[0])
    assert located(facts, LAYOUTS).name == "pad_ufes_20"


@needs_layouts
def test_the_counts_of_kvasir_2_are_those_of_its_own_list():
    with (LAYOUTS / "kvasir" / "kvasir_v2_filelist.csv").open() as file:
        labels = Counter(row["label"] for row in csv.DictReader(file))
    assert labels == entry("kvasir-v2").class_counts
    assert labels.keys() == entry("kvasir").class_counts.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_of_the_sixteen_has_a_scenario_that_fits_it(name):
    assert name in scenario_names()
    scenario, facts = read_scenario(name, {}), entry(name)
    assert scenario.data.dataset == scenario.run.dataset == name
    assert scenario.run.model.num_classes == len(facts.classes)
    assert scenario.run.model.in_channels == (3 if facts.file_backed else facts.channels)
    natural = scenario.federation.partition == "natural"
    assert natural == bool(facts.default_site_column)
    text = (ROOT / "simulation" / "scenarios" / f"{name}.toml").read_text()
    assert f"#   python simulation/run.py --scenario {name} --data-dir DATA\n" in text
    assert "inutes" in text
    told = re.sub(r"\s+#?\s*", " ", text)
    assert ("images of one patient may lie in training and test" in told) == (
        facts.split == "seeded by image (no patient ids)"
    )


def test_the_table_in_the_documentation_is_the_catalogue():
    rows = [
        f"| {e.name} | {e.title} | {e.channels} | {len(e.classes)} | {e.images} | {e.split} "
        f"| {e.licence} | {e.commercial} | {e.access} | {e.tested} |"
        for e in catalogue().values()
        if e.file_backed
    ]
    text = (ROOT / "docs" / "data.md").read_text("utf-8")
    assert "\n".join(rows) in text
    shown = re.findall(r"^\| ([a-z0-9-]+) \|.*\| (?:open|private) \|", text, flags=re.MULTILINE)
    assert shown == list(file_backed_names())
