"""A source's own splits stay; the others are drawn by patient, whatever the rows' order."""

from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.data.rows import Row
from client.data.splits import assign_splits, split_named

SHARES = (0.7, 0.1, 0.2)


def rows(count: int, *, patients: int = 0, split: str = "") -> list[Row]:
    return [
        Row(f"{split}{i}.png", 0, "ab"[i % 2], f"{split}p{i % patients}" if patients else "")
        for i in range(count)
    ]


def test_without_splits_all_three_are_drawn_in_their_shares():
    splits = assign_splits(rows(100), SHARES, 0)
    assert [splits.count(name) for name in ("train", "val", "test")] == [70, 10, 20]


def test_a_patient_stays_in_one_split():
    listed = rows(120, patients=40)
    of_patient = defaultdict(set)
    for row, split in zip(listed, assign_splits(listed, SHARES, 0), strict=True):
        of_patient[row.patient].add(split)
    assert all(len(splits) == 1 for splits in of_patient.values())
    assert set().union(*of_patient.values()) == {"train", "val", "test"}


def test_the_frames_of_a_file_stay_together():
    listed = [Row(f"{i // 5}.dcm", i % 5, "a") for i in range(100)]
    splits = assign_splits(listed, SHARES, 1)
    assert all(len(set(splits[i : i + 5])) == 1 for i in range(0, 100, 5))
    assert set(splits) == {"train", "val", "test"}


def test_classes_are_drawn_alike():
    listed = rows(200)
    splits = assign_splits(listed, SHARES, 3)
    for label in "ab":
        own = [s for row, s in zip(listed, splits, strict=True) if row.label == label]
        assert abs(own.count("test") - 20) <= 1
        assert abs(own.count("val") - 10) <= 1


def test_a_missing_val_comes_out_of_train_and_test_stays():
    listed = [r._replace(split="train") for r in rows(80, patients=40, split="train")]
    listed += [r._replace(split="test") for r in rows(20)]
    splits = assign_splits(listed, SHARES, 0)
    assert set(splits[80:]) == {"test"}
    assert set(splits[:80]) == {"train", "val"}
    patients = {row.patient for row, s in zip(listed, splits, strict=True) if s == "val"}
    assert len(patients) == 5  # an eighth of forty: 0.1 to 0.7


def test_what_is_called_train_never_becomes_test():
    """A network may have been fitted to it."""
    listed = [r._replace(split="train") for r in rows(20, split="train")] + rows(20)
    splits = assign_splits(listed, SHARES, 0)
    assert set(splits[:20]) == {"train"}
    assert [splits[20:].count(name) for name in ("train", "val", "test")] == [14, 2, 4]
    listed = [r._replace(split="train") for r in rows(20)]
    listed += [r._replace(split="val") for r in rows(4, split="val")]
    assert assign_splits(listed, SHARES, 0) == ("train",) * 20 + ("val",) * 4


def test_a_share_of_zero_draws_none():
    listed = [r._replace(split="train") for r in rows(40)]
    assert set(assign_splits(listed, (1.0, 0.0, 0.0), 0)) == {"train"}


def test_given_splits_all_stay():
    listed = [
        r._replace(split=s) for r, s in zip(rows(9), ["train", "val", "test"] * 3, strict=True)
    ]
    assert assign_splits(listed, SHARES, 0) == tuple(row.split for row in listed)


def test_a_row_without_a_split_goes_where_its_patient_is():
    listed = [Row("1", 0, "a", "p", split="test"), Row("2", 0, "a", "p"), Row("3", 0, "a", "q")]
    assert assign_splits(listed, SHARES, 0) == ("test", "test", "train")


def test_no_rows_have_no_splits():
    assert assign_splits([], SHARES, 0) == ()
    only_test = [r._replace(split="test") for r in rows(3)]
    assert assign_splits(only_test, SHARES, 0) == ("test",) * 3


ROW = st.builds(
    Row,
    st.integers(0, 30).map(str),
    st.just(0),
    st.sampled_from("abc"),
    st.sampled_from(["", "p1", "p2", "p3", "p4"]),
    st.just(""),
    st.just(""),
)


@settings(max_examples=60)
@given(st.lists(ROW, min_size=1, max_size=40, unique=True), st.integers(0, 9), st.randoms())
def test_the_draw_does_not_depend_on_the_order(listed, seed, random):
    drawn = dict(zip(listed, assign_splits(listed, SHARES, seed), strict=True))
    shuffled = list(listed)
    random.shuffle(shuffled)
    assert dict(zip(shuffled, assign_splits(shuffled, SHARES, seed), strict=True)) == drawn


@pytest.mark.parametrize(
    ("word", "split"), [("Train", "train"), ("VALID", "val"), (" testing ", "test"), ("dev", "")]
)
def test_words_for_splits(word, split):
    assert split_named(word) == split
