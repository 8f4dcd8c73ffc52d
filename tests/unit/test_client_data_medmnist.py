"""MedMNIST files are found, proven official by their MD5, and read; or the reason is said."""

import logging
import re
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from client.data.download import md5_of
from client.data.medmnist import (
    SIZES,
    data_directory,
    fetch,
    find_npz,
    medmnist_facts,
    medmnist_info,
    record_url,
)
from client.data.medmnist import read_npz as read_npz_into
from strategies.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
FILES = Path(__file__).resolve().parents[3] / "shared" / "data" / "medmnist"
needs_files = pytest.mark.skipif(
    not (FILES / "breastmnist.npz").exists(), reason="official MedMNIST files are not on this disk"
)
BREAST_MD5 = "750601b1f35ba3300ea97c75c52ff8f6"


@pytest.fixture
def altered(tmp_path):
    """A well-formed copy under the official name with other content: fewer images, flat labels."""
    contents = {}
    for split, count in (("train", 6), ("val", 4), ("test", 4)):
        contents[f"{split}_images"] = np.zeros((count, 28, 28), np.uint8)
        contents[f"{split}_labels"] = (np.arange(count) % 2).astype(np.uint8)
    path = tmp_path / "breastmnist.npz"
    np.savez_compressed(path, **contents)
    return path


@pytest.fixture
def read_npz(tmp_path):
    """Read a file with its images kept out of the home folder."""
    return partial(read_npz_into, cache_dir=tmp_path / "cache")


def test_facts_cover_the_twelve_sets_in_every_size():
    facts = medmnist_facts()
    assert set(facts) == {
        f"{stem}mnist"
        for stem in (
            *("path", "chest", "derma", "oct", "pneumonia", "retina"),
            *("breast", "blood", "tissue", "organa", "organc", "organs"),
        )
    }
    md5s = [info.md5[size] for info in facts.values() for size in SIZES]
    assert all(re.fullmatch("[0-9a-f]{32}", md5) for md5 in md5s)
    assert len(set(md5s)) == 12 * 4
    for info in facts.values():
        assert info.channels in (1, 3)
        assert len(set(info.classes)) == len(info.classes) >= 2
        assert set(info.examples) == {"train", "val", "test"}
        assert info.title
        assert info.licence == ("CC BY-NC 4.0" if info.name == "dermamnist" else "CC BY 4.0")
    assert [name for name, info in facts.items() if info.multi_label] == ["chestmnist"]


def test_facts_of_two_sets_are_the_published_ones():
    breast, tissue = medmnist_info("breastmnist"), medmnist_info("tissuemnist")
    assert breast.md5[28] == BREAST_MD5
    assert breast.classes == ("malignant", "normal, benign")
    assert breast.examples == {"train": 546, "val": 78, "test": 156}
    assert tissue.examples == {"train": 165466, "val": 23640, "test": 47280}
    assert tissue.md5[224] == "b077128c4a949f0a4eb01517f9037b9c"
    assert [breast.file_name(size) for size in (28, 64)] == [
        "breastmnist.npz",
        "breastmnist_64.npz",
    ]
    assert record_url().format(file="x.npz").endswith("/records/10519652/files/x.npz?download=1")


def test_the_table_in_the_documentation_is_the_facts():
    rows = [
        f"| {i.name} | {i.title} | {i.channels} | {len(i.classes)} "
        f"| {i.examples['train']} / {i.examples['val']} / {i.examples['test']} | {i.licence} |"
        for i in medmnist_facts().values()
    ]
    text = (ROOT / "docs" / "data.md").read_text("utf-8")
    assert "\n".join(rows) in text
    assert re.findall(r"^\| \w+mnist .*$", text, flags=re.MULTILINE) == rows


@needs_files
@pytest.mark.parametrize(
    ("name", "train_counts"), [("breastmnist", [147, 399]), ("pneumoniamnist", [1214, 3494])]
)
def test_official_files_are_read_as_published(name, train_counts, read_npz):
    info = medmnist_info(name)
    data = read_npz(find_npz(name, data_dir=FILES), info, site="A")
    counts = {s: len(data.manifest.rows(split=s)) for s in ("train", "val", "test")}
    assert counts == info.examples
    assert data.manifest.class_counts("train").tolist() == train_counts
    assert data.manifest.classes == info.classes
    assert data.images.extent == (28, 28, False)
    assert data.provenance == {"file": f"{name}.npz", "md5": info.md5[28], "official": True}
    assert {e.site for e in data.manifest.examples} == {"A"}


@needs_files
@pytest.mark.parametrize(
    ("name", "dedupe", "count", "fingerprint"),
    [
        ("breastmnist", False, 780, "3ef8af3fdf29c6a896b34f513bcd8da9"),
        ("breastmnist", True, 778, "68fd5cd45bc2456b2344681d715784cb"),
        ("pneumoniamnist", False, 5856, "0ce2947147499bf35b05a05d30b3ba2d"),
        ("pneumoniamnist", True, 5827, "91647c0c183d6a760fc4b96bcf601801"),
    ],
)
def test_fingerprints_are_those_of_earlier_versions(read_npz, name, dedupe, count, fingerprint):
    data = read_npz(FILES / f"{name}.npz", medmnist_info(name), site="A", dedupe=dedupe)
    assert (len(data), data.manifest.fingerprint()[:32]) == (count, fingerprint)


@needs_files
def test_one_changed_byte_of_an_official_file_is_an_alteration(tmp_path, read_npz):
    content = bytearray((FILES / "breastmnist.npz").read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / "breastmnist.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"expected={BREAST_MD5}; altered"):
        read_npz(path, medmnist_info("breastmnist"))


def test_an_altered_file_is_refused_with_both_md5s(altered, read_npz):
    with pytest.raises(DataError) as error:
        read_npz(altered, medmnist_info("breastmnist"))
    assert (
        str(error.value) == f"breastmnist.npz md5={md5_of(altered)} expected={BREAST_MD5}; altered"
    )
    assert "records/10519652/files/breastmnist.npz" in error.value.hint
    assert "allow-altered = true" in error.value.hint


def test_an_altered_file_is_read_when_allowed_and_the_log_says_so(altered, caplog, read_npz):
    with caplog.at_level(logging.WARNING):
        data = read_npz(altered, medmnist_info("breastmnist"), allow_altered=True)
    assert len(data) == 14
    assert data.provenance["official"] is False
    assert md5_of(altered) in caplog.text
    assert BREAST_MD5 in caplog.text


def test_the_md5_of_another_size_does_not_count(altered, read_npz):
    with pytest.raises(DataError, match="expected=742edef2a1fd1524b2efff4bd7ba9364"):
        read_npz(altered, medmnist_info("breastmnist"), 64)


def test_an_altered_file_still_has_to_match_the_published_channels_and_classes(altered, read_npz):
    with pytest.raises(DataError, match="expected RGB"):
        read_npz(altered, medmnist_info("bloodmnist"), allow_altered=True)


def test_a_truncated_file_is_called_truncated_not_altered(altered, read_npz):
    altered.write_bytes(altered.read_bytes()[:-30])
    with pytest.raises(DataError, match="truncated or no npz file"):
        read_npz(altered, medmnist_info("breastmnist"))


def test_multi_label_sets_are_refused(altered, read_npz):
    with pytest.raises(DataError, match=r"chestmnist.*multi-label, which is not supported yet"):
        read_npz(altered, medmnist_info("chestmnist"))


def test_files_are_looked_for_in_the_folder_then_the_variable_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FEDERATION_DATA", str(tmp_path / "shared"))
    assert data_directory(tmp_path) == tmp_path
    assert data_directory(Path("~/x")) == tmp_path / "home" / "x"
    assert data_directory(None) == tmp_path / "shared"
    monkeypatch.delenv("FEDERATION_DATA")
    assert data_directory(None) == tmp_path / "home" / ".cache" / "medmamba-federation"

    (tmp_path / "breastmnist_64.npz").touch()
    assert find_npz("breastmnist", 64, tmp_path) == tmp_path / "breastmnist_64.npz"


def test_a_missing_file_says_where_it_was_looked_for_and_how_to_get_it(tmp_path):
    with pytest.raises(DataError) as error:
        find_npz("bloodmnist", 128, tmp_path)
    assert str(error.value) == f"file=bloodmnist_128.npz not found in {tmp_path}"
    for way in (
        "in a file `download = true`",
        "on the command line `--set data.download=true`",
        "zenodo.org",
        "bloodmnist_128.npz",
        "data-dir",
        "FEDERATION_DATA",
    ):
        assert way in error.value.hint


@pytest.mark.parametrize("lookup", [find_npz, fetch])
def test_unknown_names_and_sizes_are_refused_before_anything_else(lookup, tmp_path):
    with pytest.raises(DataError, match="dataset=brestmnist expected one of") as error:
        lookup("brestmnist", 28, tmp_path)
    assert error.value.hint == "did you mean breastmnist?"
    with pytest.raises(DataError, match="image-size=32 expected one of 28, 64, 128, 224"):
        lookup("breastmnist", 32, tmp_path)
    assert list(tmp_path.iterdir()) == []
