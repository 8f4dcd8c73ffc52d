"""What a reader of files finds: rows as the source writes them, and what it could not use.

Every way in (a folder of classes, a CSV, DICOM, an official layout) ends here, and
:func:`client.data.build.build` makes a manifest of it. Nothing is hashed, split or decoded yet, so
a row may name a patient: it stays in memory and out of every log.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

Kind = Literal["picture", "dicom"]


class Row(NamedTuple):
    """One labelled image as its source tells of it.

    Attributes:
        file: Relative to the listing's root, with forward slashes.
        frame: Position in a file of several images; 0 otherwise.
        label: Class name as the source writes it.
        patient: As the source writes it; empty where it does not say.
        site: Natural site (hospital, machine, operator); empty where there is none.
        split: ``train``, ``val``, ``test`` where the source says; otherwise empty.
    """

    file: str
    frame: int
    label: str
    patient: str = ""
    site: str = ""
    split: str = ""


@dataclass
class Listing:
    """The rows of one source.

    Attributes:
        dataset: Name of the data set.
        root: Folder that the rows' files are relative to.
        classes: Class names in label order, as the source writes them.
        rows: One per image.
        kind: How the files are decoded.
        skipped: Files or rows left out, by reason; a reason names no file and no patient.
        unreadable: Files left out for damage, permission or a crash, likewise: they may have been
            images, and count in the share that `build` allows.
        flagged: Files used but worth a look (burned-in annotation, secondary capture), likewise.
    """

    dataset: str
    root: Path
    classes: tuple[str, ...]
    rows: list[Row]
    kind: Kind = "picture"
    skipped: Counter[str] = field(default_factory=Counter[str])
    flagged: Counter[str] = field(default_factory=Counter[str])
    unreadable: Counter[str] = field(default_factory=Counter[str])


def reasons(counts: Counter[str]) -> str:
    """Returns counted reasons in one line, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} x {reason}" for reason, count in ordered)
