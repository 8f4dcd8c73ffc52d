"""A site's class names become a run's, in the run's order, and nothing is guessed."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.labels import (
    LEFT_OUT,
    UNMAPPED,
    class_finder,
    describe_match,
    map_classes,
    mapped_names,
    match,
    unmapped_error,
)
from client.data.manifest import Example, ImageDataset, Manifest


def dataset(classes, labels, splits=None) -> ImageDataset:
    splits = splits or ["train"] * len(labels)
    examples = tuple(
        Example(f"e{i}", "made", i, label, f"e{i}", "A", split)
        for i, (label, split) in enumerate(zip(labels, splits, strict=True))
    )
    images = np.arange(len(labels), dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    return ImageDataset(Manifest("made", classes, examples), images)


@pytest.mark.parametrize("name", ["COVID 19", "covid-19", " Covid_19 ", "COVID  19"])
def test_a_name_is_found_in_any_case_and_with_any_blank(name):
    assert class_finder(["NORMAL", "COVID-19"])(name) == "COVID-19"


def test_other_names_are_not_found():
    find = class_finder(["malignant", "benign"])
    assert [find(name) for name in ("malign", "", "benign?", "m")] == [None] * 4


def test_classes_that_differ_by_case_alone_are_told_apart_by_their_exact_names():
    find = class_finder(["t1", "T1"])
    assert (find("t1"), find("T1"), find("t-1"), find(" T1")) == ("t1", "T1", None, None)


def test_own_names_are_matched_by_the_map_first():
    found = map_classes(("B", "M", "normal"), ("Normal", "malignant", "benign"), {"b": "benign"})
    assert found.labels == (2, UNMAPPED, 0)
    assert found.unmapped == ("M",)
    assert found.missing == ("malignant",)
    assert found.unknown == ()


def test_two_own_classes_may_become_one():
    assert map_classes(("a", "b", "c"), ("c", "ab"), {"a": "ab", "b": "ab"}).labels == (1, 1, 0)


def test_a_name_can_be_mapped_away_from_one_that_would_match():
    assert map_classes(("a", "b"), ("a", "b"), {"a": "b", "b": "a"}).labels == (1, 0)


def test_an_empty_target_leaves_a_class_out_and_a_wrong_one_does_not():
    found = map_classes(("a", "b"), ("a", "c"), {"a": "", "b": "d"})
    assert found.labels == (LEFT_OUT, UNMAPPED)
    assert found.unmapped == ("b",)


def test_names_in_the_map_that_the_data_does_not_have_are_told():
    assert map_classes(("a", "b"), ("a", "b"), {"A": "a", "x": "b"}).unknown == ("x",)


def test_images_keep_their_order_and_get_the_runs_labels():
    data = dataset(("b", "out", "a"), [0, 1, 2, 0], ["train", "train", "test", "val"])
    found = match(data, ("a", "b", "c"), {"out": ""})
    assert found.dataset.manifest.classes == ("a", "b", "c")
    assert found.dataset.manifest.labels.tolist() == [1, 0, 1]
    assert found.dataset.images[:, 0, 0].tolist() == [0, 2, 3]
    assert [e.example_id for e in found.dataset.manifest.examples] == ["e0", "e2", "e3"]
    assert found.absent == ("a", "c")  # a has images, but none to train on
    assert found.unmapped == ()
    assert describe_match(found) == "classes=a, b, c; without training images: a, c"


def test_a_class_without_images_need_not_be_mapped():
    data = dataset(("a", "empty", "odd"), [0, 2])
    assert match(data, ("a", "b"), {}).unmapped == ("odd",)


def test_the_error_says_what_to_write():
    error = unmapped_error(("odd", "even"), ("a", "b"))
    assert str(error) == "classes not mapped: odd, even; the run has a, b"
    assert '"odd" = "a"' in error.hint
    assert '"odd" = ""' in error.hint


def test_an_undeclared_run_takes_the_mapped_names():
    assert mapped_names(("a", "b", "c", "d"), {"a": "x", "c": "x", "d": ""}) == ("x", "b")


NAMES = st.lists(st.sampled_from("abcdef"), min_size=1, max_size=5, unique=True)


@given(NAMES, NAMES, st.dictionaries(st.sampled_from("abcdefg"), st.sampled_from("abcdef")))
def test_every_image_keeps_its_meaning_or_is_told(own, classes, label_map):
    data = dataset(tuple(own), [i % len(own) for i in range(7)])
    found = match(data, tuple(classes), label_map)
    kept = {e.example_id: classes[e.label] for e in found.dataset.manifest.examples}
    for example in data.manifest.examples:
        name = own[example.label]
        meant = label_map.get(name, name)
        assert kept.get(example.example_id) == (meant if meant in classes else None)
        assert (example.example_id in kept) == (name not in found.unmapped)
