"""A manifest follows from content and settings, is built once, and hides the patients."""

import json
import logging
import os
import stat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.data import build as build_module
from client.data.build import SplitRule, _Found, _joined, _splits
from client.data.images import Facts, Frame, Look, look
from client.data.keyed import keyed_hash
from client.data.rows import Listing, Row
from fakes.pictures import CLASSES, built, listing, picture
from strategies.errors import DataError


@pytest.fixture
def looked(monkeypatch):
    """The files that were read and decoded, in order."""
    files: list[str] = []

    def watched(task: Look):
        files.append(os.path.relpath(task.path, os.path.dirname(os.path.dirname(task.path))))
        return look(task)

    monkeypatch.setattr(build_module, "look", watched)
    return files


def test_patients_and_examples_are_keyed_hashes_and_their_names_are_nowhere(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    found = listing(tmp_path, patient="Smith-{}")
    data = built(found, tmp_path / "cache")
    assert len(data) == len(data.manifest.patients) == 12
    expected = {keyed_hash(b"key", "patient", f"Smith-{i}") for i in range(12)}
    assert set(data.manifest.patients) == expected
    assert all(len(e.example_id) == 16 for e in data.manifest.examples)
    kept = b"".join(p.read_bytes() for p in (tmp_path / "cache").iterdir())
    assert b"Smith" not in kept
    assert "Smith" not in caplog.text
    assert str(tmp_path) not in caplog.text
    assert "images_without_patient" not in caplog.text


def test_labels_sites_and_splits_are_those_of_the_rows(tmp_path):
    found = listing(tmp_path, patient="p{}", site="hospital-{}", split="test")
    data = built(found, tmp_path / "cache", site="", split=SplitRule((1.0, 0.0, 0.0)))
    for example in data.manifest.examples:
        number = int(example.file[-7:-4])
        assert example[1:4] == (f"{CLASSES[number % 2]}/{number:03d}.png", 0, number % 2)
        assert example[5:] == (f"hospital-{number}", "test")
    named = built(found, tmp_path / "cache", site="B")
    assert {example.site for example in named.manifest.examples} == {"B"}


def test_an_image_without_a_patient_counts_as_one_and_is_named_in_the_log(tmp_path, caplog):
    data = built(listing(tmp_path), tmp_path / "cache")
    assert all(e.patient == e.example_id for e in data.manifest.examples)
    assert "dataset=made images_without_patient=12: each counts as a patient" in caplog.text


def test_another_key_gives_other_hashes_and_the_same_split(tmp_path):
    found = listing(tmp_path, patient="p{}")
    one, other = (built(found, tmp_path / key, key=key.encode()).manifest for key in ("a", "b"))
    assert not set(one.patients) & set(other.patients)
    assert {e.file: e.split for e in one.examples} == {e.file: e.split for e in other.examples}


@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(order=st.permutations(range(8)))
def test_neither_names_nor_order_of_files_change_a_manifest(tmp_path_factory, order):
    one, other = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("other")
    first = built(listing(one, 8, patient="p{}"), one / "cache").manifest
    rows = []
    for place, number in enumerate(order):
        picture(other, f"renamed/{place}", number)
        rows.append(Row(f"renamed/{place}", 0, CLASSES[number % 2], f"p{number}"))
    second = built(Listing("made", other, CLASSES, rows), other / "cache").manifest
    assert first.fingerprint() == second.fingerprint()
    assert [e._replace(file="") for e in first.examples] == [
        e._replace(file="") for e in second.examples
    ]


def test_content_label_and_patient_change_the_fingerprint(tmp_path):
    found = listing(tmp_path, 4, patient="p{}", split="train")
    prints = {built(found, tmp_path / "cache").manifest.fingerprint()}
    found.rows[0] = found.rows[0]._replace(label="yes")
    prints.add(built(found, tmp_path / "cache").manifest.fingerprint())
    found.rows[0] = found.rows[0]._replace(patient="p9")
    prints.add(built(found, tmp_path / "cache").manifest.fingerprint())
    picture(tmp_path, found.rows[0].file, 77)
    prints.add(built(found, tmp_path / "cache").manifest.fingerprint())
    assert len(prints) == 4


# --- splits and copies


def test_a_source_without_splits_is_split_by_patient(tmp_path):
    found = listing(tmp_path, 40)
    found.rows = [row._replace(patient=f"p{i // 4}") for i, row in enumerate(found.rows)]
    manifest = built(found, tmp_path / "cache", split=SplitRule((0.5, 0.25, 0.25))).manifest
    assert {e.split for e in manifest.examples} == {"train", "val", "test"}
    assert len({(e.patient, e.split) for e in manifest.examples}) == 10


def test_a_patient_in_two_of_the_sources_splits_is_refused_unnamed(tmp_path):
    found = listing(tmp_path, 2, patient="Smith")
    found.rows = [
        row._replace(split=split) for row, split in zip(found.rows, ("train", "test"), strict=True)
    ]
    with pytest.raises(DataError, match="patients_in_two_splits=1") as error:
        built(found, tmp_path / "cache")
    assert "Smith" not in str(error.value)


def with_copies(folder, count: int = 30) -> Listing:
    """Each picture twice, under another name, without patients."""
    found = listing(folder, count)
    for i in range(count):
        name = f"copies/{i}.png"
        picture(folder, name, i)
        found.rows.append(found.rows[i]._replace(file=name))
    return found


def test_copies_of_unknown_patients_are_not_drawn_into_two_splits(tmp_path):
    data = built(with_copies(tmp_path), tmp_path / "cache")
    splits: dict[str, set[str]] = {}
    for example, frame in zip(data.manifest.examples, data.images.frames, strict=True):
        assert (example.file, example.frame) == (frame.file, frame.frame)
        splits.setdefault(frame.facts.pixels, set()).add(example.split)
    assert len(splits) == 30
    assert all(len(found) == 1 for found in splits.values())
    assert set.union(*splits.values()) == {"train", "val", "test"}


def test_copies_are_told_and_removed_when_asked(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    found = with_copies(tmp_path, 3)
    assert len(built(found, tmp_path / "cache")) == 6
    for _ in range(2):  # the second one is kept, and tells the same
        caplog.clear()
        assert len(built(found, tmp_path / "cache", dedupe=True)) == 3
        assert "duplicate_groups=3 images=6" in caplog.text
    found.rows[0] = found.rows[0]._replace(label="yes")
    assert len(built(found, tmp_path / "cache", dedupe=True)) == 2  # two labels: neither is right


# --- what cannot be used


def test_unreadable_files_are_left_out_counted_and_told(tmp_path, caplog):
    found = listing(tmp_path, 40)
    (tmp_path / found.rows[3].file).write_bytes(b"")
    (tmp_path / found.rows[4].file).write_text("not a picture")
    found.skipped["no picture by its name"] = 7
    found.flagged["burned-in annotation"] = 2
    data = built(found, tmp_path / "cache")
    assert len(data) == 38
    files = {e.file for e in data.manifest.examples}
    assert files == {row.file for i, row in enumerate(found.rows) if i not in (3, 4)}
    expected = (
        "dataset=made skipped: 7 x no picture by its name, 1 x empty file, "
        "1 x not a picture (PNG, JPEG, BMP, TIFF, WEBP)"
    )
    assert expected in caplog.text
    assert "dataset=made worth a look: 2 x burned-in annotation" in caplog.text


def test_more_unreadable_files_than_allowed_are_refused(tmp_path):
    found = listing(tmp_path, 20)
    for row in found.rows[:2]:
        (tmp_path / row.file).write_bytes(b"")
    with pytest.raises(
        DataError,
        match=r"unreadable=2 of 20 images expected at most max-unreadable-share=0\.05: "
        r"2 x empty file",
    ):
        built(found, tmp_path / "cache")
    assert len(built(found, tmp_path / "cache", max_unreadable_share=0.1)) == 18


def test_a_source_of_nothing_says_why(tmp_path):
    with pytest.raises(DataError, match=r"dataset=made images=0 expected at least one$"):
        built(Listing("made", tmp_path, CLASSES, []), tmp_path / "cache")
    found = listing(tmp_path, 1)
    found.skipped["segmentation mask"] = 3
    (tmp_path / found.rows[0].file).unlink()
    with pytest.raises(DataError, match=r"3 x segmentation mask, 1 x file cannot be opened"):
        built(found, tmp_path / "cache", max_unreadable_share=1.0)


def test_rows_of_other_labels_and_rows_listed_twice_are_counted(tmp_path, caplog):
    found = listing(tmp_path, 6)
    found.rows += [found.rows[0], found.rows[1]._replace(label="maybe")]
    assert len(built(found, tmp_path / "cache")) == 6
    assert "1 x label is none of the classes, 1 x row listed twice" in caplog.text


# --- built once


def test_a_manifest_is_built_once_and_is_its_owners_alone(tmp_path, looked):
    found = listing(tmp_path)
    first = built(found, tmp_path / "cache").manifest
    assert len(looked) == 12
    assert built(found, tmp_path / "cache").manifest == first
    assert len(looked) == 12
    (path,) = (tmp_path / "cache").iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_a_kept_manifest_is_not_computed_again(tmp_path, monkeypatch):
    found = listing(tmp_path)
    first = built(found, tmp_path / "cache").manifest

    def refuse(*arguments):
        raise AssertionError("split again")

    monkeypatch.setattr(build_module, "assign_splits", refuse)
    assert built(found, tmp_path / "cache").manifest == first
    with pytest.raises(AssertionError):
        built(found, tmp_path / "cache", split=SplitRule(seed=1))


def test_only_files_that_changed_are_read_again(tmp_path, looked):
    found = listing(tmp_path)
    first = built(found, tmp_path / "cache").manifest
    looked.clear()
    picture(tmp_path, "no/002.png", 50)
    picture(tmp_path, "no/new.png", 51)
    found.rows.append(Row("no/new.png", 0, "no"))
    second = built(found, tmp_path / "cache").manifest
    assert sorted(looked) == ["no/002.png", "no/new.png"]
    assert len(second) == 13
    changed = {e.file for e in set(second.examples)} - {
        e.file for e in second.examples if e.example_id in {f.example_id for f in first.examples}
    }
    assert changed == {"no/002.png", "no/new.png"}


def test_a_change_that_keeps_the_size_is_noticed_by_its_time(tmp_path, looked):
    found = listing(tmp_path, 2, split="train")
    path = tmp_path / found.rows[0].file
    path.write_bytes(path.read_bytes() + b"a")
    first = built(found, tmp_path / "cache").manifest.fingerprint()
    path.write_bytes(path.read_bytes()[:-1] + b"b")
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert built(found, tmp_path / "cache").manifest.fingerprint() != first


def test_a_change_by_a_tool_that_keeps_size_and_time_is_noticed(tmp_path):
    found = listing(tmp_path, 2, split="train")
    path = tmp_path / found.rows[0].file
    path.write_bytes(path.read_bytes() + b"a")
    before = path.stat()
    first = built(found, tmp_path / "cache").manifest.fingerprint()
    path.write_bytes(path.read_bytes()[:-1] + b"b")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert built(found, tmp_path / "cache").manifest.fingerprint() != first


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("123456789")), max_size=20),
    st.randoms(),
)
def test_what_is_linked_by_file_or_pixels_is_one_patient(images, random):
    named = _joined(images)
    for file, pixels in images:
        for other_file, other in images:
            if file == other_file or pixels == other:
                assert named[pixels] == named[other]
    shuffled = list(images)
    random.shuffle(shuffled)
    assert _joined(shuffled) == named
    assert _joined([(f"moved/{file}", pixels) for file, pixels in images]) == named


def test_frames_that_look_alike_do_not_part_their_file(tmp_path):
    """A black first frame in many files, and equal frames within one."""
    rows = [Row(f"{i // 4}.dcm", i % 4, "no") for i in range(80)]
    facts = [
        Facts("black" if row.frame == 0 and int(row.file[0]) < 3 else f"{row.file}{row.frame // 2}",
              8, 8, 1, 8)
        for row in rows
    ]  # fmt: skip
    found = [
        _Found(row, 0, Frame(row.file, row.frame, 1, 1, row.file, fact), "")
        for row, fact in zip(rows, facts, strict=True)
    ]
    splits = _splits(found, SplitRule())
    assert set(splits) == {"train", "val", "test"}
    for start in range(0, 80, 4):
        assert len(set(splits[start : start + 4])) == 1


def test_a_file_that_was_repaired_is_used(tmp_path):
    found = listing(tmp_path, 30)
    path = tmp_path / found.rows[0].file
    content = path.read_bytes()
    path.write_bytes(content[:100])
    assert len(built(found, tmp_path / "cache")) == 29
    path.write_bytes(content)
    assert len(built(found, tmp_path / "cache")) == 30


def test_a_file_that_a_new_plug_in_decodes_is_used(tmp_path, monkeypatch):
    found = listing(tmp_path, 30)

    def lacking(task: Look):
        facts = look(task)
        return facts._replace(frames={0: "no decoder"}) if task.path.endswith("000.png") else facts

    with monkeypatch.context() as patched:
        patched.setattr(build_module, "look", lacking)
        assert len(built(found, tmp_path / "cache")) == 29
    assert len(built(found, tmp_path / "cache")) == 30


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "files": 3}),
        lambda text: json.dumps({**json.loads(text), "examples": [[1, 2]]}),
        lambda text: json.dumps({"files": {}, "settings": None}),
        lambda text: "\udcff",
    ],
)
def test_a_damaged_manifest_is_made_anew(tmp_path, damage):
    found = listing(tmp_path)
    first = built(found, tmp_path / "cache").manifest
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(damage(path.read_text()).encode("utf-8", "surrogateescape"))
    assert built(found, tmp_path / "cache").manifest == first


def test_other_decoding_options_read_the_files_again(tmp_path, looked):
    found = listing(tmp_path, 3)
    built(found, tmp_path / "cache", options="lung")
    built(found, tmp_path / "cache", options="bone")
    assert len(looked) == 6
