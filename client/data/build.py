"""From the rows of a source to a data set: hash, decode once, split by patient, look for copies.

The manifest is built once and kept as JSON in the cache folder with what was learned of each file.
It is used again while every file's path, size and time of change and all settings are the same;
otherwise the changed files are read again, and no others.

Invariant: patients leave their rows as keyed hashes and enter no file, log or error otherwise. The
manifest follows from the content of the files and the settings: not from file names, not from the
order in which they were found. Nothing is left out silently: what was skipped, and why, is counted
and logged.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from client.data.duplicates import Duplicates, find_duplicates, tell_duplicates
from client.data.images import (
    CRASHED,
    DECODERS,
    Facts,
    FileFacts,
    FileImages,
    Frame,
    Look,
    changed_ns,
    look,
)
from client.data.keyed import PUBLIC_KEY, keyed_hash
from client.data.manifest import Example, ImageDataset, Manifest
from client.data.rows import Listing, Row, reasons
from client.data.splits import assign_splits
from client.data.workers import FEW, in_workers, num_workers
from strategies import cli
from strategies.errors import DataError
from strategies.files import make_folder, write_atomic

logger = logging.getLogger(__name__)

FORMAT = 1
LISTED_TWICE = "row listed twice"
OTHER_LABEL = "label is none of the classes"


@dataclass(frozen=True)
class SplitRule:
    """How images without a split of their own get one.

    Attributes:
        fractions: Shares of patients in train, val and test.
        seed: Root of the draw.
    """

    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    seed: int = 0


class _Found(NamedTuple):
    """A row that can be used, its label's index and its image."""

    row: Row
    label: int
    image: Frame
    patient: str


def build(
    listing: Listing,
    *,
    key: bytes,
    split: SplitRule,
    dedupe: bool,
    cache_dir: Path,
    site: str,
    max_unreadable_share: float = 0.05,
    options: object = None,
    workers: int | None = None,
) -> ImageDataset:
    """Makes a data set of what a reader found.

    Args:
        listing: From a reader.
        key: Of the hashes that stand for patients and examples.
        split: For images whose source names no split (`splits.assign_splits`).
        dedupe: Keep one of several identical images; otherwise they are only counted.
        cache_dir: Where the manifest and, later, prepared images are kept.
        site: The site that all examples belong to; empty: the rows' own.
        max_unreadable_share: The largest share of the listed images that may be undecodable.
        options: How DICOM becomes pixels (`dicom.DicomOptions`); part of the caches' keys.
        workers: Processes that decode; None means one a core, and none for a few pictures.

    Returns:
        The manifest and its images, which stay in their files.

    Raises:
        DataError: Nothing is left, too much is undecodable, or a patient is in two of the source's
            own splits.
    """
    make_folder(cache_dir, secret=True)
    slot = keyed_hash(PUBLIC_KEY, "manifest", listing.dataset, str(listing.root), listing.kind)
    path = cache_dir / f"manifest-{slot}.json"
    cached = _read(path)
    settings = [FORMAT, DECODERS, listing.kind, repr(options)]
    known = cached.get("files", {}) if cached.get("settings") == settings else {}
    files = _files(listing, options, known, workers)
    unreadable, skipped = Counter(listing.unreadable), Counter(listing.skipped)
    found = _found(listing, files, key, unreadable, skipped)
    _require_enough(listing, found, unreadable, skipped, max_unreadable_share)
    rows = [
        [*one.row, one.label, one.image.digest, one.image.size, one.image.changed_ns]
        for one in found
    ]
    stamp = keyed_hash(
        key,
        "manifest",
        json.dumps([settings, listing.dataset, listing.classes, split.fractions, split.seed]),
        json.dumps([dedupe, site, rows]),
    )
    if cached.get("stamp") == stamp:
        examples, copies = cached["examples"], cached["copies"]
    else:
        splits = _splits(found, split)
        copies = find_duplicates(
            [one.image.facts.pixels for one in found],
            [one.label for one in found],
            splits,
            [one.patient for one in found],
        )
        kept = copies.kept if dedupe else range(len(found))
        examples = _examples([(found[i], splits[i]) for i in kept], key, site)
        document = {
            "stamp": stamp,
            "settings": settings,
            "dataset": listing.dataset,
            "classes": listing.classes,
            "examples": examples,
            "copies": copies._replace(kept=()),
            "files": files,
        }
        write_atomic(path, json.dumps(document), mode=0o600)
    manifest = Manifest(listing.dataset, listing.classes, tuple(examples))
    _tell(listing, manifest, unreadable + skipped)
    tell_duplicates(listing.dataset, copies, removed=dedupe)
    frames = {(one.image.file, one.image.frame): one.image for one in found}
    images = FileImages(
        dataset=listing.dataset,
        root=listing.root,
        kind=listing.kind,
        options=options,
        cache_dir=cache_dir,
        frames=tuple(frames[e.file, e.frame] for e in examples),
        rows=np.arange(len(examples)),
    )
    return ImageDataset(manifest, images)


def _read(path: Path) -> dict[str, Any]:
    """Returns a kept manifest; empty where there is none or nothing can be made of it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        return {
            **document,
            "files": _parsed(document["files"]),
            "examples": [Example(*values) for values in document["examples"]],
            "copies": Duplicates(*document["copies"]),
        }
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        logger.warning("manifest cache damaged: it is made anew")
        return {}


def _parsed(files: Mapping[str, Any]) -> dict[str, FileFacts]:
    return {
        file: FileFacts(
            size,
            changed_ns,
            digest,
            {
                int(frame): facts if isinstance(facts, str) else Facts(*facts)
                for frame, facts in frames.items()
            },
        )
        for file, (size, changed_ns, digest, frames) in files.items()
    }


def _files(
    listing: Listing, options: object, known: Mapping[str, FileFacts], workers: int | None
) -> dict[str, FileFacts]:
    """Returns what each file holds; reads those that are new or have changed."""
    frames: dict[str, set[int]] = {}
    for row in listing.rows:
        frames.setdefault(row.file, set()).add(row.frame)
    files = {
        file: known[file]
        for file, wanted in frames.items()
        if file in known
        # What could not be decoded is tried again: a plug-in may have been installed since.
        and all(isinstance(known[file].frames.get(frame), Facts) for frame in wanted)
        and _state(listing.root / file) == known[file][:2]
    }
    unknown = [file for file in frames if file not in files]
    tasks = [
        Look(str(listing.root / file), listing.kind, tuple(sorted(frames[file])), options)
        for file in unknown
    ]
    if workers is None:
        few = listing.kind == "picture" and len(tasks) < FEW
        workers = 0 if few else num_workers()
    crashed = FileFacts(0, 0, "", {})
    with cli.progress() as progress:
        bar = progress.add_task("reading images", total=len(tasks))
        for position, facts in in_workers(look, tasks, crashed=crashed, workers=workers):
            if not facts.frames:
                facts = crashed._replace(frames=dict.fromkeys(tasks[position].frames, CRASHED))
            files[unknown[position]] = facts
            progress.advance(bar)
    return files


def _state(path: Path) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return (-1, -1)
    return status.st_size, changed_ns(status)


def _found(
    listing: Listing,
    files: Mapping[str, FileFacts],
    key: bytes,
    unreadable: Counter[str],
    skipped: Counter[str],
) -> list[_Found]:
    """Returns the rows that can be used, in no order of the file system; counts the others."""
    index = {name: label for label, name in enumerate(listing.classes)}
    found: list[_Found] = []
    rows = sorted(set(listing.rows))
    if len(rows) < len(listing.rows):
        skipped[LISTED_TWICE] += len(listing.rows) - len(rows)
    for row in rows:
        file = files[row.file]
        facts = file.frames[row.frame]
        if isinstance(facts, str):
            unreadable[facts] += 1
        elif row.label not in index:
            skipped[OTHER_LABEL] += 1
        else:
            image = Frame(row.file, row.frame, file.size, file.changed_ns, file.digest, facts)
            patient = keyed_hash(key, "patient", row.patient) if row.patient else ""
            found.append(_Found(row, index[row.label], image, patient))
    return found


def _require_enough(
    listing: Listing,
    found: list[_Found],
    unreadable: Counter[str],
    skipped: Counter[str],
    max_unreadable_share: float,
) -> None:
    """Refuses a source of which too little can be decoded.

    What a reader left out (a mask, a file without a label) is told and does not count: it may be
    most of a folder for a good reason. Files that it found damaged or closed do count.
    """
    if not found:
        left_out = unreadable + skipped
        why = f": {reasons(left_out)}" if left_out else ""
        raise DataError(
            f"dataset={listing.dataset} images=0 expected at least one{why}",
            "check the folder, and that its files are images with labels",
        )
    failed = unreadable.total()
    total = failed + len(found)
    if failed > max_unreadable_share * total:
        raise DataError(
            f"dataset={listing.dataset} unreadable={failed} of {total} images expected at most "
            f"max-unreadable-share={max_unreadable_share:g}: {reasons(unreadable)}",
            "repair or remove the files, or raise max-unreadable-share",
        )


def _examples(kept: list[tuple[_Found, str]], key: bytes, site: str) -> list[Example]:
    """Names each image by its content, and its patient by a keyed hash."""
    # Identical files are told apart by a number, given in an order that follows from content.
    seen: Counter[tuple[str, int]] = Counter()
    examples: list[Example] = []
    for (row, label, image, patient), split in sorted(
        kept, key=lambda one: (one[1], one[0].label, one[0].patient, one[0].row.site)
    ):
        place = (image.digest, image.frame)
        example_id = keyed_hash(key, "example", *place, seen[place])
        seen[place] += 1
        examples.append(
            Example(
                example_id,
                row.file,
                row.frame,
                label,
                patient or example_id,
                site or row.site,
                split,
            )
        )
    return sorted(examples)


def _splits(found: list[_Found], rule: SplitRule) -> list[str]:
    """Returns each row's split: the source's own, or drawn by patient.

    Of unknown patients, the frames of a file and identical images are dealt out as one patient, so
    that a drawn split has neither on both sides. That patient is named by content, and others as
    the source names them, not by their hashes: neither another key nor other file names change the
    split.
    """
    unknown = [one for one in found if not one.row.patient]
    named = _joined([(one.row.file, one.image.facts.pixels) for one in unknown])
    rows = [
        one.row if one.row.patient else one.row._replace(patient=named[one.image.facts.pixels])
        for one in found
    ]
    return list(assign_splits(rows, rule.fractions, rule.seed))


def _joined(images: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Returns by pixel hash the least of all hashes that are linked with it through their files."""
    parent = {pixels: pixels for _, pixels in images}

    def root(pixels: str) -> str:
        while parent[pixels] != pixels:
            parent[pixels] = parent[parent[pixels]]
            pixels = parent[pixels]
        return pixels

    first: dict[str, str] = {}
    for file, pixels in images:
        low, high = sorted((root(first.setdefault(file, pixels)), root(pixels)))
        parent[high] = low
    return {pixels: f"pixels {root(pixels)}" for pixels in parent}


def _tell(listing: Listing, manifest: Manifest, skipped: Counter[str]) -> None:
    name = listing.dataset
    logger.info(
        "dataset=%s images=%d patients=%d skipped=%d",
        name,
        len(manifest),
        len(manifest.patients),
        skipped.total(),
    )
    if skipped:
        logger.warning("dataset=%s skipped: %s", name, reasons(skipped))
    if listing.flagged:
        logger.warning("dataset=%s worth a look: %s", name, reasons(listing.flagged))
    unknown = sum(example.patient == example.example_id for example in manifest.examples)
    if unknown:
        logger.warning(
            "dataset=%s images_without_patient=%d: each counts as a patient of its own, so images "
            "of one person may lie in training and test",
            name,
            unknown,
        )
