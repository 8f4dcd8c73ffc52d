"""What a data set holds: one row per image with its label, patient, site and split.

Invariant: a `Manifest` that exists is sound. Labels lie inside the declared classes, example ids
are unique, and no patient has images in two splits, because a model that saw a patient in training
must not be judged on the same patient. Positions (`rows`) are the only handle to images: row i of
`ImageDataset.images` belongs to `manifest.examples[i]`.

Nothing here leaves the site. Error texts name labels, splits and counts, never a patient.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
import numpy.typing as npt

from strategies.errors import DataError

if TYPE_CHECKING:
    from client.data.images import FileImages
    from client.data.stored import StoredImages

SPLITS = ("train", "val", "test")

IntArray = npt.NDArray[np.int64]
ImageArray = npt.NDArray[np.uint8]


class Example(NamedTuple):
    """One labelled image.

    Attributes:
        example_id: Unique in its manifest, stable between loads, and changed by other content: it
            is made of the content's digest (or of what a generator draws from), never of a path.
        file: Where the pixels come from: a path relative to the data set's folder, or the name of
            an archive or generator.
        frame: Position inside that file.
        label: Class index, from 0.
        patient: Who it shows; the example's own id where the source does not say.
        site: The hospital it belongs to; empty where that is decided later.
        split: One of `SPLITS`.
    """

    example_id: str
    file: str
    frame: int
    label: int
    patient: str
    site: str
    split: str


@dataclass(frozen=True)
class Manifest:
    """The rows of a data set, checked when made.

    Attributes:
        dataset: Name of the data set.
        classes: Class names in label order.
        examples: The rows.

    Raises:
        DataError: No or repeated classes, a label outside them, an unknown split, a repeated
            example id, or a patient with images in two splits.
    """

    dataset: str
    classes: tuple[str, ...]
    examples: tuple[Example, ...]

    def __post_init__(self) -> None:
        _check_classes(self.classes)
        _check_labels(self.labels, self.classes)
        _check_splits(self.examples)
        _check_ids(self.examples)
        _check_patients(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    @cached_property
    def labels(self) -> IntArray:
        """Class indices, shape (n,), read-only."""
        labels = np.fromiter((e.label for e in self.examples), dtype=np.int64, count=len(self))
        labels.setflags(write=False)
        return labels

    @property
    def num_classes(self) -> int:
        """Number of declared classes, whether or not each has an example."""
        return len(self.classes)

    @cached_property
    def patients(self) -> tuple[str, ...]:
        """The distinct patients, sorted."""
        return tuple(sorted({e.patient for e in self.examples}))

    def class_counts(self, split: str | None = None) -> IntArray:
        """Counts examples per class, shape (num_classes,).

        Under differential privacy these counts are private data: release them only with noise.
        """
        labels = self.labels if split is None else self.labels[self.rows(split=split)]
        return np.bincount(labels, minlength=self.num_classes).astype(np.int64)

    def rows(self, *, split: str | None = None, site: str | None = None) -> IntArray:
        """Positions of the examples of a split and a site, ascending; None means any."""
        if split is not None and split not in SPLITS:
            raise _unknown_split(split)
        kept = [
            position
            for position, e in enumerate(self.examples)
            if (split is None or e.split == split) and (site is None or e.site == site)
        ]
        return np.asarray(kept, dtype=np.int64)

    def subset(self, rows: Sequence[int] | IntArray) -> Manifest:
        """The manifest of some rows, in the order given."""
        return Manifest(self.dataset, self.classes, tuple(self.examples[int(row)] for row in rows))

    def fingerprint(self) -> str:
        """SHA-256 over the classes and every example, whatever their order and their files' names.

        An example id stands for content, so a file that is moved or renamed changes nothing and a
        file whose bytes change does.
        """
        digest = hashlib.sha256(json.dumps([self.dataset, self.classes]).encode())
        for example in sorted(e._replace(file="") for e in self.examples):
            digest.update(json.dumps(example).encode())
        return digest.hexdigest()


class Provenance(TypedDict, total=False):
    """Where the pixels of a data set come from.

    Attributes:
        file: Name of the file, without its folder.
        md5: MD5 of the file that was read.
        official: Whether that MD5 is the published one; absent where nothing is published.
    """

    file: str
    md5: str
    official: bool


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images with their manifest.

    Attributes:
        manifest: One row per image.
        images: In memory, uint8, (n, h, w) grey or (n, h, w, 3) RGB; or in a mapped cache; or in
            files that are decoded when they are needed. Row i belongs to manifest.examples[i].
        provenance: Which file was read; empty for generated images and for folders.
    """

    manifest: Manifest
    images: ImageArray | FileImages | StoredImages
    provenance: Provenance = field(default_factory=lambda: Provenance())

    def __post_init__(self) -> None:
        if isinstance(self.images, np.ndarray):
            shape = self.images.shape
            if self.images.dtype != np.uint8 or not (len(shape) == 3 or shape[3:] == (3,)):
                raise DataError(
                    f"images={self.images.dtype}{shape} expected uint8 (n, h, w) or (n, h, w, 3)",
                    "convert the images to 8-bit grey or RGB",
                )
        if len(self.images) != len(self.manifest):
            raise DataError(
                f"images={len(self.images)} expected {len(self.manifest)}, one per manifest row",
                "images and labels do not belong together",
            )

    def __len__(self) -> int:
        return len(self.manifest)

    def subset(self, rows: Sequence[int] | IntArray) -> ImageDataset:
        """Some rows, in the order given; images in memory are copied, others are not."""
        positions = np.asarray(rows, dtype=np.int64)
        return ImageDataset(
            self.manifest.subset(positions), self.images[positions], self.provenance
        )


def split_patients(
    patients: Sequence[str],
    labels: Sequence[int] | IntArray,
    fractions: tuple[float, float, float],
    seed: int,
) -> tuple[str, ...]:
    """Draws a train/val/test split by patient, stratified by each patient's most frequent label.

    Patients are dealt class by class to whichever split is furthest below its share, so the
    fractions (of patients, not of images) hold within one patient overall and closely per class.
    A class that would miss from train takes one of its patients there.

    Args:
        patients: The patient of each example.
        labels: The label of each example.
        fractions: Shares of train, val and test; they sum to 1 and train is positive.
        seed: Root of the draw. The result depends on the set of examples, not on their order.

    Returns:
        The split of each example, in the order given.

    Raises:
        DataError: Fractions that are no shares, or a label missing for a patient.

    >>> split_patients(["p1", "p1", "p2", "p3"], [0, 0, 0, 0], (0.6, 0.2, 0.2), seed=1)
    ('train', 'train', 'val', 'train')
    """
    if min(fractions) < 0 or fractions[0] <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise DataError(
            f"fractions={fractions} expected three shares that sum to 1 with train above 0",
            "for example (0.6, 0.2, 0.2)",
        )
    if len(patients) != len(labels):
        raise DataError(
            f"labels={len(labels)} expected {len(patients)}, one per example's patient",
            "give every example one patient and one label",
        )
    label_counts: dict[str, Counter[int]] = {}
    for patient, label in zip(patients, labels, strict=True):
        label_counts.setdefault(patient, Counter())[int(label)] += 1

    dealt = _dealing_order(label_counts, seed)
    split_of = _deal(dealt, fractions)
    _fill_train(split_of, dealt, label_counts)
    return tuple(split_of[patient] for patient in patients)


def _dealing_order(label_counts: dict[str, Counter[int]], seed: int) -> list[str]:
    """Patients shuffled by seed, then grouped by majority label (ties: the lower label)."""
    names = sorted(label_counts)
    shuffled = [names[i] for i in np.random.default_rng(seed).permutation(len(names))]
    return sorted(shuffled, key=lambda p: min((-n, c) for c, n in label_counts[p].items())[1])


def _deal(order: Sequence[str], fractions: tuple[float, float, float]) -> dict[str, str]:
    split_of: dict[str, str] = {}
    given = [0, 0, 0]
    for turn, patient in enumerate(order, start=1):
        shortfall = [share * turn - count for share, count in zip(fractions, given, strict=True)]
        neediest = shortfall.index(max(shortfall))
        given[neediest] += 1
        split_of[patient] = SPLITS[neediest]
    return split_of


def _fill_train(
    split_of: dict[str, str], order: Sequence[str], label_counts: dict[str, Counter[int]]
) -> None:
    """Moves one patient to train for each class that has examples but none there."""
    for label in sorted({label for counts in label_counts.values() for label in counts}):
        holders = [patient for patient in order if label in label_counts[patient]]
        if all(split_of[patient] != "train" for patient in holders):
            split_of[holders[0]] = "train"


def _check_classes(classes: tuple[str, ...]) -> None:
    if not classes or len(set(classes)) != len(classes):
        raise DataError(
            f"classes={list(classes)} expected at least one name and no name twice",
            "name the classes in label order",
        )


def _check_labels(labels: IntArray, classes: tuple[str, ...]) -> None:
    outside = Counter(labels[(labels < 0) | (labels >= len(classes))].tolist())
    if outside:
        label, count = min(outside.items())
        others = f" (and {len(outside) - 1} other values)" if len(outside) > 1 else ""
        raise DataError(
            f"label={label} in {count} examples{others} expected 0..{len(classes) - 1} "
            f"for the {len(classes)} declared classes",
            "correct the labels, or declare every class in label order",
        )


def _check_splits(examples: tuple[Example, ...]) -> None:
    for split in {e.split for e in examples}:
        if split not in SPLITS:
            raise _unknown_split(split)


def _unknown_split(split: str) -> DataError:
    return DataError(f"split={split} expected one of {', '.join(SPLITS)}", "rename the split")


def _check_ids(examples: tuple[Example, ...]) -> None:
    repeated = len(examples) - len({e.example_id for e in examples})
    if repeated:
        raise DataError(
            f"repeated_example_ids={repeated} expected every example id once",
            "remove the rows that are listed twice",
        )


def _check_patients(examples: tuple[Example, ...]) -> None:
    split_of: dict[str, str] = {}
    crossing = {e.patient for e in examples if split_of.setdefault(e.patient, e.split) != e.split}
    if crossing:
        raise DataError(
            f"patients_in_two_splits={len(crossing)} expected each patient in one split only",
            "split by patient, not by image",
        )
