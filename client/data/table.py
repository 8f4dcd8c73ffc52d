"""Tables: a CSV of any site's making, and the one that lists a site's images.

Source of the form: RFC 4180, with a comma, semicolon or tab between fields; UTF-8, with or without
a byte order mark.

Invariant: a row that is used names a regular file inside the data folder and one class, once.
Everything else is counted with its reason. A table that is not what it seems (another encoding, an
open quote that swallows the rest) is refused as a whole, because its rows would be wrong unseen.
"""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from client.data.dicom_patients import NEARLY_SAME, plain_number
from client.data.folder import Tree, require_folder
from client.data.labels import class_finder
from client.data.rows import Listing, Row
from client.data.splits import split_named
from strategies.cli import nearest
from strategies.errors import DataError

logger = logging.getLogger(__name__)

SEPARATORS = (",", ";", "\t")
NEEDED, OPTIONAL = ("file", "label"), ("patient", "split", "site")
# What spreadsheets and pandas write for nothing.
NOTHING = frozenset({"", "nan", "na", "n/a", "#n/a", "<na>", "null", "nat"})

# For a site whose name has no letter that a site's name may have.
UNNAMED_SITE = "unknown"

EMPTY_ROW = "row without content"
TOO_LONG = "row with more fields than the header"
NO_FILE = "row without a file"
NO_LABEL = "row without a label"
OTHER_LABEL = "row of a class that is not declared"
OTHER_SPLIT = "row whose split is none of train, val, test"
OUTSIDE = "row whose file is outside the folder"
MISSING = "row whose file is missing"
REPEATED = "row that repeats another"
CONTRADICTORY = "row that contradicts another of the same file"
NOT_NAMED = "picture that the table does not name"


class Table(NamedTuple):
    """A CSV's content.

    Attributes:
        columns: Names in the header, trimmed and in lower case.
        rows: One mapping from column to value a row; values are trimmed, absent ones empty.
        skipped: Rows that are not in `rows`, by reason.
    """

    columns: tuple[str, ...]
    rows: list[dict[str, str]]
    skipped: Counter[str]


def read_table(path: Path, needed: Sequence[str] = ()) -> Table:
    """Read a CSV whole.

    Args:
        path: The file.
        needed: Columns that must be there, in lower case.

    Raises:
        DataError: It cannot be read, is not UTF-8, has no sound header, a quote that does not end
            or more than `csv` reads into one field, or lacks a column.
    """
    lines = io.StringIO(_text(path), newline="")
    reader = csv.reader(lines, delimiter=_separator(path, lines.getvalue()), strict=True)
    skipped = Counter[str]()
    rows: list[dict[str, str]] = []
    try:
        columns = _columns(path, next(reader, []), needed)
        for values in reader:
            trimmed = [value.strip() for value in values]
            if not any(trimmed):
                if values:  # a line without anything is no row
                    skipped[EMPTY_ROW] += 1
            elif any(trimmed[len(columns) :]):
                skipped[TOO_LONG] += 1
            else:
                rows.append(dict.fromkeys(columns, "") | dict(zip(columns, trimmed, strict=False)))
    except csv.Error as error:
        raise DataError(
            f"csv={path} line {reader.line_num} cannot be read: {error}",
            'close every quote; a quote inside a quoted field is written twice, ""',
        ) from error
    return Table(columns, rows, skipped)


def list_table(
    path: Path, root: Path, classes: Sequence[str] = (), dataset: str = "csv"
) -> Listing:
    """List the images that a CSV names: `file,label` and, where known, `patient,split,site`.

    Args:
        path: The CSV.
        root: Folder that its files are relative to.
        classes: Class names in label order; empty takes the labels found, sorted.
        dataset: Name of the data set.

    Returns:
        One row an image. `skipped` counts rows that are not used, and pictures in the folder that
        no row names.

    Raises:
        DataError: The folder or the CSV cannot be read, or the CSV lacks a column.
    """
    require_folder(root)
    table = read_table(path, NEEDED)
    _tell_unused(table.columns)
    listing = Listing(dataset, root, tuple(classes), [], skipped=table.skipped)
    find = class_finder(classes)
    inside = _Inside(root)
    named: set[str] = set()
    by_file: dict[str, list[Row]] = {}
    for values in table.rows:
        row = _row(values)
        named.add(row.file)
        label = find(row.label) if classes else row.label
        # A declared class may be called NA.
        if row.label.casefold() in NOTHING and not (classes and label):
            label = ""
        reason = _reason(values, row, label, inside)
        if reason:
            listing.skipped[reason] += 1
        else:
            assert label is not None  # `_reason` refused it
            by_file.setdefault(row.file, []).append(row._replace(label=label))
    missing = listing.skipped[MISSING]
    if 2 * missing > len(table.rows):
        raise DataError(
            f"csv={path} rows={len(table.rows)} missing_files={missing} expected at most half",
            "is the folder mounted, and open to this user? Keep the rows of this folder alone",
        )
    for rows in by_file.values():
        if len(set(rows)) > 1:
            listing.skipped[CONTRADICTORY] += len(rows)
        else:
            listing.rows.append(rows[0])
            if rows[1:]:
                listing.skipped[REPEATED] += len(rows[1:])
    if not classes:
        listing.classes = tuple(sorted({row.label for row in listing.rows}))
    _count_unnamed(listing, named)
    _flag_nearly_same(listing)
    return listing


def _flag_nearly_same(listing: Listing) -> None:
    """Flag patients that a spreadsheet may have made two of, as it strips leading zeros."""
    spelt: dict[str, set[str]] = {}
    for row in listing.rows:
        spelt.setdefault(plain_number(row.patient), set()).add(row.patient)
    several = sum(
        bool(row.patient) and len(spelt[plain_number(row.patient)]) > 1 for row in listing.rows
    )
    if several:
        listing.flagged[NEARLY_SAME] += several


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"csv={path} cannot be read ({error.strerror})",
            "check the path, and who may read the file",
        ) from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"csv={path} line {line} is not UTF-8: byte 0x{content[error.start]:02x}",
            "save it as `CSV UTF-8`, or convert it: iconv -f latin1 -t utf-8 OLD.csv > NEW.csv",
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(
            f"csv={path} line {line} holds a zero byte",
            "it is no text, or UTF-16: save it as UTF-8",
        )
    return text


def _separator(path: Path, text: str) -> str:
    """The separator that the header has most of, outside quotes; a comma where it has none."""
    header = "".join(text.lstrip().partition("\n")[0].split('"')[::2])
    return max(SEPARATORS, key=header.count)


def _columns(path: Path, header: Sequence[str], needed: Sequence[str]) -> tuple[str, ...]:
    columns = tuple(name.strip().casefold() for name in header)
    repeated = [name for name, count in Counter(columns).items() if name and count > 1]
    if repeated:
        first = columns.index(repeated[0])
        again = columns.index(repeated[0], first + 1)
        raise DataError(
            # By position: without a header these are values of a row, and may name a patient.
            f"csv={path} columns {first + 1} and {again + 1} of its header have the same name",
            "the first line names the columns, each another",
        )
    missing = [name for name in needed if name not in columns]
    if missing:
        raise DataError(
            f"csv={path} lacks the column {', '.join(missing)}",
            f"the first line names the columns: {','.join(needed)}",
        )
    return columns


def _tell_unused(columns: Sequence[str]) -> None:
    known = (*NEEDED, *OPTIONAL)
    unused = [name for name in columns if name and name not in known]
    if unused:
        logger.info("csv columns not used: %s", ", ".join(unused))
    for name in unused:
        # A misspelt `patient` would let a person into training and test.
        hint = nearest(name, [column for column in OPTIONAL if column not in columns])
        if hint.startswith("did you mean"):
            logger.warning("csv column=%s is not used: %s", name, hint)


def _row(values: dict[str, str]) -> Row:
    """A row as it stands, its file with forward slashes and without detours."""
    known = {
        name: "" if (value := values.get(name, "")).casefold() in NOTHING else value
        for name in OPTIONAL
    }
    file = values["file"].replace("\\", "/")
    return Row(
        str(PurePosixPath(file)) if file else "",
        0,
        values["label"],
        known["patient"],
        site_name(known["site"]) if known["site"] else "",
        split_named(known["split"]),
    )


def site_name(value: str) -> str:
    """Return a name that a site of a federation may have, made of what a table says.

    >>> site_name("St. Mary's / North")
    'St-Mary-s-North'
    """
    return re.sub(r"[^A-Za-z0-9]+", "-", value).strip("-")[:32].rstrip("-") or UNNAMED_SITE


def _reason(values: dict[str, str], row: Row, label: str | None, inside: _Inside) -> str:
    """Why a row is not used; empty when it is."""
    if row.file.casefold() in NOTHING:
        return NO_FILE
    if label == "":
        return NO_LABEL
    if label is None:
        return OTHER_LABEL
    if not row.split and values.get("split", "").casefold() not in NOTHING:
        return OTHER_SPLIT
    return inside.reason(row.file)


class _Inside:
    """Whether files are there and inside a folder, also behind links."""

    def __init__(self, root: Path) -> None:
        self._root, self._real = root, os.path.realpath(root)
        self._folders: dict[str, bool] = {}

    def reason(self, file: str) -> str:
        """Why a file is not used; empty when it is."""
        place = PurePosixPath(file)
        if place.is_absolute() or ".." in place.parts or file[1:2] == ":":
            return OUTSIDE
        path = os.path.join(self._root, file)
        folder = os.path.dirname(path)
        if folder not in self._folders:
            self._folders[folder] = self._holds(folder)
        if not self._folders[folder] or (os.path.islink(path) and not self._holds(path)):
            return OUTSIDE
        return "" if os.path.isfile(path) else MISSING

    def _holds(self, path: str) -> bool:
        return Path(os.path.realpath(path)).is_relative_to(self._real)


def _count_unnamed(listing: Listing, named: set[str]) -> None:
    """Count pictures in the folder that the table does not name; nothing else there matters."""
    below = Tree(listing.root, Counter()).pictures_below(listing.root)
    unnamed = sum(1 for path in below if path.relative_to(listing.root).as_posix() not in named)
    if unnamed:
        listing.skipped[NOT_NAMED] += unnamed
