"""Verify tells each difference between what lies there and what was published, in a line."""

import csv
import hashlib
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from client.data.catalogue import catalogue, entry, file_backed_names
from client.data.verify import verify
from fakes import npz_files
from fakes.miniatures import miniature
from strategies.errors import DataError

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
needs_layouts = pytest.mark.skipif(
    not (SHARED / "layouts").is_dir(),
    reason="the official layouts' files (shared/data) are not on this disk",
)
needs_files = pytest.mark.skipif(
    not (SHARED / "medmnist" / "breastmnist.npz").exists(),
    reason="official MedMNIST files are not on this disk",
)
NPZ = [name for name in catalogue() if name not in file_backed_names()]


def found(name, folder, size=28, level=None):
    return [str(f) for f in verify(name, folder, size) if level in (None, f.level)]


def differences(name, folder, size=28):
    lines = found(name, folder, size, "DIFFERS")
    return [line.removeprefix("DIFFERS  ") for line in lines]


@pytest.fixture
def as_small(monkeypatch):
    """Publish the miniature's counts instead of the real ones."""

    def _as_small(name, per_class, **changes):
        facts = entry(name)
        counts = dict.fromkeys(facts.class_counts, per_class)
        small = facts.model_copy(update={"class_counts": counts, **changes})
        monkeypatch.setattr("client.data.verify.entry", lambda _: small)
        return small

    return _as_small


@pytest.mark.parametrize("name", file_backed_names())
def test_a_set_that_is_as_published_has_no_difference(name, tmp_path, as_small):
    as_small(name, 4, patients={"pad-ufes-20": 12, "fetal-planes": 4}.get(name, 0))
    assert differences(name, miniature(name, tmp_path, per_class=4)) == []
    lines = found(name, tmp_path, level="ok")
    total = 4 * len(entry(name).classes)
    assert f"ok       images        images: {total}, as published" in lines


@pytest.mark.parametrize("name", file_backed_names())
def test_a_miniature_differs_in_every_class(name, tmp_path):
    lines = differences(name, miniature(name, tmp_path, per_class=2))
    facts = entry(name)
    total = 2 * len(facts.classes)
    assert f"images        images: {total}, published {facts.images}" in lines
    for label, count in facts.class_counts.items():
        assert f"images        images of class {label}: 2, published {count}" in lines


@pytest.mark.parametrize("name", NPZ)
def test_a_medmnist_miniature_differs_in_md5_and_every_split(name, tmp_path):
    facts = entry(name)
    miniature(name, tmp_path, per_class=2)
    lines = differences(name, tmp_path)
    count = 2 * len(facts.classes)
    assert lines[0].startswith(f"file          {name}.npz md5: ")
    assert lines[0].endswith(f"published {facts.md5[f'{name}.npz']}")
    wrong = {"train", "val", "test"}
    assert {line.split()[0] for line in lines[1:]} == wrong
    for split, published in facts.examples.items():
        assert f"{split:<12}  images: {count}, published {published}" in lines
        assert f"{split:<12}  labels: {count}, published {published}" in lines


def test_labels_channels_and_sizes_that_differ_are_named(tmp_path):
    miniature("breastmnist", tmp_path, per_class=2)
    arrays = dict(np.load(tmp_path / "breastmnist.npz"))
    arrays["val_labels"] = np.array([[0], [1], [2], [3]], np.uint8)
    arrays["test_images"] = np.zeros((4, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "breastmnist.npz", **arrays)
    lines = differences("breastmnist", tmp_path)
    assert "val           labels outside the classes: [2, 3]" in lines
    assert (
        "test          shape and type: (32, 32, 3, 'uint8'), published (28, 28, 'uint8')" in lines
    )


def test_a_file_without_an_array_or_of_no_archive_is_a_difference(tmp_path):
    path = tmp_path / "breastmnist.npz"
    assert differences("breastmnist", tmp_path) == [
        f"file          breastmnist.npz is not in {tmp_path}"
    ]
    np.savez(path, train_images=np.zeros((1, 28, 28), np.uint8))
    assert differences("breastmnist", tmp_path)[-1].startswith(
        "file          file=breastmnist.npz lacks train_labels"
    )
    path.write_bytes(b"no archive")
    assert "truncated or no npz file" in differences("breastmnist", tmp_path)[-1]


def test_an_array_of_objects_is_not_unpickled(tmp_path):
    miniature("breastmnist", tmp_path, per_class=2)
    arrays = dict(np.load(tmp_path / "breastmnist.npz"))
    arrays["train_labels"] = np.array([print, print], dtype=object)
    np.savez(tmp_path / "breastmnist.npz", allow_pickle=True, **arrays)
    assert "Object arrays cannot be loaded" in differences("breastmnist", tmp_path)[-1]


def test_labels_that_memory_does_not_hold_are_not_read(tmp_path):
    miniature("breastmnist", tmp_path, per_class=2)
    path = tmp_path / "breastmnist.npz"
    contents = dict(np.load(path))
    large = npz_files.member(contents["train_labels"], shape=(2**40,))
    announced = {"train_labels": 128 + 2**40}
    npz_files.write_members(path, contents | {"train_labels": large}, announced=announced)
    assert "(1099511627776,) expected at most" in differences("breastmnist", tmp_path)[-1]


def test_what_was_left_out_and_what_is_no_picture_is_told(tmp_path, as_small):
    as_small("cervical-us", 4)
    miniature("cervical-us", tmp_path, per_class=4)
    normal = tmp_path / "cervical-us" / "normal"
    first, second, *_ = sorted(normal.iterdir())
    first.write_bytes(b"")
    second.write_bytes(b"no picture")
    lines = differences("cervical-us", tmp_path)
    assert lines == [
        "images        images: 15, published 16",
        "images        images of class normal: 3, published 4",
        "left out      empty file: 1",
        "pictures      files that are no picture: 1",
    ]


def test_a_patient_in_train_and_test_is_a_difference(tmp_path, as_small):
    as_small("fetal-planes", 4, patients=4)
    miniature("fetal-planes", tmp_path, per_class=4, packed=False)
    table = tmp_path / "FETAL_PLANES_DB_data.csv"
    lines = table.read_text().splitlines()
    lines[1] = lines[1][:-2] + "0 "
    table.write_text("\n".join(lines) + "\n")
    assert differences("fetal-planes", tmp_path) == [
        "split         patients in both train and test: 1"
    ]


def test_patients_that_are_missing_are_told(tmp_path, as_small):
    as_small("pad-ufes-20", 4, patients=13)
    assert differences("pad-ufes-20", miniature("pad-ufes-20", tmp_path, per_class=4)) == [
        "table         patients: 12, published 13"
    ]


def test_an_archive_is_compared_where_an_md5_is_known(tmp_path, as_small):
    miniature("kvasir", tmp_path, per_class=1)
    archive = tmp_path / "kvasir-dataset.zip"
    md5 = hashlib.md5(archive.read_bytes(), usedforsecurity=False).hexdigest()
    note = f"note     archive       kvasir-dataset.zip md5={md5}; no MD5 is known to compare with"
    as_small("kvasir", 1)
    assert found("kvasir", tmp_path)[0] == note
    as_small("kvasir", 1, md5={"kvasir-dataset.zip": "0" * 32})
    assert differences("kvasir", tmp_path) == [
        f"archive       kvasir-dataset.zip md5: {md5}, published {'0' * 32}"
    ]


def test_kvasirs_groups_are_told_as_a_proxy(tmp_path):
    lines = found("kvasir", miniature("kvasir", tmp_path, per_class=3), level="note")
    groups = "over-1280x1024 8, upto-1280x1024 8, upto-720x576 8"
    assert f"note     sites         resolution: {groups}" in lines


@pytest.mark.parametrize("content", [b"\xff\xfe", b"filepath\nx\n", b"", b"filepath,label\n,\n"])
def test_a_list_of_files_that_is_none_is_passed_over(content, tmp_path):
    (tmp_path / "x_filelist.csv").write_bytes(content)
    assert len(differences("kvasir-v2", tmp_path)) == 1


@pytest.mark.parametrize("name", ["kvasir", "breastmnist"])
def test_a_folder_that_is_none_and_a_name_that_is_none_are_errors(name, tmp_path):
    with pytest.raises(DataError, match=r"data-dir=.*nowhere expected a folder"):
        verify(name, tmp_path / "nowhere")
    with pytest.raises(DataError, match="dataset=kvaser expected one of"):
        verify("kvaser", tmp_path)
    with pytest.raises(DataError, match="image-size=32 expected one of"):
        verify("breastmnist", tmp_path, 32)


@needs_files
@pytest.mark.parametrize("name", ["breastmnist", "pneumoniamnist"])
def test_the_real_medmnist_files_are_as_published(name):
    assert differences(name, SHARED / "medmnist") == []
    assert len(found(name, SHARED / "medmnist", level="ok")) == 1 + 3 * 3


@needs_layouts
def test_the_real_table_of_pad_is_whole_and_its_images_are_not():
    lines = found("pad-ufes-20", SHARED / "layouts", level="ok")
    assert lines == [
        "ok       table         rows: 2298, as published",
        "ok       table         rows of each of 6 classes, as published",
        "ok       table         patients: 1373, as published",
    ]
    lines = differences("pad-ufes-20", SHARED / "layouts")
    assert lines[0] == "images        images: 7, published 2298"
    assert lines[-1] == "left out      row whose file is missing: 2291"
    assert len(lines) == 8
    modes = found("pad-ufes-20", SHARED / "layouts", level="note")
    assert modes == ["note     pictures      modes: RGB 2, RGBA 5"]


@needs_layouts
def test_the_real_list_of_kvasir_2_is_whole():
    assert found("kvasir-v2", SHARED / "layouts", level="ok") == [
        "ok       list          names in kvasir_v2_filelist.csv: 8000, as published",
        "ok       list          names in kvasir_v2_filelist.csv of each of 8 classes, as published",
    ]
    with (SHARED / "layouts" / "kvasir" / "kvasir_v2_filelist.csv").open() as file:
        assert len(Counter(row["filepath"] for row in csv.DictReader(file))) == 8000


@needs_layouts
def test_the_real_rows_of_fetal_planes_differ_in_what_is_missing():
    lines = differences("fetal-planes", SHARED / "layouts")
    assert lines[0] == "table         rows: 13, published 12400"
    assert "table         patients: 6, published 1792" in lines
    assert lines[-1] == "left out      row whose file is missing: 13"


def with_arrays(folder, **changes):
    miniature("breastmnist", folder, per_class=2)
    arrays = dict(np.load(folder / "breastmnist.npz"))
    np.savez(folder / "breastmnist.npz", **(arrays | changes))
    return differences("breastmnist", folder)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"val_labels": np.array(1)}, "labels: int64(), expected an integer for each image"),
        ({"val_labels": np.array(["a"] * 4)}, "labels: <U1(4,), expected an integer for each"),
        ({"val_labels": np.ones(4)}, "labels: float64(4,), expected an integer for each image"),
        ({"val_labels": np.ones((4, 3), int)}, "labels: int64(4, 3), expected an integer for"),
        ({"val_labels": np.array([0, 1, 1, 10**13])}, "labels outside the classes: [10000000000"),
        ({"val_labels": np.array([0, 1, 1, -1])}, "labels outside the classes: [-1]"),
        ({"val_images": np.array(7, np.uint8)}, "images: a single number, published 78"),
    ],
)
def test_an_array_of_another_kind_is_a_difference(tmp_path, changes, line):
    lines = with_arrays(tmp_path, **changes)
    assert any(found.startswith(f"val           {line}") for found in lines), lines
    # The split after it is compared all the same.
    assert "test          images: 4, published 156" in lines


def test_many_labels_outside_the_classes_stay_one_short_line(tmp_path):
    lines = with_arrays(tmp_path, val_labels=np.arange(1000))
    assert "val           labels outside the classes: 998, such as [2, 3, 4, 5, 6]" in lines


def test_damaged_bytes_inside_an_array_are_a_difference(tmp_path):
    miniature("breastmnist", tmp_path, per_class=2)
    path = tmp_path / "breastmnist.npz"
    arrays = dict(np.load(path))
    np.savez_compressed(path, **arrays)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("train_labels.npy")
    content = bytearray(path.read_bytes())
    start = (
        member.header_offset
        + 30
        + int.from_bytes(content[member.header_offset + 28 :][:2], "little")
        + len(member.filename)
    )
    content[start] |= 6  # a block type that deflate does not have
    path.write_bytes(content)
    assert "cannot be read: train_labels: Error -3" in differences("breastmnist", tmp_path)[-1]
