"""The tables that come with two of the sets: PAD-UFES-20's and FETAL_PLANES_DB's.

Facts of these files: Fetal planes' table has semicolons, `Train ` with a space behind it for its
last header, "1 " and "0 " for values, and image names without an ending. PAD's spells a column
`fitspatrick`, and 804 of its rows miss it and others.

Invariant: whatever a table holds, reading it gives rows or one error that names a column, never a
patient.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import NamedTuple

from client.data.catalogue import Entry
from client.data.rows import Row
from strategies.errors import DataError

NO_SITE = "unknown"
# Stands in `Row.split` where a table's split is neither of these.
UNKNOWN_SPLIT = "?"
SPLIT_OF = {"1": "train", "0": "test"}


class Table(NamedTuple):
    """Where a set's table says what; the columns as they are spelled there."""

    stem: str
    delimiter: str
    file: str
    ending: str
    label: str
    patient: str
    split: str


TABLES = {
    "pad-ufes-20": Table("metadata", ",", "img_id", "", "diagnostic", "patient_id", ""),
    "fetal-planes": Table(
        "FETAL_PLANES_DB_data", ";", "Image_name", ".png", "Plane", "Patient_num", "Train"
    ),
}


def table_rows(facts: Entry, root: Path, column: str = "") -> list[Row]:
    """The rows of a set's own table, whether or not their files are there.

    Args:
        facts: A set with a table.
        root: The table's folder.
        column: What to take for a site; empty: nothing.

    Returns:
        Rows whose `file` is a name without a folder.

    Raises:
        DataError: The table cannot be read, is not UTF-8, or lacks a column.
    """
    form = TABLES[facts.name]
    site = (column,) if column else ()
    path = table_path(facts, root)
    assert path is not None  # `located` looked for it
    needed = (form.file, form.label, form.patient, *([form.split] if form.split else []), *site)
    return [
        Row(
            values[form.file] + form.ending,
            0,
            values[form.label],
            values[form.patient],
            _site(values[column]) if column else "",
            SPLIT_OF.get(values[form.split], UNKNOWN_SPLIT) if form.split else "",
        )
        for values in _read_table(path, form.delimiter, needed)
    ]


def table_path(facts: Entry, folder: Path) -> Path | None:
    """A set's table in a folder, also a browser's copy such as `metadata (1).csv`."""
    form = TABLES[facts.name]
    return next((p for p in sorted(folder.glob(f"{form.stem}*.csv")) if _is_table(p, form)), None)


def _is_table(path: Path, form: Table) -> bool:
    """Whether a file is the set's table and not another one's `metadata.csv`."""
    try:
        with path.open("rb") as file:
            header = file.readline(1 << 16).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return False
    return form.file in [name.strip() for name in header.split(form.delimiter)]


def _read_table(path: Path, delimiter: str, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of an official table; blanks around its header and values are taken off.

    Raises:
        DataError: It cannot be read, is not UTF-8, or lacks a column.
    """
    hint = "get the official file again"
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter)
            header = [name.strip() for name in next(reader, [])]
            missing = [name for name in columns if name not in header]
            if missing:
                raise DataError(f"table={path.name} lacks the column {', '.join(missing)}", hint)
            rows = [
                dict(zip(header, (value.strip() for value in values), strict=False))
                for values in reader
                if values
            ]
    except UnicodeDecodeError as error:
        raise DataError(f"table={path.name} expected UTF-8 text", hint) from error
    except (OSError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"table={path.name} cannot be read ({reason})", hint) from error
    blank = dict.fromkeys(columns, "")
    return [{**blank, **row} for row in rows]


def _site(value: str) -> str:
    """A name that a site of a federation may have."""
    return re.sub(r"[^A-Za-z0-9]+", "-", value).strip("-")[:32].rstrip("-") or NO_SITE
