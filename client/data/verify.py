"""Comparing what lies in a folder with what was published: files, counts, patients, checksums.

Invariant: every difference is one finding with both numbers, and none hides another. Pictures are
opened, not decoded; that happens when a site reads them. Nothing is written, except that official
archives are unpacked as in every other reading of them.
"""

from __future__ import annotations

import csv
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from client.data import layouts, npz_members
from client.data.archives import folders
from client.data.catalogue import Entry, entry
from client.data.download import md5_of
from client.data.manifest import SPLITS
from client.data.medmnist import data_directory, medmnist_info, medmnist_path
from client.data.npz import require_npz
from client.data.official_tables import TABLES, table_rows
from client.data.rows import Listing, Row
from strategies.cli import one_line, progress
from strategies.errors import DataError

FILE_LIST = "*_filelist.csv"
# So many wrong labels are told; a file of another kind may hold millions.
_EXAMPLES = 5


class Finding(NamedTuple):
    """One line of a comparison.

    Attributes:
        level: `ok` where it agrees, `note` where nothing is published to compare with.
        name: What was compared.
        detail: What was found, and what was expected where that differs.
    """

    level: Literal["ok", "note", "DIFFERS"]
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.level:<7}  {self.name:<12}  {one_line(self.detail)}"


def verify(name: str, data_dir: Path | None, size: int = 28) -> Iterator[Finding]:
    """Compares a set's files with the catalogue.

    Args:
        name: The catalogue's name.
        data_dir: Folder of the official files; None means FEDERATION_DATA, else the user's cache.
        size: Image side of a MedMNIST set.

    Yields:
        Findings, in the order of reading.

    Raises:
        DataError: An unknown name or size, or no such folder.
    """
    facts = entry(name)
    folder = data_directory(data_dir)
    if not folder.is_dir():
        raise DataError(f"data-dir={folder} expected a folder", "check the path")
    if facts.file_backed:
        return _files(facts, folder)
    return _npz(facts, medmnist_path(medmnist_info(name), size, folder), size)


def _compare(name: str, what: str, found: Any, expected: Any) -> Finding:
    if found == expected:
        return Finding("ok", name, f"{what}: {found}, as published")
    return Finding("DIFFERS", name, f"{what}: {found}, published {expected}")


def _counts(name: str, what: str, found: Mapping[str, int], facts: Entry) -> Iterator[Finding]:
    """Compares a total and its classes; one line where all agree, one for each that does not."""
    total, expected = sum(found.values()), facts.class_counts
    different = [label for label in expected if found.get(label, 0) != expected[label]]
    different += sorted(set(found) - set(expected))
    yield _compare(name, what, total, facts.images)
    if not different:
        yield Finding("ok", name, f"{what} of each of {len(expected)} classes, as published")
    for label in different:
        published = expected.get(label)
        yield Finding(
            "DIFFERS",
            name,
            f"{what} of class {label}: {found.get(label, 0)}, "
            + (f"published {published}" if published is not None else "no such class"),
        )


# --- folders of files


def _files(facts: Entry, folder: Path) -> Iterator[Finding]:
    yield from _archive(facts, folder)
    yield from _file_list(facts, folder)
    try:
        root = layouts.located(facts, folder)
        if facts.name in TABLES:
            yield from _table(facts, root)
        listing = layouts.read(facts.name, folder)
    except DataError as error:
        yield Finding("DIFFERS", "images", f"{error}; {error.hint}")
        return
    yield from _counts("images", "images", Counter(row.label for row in listing.rows), facts)
    for reason, count in sorted(listing.skipped.items()):
        yield Finding("DIFFERS", "left out", f"{reason}: {count}")
    for reason, count in sorted(listing.flagged.items()):
        yield Finding("note", "sites", f"{reason}: {count}")
    yield from _opened(listing)
    sites = Counter(row.site for row in listing.rows if row.site)
    if sites:
        shares = ", ".join(f"{site} {count}" for site, count in sorted(sites.items()))
        yield Finding("note", "sites", f"{facts.default_site_column}: {shares}")


def _archive(facts: Entry, folder: Path) -> Iterator[Finding]:
    path = folder / facts.archive
    if not facts.archive or not path.is_file():
        return
    md5, published = md5_of(path), facts.md5.get(facts.archive)
    if published is None:
        yield Finding("note", "archive", f"{path.name} md5={md5}; no MD5 is known to compare with")
    else:
        yield _compare("archive", f"{path.name} md5", md5, published)


def _file_list(facts: Entry, folder: Path) -> Iterator[Finding]:
    """Compares a list of file names (`filepath,label,...`) where one of the set lies there."""
    for inner in folders(folder, 1):
        for path in sorted(inner.glob(FILE_LIST)):
            try:
                with path.open(encoding="utf-8", newline="") as file:
                    rows = list(csv.DictReader(file))
                labels = Counter(
                    row["label"] for row in rows if row["filepath"].startswith(f"{facts.folder}/")
                )
            except (OSError, UnicodeDecodeError, csv.Error, KeyError, AttributeError):
                continue
            if labels:
                yield from _counts("list", f"names in {path.name}", labels, facts)


def _table(facts: Entry, root: Path) -> Iterator[Finding]:
    rows = table_rows(facts, root)
    yield from _counts("table", "rows", Counter(row.label for row in rows), facts)
    patients = {row.patient for row in rows}
    yield _compare("table", "patients", len(patients), facts.patients)
    if TABLES[facts.name].split:
        yield from _official_split(rows)


def _official_split(rows: list[Row]) -> Iterator[Finding]:
    counts = Counter(row.split for row in rows)
    shares = ", ".join(f"{split} {counts[split]}" for split in SPLITS if counts[split])
    yield Finding("note", "split", f"official: {shares}; its counts are not published")
    patients = {split: {row.patient for row in rows if row.split == split} for split in SPLITS}
    both = len(patients["train"] & patients["test"])
    text = f"patients in both train and test: {both}"
    yield Finding("DIFFERS" if both else "ok", "split", text)


def _opened(listing: Listing) -> Iterator[Finding]:
    """Opens every picture: its kind and size are read, its pixels are not."""
    broken, modes = 0, Counter[str]()
    with progress() as bar:
        for row in bar.track(listing.rows, description="opening pictures"):
            try:
                with Image.open(listing.root / row.file) as image:
                    modes[image.mode] += 1
            except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
                broken += 1
    kinds = ", ".join(f"{mode} {count}" for mode, count in sorted(modes.items()))
    if kinds:
        yield Finding("note", "pictures", f"modes: {kinds}")
    if broken:
        yield Finding("DIFFERS", "pictures", f"files that are no picture: {broken}")


# --- MedMNIST's files


def _npz(facts: Entry, path: Path, size: int) -> Iterator[Finding]:
    if not path.is_file():
        yield Finding("DIFFERS", "file", f"{path.name} is not in {path.parent}")
        return
    yield _compare("file", f"{path.name} md5", md5_of(path), facts.md5[path.name])
    try:
        require_npz(path)
        with npz_members.opened(path) as archive:
            for split in SPLITS:
                yield from _split(facts, archive, split, size)
    except DataError as error:
        yield Finding("DIFFERS", "file", str(error))


def _split(facts: Entry, archive: zipfile.ZipFile, split: str, size: int) -> Iterator[Finding]:
    images = npz_members.member(archive, f"{split}_images")
    count = images.shape[0] if images.shape else "a single number"
    yield _compare(split, "images", count, facts.examples[split])
    colour = (3,) if facts.channels == 3 else ()
    kind = (*images.shape[1:], str(images.dtype))
    yield _compare(split, "shape and type", kind, (size, size, *colour, "uint8"))
    labels = npz_members.whole(archive, npz_members.member(archive, f"{split}_labels"))
    found = f"labels: {labels.dtype}{labels.shape}, expected"
    if labels.dtype.kind not in "iu" or not labels.ndim:
        yield Finding("DIFFERS", split, f"{found} an integer for each image")
        return
    yield _compare(split, "labels", len(labels), facts.examples[split])
    values, counts = np.unique(labels, return_counts=True)
    if facts.multi_label:
        expected = (facts.examples[split], len(facts.classes))
        yield _compare(split, "findings of each image", labels.shape, expected)
        known = range(2)
    else:
        if labels.size != len(labels):
            yield Finding("DIFFERS", split, f"{found} an integer for each image")
        known = range(len(facts.classes))
        pairs = zip(values.tolist(), counts.tolist(), strict=True)
        text = ", ".join(f"{label}: {count}" for label, count in pairs if label in known)
        yield Finding("note", split, f"images of each class, not published: {text}")
    outside = [label for label in values.tolist() if label not in known]
    if outside:
        few = len(outside) <= _EXAMPLES
        text = f"{outside}" if few else f"{len(outside)}, such as {outside[:_EXAMPLES]}"
        yield Finding("DIFFERS", split, f"labels outside the classes: {text}")
