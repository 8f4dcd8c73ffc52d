"""Identical images: how many there are, which splits and patients they cross, whose labels differ.

Two images are identical when all their pixels are: the same picture saved in another format is
found, one that was scaled or compressed again is not.

Invariant: with duplicates removed no image is in two splits, and what a model is judged on stays:
the copy in test is kept before the one in val, and that before the one in train. Images that carry
two labels are all left out, because one of the labels is wrong and nobody knows which.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

# Which copy stays.
_RANK = {"test": 0, "val": 1, "train": 2}


class Duplicates(NamedTuple):
    """What is identical to what; a group is all images of the same pixels, two or more.

    Attributes:
        groups: Number of groups.
        images: Images in them.
        across_splits: Groups with images in more than one split.
        across_patients: Groups with images of more than one patient.
        conflicts: Groups whose images have different labels.
        conflicting_images: Images in those.
        kept: Positions that stay when duplicates are removed, ascending.
    """

    groups: int
    images: int
    across_splits: int
    across_patients: int
    conflicts: int
    conflicting_images: int
    kept: tuple[int, ...]


def find_duplicates(
    pixels: Sequence[str],
    labels: Sequence[int],
    splits: Sequence[str],
    patients: Sequence[str],
) -> Duplicates:
    """Group images by their pixels.

    Args:
        pixels: Hash of each image's pixels.
        labels: Label of each image.
        splits: Split of each image.
        patients: Patient of each image; an empty text where it is not known, which is nobody's.

    Returns:
        Of copies in one split, `kept` has the first in the order given.
    """
    members: dict[str, list[int]] = {}
    for place, digest in enumerate(pixels):
        members.setdefault(digest, []).append(place)
    groups = [group for group in members.values() if len(group) > 1]
    conflicts = [group for group in groups if len({labels[i] for i in group}) > 1]
    disputed = {place for group in conflicts for place in group}
    best = (min(group, key=lambda i: (_RANK[splits[i]], i)) for group in members.values())
    return Duplicates(
        groups=len(groups),
        images=sum(map(len, groups)),
        across_splits=sum(len({splits[i] for i in group}) > 1 for group in groups),
        across_patients=sum(len({patients[i] for i in group} - {""}) > 1 for group in groups),
        conflicts=len(conflicts),
        conflicting_images=len(disputed),
        kept=tuple(sorted(place for place in best if place not in disputed)),
    )


def tell_duplicates(dataset: str, found: Duplicates, *, removed: bool) -> None:
    """Log what was found; says what it means only where it means something."""
    if not found.groups:
        return
    counts = "duplicate_groups=%d images=%d across_splits=%d across_patients=%d label_conflicts=%d"
    values = found[:5]
    if removed:
        logger.info(f"dataset=%s {counts} removed", dataset, *values)
    elif found.across_splits or found.conflicts or found.across_patients:
        logger.warning(
            f"dataset=%s {counts}: identical images in two splits make results look better than "
            "they are; dedupe = true keeps one of each, and none that has two labels",
            dataset,
            *values,
        )
    else:
        logger.info(f"dataset=%s {counts}", dataset, *values)


def pixel_hash(pixels: npt.NDArray[np.uint8 | np.uint16]) -> str:
    """Return 32 hexadecimal digits for an image's shape, type and pixels.

    Args:
        pixels: (h, w), or (h, w, 3); an RGB image whose channels are equal is a grey one.
    """
    if pixels.ndim == 3 and (pixels[..., :1] == pixels[..., 1:]).all():
        pixels = pixels[..., 0]
    digest = hashlib.blake2b(f"{pixels.dtype}{pixels.shape}".encode(), digest_size=16)
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()
