"""The CSV that labels DICOM files: `key,label[,patient,split]`, and what its keys name.

The first column names an instance, a series, a study, an examination (AccessionNumber) or a file;
every image under it gets the label. Which of the five it is stands in the settings, in that
column's header (`StudyInstanceUID`, `study-instance-uid`), or is found out by comparing.

Invariant: a key that is used has one label. What contradicts itself is left out and counted; what
names nothing, or could mean two things, is refused with counts. No text quotes a key.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from client.data.labels import class_finder
from client.data.splits import split_named
from client.data.table import (
    NO_LABEL,
    NOTHING,
    OTHER_LABEL,
    OTHER_SPLIT,
    read_table,
)
from strategies.cli import nearest
from strategies.errors import DataError

logger = logging.getLogger(__name__)

# Spelling in settings, and what the standard calls it; a file is named relative to the folder.
LABEL_KEYS = {
    "sop-instance-uid": "SOPInstanceUID",
    "series-instance-uid": "SeriesInstanceUID",
    "study-instance-uid": "StudyInstanceUID",
    "accession-number": "AccessionNumber",
    "file": "file",
}
COLUMNS = ("label", "patient", "split")

NO_KEY = "row without a key"
REPEATED = "row that repeats another"
CONTRADICTORY = "row that contradicts another of the same key"


class Label(NamedTuple):
    """What the table says of one key; patient and split are empty where it does not say."""

    label: str
    patient: str
    split: str


class LabelTable(NamedTuple):
    """The table as read.

    Attributes:
        key: Which of `LABEL_KEYS` its header names; empty where it says only "key".
        labels: By key.
        skipped: Rows left out, by reason.
    """

    key: str
    labels: dict[str, Label]
    skipped: Counter[str]


def read_labels(path: Path, classes: Sequence[str] = ()) -> LabelTable:
    """Reads the table of labels.

    Args:
        path: The CSV.
        classes: The only names that labels may spell; empty takes every name.

    Raises:
        DataError: It cannot be read, lacks a column, or its first column is none of the keys.
    """
    table = read_table(path, ("label",))
    first = table.columns[0]
    key = _key_named(path, first)
    _tell_unused(table.columns[1:])
    find = class_finder(classes)
    skipped = table.skipped
    found: dict[str, list[Label]] = {}
    for values in table.rows:
        name = values[first].replace("\\", "/").removeprefix("./")  # no other key has a backslash
        label = values["label"]
        spelt = find(label) if classes else label
        split = values.get("split", "")
        patient = values.get("patient", "")
        if name.casefold() in NOTHING:
            skipped[NO_KEY] += 1
        elif label.casefold() in NOTHING and label not in classes:  # a class may be called NA
            skipped[NO_LABEL] += 1
        elif spelt is None:
            skipped[OTHER_LABEL] += 1
        elif split.casefold() not in NOTHING and not split_named(split):
            skipped[OTHER_SPLIT] += 1
        else:
            patient = "" if patient.casefold() in NOTHING else patient
            found.setdefault(name, []).append(Label(spelt, patient, split_named(split)))
    labels: dict[str, Label] = {}
    for name, said in found.items():
        if len(set(said)) > 1:
            skipped[CONTRADICTORY] += len(said)
        else:
            labels[name] = said[0]
            skipped[REPEATED] += len(said) - 1
    return LabelTable(key, labels, +skipped)


def choose_key(table: LabelTable, wanted: str | None, images: Iterable[Mapping[str, str]]) -> str:
    """Returns which of `LABEL_KEYS` the table's first column holds.

    Args:
        table: The table.
        wanted: From the settings; None where they do not say.
        images: For each image its value of each key.

    Raises:
        DataError: The settings contradict the header, or the images do not tell.
    """
    if wanted is not None and wanted not in LABEL_KEYS:
        raise DataError(
            f"label-key={wanted} expected one of {', '.join(LABEL_KEYS)}",
            nearest(wanted, LABEL_KEYS),
        )
    if wanted and table.key and wanted != table.key:
        raise DataError(
            f"label-key={wanted} expected {table.key}, as the first column of labels is called",
            "change label-key, or call that column key",
        )
    if wanted or table.key:
        return wanted or table.key
    values: dict[str, set[str]] = {key: set() for key in LABEL_KEYS}
    for image in images:
        for key, value in image.items():
            values[key].add(value)
    matches = {key: len(values[key] & table.labels.keys()) for key in LABEL_KEYS}
    matching = [key for key, count in matches.items() if count]
    if len(matching) == 1:
        return matching[0]
    told = ", ".join(f"{key} {count}" for key, count in matches.items())
    raise DataError(
        f"label-key cannot be told: of {len(table.labels)} labelled keys match {told}",
        "set label-key" if matching else "check that the labels belong to this folder",
    )


def _key_named(path: Path, column: str) -> str:
    spellings = {_letters(key): key for key in LABEL_KEYS}
    if column != "key" and _letters(column) not in spellings:
        raise DataError(
            f"csv={path} first column={column} expected key, {', '.join(LABEL_KEYS.values())}",
            "docs/dicom.md describes the table of labels",
        )
    return spellings.get(_letters(column), "")


def _tell_unused(columns: Sequence[str]) -> None:
    """A misspelt `patient` would let a person into training and test."""
    for name in columns:
        if name and name not in COLUMNS:
            hint = nearest(name, [column for column in COLUMNS if column not in columns])
            level = logging.WARNING if hint.startswith("did you mean") else logging.INFO
            logger.log(level, "labels column=%s is not used: %s", name, hint)


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name)).casefold()
