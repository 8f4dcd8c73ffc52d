"""A folder of classes: every picture is a row or is counted, whatever else lies there."""

import os
import subprocess
from pathlib import Path

import pytest

from client.data import folder
from client.data.folder import list_folder
from strategies.errors import DataError


def put(root: Path, *names: str) -> None:
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def found(listing) -> list[tuple[str, str, str]]:
    return [(row.file, row.label, row.split) for row in listing.rows]


def test_a_folder_is_a_class_and_its_pictures_lie_anywhere_below(tmp_path):
    put(tmp_path, "ill/b.png", "ill/a.JPG", "ill/day 2/c.tiff", "healthy/d.webp")
    listing = list_folder(tmp_path)
    assert listing.classes == ("healthy", "ill")
    assert found(listing) == [
        ("healthy/d.webp", "healthy", ""),
        ("ill/a.JPG", "ill", ""),
        ("ill/b.png", "ill", ""),
        ("ill/day 2/c.tiff", "ill", ""),
    ]
    assert not listing.skipped
    assert {row.patient for row in listing.rows} == {""}
    assert (listing.dataset, listing.root, listing.kind) == ("folder", tmp_path, "picture")


def test_declared_classes_decide_the_order_and_are_found_in_any_case(tmp_path):
    put(tmp_path, "NORMAL/a.png", "Soft_Tissue/b.png", "other/c.png", "other/d.png")
    listing = list_folder(tmp_path, ("soft tissue", "normal", "absent"))
    assert listing.classes == ("soft tissue", "normal", "absent")
    assert [row.label for row in listing.rows] == ["normal", "soft tissue"]
    assert listing.skipped == {folder.OTHER_CLASS: 2}


def test_one_folder_around_the_classes_is_tolerated(tmp_path):
    put(tmp_path, "set/a/1.png", "set/b/2.png", "readme.txt")
    assert [label for _, label, _ in found(list_folder(tmp_path))] == ["a", "b"]
    assert list_folder(tmp_path).skipped == {folder.NO_PICTURE: 1}


def test_a_single_class_folder_is_no_wrapper(tmp_path):
    put(tmp_path, "a/1.png", "a/more/2.png")
    assert list_folder(tmp_path).classes == ("a",)
    put(tmp_path / "two", "Normal/p1/1.png", "Normal/p2/2.png")
    assert [row.label for row in list_folder(tmp_path / "two", ("normal", "ill")).rows] == [
        "normal",
        "normal",
    ]


@pytest.mark.parametrize("top", ["", "set/"])
def test_folders_of_splits_give_the_split(tmp_path, top):
    names = ("Training/a/1.png", "valid/a/2.png", "TEST/b/3.png", "masks/a/4.png", "valid/5.png")
    put(tmp_path, *(top + name for name in names))
    listing = list_folder(tmp_path)
    assert sorted(row.split for row in listing.rows) == ["test", "train", "val"]
    assert listing.classes == ("a", "b")
    assert listing.skipped == {folder.NO_CLASS: 2}


def test_without_a_train_folder_these_are_classes(tmp_path):
    put(tmp_path, "test/1.png", "control/2.png")
    assert list_folder(tmp_path).classes == ("control", "test")
    put(tmp_path, "train/3.png")
    assert list_folder(tmp_path, ("train", "test")).classes == ("train", "test")
    assert len(list_folder(tmp_path, ("train", "test")).rows) == 2


def test_a_class_spelled_in_two_cases_in_two_splits_is_one(tmp_path):
    put(tmp_path, "train/Normal/1.png", "test/NORMAL/2.png", "train/ill/3.png")
    assert len(list_folder(tmp_path).classes) == 2
    assert len({row.label for row in list_folder(tmp_path).rows}) == 2


def test_what_is_not_used_is_counted_with_its_reason(tmp_path):
    put(tmp_path, "a/1.png", "a/1_mask.png", "a/1_mask_2.PNG", "a/notes.txt", "a/.DS_Store")
    put(tmp_path, "b/2.png", "beside.png", ".git/x.png", "__MACOSX/a/1.png")
    (tmp_path / "b" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    listing = list_folder(tmp_path)
    assert [row.file for row in listing.rows] == ["a/1.png", "b/2.png"]
    assert listing.skipped == {
        folder.MASK: 2,
        folder.NO_PICTURE: 1,
        folder.HIDDEN: 3,
        folder.NO_CLASS: 1,
        folder.IRREGULAR: 2,
    }


def test_loops_of_links_end_and_each_picture_is_listed_where_it_lies(tmp_path):
    put(tmp_path / "data", "a/1.png", "b/2.png")
    put(tmp_path / "elsewhere", "3.png")
    (tmp_path / "data/a/again").symlink_to(tmp_path / "data/b")
    (tmp_path / "data/a/loop").symlink_to(tmp_path / "data/a")
    (tmp_path / "data/b/up").symlink_to(tmp_path)
    (tmp_path / "data/b/self").symlink_to(tmp_path / "data/b/self")
    (tmp_path / "data/b/far").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/back").symlink_to(tmp_path / "data")
    (tmp_path / "data/c").symlink_to(tmp_path / "elsewhere")
    listing = list_folder(tmp_path / "data")
    assert found(listing) == [("a/1.png", "a", ""), ("b/2.png", "b", ""), ("b/far/3.png", "b", "")]
    assert listing.skipped == {folder.SEEN: 5, folder.IRREGULAR: 1}


@pytest.fixture
def deep(tmp_path):
    """A folder deeper than Python's stack, which shutil.rmtree, and so pytest, could not remove."""
    path, here = tmp_path / "deep", os.getcwd()
    path.mkdir()
    os.chdir(path)
    try:
        for _ in range(1200):
            os.mkdir("d")
            os.chdir("d")
    finally:
        os.chdir(here)
    yield path
    subprocess.run(["rm", "-r", str(path)], check=True)


def test_folders_deeper_than_pythons_stack_are_read(tmp_path, deep):
    put(tmp_path, f"{deep.name}/top.png")
    assert len(list_folder(tmp_path).rows) == 1


def test_a_folder_that_cannot_be_read_is_counted(tmp_path, monkeypatch):
    put(tmp_path, "a/1.png", "b/2.png")
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    listing = list_folder(tmp_path)
    assert [row.file for row in listing.rows] == ["a/1.png"]
    assert listing.skipped == {"folder that cannot be read (Permission denied)": 1}


def test_a_root_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"cannot be read \(No such file or directory\)$"):
        list_folder(tmp_path / "gone")
    put(tmp_path, "file")
    with pytest.raises(DataError, match=r"cannot be read \(Not a directory\)$"):
        list_folder(tmp_path / "file")


def test_an_empty_root_is_an_empty_listing(tmp_path):
    assert list_folder(tmp_path).rows == []
    assert list_folder(tmp_path).classes == ()


def test_a_class_whose_name_cannot_be_printed_is_counted(tmp_path):
    put(tmp_path, "a/1.png")
    bad = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(bad)
    Path(os.fsdecode(bad), "2.png").write_bytes(b"x")
    listing = list_folder(tmp_path)
    assert listing.classes == ("a",)
    assert listing.skipped == {folder.NOT_UTF8: 1}
