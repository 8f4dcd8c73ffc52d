"""A table's rows are used or counted; a table that is not what it seems is refused as a whole."""

import csv
import io
import logging
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from client.data import table
from client.data.dicom_patients import NEARLY_SAME
from client.data.rows import Row
from client.data.table import list_table, read_table
from client.site_config import SiteConfig
from strategies.errors import DataError


@pytest.fixture
def write(tmp_path):
    def _write(content: str | bytes) -> Path:
        path = tmp_path / "table.csv"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return _write


@pytest.fixture
def root(tmp_path):
    """A folder with the pictures 1.png to 4.png, and one in a folder."""
    for name in ("1.png", "2.png", "3.png", "4.png", "in/5.png"):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return tmp_path / "images"


# --- any table


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("start", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_separators_marks_and_line_ends_of_any_program(write, separator, start, end):
    lines = [" File ", "LABEL"], ["a.png", ' x, "y"; z '], ["b.png", ""]
    text = io.StringIO()
    csv.writer(text, delimiter=separator, lineterminator=end).writerows(lines)
    found = read_table(write(start + text.getvalue()))
    assert found.columns == ("file", "label")
    assert found.rows == [
        {"file": "a.png", "label": 'x, "y"; z'},
        {"file": "b.png", "label": ""},
    ]


def test_a_quoted_header_does_not_decide_the_separator(write):
    assert read_table(write('"a,b,c";d\n1;2\n')).columns == ("a,b,c", "d")


def test_quotes_and_line_ends_inside_a_field_are_part_of_it(write):
    found = read_table(write('a,b\n"two\nlines","say ""x"""\n3 " 4,5\n'))
    assert found.rows == [{"a": "two\nlines", "b": 'say "x"'}, {"a": '3 " 4', "b": "5"}]


def test_short_rows_are_filled_and_long_ones_counted(write):
    found = read_table(write("a,b\n1\n1,2,3\n1,2,,\n,,\n\n"))
    assert found.rows == [{"a": "1", "b": ""}, {"a": "1", "b": "2"}]
    assert found.skipped == {table.TOO_LONG: 1, table.EMPTY_ROW: 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a\nb\ncaf\u00e9".encode("latin-1"), r"line 3 is not UTF-8: byte 0xe9$"),
        ("file,label\n".encode("utf-16"), r"line 1 is not UTF-8: byte 0xff$"),
        ("file,label\n".encode("utf-16-le"), r"line 1 holds a zero byte$"),
        ('a,b\n1,"2\n3,4\n', r"line 3 cannot be read: unexpected end of data$"),
        ('a,b\n1,"2"3\n', r"line 2 cannot be read: "),
        ("a,b\n" + "x" * 200_000, r"line 2 cannot be read: field larger than"),
        ("a,b,A\n1,2,3\n", r"columns 1 and 3 of its header have the same name$"),
        ("", r"lacks the column file, label$"),
        ("name,label\n", r"lacks the column file$"),
    ],
)
def test_a_table_that_is_not_what_it_seems_is_refused(write, content, message):
    with pytest.raises(DataError, match=message) as error:
        read_table(write(content), ("file", "label") if "column file" in message else ())
    assert error.value.hint
    assert "\n" not in str(error.value)


def test_a_first_row_that_is_no_header_is_not_quoted(write):
    with pytest.raises(DataError, match=r"columns 2 and 3 of") as error:
        read_table(write("a.png,Smith,Smith\nb.png,Jones,Jones\n"), ("file", "label"))
    assert "smith" not in f"{error.value} {error.value.hint}".casefold()


def test_a_table_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"no\.csv cannot be read \(No such file or directory\)$"):
        read_table(tmp_path / "no.csv")


# --- a list of images


def test_rows_carry_what_the_table_tells(write, root):
    text = "patient;split;site;file;label\n7;Train;north;1.png;ill\nNaN;;;in\\5.png;well\n"
    listing = list_table(write(text), root)
    assert listing.rows == [
        Row("1.png", 0, "ill", "7", "north", "train"),
        Row("in/5.png", 0, "well"),
    ]
    assert listing.classes == ("ill", "well")
    assert (listing.root, listing.dataset, listing.kind) == (root, "csv", "picture")
    assert listing.skipped == {table.NOT_NAMED: 3}


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("Klinik S\u00fcd, Haus 2", "Klinik-S-d-Haus-2"),
        ("x" * 40, "x" * 32),
        ("\u75c5\u9662", "unknown"),
        ("nan", ""),
    ],
)
def test_a_site_is_one_that_a_federation_may_have(write, root, value, name):
    listing = list_table(write(f'file,label,site\n1.png,a,"{value}"\n'), root)
    assert [row.site for row in listing.rows] == [name]
    assert not name or SiteConfig.model_validate({"site": name, "data": {}})


def test_declared_classes_decide_the_order_and_are_found_in_any_case(write, root):
    path = write("file,label\n1.png,ILL\n2.png,well\n3.png,other\n4.png,NA\n")
    listing = list_table(path, root, ("well", "ill", "absent"))
    assert listing.classes == ("well", "ill", "absent")
    assert [row.label for row in listing.rows] == ["ill", "well"]
    assert listing.skipped == {table.OTHER_LABEL: 1, table.NO_LABEL: 1, table.NOT_NAMED: 1}


def test_a_declared_class_may_be_called_na(write, root):
    listing = list_table(write("file,label\n1.png,NA\n2.png,PA\n"), root, ("NA", "PA"))
    assert [row.label for row in listing.rows] == ["NA", "PA"]


@pytest.mark.parametrize("nothing", ["", "NaN", "nan", "N/A", "null", " "])
def test_a_row_without_a_file_or_a_label_is_counted(write, root, nothing):
    text = f"file,label,note\n1.png,{nothing},x\n{nothing},a,x\n2.png,a,x\n"
    listing = list_table(write(text), root)
    assert [row.file for row in listing.rows] == ["2.png"]
    assert listing.skipped[table.NO_LABEL] == listing.skipped[table.NO_FILE] == 1


@pytest.mark.parametrize(
    "file", ["../secret.png", "in/../../secret.png", "/etc/passwd", "C:\\x.png", "out.png", "far/x"]
)
def test_a_row_outside_the_folder_is_not_followed(write, root, tmp_path, file):
    (tmp_path / "secret.png").write_bytes(b"x")
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "far").symlink_to(tmp_path)
    listing = list_table(write(f"file,label\n{file},a\n1.png,b\n"), root)
    assert [row.file for row in listing.rows] == ["1.png"]
    assert listing.skipped[table.OUTSIDE] == 1


def test_links_inside_the_folder_are_followed(write, root):
    (root / "near.png").symlink_to(root / "1.png")
    listing = list_table(write("file,label\nnear.png,a\n"), root)
    assert [row.file for row in listing.rows] == ["near.png"]


def test_files_that_are_not_there_are_counted(write, root):
    (root / "gone.png").symlink_to(root / "nowhere.png")
    (root / "loop.png").symlink_to(root / "loop.png")
    files = ["1.png", "2.png", "3.png", "4.png", "in/5.png"]
    missing = ["no.png", "gone.png", "loop.png", "in", f"{'x' * 300}.png"]
    text = "\n".join(["file,label", *(f"{file},a" for file in [*missing, *files])])
    listing = list_table(write(text), root)
    assert [row.file for row in listing.rows] == files
    assert listing.skipped[table.MISSING] == 5
    with pytest.raises(DataError, match="rows=11 missing_files=6 expected at most half"):
        list_table(write(f"{text}\nnowhere.png,a"), root)


def test_patients_that_a_spreadsheet_made_two_of_are_flagged(write, root):
    text = "file,label,patient\n1.png,a,007\n2.png,a,7\n3.png,b,8\n4.png,b,\n"
    listing = list_table(write(text), root)
    assert dict(listing.flagged) == {NEARLY_SAME: 2}
    assert not list_table(write(text.replace("007", "7")), root).flagged


def test_a_repeated_row_counts_once_and_a_contradiction_not_at_all(write, root):
    text = (
        "file,label,patient\n1.png,a,p\n./1.png,a,p\n2.png,a,p\n2.png,b,p\n3.png,a,p\n3.png,a,q\n"
    )
    listing = list_table(write(text), root)
    assert [row.file for row in listing.rows] == ["1.png"]
    assert listing.skipped == {table.REPEATED: 1, table.CONTRADICTORY: 4, table.NOT_NAMED: 2}


def test_an_unknown_split_is_counted_and_not_drawn_anew(write, root):
    listing = list_table(write("file,label,split\n1.png,a,dev\n2.png,a,validation\n"), root)
    assert [row.split for row in listing.rows] == ["val"]
    assert listing.skipped[table.OTHER_SPLIT] == 1


def test_a_misspelt_patient_column_is_told(write, root, caplog):
    caplog.set_level(logging.INFO)
    list_table(write("file,label,pateint,age\n1.png,a,7,80\n"), root)
    assert "csv columns not used: pateint, age" in caplog.text
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings == ["csv column=pateint is not used: did you mean patient?"]


def test_a_folder_or_table_that_is_not_there_is_an_error(write, root, tmp_path):
    path = write("file,label\n1.png,a\n")
    with pytest.raises(DataError, match=r"^folder=.*gone cannot be read"):
        list_table(path, tmp_path / "gone")
    with pytest.raises(DataError, match="lacks the column label"):
        list_table(write("file;lable\n1.png;a\n"), root)


def test_reasons_name_no_file_and_no_patient(write, root):
    text = (
        "file,label,patient,split\nx9.png,a,p9,\n../x9,a,p9,\n1.png,,p9,\n2.png,a,p9,x9\n1.png,a,\n"
    )
    listing = list_table(write(text), root)
    assert not any("x9" in reason or "p9" in reason for reason in listing.skipped)


# --- fuzz: any bytes give a listing or one error

WORD = st.sampled_from(
    ["1.png", "2.png", "in/5.png", "../x", "", "nan", "a", "b", "train", '"', '""', "\n", "\r\n"]
)
LIKE_A_TABLE = st.lists(st.lists(WORD | st.text(max_size=5), max_size=6), max_size=8)
ENCODINGS = ("utf-8", "utf-8-sig", "latin-1", "utf-16", "cp1252")


def survives(path: Path, root: Path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        listing = list_table(path, root)
    except DataError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert refused.hint
        assert "\n" not in str(refused)
        return
    for row in listing.rows:
        assert (root / row.file).resolve().is_relative_to(root.resolve())
        assert (root / row.file).is_file()
        assert row.label in listing.classes
        assert row.split in ("", "train", "val", "test")
    assert len({row.file for row in listing.rows}) == len(listing.rows)
    assert all(count > 0 for count in listing.skipped.values())


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@FUZZ
@given(st.binary(max_size=200))
@example(b"file,label\n\xff,\n")
@example(b"\xef\xbb\xbf")
@example(b"file,label\n.,a\n")
@example(b"file,label\n/,a\n")
def test_any_bytes_give_a_listing_or_one_error(root, tmp_path, content):
    survives(tmp_path / "t.csv", root, content)
    survives(tmp_path / "t.csv", root, b"file,label,patient,split\n" + content)


@FUZZ
@given(LIKE_A_TABLE, st.sampled_from(",;\t|"), st.sampled_from(ENCODINGS))
def test_anything_like_a_table_gives_a_listing_or_one_error(
    root, tmp_path, rows, separator, encoding
):
    text = "\n".join(separator.join(row) for row in [["file", "label", "patient", "split"], *rows])
    survives(tmp_path / "t.csv", root, text.encode(encoding, "replace"))


TRIMMED = st.text(max_size=8).map(str.strip).filter(lambda text: "\0" not in text)


@FUZZ
@given(st.lists(st.tuples(TRIMMED, TRIMMED).filter(any), max_size=6), st.sampled_from(",;\t"))
def test_what_a_program_writes_is_what_is_read(tmp_path, rows, separator):
    text = io.StringIO()
    csv.writer(text, delimiter=separator).writerows([("a", "b"), *rows])
    (tmp_path / "t.csv").write_bytes(text.getvalue().encode("utf-8", "replace"))
    found = read_table(tmp_path / "t.csv")
    assert [(row["a"], row["b"]) for row in found.rows] == [
        tuple(value.encode("utf-8", "replace").decode() for value in row) for row in rows
    ]
    assert not found.skipped


def test_a_root_of_bytes_that_are_no_text_is_listed(write, tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.mkdir(folder)
    root = Path(os.fsdecode(folder))
    (root / "1.png").write_bytes(b"x")
    assert len(list_table(write("file,label\n1.png,a\n"), root).rows) == 1
