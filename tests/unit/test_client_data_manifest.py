"""Manifests are sound by construction, and splits never divide a patient."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.manifest import (
    SPLITS,
    Example,
    ImageDataset,
    Manifest,
    split_patients,
)
from strategies.errors import DataError

CLASSES = ("normal", "benign", "malignant")
FRACTIONS = (0.6, 0.2, 0.2)


def example(number: int, label: int = 0, split: str = "train", **changes: object) -> Example:
    row = Example(f"e{number}", "file:md5", number, label, f"p{number}", "A", split)
    return row._replace(**changes)


def manifest(*examples: Example) -> Manifest:
    return Manifest("toy", CLASSES, examples)


def test_rows_and_counts_select_by_split_and_site():
    rows = manifest(
        example(0, 0),
        example(1, 2, site="B"),
        example(2, 2, "val"),
        example(3, 2, "test", site="B"),
    )
    assert rows.labels.tolist() == [0, 2, 2, 2]
    assert rows.labels.dtype == np.int64
    assert rows.class_counts().tolist() == [1, 0, 3]
    assert rows.class_counts("train").tolist() == [1, 0, 1]
    assert rows.rows(split="train").tolist() == [0, 1]
    assert rows.rows(site="B").tolist() == [1, 3]
    assert rows.rows(split="test", site="B").tolist() == [3]
    assert rows.rows(split="val", site="B").tolist() == []
    assert rows.patients == ("p0", "p1", "p2", "p3")
    assert rows.num_classes == 3


def test_labels_cannot_be_changed_behind_the_manifest():
    with pytest.raises(ValueError, match="read-only"):
        manifest(example(0)).labels[0] = 1


def test_one_class_data_keep_a_count_for_every_declared_class():
    rows = manifest(example(0, 1), example(1, 1))
    assert rows.class_counts().tolist() == [0, 2, 0]
    assert rows.class_counts("val").tolist() == [0, 0, 0]


def test_an_empty_manifest_counts_nothing():
    assert manifest().class_counts().tolist() == [0, 0, 0]


def test_subset_keeps_the_given_order():
    rows = manifest(example(0, 0), example(1, 1), example(2, 2)).subset([2, 0])
    assert [e.example_id for e in rows.examples] == ["e2", "e0"]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 3, 3], "label=3 in 2 examples expected 0..2 for the 3 declared classes"),
        ([-1, 0], "label=-1 in 1 examples expected 0..2"),
        ([7, 9, 9], r"label=7 in 1 examples \(and 1 other values\) expected 0..2"),
    ],
)
def test_a_label_outside_the_classes_is_named_with_its_count(labels, message):
    with pytest.raises(DataError, match=message):
        manifest(*(example(i, label) for i, label in enumerate(labels)))


def test_an_unknown_split_is_named():
    with pytest.raises(DataError, match="split=valid expected one of train, val, test"):
        manifest(example(0, split="valid"))
    with pytest.raises(DataError, match="split=holdout"):
        manifest(example(0)).rows(split="holdout")


def test_repeated_example_ids_are_counted():
    with pytest.raises(DataError, match="repeated_example_ids=2 expected every example id once"):
        manifest(example(0), *(example(i, example_id="e0") for i in (1, 2)))


def test_a_patient_in_two_splits_is_refused_without_naming_the_patient():
    crossing = [example(0, patient="Smith"), example(1, split="test", patient="Smith")]
    with pytest.raises(DataError, match="patients_in_two_splits=1 expected each patient") as error:
        manifest(*crossing)
    assert "Smith" not in str(error.value) + error.value.hint


@pytest.mark.parametrize("classes", [(), ("a", "a")])
def test_classes_are_named_once_each(classes):
    with pytest.raises(DataError, match="at least one name and no name twice"):
        Manifest("toy", classes, ())


@given(st.permutations(range(5)))
def test_fingerprint_ignores_order(order):
    rows = manifest(*(example(i, i % 3) for i in range(5)))
    assert rows.subset(order).fingerprint() == rows.fingerprint()


@given(row=st.integers(0, 4), shift=st.integers(1, 2))
def test_fingerprint_changes_with_any_label(row, shift):
    rows = manifest(*(example(i, i % 3) for i in range(5)))
    changed = [e._replace(label=(e.label + shift * (e.frame == row)) % 3) for e in rows.examples]
    assert manifest(*changed).fingerprint() != rows.fingerprint()


@pytest.mark.parametrize("field", ["example_id", "patient", "site", "frame", "split"])
def test_fingerprint_changes_with_any_field(field):
    changed = example(0)._replace(**{field: {"frame": 9, "split": "val"}.get(field, "x")})
    assert manifest(changed).fingerprint() != manifest(example(0)).fingerprint()


def test_fingerprint_changes_with_rows_classes_and_name():
    base = manifest(example(0), example(1))
    assert len(base.fingerprint()) == 64
    assert base.subset([0]).fingerprint() != base.fingerprint()
    assert Manifest("other", CLASSES, base.examples).fingerprint() != base.fingerprint()
    assert Manifest("toy", CLASSES[::-1], base.examples).fingerprint() != base.fingerprint()


def test_images_and_rows_stay_together_in_a_subset():
    images = np.arange(3 * 4, dtype=np.uint8).reshape(3, 2, 2)
    data = ImageDataset(manifest(example(0), example(1), example(2)), images)
    part = data.subset([2, 1])
    assert [e.frame for e in part.manifest.examples] == [2, 1]
    assert np.array_equal(part.images, images[[2, 1]])
    assert len(data.subset([])) == 0


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 4, 4), np.float32), r"images=float32\(1, 4, 4\) expected uint8"),
        (np.zeros((1, 4, 4, 2), np.uint8), r"images=uint8\(1, 4, 4, 2\) expected"),
        (np.zeros((1, 4), np.uint8), r"images=uint8\(1, 4\) expected"),
        (np.zeros((2, 4, 4), np.uint8), "images=2 expected 1, one per manifest row"),
    ],
)
def test_images_that_do_not_fit_the_manifest_are_refused(images, message):
    with pytest.raises(DataError, match=message):
        ImageDataset(manifest(example(0)), images)


cohorts = st.lists(
    st.tuples(st.integers(0, 25).map("p{}".format), st.integers(0, 3)), min_size=1, max_size=80
)


@given(cohorts, st.integers(0, 2**32))
def test_a_split_never_divides_a_patient_and_shows_every_class_to_training(cohort, seed):
    patients, labels = zip(*cohort, strict=True)
    splits = split_patients(patients, labels, FRACTIONS, seed)
    assert set(splits) <= set(SPLITS)
    for patient in set(patients):
        assert len({s for p, s in zip(patients, splits, strict=True) if p == patient}) == 1
    in_train = {label for label, s in zip(labels, splits, strict=True) if s == "train"}
    assert in_train == set(labels)


@given(cohorts, st.integers(0, 100), st.randoms(use_true_random=False))
def test_a_split_does_not_depend_on_the_order_of_the_rows(cohort, seed, random):
    def split_of(rows: list) -> dict:
        patients, labels = zip(*rows, strict=True)
        return dict(zip(patients, split_patients(patients, labels, FRACTIONS, seed), strict=True))

    shuffled = list(cohort)
    random.shuffle(shuffled)
    assert split_of(shuffled) == split_of(cohort)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 100))
def test_a_split_keeps_the_fractions_within_every_class(patients_per_class, seed):
    labels = [label for label, count in enumerate(patients_per_class) for _ in range(count)]
    patients = [f"p{i}" for i in range(len(labels))]
    splits = split_patients(patients, labels, FRACTIONS, seed)
    for label, count in enumerate(patients_per_class):
        for split, fraction in zip(SPLITS, FRACTIONS, strict=True):
            dealt = sum(1 for x, s in zip(labels, splits, strict=True) if x == label and s == split)
            assert abs(dealt - fraction * count) <= 2


def test_another_seed_splits_otherwise():
    patients = [f"p{i}" for i in range(30)]
    draws = {split_patients(patients, [0] * 30, FRACTIONS, seed) for seed in range(3)}
    assert len(draws) == 3


def test_a_share_of_zero_gets_no_patient():
    patients = [f"p{i}" for i in range(10)]
    splits = split_patients(patients, [0] * 10, (0.8, 0.2, 0.0), seed=0)
    assert [splits.count(split) for split in SPLITS] == [8, 2, 0]


def test_the_majority_label_decides_the_stratum():
    # Ten patients look like class 0 by first image and like class 1 by most images.
    mixed = [f"m{i}" for i in range(10)]
    pure = [f"q{i}" for i in range(10)]
    patients = [*mixed, *mixed, *mixed, *pure]
    labels = [0] * 10 + [1] * 20 + [0] * 10
    splits = dict(zip(patients, split_patients(patients, labels, FRACTIONS, 0), strict=True))
    for group in (mixed, pure):
        assert [sum(splits[p] == s for p in group) for s in SPLITS] == [6, 2, 2]


@pytest.mark.parametrize(
    "fractions", [(0.5, 0.2, 0.2), (1.2, -0.2, 0.0), (0.0, 0.5, 0.5), (0.6, 0.6, -0.2)]
)
def test_fractions_that_are_no_shares_are_refused(fractions):
    with pytest.raises(DataError, match="three shares that sum to 1 with train above 0"):
        split_patients(["p"], [0], fractions, 0)


def test_every_example_needs_a_label_to_be_split():
    with pytest.raises(DataError, match="labels=1 expected 2, one per example's patient"):
        split_patients(["p", "q"], [0], FRACTIONS, 0)
