"""A folder of DICOM and a table of labels become rows; whatever is left out is counted."""

import logging
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    RTDoseStorage,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
)

from client.data import dicom_tree
from client.data.dicom_file import quiet
from client.data.dicom_labels import LABEL_KEYS
from client.data.dicom_patients import JOINED, Claim, name_patients
from client.data.dicom_tree import list_dicom
from client.data.rows import Row
from client.data.source import DataSource
from fakes.dicoms import NAME, uid, write_dicom, write_dicomdir
from fakes.pictures import built
from strategies.errors import DataError

WHEEL = Path(pydicom.__file__).parent / "data" / "test_files"
PIXELS = np.arange(16, dtype=np.uint16).reshape(4, 4)
CINE = np.arange(80, dtype=np.uint16).reshape(5, 4, 4)


def table(folder: Path, *lines: str, name="labels.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def tree(tmp_path):
    """Two patients: one with two series, one with a study of one image."""
    root = tmp_path / "archive"
    write_dicom(root / "1" / "a.dcm", PIXELS, study="1", series="1", instance="1")
    write_dicom(root / "1" / "b", PIXELS, study="1", series="2", instance="1")
    write_dicom(root / "2" / "c.dcm", PIXELS, study="2", series="1", instance="1")
    return root


KEYS = {
    "sop-instance-uid": (uid("1", "1", "1"), uid("1", "2", "1"), uid("2", "1", "1")),
    "series-instance-uid": (uid("1", "1"), uid("1", "2"), uid("2", "1")),
    "study-instance-uid": (uid("1"), uid("1"), uid("2")),
    "accession-number": ("A1", "A1", "A2"),
    "file": ("1/a.dcm", "1/b", "2/c.dcm"),
}


@pytest.mark.parametrize("key", LABEL_KEYS)
@pytest.mark.parametrize("how", ["setting", "header", "standard", "found"])
def test_labels_join_by_each_key_however_it_is_named(tmp_path, tree, key, how):
    first = {"header": key, "standard": LABEL_KEYS[key]}.get(how, "key")
    rows = dict.fromkeys(
        f"{value},{label}" for value, label in zip(KEYS[key], ("x", "x", "y"), strict=True)
    )
    labels = table(tmp_path, f"{first},label", *rows)
    found = list_dicom(tree, labels, label_key=key if how == "setting" else None)
    assert found.rows == [
        Row("1/a.dcm", 0, "x", "P1"),
        Row("1/b", 0, "x", "P1"),
        Row("2/c.dcm", 0, "y", "P2"),
    ]
    assert (found.classes, found.kind, found.root) == (("x", "y"), "dicom", tree)
    assert not found.skipped
    assert not found.flagged


def test_a_key_that_fits_two_ways_is_refused_with_counts(tmp_path, tree):
    write_dicom(tree / "A1", PIXELS, study="3", AccessionNumber="A3")
    labels = table(tmp_path, "key,label", "A1,x", "A2,y")
    with pytest.raises(DataError) as raised:
        list_dicom(tree, labels)
    assert str(raised.value) == (
        "label-key cannot be told: of 2 labelled keys match sop-instance-uid 0, "
        "series-instance-uid 0, study-instance-uid 0, accession-number 2, file 1"
    )
    assert len(list_dicom(tree, labels, label_key="file").rows) == 1


def test_labels_of_another_folder_are_refused(tmp_path, tree):
    with pytest.raises(DataError, match=r"of 1 labelled keys match sop-instance-uid 0, .* file 0"):
        list_dicom(tree, table(tmp_path, "key,label", "elsewhere,x"))


def test_a_setting_that_contradicts_the_header_is_refused(tmp_path, tree):
    labels = table(tmp_path, "AccessionNumber,label", "A1,x")
    with pytest.raises(DataError, match="label-key=file expected accession-number"):
        list_dicom(tree, labels, label_key="file")
    with pytest.raises(DataError, match="label-key=files expected one of sop-instance-uid"):
        list_dicom(tree, labels, label_key="files")


def test_frames_are_chosen(tmp_path, tree):
    write_dicom(tree / "cine", CINE, study="4")
    labels = table(tmp_path, "file,label", "cine,x")
    chosen = {
        frames: [row.frame for row in list_dicom(tree, labels, frames=frames).rows]
        for frames in ("first", "middle", "all")
    }
    assert chosen == {"first": [0], "middle": [2], "all": [0, 1, 2, 3, 4]}
    with pytest.raises(DataError, match="frames=last expected one of first, middle, all"):
        list_dicom(tree, labels, frames="last")  # pyright: ignore[reportArgumentType]


def test_labels_and_images_without_each_other_are_counted(tmp_path, tree):
    labels = table(tmp_path, "file,label", "1/a.dcm,x", "1/gone.dcm,x")
    found = list_dicom(tree, labels)
    assert [row.file for row in found.rows] == ["1/a.dcm"]
    assert found.skipped == {"image without a label": 2, "label without an image": 1}
    assert found.classes == ("x",)


def test_labels_that_mostly_meet_nothing_are_refused(tmp_path, tree):
    (tree / "cut").write_bytes((tree / "2" / "c.dcm").read_bytes()[:170])
    labels = table(tmp_path, "file,label", "1/a.dcm,x", "1/gone.dcm,x", "2/gone.dcm,y")
    with pytest.raises(DataError) as raised:
        list_dicom(tree, labels)
    assert str(raised.value) == (
        "labels=3 without_image=2 unreadable_files=1 expected at most half without an image; "
        "left out: 1 x DICOM header truncated or damaged"
    )


def test_rows_that_cannot_be_used_are_counted(tmp_path, tree):
    labels = table(
        tmp_path,
        "file;label;patient;split",
        "1/a.dcm;x;007;Training",
        "./1\\b;y;nan;validation",
        "2/c.dcm;x;;",
        "2/c.dcm;y;;",
        "1/b;y;;val",
        ";x;;",
        "3;;;",
        "4;x;;later",
    )
    found = list_dicom(tree, labels)
    assert found.rows == [
        Row("1/a.dcm", 0, "x", "007", "", "train"),
        Row("1/b", 0, "y", "007", "", "val"),  # of the same study
    ]
    assert found.skipped == {
        "row that contradicts another of the same key": 2,
        "row that repeats another": 1,
        "row without a key": 1,
        "row without a label": 1,
        "row whose split is none of train, val, test": 1,
        "image without a label": 1,
    }


def test_declared_classes_decide_order_and_spelling(tmp_path, tree):
    labels = table(tmp_path, "file,label", "1/a.dcm,Soft_Tissue", "1/b,bone", "2/c.dcm,Foot")
    found = list_dicom(tree, labels, classes=("soft tissue", "bone"))
    assert [row.label for row in found.rows] == ["soft tissue", "bone"]
    assert found.classes == ("soft tissue", "bone")
    assert found.skipped["row of a class that is not declared"] == 1


def test_a_misspelt_patient_column_is_told(tmp_path, tree, caplog):
    list_dicom(tree, table(tmp_path, "file,label,pateint,remark", "1/a.dcm,x,7,"))
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warned == ["labels column=pateint is not used: did you mean patient?"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "lacks the column label"),
        (b"file,text\n1,2\n", "lacks the column label"),
        (b"name,label\n1,2\n", "first column=name expected key, SOPInstanceUID"),
        (b"label,file\n1,2\n", "first column=label expected key, SOPInstanceUID"),
        (b"file,label\n1,x\n2,\xe4\n", r"line 3 is not UTF-8"),
        (b'file,label\n1,"x\n', "line 2 cannot be read"),
        ("file,label\n1,x\n".encode("utf-16"), "is not UTF-8"),
    ],
)
def test_tables_that_are_none_are_refused(tmp_path, tree, content, text):
    labels = tmp_path / "labels.csv"
    labels.write_bytes(content)
    with pytest.raises(DataError, match=text):
        list_dicom(tree, labels)


def test_a_table_with_a_byte_order_mark_is_read(tmp_path, tree):
    labels = tmp_path / "labels.csv"
    labels.write_bytes(b"\xef\xbb\xbffile,label\r\n1/a.dcm,x\r\n")
    assert len(list_dicom(tree, labels).rows) == 1


def test_absent_folders_and_tables_are_refused(tmp_path, tree):
    labels = table(tmp_path, "file,label", "1/a.dcm,x")
    with pytest.raises(DataError, match=r"folder=.*nowhere cannot be read"):
        list_dicom(tmp_path / "nowhere", labels)
    with pytest.raises(DataError, match=r"csv=.*none\.csv cannot be read"):
        list_dicom(tree, tmp_path / "none.csv")


def test_what_is_no_image_is_skipped_with_its_reason(tmp_path, tree):
    write_dicom(tree / "report", None, study="5", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11")
    write_dicom(tree / "seg", PIXELS, study="6", SOPClassUID=SegmentationStorage)
    write_dicom(tree / "dose", PIXELS, study="7", SOPClassUID=RTDoseStorage)
    write_dicom(tree / "frames", PIXELS, study="8", NumberOfFrames="999999999")
    odd = write_dicom(tree / "odd", PIXELS, study="9", NumberOfFrames="77")
    frames = b"\x28\0\x08\0IS\x02\0"
    odd.write_bytes(odd.read_bytes().replace(frames + b"77", frames + b"1A"))
    shutil.copy(tree / "1" / "a.dcm", tree / "copy")
    (tree / "empty.dcm").touch()
    (tree / "notes.txt").write_text("nothing")
    (tree / "viewer.exe").write_bytes(b"MZ" + b"\0" * 500)
    (tree / "cut.dcm").write_bytes((tree / "2" / "c.dcm").read_bytes()[:600])
    labels = table(tree, "accession-number,label", "A1,x", "A2,y")
    found = list_dicom(tree, labels)
    assert sorted(row.file for row in found.rows) == ["1/a.dcm", "1/b", "2/c.dcm"]
    assert found.skipped == {
        "DICOM object without an image": 1,
        "DICOM object without an image (segmentation)": 1,
        "DICOM object without an image (radiotherapy dose)": 1,
        "second copy of an instance": 1,
        "not a DICOM file": 2,  # the table itself lies there too and is no count
    }
    assert found.unreadable == {"DICOM header truncated or damaged": 3, "empty file": 1}


def test_links_are_followed_and_loops_end(tmp_path, tree):
    elsewhere = tmp_path / "elsewhere"
    write_dicom(elsewhere / "d", PIXELS, study="4")
    (tree / "linked").symlink_to(elsewhere)
    (tree / "1" / "up").symlink_to(tree)
    (tree / "self").symlink_to(tree / "self")
    (tree / "dead").symlink_to(tree / "nothing")
    (tree / "again.dcm").symlink_to(tree / "1" / "a.dcm")
    labels = table(tmp_path, "AccessionNumber,label", "A1,x", "A2,x", "A4,y")
    found = list_dicom(tree, labels)
    assert len(found.rows) == 4
    assert "linked/d" in {row.file for row in found.rows}
    assert found.skipped.pop("folder or file reached a second time by a link") == 2
    assert not found.skipped
    assert sorted(found.unreadable.values()) == [1, 1]
    assert all(reason.startswith("file cannot be opened") for reason in found.unreadable)


def test_a_folder_that_cannot_be_read_is_counted(tmp_path, tree, monkeypatch):
    real = os.scandir

    def refuse(path):  # simulated: tests may run as root, whom no mode keeps out
        if str(path).endswith("2"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = list_dicom(tree, table(tmp_path, "AccessionNumber,label", "A1,x", "A2,y"))
    assert found.unreadable == {"folder cannot be read": 1}
    assert found.skipped == {"label without an image": 1}


def test_names_that_are_not_utf8_are_counted(tmp_path, tree):
    shutil.copy(tree / "1" / "a.dcm", os.fsencode(tree) + b"/\xe4.dcm")
    shutil.copy(tree / "1" / "a.dcm", tree / "\x1b[2J")
    found = list_dicom(tree, table(tmp_path, "AccessionNumber,label", "A1,x", "A2,y"))
    assert found.skipped == {"file name is not printable UTF-8": 2}


def test_a_header_that_crashes_its_reader_is_unreadable(tmp_path, tree, monkeypatch):
    look = dicom_tree._look
    monkeypatch.setattr(dicom_tree, "MANY", 1)
    monkeypatch.setattr(
        dicom_tree,
        "in_workers",
        lambda _, tasks, *, crashed, workers: (
            (i, crashed if task[1] == "1/b" else look(task)) for i, task in enumerate(tasks)
        ),
    )
    found = list_dicom(tree, table(tmp_path, "AccessionNumber,label", "A1,x", "A2,y"))
    assert found.unreadable == {"reading the header crashed": 1}
    assert not found.skipped


def test_unreadable_files_count_towards_the_share(tmp_path, tree, caplog):
    (tree / "cut").write_bytes((tree / "2" / "c.dcm").read_bytes()[:400])
    found = list_dicom(tree, table(tmp_path, "AccessionNumber,label", "A1,x", "A2,y"))
    with pytest.raises(
        DataError,
        match=r"unreadable=1 of 4 images expected at most max-unreadable-share=0\.05: "
        r"1 x DICOM header truncated or damaged",
    ):
        built(found, tmp_path / "cache")
    assert len(built(found, tmp_path / "cache", max_unreadable_share=0.25)) == 3
    assert "dataset=dicom skipped: 1 x DICOM header truncated or damaged" in caplog.text
    assert found.unreadable == {"DICOM header truncated or damaged": 1}  # as it was


def test_windows_in_hounsfield_units_are_flagged_outside_ct(tmp_path, tree):
    write_dicom(tree / "d", PIXELS, study="4", Modality="MR")
    write_dicom(tree / "e", PIXELS, study="5", Modality=None)
    labels = table(tmp_path, "file,label", "1/a.dcm,x", "d,x", "e,x")
    for window in ("lung", "40/400"):
        assert list_dicom(tree, labels, window=window).flagged == {
            "window in Hounsfield units on an image that is not CT": 2
        }
    for window in ("auto", "none"):
        assert not list_dicom(tree, labels, window=window).flagged


def patients(root, labels):
    found = list_dicom(root, labels)
    return {row.file: row.patient for row in found.rows}, found.flagged


def test_a_patient_that_the_table_names_in_some_rows_is_one(tmp_path, tree):
    write_dicom(tree / "d", PIXELS, study="4", PatientID="P1")
    labels = table(tmp_path, "file,label,patient", "1/a.dcm,x,007", "d,x,", "2/c.dcm,x,")
    assert patients(tree, labels) == ({"1/a.dcm": "007", "d": "007", "2/c.dcm": "P2"}, {})


def test_a_patient_whose_number_only_the_table_has_joins_the_headers_one(tmp_path, tree):
    write_dicom(tree / "d", PIXELS, study="4", PatientID="")
    labels = table(tmp_path, "file,label,patient", "1/a.dcm,x,", "d,x,P1", "2/c.dcm,x,")
    assert patients(tree, labels)[0] == {"1/a.dcm": "P1", "d": "P1", "2/c.dcm": "P2"}


def test_a_study_stays_with_the_patient_that_one_of_its_files_names(tmp_path):
    write_dicom(tmp_path / "a", PIXELS, study="1", instance="1", PatientID="P1")
    write_dicom(tmp_path / "b", PIXELS, study="1", instance="2", PatientID="")
    write_dicom(tmp_path / "c", PIXELS, study="2", PatientID="P1")
    write_dicom(tmp_path / "d", PIXELS, study="3", PatientID="P3")
    labels = table(tmp_path, "file,label", "b,x", "c,y", "d,y")  # a has no label, and tells
    assert patients(tmp_path, labels) == ({"b": "P1", "c": "P1", "d": "P3"}, {})


def test_a_missing_issuer_is_the_only_one_there_is(tmp_path):
    write_dicom(tmp_path / "a", PIXELS, study="1", PatientID="P", IssuerOfPatientID="A")
    write_dicom(tmp_path / "b", PIXELS, study="2", PatientID="P")
    write_dicom(tmp_path / "c", PIXELS, study="3", PatientID="Q")
    labels = table(tmp_path, "file,label", "a,x", "b,y", "c,y")
    assert patients(tmp_path, labels) == (
        {"a": "P\\A", "b": "P\\A", "c": "Q"},
        {},
    )


def test_a_table_that_names_every_patient_decides_alone(tmp_path):
    for name in "abc":  # anonymised by giving all the same number
        write_dicom(tmp_path / name, PIXELS, study=name, PatientID="ANON")
    labels = table(tmp_path, "file,label,patient", "a,x,1", "b,x,2", "c,y,2")
    named, flagged = patients(tmp_path, labels)
    assert named == {"a": "1", "b": "2", "c": "2"}
    assert flagged == {"one PatientID in all studies: was it removed?": 3}


def test_a_table_that_leaves_one_of_them_open_does_not(tmp_path):
    for name in "abcd":
        write_dicom(tmp_path / name, PIXELS, study=name, PatientID="D" if name == "d" else "ANON")
    labels = table(tmp_path, "file,label,patient", "a,x,1", "b,x,2", "c,y,", "d,y,")
    named, flagged = patients(tmp_path, labels)
    assert named == {"a": "1", "b": "1", "c": "1", "d": "D"}
    assert flagged == {JOINED: 3}


def test_a_study_of_several_patients_is_one_and_flagged(tmp_path):
    write_dicom(tmp_path / "a", PIXELS, study="1", instance="1", PatientID="P2")
    write_dicom(tmp_path / "b", PIXELS, study="1", instance="2", PatientID="P1")
    labels = table(tmp_path, "file,label", "a,x", "b,x")
    assert patients(tmp_path, labels) == (
        {"a": "P1", "b": "P1"},
        {JOINED: 2},
    )


@pytest.mark.parametrize("other", ["p7", "007", "7\t"])
def test_patients_whose_names_are_nearly_the_same_are_flagged(tmp_path, other):
    first = "P7" if other == "p7" else "7"
    write_dicom(tmp_path / "a", PIXELS, study="1", PatientID=first)
    write_dicom(tmp_path / "b", PIXELS, study="2", PatientID=other)
    write_dicom(tmp_path / "c", PIXELS, study="3", PatientID="8")
    labels = table(tmp_path, "file,label", "a,x", "b,x", "c,x")
    assert patients(tmp_path, labels)[1] == {
        "patient whose number differs from another's by case, spaces or leading zeros alone": 2
    }


@given(
    images=st.lists(
        st.tuples(*[st.sampled_from(["", "a", "b", "c"])] * 4, st.booleans()), max_size=7
    ),
    data=st.data(),
)
def test_patients_do_not_depend_on_order_and_join_what_is_linked(images, data):
    claims = [Claim(*image) for image in images]
    order = data.draw(st.permutations(range(len(claims))))
    names = name_patients(claims, Counter())
    shuffled = name_patients([claims[i] for i in order], Counter())
    assert [names[i] for i in order] == shuffled
    for one, first in zip(claims, names, strict=True):
        for other, second in zip(claims, names, strict=True):
            same_number = one.patient_id and one[1:3] == other[1:3]
            same_study = one.study and one.study == other.study
            if (
                not one.table
                and not other.table
                and one.used
                and other.used
                and (same_number or same_study)
            ):
                assert first == second


def test_patients_come_from_table_header_or_study(tmp_path, tree):
    write_dicom(tree / "d", PIXELS, study="4", IssuerOfPatientID="Hospital A")
    write_dicom(tree / "e", PIXELS, study="5", PatientID="")
    write_dicom(tree / "f", PIXELS, study="6", PatientID=None, StudyInstanceUID="")
    labels = table(
        tmp_path, "file,label,patient", "1/a.dcm,x,007", "1/b,x", "d,x", "e,x", "f,x", "2/c.dcm,x"
    )
    found = list_dicom(tree, labels)
    assert {row.file: row.patient for row in found.rows} == {
        "1/a.dcm": "007",
        "1/b": "007",
        "2/c.dcm": "P2",
        "d": "P4\\Hospital A",
        "e": uid("5"),
        "f": "",
    }
    assert found.flagged == {
        "no PatientID: the study counts as the patient": 1,
        "neither PatientID nor study: the image counts as a patient": 1,
    }


def test_doubtful_patients_are_flagged(tmp_path):
    for study in ("1", "2"):
        issuer = {"IssuerOfPatientID": study}
        write_dicom(tmp_path / study, PIXELS, study=study, PatientID="anonymous", **issuer)
    found = list_dicom(tmp_path, table(tmp_path, "file,label", "1,x", "2,y"))
    assert found.flagged == {
        "PatientID with several issuers: counted as several patients": 2,
        "one PatientID in all studies: was it removed?": 2,
    }


def test_burned_in_text_and_secondary_captures_are_flagged(tmp_path):
    write_dicom(tmp_path / "1", PIXELS, study="1", BurnedInAnnotation="YES")
    write_dicom(tmp_path / "2", PIXELS, study="2", BurnedInAnnotation="NO")
    write_dicom(tmp_path / "3", PIXELS, study="3", SOPClassUID=SecondaryCaptureImageStorage)
    write_dicom(tmp_path / "4", PIXELS, study="4", BurnedInAnnotation="YES")
    found = list_dicom(tmp_path, table(tmp_path, "file,label", "1,x", "2,x", "3,x"))
    assert len(found.rows) == 3
    # The fourth has no label, so nobody sees it.
    assert found.flagged == {"annotation burned into the pixels": 1, "secondary capture": 1}


def test_a_dicomdir_decides_which_files_count(tmp_path, tree):
    write_dicomdir(tree / "DICOMDIR", [["1", "a.dcm"], ["2", "c.dcm"], ["2", "gone"], ["..", "x"]])
    write_dicom(tmp_path / "x", PIXELS, study="9")
    labels = table(tmp_path, "AccessionNumber,label", "A1,x", "A2,y", "A9,y")
    for root in (tree, tree / "DICOMDIR"):
        found = list_dicom(root, labels)
        assert [row.file for row in found.rows] == ["1/a.dcm", "2/c.dcm"]
        assert found.root == tree
        assert found.skipped == {
            "file named by the DICOMDIR is not there": 1,
            "file named by the DICOMDIR is outside its folder": 1,
            "label without an image": 1,
        }


def test_a_damaged_dicomdir_is_told_and_the_folder_searched(tmp_path, tree):
    (tree / "DICOMDIR").write_bytes(b"nothing of the kind")
    found = list_dicom(tree, table(tmp_path, "AccessionNumber,label", "A1,x", "A2,y"))
    assert len(found.rows) == 3
    assert found.flagged == {"DICOMDIR cannot be read: the folder was searched instead": 1}


def test_the_real_dicomdir_of_the_wheel(tmp_path):
    root = WHEEL / "dicomdirtests"
    files = [path for path in root.rglob("*") if path.is_file()]
    images = sorted(p.relative_to(root).as_posix() for p in files if p.parent.parent.parent == root)
    labels = table(tmp_path, "file,label", *(f"{image},x" for image in images))
    found = list_dicom(root, labels)
    assert [row.file for row in found.rows] == images
    assert len(images) == 31
    assert len({row.patient for row in found.rows}) == 2
    assert not found.skipped


def test_a_medium_that_is_mounted_with_lower_case_names_is_read(tmp_path, tree):
    """Its DICOMDIR has upper case, as PS3.10 wants it."""
    write_dicomdir(tree / "dicomdir", [["1", "A.DCM"], ["1", "B"], ["1", "GONE"]])
    found = list_dicom(tree, table(tmp_path, "file,label", "1/a.dcm,x", "1/b,x"))
    assert [row.file for row in found.rows] == ["1/a.dcm", "1/b"]
    absent = "file named by the DICOMDIR is not there"
    assert found.skipped[absent] == 1
    (tree / "1" / "A.dcm").write_bytes(b"another")  # which of the two is meant?
    found = list_dicom(tree, table(tmp_path, "file,label", "1/b,x"))
    assert [row.file for row in found.rows] == ["1/b"]
    assert found.skipped[absent] == 2


def test_a_folder_without_an_image_says_why(tmp_path):
    for name in ("a.dcm", "b.dcm"):
        (tmp_path / name).write_text("nothing of the kind")
    labels = table(tmp_path.parent, "AccessionNumber,label", "A1,x", name=f"{tmp_path.name}.csv")
    with pytest.raises(DataError, match=r"images=0 expected at least one: 2 x not a DICOM file"):
        list_dicom(tmp_path, labels)


def test_every_file_of_the_wheel_is_a_row_or_a_count(tmp_path):
    root = tmp_path / "wheel"
    shutil.copytree(WHEEL, root)
    (root / "dicomdirtests" / "DICOMDIR").unlink()
    files = sorted(p for p in root.rglob("*") if p.is_file() and p.name != "DICOMDIR")
    instances: dict[str, str] = {}
    for file in files:
        with quiet():
            header = pydicom.dcmread(file, force=True, stop_before_pixels=True)
        if "Rows" in header:
            name = file.relative_to(root).as_posix()
            instances.setdefault(header.get("SOPInstanceUID", name), name)
    found = list_dicom(
        root, table(tmp_path, "file,label", *(f"{name},x" for name in instances.values()))
    )
    without = found.skipped.pop("label without an image")
    assert len(found.rows) == len(instances) - without > 50
    assert len(found.rows) + found.skipped.total() + found.unreadable.total() == len(files)
    assert found.flagged["secondary capture"] > 5


def test_the_order_of_the_file_system_does_not_matter(tmp_path, tree, monkeypatch):
    labels = table(tmp_path, "AccessionNumber,label", "A1,x", "A2,y")
    shutil.copy(tree / "1" / "a.dcm", tree / "z")
    forwards = list_dicom(tree, labels)
    walk = os.walk

    def backwards(*arguments, **options):
        for folder, folders, files in walk(*arguments, **options):
            folders.reverse()
            yield folder, folders, files[::-1]

    monkeypatch.setattr(os, "walk", backwards)
    assert list_dicom(tree, labels) == forwards


def test_many_headers_are_read_by_workers(tmp_path, tree, monkeypatch):
    labels = table(tmp_path, "AccessionNumber,label", "A1,x", "A2,y")
    alone = list_dicom(tree, labels)
    monkeypatch.setattr(dicom_tree, "MANY", 1)
    assert list_dicom(tree, labels) == alone


def test_no_patient_reaches_a_log_a_count_or_an_error(tmp_path, tree, caplog):
    caplog.set_level(logging.DEBUG)
    write_dicom(tree / "d", PIXELS, study="4", PatientID="SECRET-4", BurnedInAnnotation="YES")
    found = list_dicom(tree, table(tmp_path, "AccessionNumber,label", "A1,x", "A4,y"))
    with pytest.raises(DataError) as raised:
        list_dicom(tree, table(tmp_path, "key,label", "SECRET-4,x", name="other.csv"))
    told = [*caplog.messages, *found.skipped, *found.unreadable, *found.flagged, str(raised.value)]
    for secret in (NAME, "SECRET", "P1", "A1", "A4", uid("1"), uid("4")):
        assert not [text for text in told if secret in text]


def test_the_settings_know_the_same_keys():
    for key in LABEL_KEYS:
        assert DataSource(dataset="dicom", folder="f", labels="l", label_key=key).label_key == key


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.one_of(
        st.binary(max_size=200),
        st.text(alphabet='file,label"\n\r;\t\0äA1', max_size=120).map(str.encode),
        st.text(alphabet='A12,xy"\n;', max_size=120).map(lambda t: f"key,label\n{t}".encode()),
    )
)
def test_any_table_is_read_or_refused(tmp_path, tree, content):
    labels = tmp_path / "fuzzed.csv"
    labels.write_bytes(content)
    try:
        found = list_dicom(tree, labels)
    except DataError:
        return
    assert len({row.file for row in found.rows}) == len(found.rows)
    assert {row.label for row in found.rows} <= set(found.classes)
