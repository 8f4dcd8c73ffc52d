"""A data source is checked when declared and loads exactly what it declares."""

from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from client.data import registry
from client.data.dicom import WINDOWS, DicomOptions
from client.data.registry import load
from client.data.source import WINDOW_PRESETS, WINDOW_WORDS, DataSource, dataset_names
from fakes import pictures
from strategies.errors import DataError

FILES = Path(__file__).resolve().parents[3] / "shared" / "data" / "medmnist"
needs_files = pytest.mark.skipif(
    not (FILES / "breastmnist.npz").exists(), reason="official MedMNIST files are not on this disk"
)


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    """Keep the images of a simulation out of the home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


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


# The least that each kind needs.
LEAST = {
    "npz": {"file": "f", "classes": ["a", "b"]},
    "folder": {"folder": "f"},
    "csv": {"file": "f"},
    "dicom": {"folder": "f", "labels": "l"},
}


def test_every_name_is_accepted():
    for name in dataset_names():
        assert source(dataset=name, **LEAST.get(name, {})).dataset == name


# A value other than the default of each setting.
OTHER = {
    "image-size": 28,
    "data-dir": "d",
    "allow-altered": True,
    "download": True,
    "site-column": "Operator",
    "file": "f",
    "folder": "g",
    "labels": "l",
    "label-key": "file",
    "frames": "all",
    "window": "lung",
    "classes": ["a", "b"],
    "label-map": {"a": "b"},
    "split-fractions": [0.5, 0.25, 0.25],
    "dedupe": True,
    "max-unreadable-share": 0.5,
    "patients-per-site": 3,
    "seed": 4,
}
USED = {
    "phantom": "image-size label-map patients-per-site seed",
    "npz": "classes dedupe file label-map",
    "folder": "classes dedupe folder label-map max-unreadable-share seed split-fractions",
    "csv": "classes dedupe file folder label-map max-unreadable-share seed split-fractions",
    "dicom": "classes dedupe folder frames label-key label-map labels max-unreadable-share seed "
    "split-fractions window",
    "breastmnist": "allow-altered data-dir dedupe download image-size label-map",
    "fetal-planes": "data-dir dedupe download label-map max-unreadable-share seed site-column "
    "split-fractions",
}


@pytest.mark.parametrize("kind", USED)
@pytest.mark.parametrize("key", OTHER)
def test_a_setting_has_an_effect_or_is_refused(kind, key):
    table = {"dataset": kind, **LEAST.get(kind, {})}
    if key in USED[kind].split():
        assert source(**table) != source(**{**table, key: OTHER[key]}) or key in table
    else:
        with pytest.raises(DataError, match=f"^{key}=.* has no effect with dataset={kind}$"):
            source(**{**table, key: OTHER[key]})


def test_every_setting_is_tried():
    fields = DataSource.model_fields
    assert {"dataset", *OTHER} == {field.alias or name for name, field in fields.items()}


@pytest.mark.parametrize("kind", LEAST)
def test_what_a_kind_needs_is_asked_for(kind):
    for key in LEAST[kind]:
        table = {name: value for name, value in LEAST[kind].items() if name != key}
        needed = " and ".join(LEAST[kind])
        with pytest.raises(DataError, match=f"^dataset={kind} expected {needed}$") as error:
            source(dataset=kind, **table)
        assert f"{key} = " in error.value.hint


def test_a_site_column_is_one_that_the_set_has():
    with pytest.raises(DataError, match=r"^site-column=Operater expected US_Machine, Operator$"):
        source(**{"dataset": "fetal-planes", "site-column": "Operater"})
    with pytest.raises(DataError, match=r"^site-column=x expected none: the set tells no sites$"):
        source(**{"dataset": "cpn-xray", "site-column": "x"})


@pytest.mark.parametrize("window", ["auto", "none", "lung", "soft-tissue", "40/400", "-600/1500.5"])
def test_a_window_is_a_word_or_centre_and_width(window):
    assert source(dataset="dicom", folder="f", labels="l", window=window).window == window


def test_the_reader_knows_every_window_that_a_source_may_name():
    assert (*WINDOWS,) == WINDOW_PRESETS
    for window in (*WINDOW_WORDS, "40/400", "-600/1500.5"):
        assert DicomOptions(window).window == window


@pytest.mark.parametrize("window", ["", "liver", "40", "40/", "40/-400", "40/0", "a/b", "4/40/4"])
def test_any_other_window_is_refused(window):
    with pytest.raises(
        DataError, match=f"^window={window} expected auto, none, lung, .* CENTRE/WIDTH$"
    ):
        source(dataset="dicom", folder="f", labels="l", window=window)


@pytest.mark.parametrize(
    "fractions", [[0.5, 0.1, 0.1], [0.0, 0.5, 0.5], [1.2, -0.1, -0.1], [float("nan"), 0.5, 0.5]]
)
def test_fractions_are_shares(fractions):
    with pytest.raises(DataError, match=r"^split-fractions=.* that sum to 1 with train above 0$"):
        source(**{"dataset": "folder", "folder": "f", "split-fractions": fractions})


def test_whole_numbers_are_shares_too():
    declared = source(**{"dataset": "folder", "folder": "f", "split-fractions": [1, 0, 0]})
    assert declared.split_fractions == (1.0, 0.0, 0.0)


@pytest.mark.parametrize("classes", [["a"], ["a", "a"], ["a", " "]])
@pytest.mark.parametrize("kind", ["npz", "folder", "csv", "dicom"])
def test_classes_are_two_or_more_names(kind, classes):
    with pytest.raises(DataError, match=f"^classes={', '.join(classes)}: expected "):
        source(**{"dataset": kind, **LEAST[kind], "classes": classes})


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
    assert "md5" not in caplog.text
    # The official file holds one image twice: in train and in another split, with two labels.
    assert "duplicate_groups=1 images=2 across_splits=1 across_patients=0 label_conflicts=1" in (
        caplog.text
    )


@needs_files
def test_duplicates_of_a_medmnist_file_are_removed_when_asked_for():
    table = {"dataset": "breastmnist", "data-dir": str(FILES), "dedupe": True}
    assert len(load(source(**table), ["A"])) == 778  # the labels of the two contradict each other


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


# --- a site's own pictures, from declaration to data set


def test_a_folder_is_loaded_and_what_is_no_picture_is_counted(tmp_path, caplog):
    for i in range(30):
        pictures.picture(tmp_path / "own", f"{'ab'[i % 2]}/{i}.png", i)
    (tmp_path / "own/a/empty.png").touch()
    (tmp_path / "own/a/text.jpg").write_text("no picture")
    (tmp_path / "own/b/cut.png").write_bytes((tmp_path / "own/b/1.png").read_bytes()[:60])
    (tmp_path / "own/b/1_mask.png").touch()
    table = {"dataset": "folder", "folder": str(tmp_path / "own")}
    with pytest.raises(DataError, match="unreadable=3 of 33 images expected at most"):
        load(source(**table), ["A"], tmp_path / "state")
    data = load(source(**table, **{"max-unreadable-share": 0.1}), ["A"], tmp_path / "state")
    assert data.manifest.class_counts().tolist() == [15, 15]
    assert data.manifest.classes == ("a", "b")
    assert {e.site for e in data.manifest.examples} == {"A"}
    assert "1 x empty file" in caplog.text
    assert "segmentation mask" in caplog.text
    assert "images_without_patient=30" in caplog.text


def test_a_table_keeps_patients_together_and_duplicates_out_of_training(tmp_path):
    lines = ["file,label,patient,split"]
    for i in range(40):
        pictures.picture(tmp_path, f"{i}.png", i)
        lines.append(f"{i}.png,{'ab'[i % 2]},p{i // 4},{'test' if i < 8 else ''}")
    pictures.picture(tmp_path, "copy.png", 0)
    lines.append("copy.png,a,p9,train")
    (tmp_path / "own.csv").write_text("\n".join(lines))
    table = {"dataset": "csv", "file": str(tmp_path / "own.csv")}
    data = load(source(**table), ["A"], tmp_path / "state")
    assert len(data) == 41
    clean = load(source(**table, dedupe=True), ["A"], tmp_path / "state")
    assert len(clean) == 40
    assert len(clean.manifest.rows(split="test")) == 8
    assert len(clean.manifest.rows(split="val")) > 0
    assert len(clean.manifest.patients) == 10
    text = repr(clean.manifest.examples)
    assert not any(f"'p{i}'" in text for i in range(10))  # hashes alone


def test_a_patient_in_two_of_the_sources_splits_is_refused(tmp_path):
    for name in ("1.png", "2.png"):
        pictures.picture(tmp_path, name, int(name[0]))
    text = "file,label,patient,split\n1.png,a,p7,train\n2.png,b,p7,test\n"
    (tmp_path / "own.csv").write_text(text)
    with pytest.raises(DataError, match="patients_in_two_splits=1") as error:
        load(source(dataset="csv", file=str(tmp_path / "own.csv")), ["A"], tmp_path / "state")
    assert "p7" not in str(error.value)
