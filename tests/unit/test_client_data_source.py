"""A data source is checked when declared and loads exactly what it declares."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from client.data import registry
from client.data.registry import load
from client.data.source import DataSource, dataset_names
from strategies.errors import DataError

FILES = Path(__file__).resolve().parents[3] / "shared" / "data" / "medmnist"
needs_files = pytest.mark.skipif(
    not (FILES / "breastmnist.npz").exists(), reason="official MedMNIST files are not on this disk"
)


@pytest.fixture
def own_file(tmp_path):
    contents = {}
    for split in ("train", "val", "test"):
        contents[f"{split}_images"] = np.full((4, 12, 12, 3), 7, np.uint8)
        contents[f"{split}_labels"] = np.array([0, 1, 0, 1])
    path = tmp_path / "own.npz"
    np.savez(path, **contents)
    return path


def source(**table) -> DataSource:
    return DataSource.model_validate(table)


def test_toml_keys_are_kebab_case():
    table = {"dataset": "breastmnist", "data-dir": "/d", "allow-altered": True, "image-size": 64}
    declared = source(**table)
    assert declared.data_dir == Path("/d")
    assert declared.allow_altered
    assert declared.stored_size == 64


def test_absent_sizes_are_the_usual_ones():
    assert source().stored_size == 64
    assert source(dataset="breastmnist").stored_size == 28


def test_a_source_survives_being_written_down_and_read_back():
    declared = source(dataset="npz", file="/d/own.npz", classes=["a", "b"])
    written = declared.model_dump(mode="json", by_alias=True)
    assert DataSource.model_validate(written) == declared


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("brestmnist", "did you mean breastmnist?"),
        ("phantm", "did you mean phantom?"),
        ("zzz", "valid: "),
    ],
)
def test_an_unknown_data_set_gets_the_nearest_name(name, hint):
    with pytest.raises(DataError, match=f"dataset={name} expected one of phantom, npz") as error:
        source(dataset=name)
    assert error.value.hint.startswith(hint)


def test_every_name_is_accepted():
    for name in dataset_names():
        extra = {"file": "f", "classes": ["a", "b"]} if name == "npz" else {}
        assert source(dataset=name, **extra).dataset == name


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"file": "x.npz"}, "file=x.npz has no effect with dataset=phantom"),
        ({"download": True}, "download=True has no effect with dataset=phantom"),
        ({"dataset": "breastmnist", "classes": ["a"]}, r"classes=\('a',\) has no effect with"),
        ({"dataset": "breastmnist", "seed": 3}, "seed=3 has no effect with dataset=breastmnist"),
        (
            {"dataset": "npz", "file": "x", "classes": ["a"], "image-size": 64},
            "image-size=64 has no effect with dataset=npz",
        ),
        ({"dataset": "npz", "file": "x.npz"}, "dataset=npz expected file and classes"),
        ({"dataset": "npz", "classes": ["a"]}, "dataset=npz expected file and classes"),
        (
            {"dataset": "npz", "file": "x", "classes": ["a"]},
            "^classes=a: expected at least two classes$",
        ),
        ({"dataset": "octmnist", "image-size": 32}, "image-size=32 expected one of 28, 64, 128"),
        ({"image-size": 8}, "image-size=8 expected at least 16"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(table, message):
    with pytest.raises(DataError, match=message):
        source(**table)


def test_unknown_keys_and_values_out_of_range_are_refused():
    for table in ({"data_folder": "x"}, {"patients-per-site": 0}, {"seed": -1}):
        with pytest.raises(ValueError, match=next(iter(table))):
            source(**table)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, True) for key in ("patients-per-site", "seed", "image-size")),
        *((key, "3") for key in ("patients-per-site", "seed", "image-size")),
        *((key, 3.0) for key in ("patients-per-site", "seed", "image-size")),
        *((key, value) for key in ("download", "allow-altered") for value in ("no", 0, 1)),
    ],
)
def test_a_value_of_another_type_is_not_converted(key, value):
    with pytest.raises(ValidationError, match=r"valid (integer|boolean)"):
        source(**{"dataset": "breastmnist", key: value})


def test_paths_and_lists_are_what_toml_has_for_them():
    declared = source(dataset="npz", file="own.npz", classes=["a", "b"])
    assert declared.file == Path("own.npz")
    assert declared.classes == ("a", "b")


def test_the_phantom_is_generated_for_the_sites_asked_for():
    declared = source(**{"patients-per-site": 3, "image-size": 16, "seed": 5})
    data = load(declared, ["A", "B"])
    assert {e.site for e in data.manifest.examples} == {"A", "B"}
    assert data.images.shape[1:] == (16, 16)
    assert len(data.manifest.patients) == 6
    other_seed = load(declared.model_copy(update={"seed": 6}), ["A", "B"])
    assert not np.array_equal(other_seed.images[:3], data.images[:3])


def test_an_own_file_is_read_with_its_classes_and_its_md5(own_file):
    data = load(source(dataset="npz", file=str(own_file), classes=["a", "b"]), ["A"])
    assert data.manifest.class_counts().tolist() == [6, 6]
    assert data.manifest.classes == ("a", "b")
    assert {e.site for e in data.manifest.examples} == {"A"}
    assert len(data.provenance["md5"]) == 32
    assert "official" not in data.provenance


def test_file_examples_of_several_sites_wait_for_the_partition(own_file):
    data = load(source(dataset="npz", file=str(own_file), classes=["a", "b"]), ["A", "B"])
    assert {e.site for e in data.manifest.examples} == {""}


def test_an_own_file_that_is_not_there_is_told(tmp_path):
    declared = source(dataset="npz", file=str(tmp_path / "no.npz"), classes=["a", "b"])
    with pytest.raises(DataError, match=r"no\.npz expected an existing npz file"):
        load(declared, ["A"])


@needs_files
def test_a_medmnist_file_is_loaded_from_the_folder(caplog):
    data = load(source(**{"dataset": "breastmnist", "data-dir": str(FILES)}), ["A"])
    assert len(data) == 780
    assert data.provenance["official"] is True
    assert caplog.text == ""


def test_an_altered_medmnist_file_is_loaded_only_when_allowed(own_file, tmp_path, caplog):
    own_file.rename(tmp_path / "bloodmnist.npz")
    table = {"dataset": "bloodmnist", "data-dir": str(tmp_path)}
    with pytest.raises(DataError, match="altered"):
        load(source(**table), ["A"])
    assert len(load(source(**table, **{"allow-altered": True}), ["A"])) == 12
    assert "altered file allowed" in caplog.text


def test_nothing_is_downloaded_unless_the_source_says_so(tmp_path, monkeypatch):
    fetched = []

    def fetch(name, size, data_dir):
        fetched.append((name, size, data_dir))
        raise DataError("stop here")

    monkeypatch.setattr(registry, "fetch", fetch)
    table = {"dataset": "breastmnist", "data-dir": str(tmp_path), "image-size": 64}
    with pytest.raises(DataError, match=r"breastmnist_64\.npz not found"):
        load(source(**table), ["A"])
    assert fetched == []
    with pytest.raises(DataError, match="stop here"):
        load(source(**table, download=True), ["A"])
    assert fetched == [("breastmnist", 64, tmp_path)]


@needs_files
def test_a_file_that_is_there_is_not_downloaded_again(monkeypatch):
    monkeypatch.setattr(registry, "fetch", None)
    table = {"dataset": "breastmnist", "data-dir": str(FILES), "download": True}
    assert len(load(source(**table), ["A"])) == 780


def test_a_multi_label_set_is_refused_before_it_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "fetch", None)
    table = {"dataset": "chestmnist", "data-dir": str(tmp_path), "download": True}
    with pytest.raises(DataError, match="multi-label, which is not supported yet"):
        load(source(**table), ["A"])
