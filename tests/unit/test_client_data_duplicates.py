"""Identical images are found by their pixels, told, and kept out of training when asked to."""

import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.duplicates import find_duplicates, pixel_hash, tell_duplicates
from client.data.manifest import SPLITS

PACK = (
    Path(__file__).resolve().parents[3] / "shared" / "data" / "packs" / "otoscopy_viscaino_64.npz"
)


def test_the_copy_that_is_judged_on_stays():
    found = find_duplicates(
        ["x", "x", "x", "y", "y", "z"],
        [0] * 6,
        ["train", "val", "test", "train", "val", "train"],
        [""] * 6,
    )
    assert found.kept == (2, 4, 5)
    assert (found.groups, found.images, found.across_splits) == (2, 5, 2)


def test_of_copies_in_one_split_the_first_stays():
    found = find_duplicates(["x"] * 3, [0] * 3, ["train"] * 3, ["p", "q", ""])
    assert found.kept == (0,)
    assert (found.across_splits, found.across_patients) == (0, 1)


def test_images_with_two_labels_are_all_left_out():
    found = find_duplicates(["x", "x", "x", "y"], [0, 1, 0, 1], ["train"] * 4, [""] * 4)
    assert (found.conflicts, found.conflicting_images) == (1, 3)
    assert found.kept == (3,)


@given(
    st.lists(
        st.tuples(
            st.sampled_from("uvwxyz"), st.integers(0, 1), st.sampled_from(SPLITS), st.text("pq")
        )
    )
)
def test_what_is_kept_is_different_and_undisputed(images):
    pixels, labels, splits, patients = zip(*images, strict=True) if images else ((), (), (), ())
    found = find_duplicates(pixels, labels, splits, patients)
    kept = [pixels[i] for i in found.kept]
    assert len(set(kept)) == len(kept)
    for digest in set(pixels):
        own = [i for i, other in enumerate(pixels) if other == digest]
        undisputed = len({labels[i] for i in own}) == 1
        assert (digest in kept) == undisputed
    again = find_duplicates(
        *([x[i] for i in found.kept] for x in (pixels, labels, splits, patients))
    )
    assert again.groups == 0


def test_pixels_alone_decide():
    grey = np.arange(16, dtype=np.uint8).reshape(4, 4)
    assert pixel_hash(grey) == pixel_hash(np.stack([grey] * 3, axis=-1))
    assert pixel_hash(grey) == pixel_hash(np.asfortranarray(grey))
    assert pixel_hash(grey) != pixel_hash(grey.reshape(2, 8))
    assert pixel_hash(grey) != pixel_hash(grey.astype(np.uint16))
    colour = np.stack([grey, grey, grey[::-1]], axis=-1)
    assert pixel_hash(colour) != pixel_hash(grey)


def test_what_crosses_splits_is_a_warning_unless_it_was_removed(caplog):
    caplog.set_level(logging.INFO)
    splits = ["train", "test", "train", "val", "val"]
    found = find_duplicates("xxyzz", [0, 0, 0, 0, 1], splits, [""] * 5)
    tell_duplicates("made", found, removed=False)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith(
        "dataset=made duplicate_groups=2 images=4 across_splits=1 across_patients=0 "
        "label_conflicts=1: identical images in two splits"
    )
    caplog.clear()
    tell_duplicates("made", found, removed=True)
    assert caplog.records[0].levelno == logging.INFO
    assert caplog.records[0].getMessage().endswith(" removed")


def test_harmless_copies_are_no_warning_and_none_is_no_line(caplog):
    caplog.set_level(logging.INFO)
    harmless = find_duplicates("xx", [0, 0], ["train"] * 2, [""] * 2)
    tell_duplicates("made", harmless, removed=False)
    assert [record.levelno for record in caplog.records] == [logging.INFO]
    caplog.clear()
    none = find_duplicates("xy", [0, 0], ["train", "test"], [""] * 2)
    tell_duplicates("made", none, removed=True)
    assert not caplog.records


def test_copies_of_two_patients_are_a_warning(caplog):
    tell_duplicates("made", find_duplicates(["x", "x"], [0, 0], ["val"] * 2, "pq"), removed=False)
    assert "across_patients=1" in caplog.text


@pytest.mark.skipif(not PACK.exists(), reason="the otoscopy pack is not on this disk")
def test_the_otoscopy_set_has_65_images_in_both_of_its_splits():
    with np.load(PACK, allow_pickle=False) as pack:
        images, labels = pack["images"], pack["labels"].ravel().tolist()
        splits, md5 = pack["split"].tolist(), pack["md5"].tolist()
    found = find_duplicates([pixel_hash(i) for i in images], labels, splits, [""] * len(images))
    assert (found.groups, found.images, found.across_splits) == (66, 135, 65)
    assert found.conflicts == 0
    assert len(found.kept) == 880 - (135 - 66)
    # The files themselves are identical: nothing is found that is not there.
    assert find_duplicates(md5, labels, splits, [""] * len(images)) == found
    kept = find_duplicates(*([x[i] for i in found.kept] for x in (md5, labels, splits, [""] * 880)))
    assert kept.across_splits == 0
    tested = {digest for digest, split in zip(md5, splits, strict=True) if split == "test"}
    assert {md5[i] for i in found.kept if splits[i] == "test"} == tested
