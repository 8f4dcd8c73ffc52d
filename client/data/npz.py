"""Reading a file in MedMNIST's npz layout: six arrays, images and labels of train, val and test.

The images go from the file into a mapped cache, one after the other, the first time that their
content is met; afterwards only their number, hashes and labels are looked at.

Invariant: what is returned agrees with itself (types, shapes, counts, label range), memory does not
grow with the images, and nothing in the file is ever unpickled. The layout carries no patients, so
each image counts as its own patient. An image's id follows from its pixels and the site's key:
other images in the file do not change it.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from client.data.cache import ImageCache, Stored, cache_key, open_cache
from client.data.download import md5_of
from client.data.duplicates import find_duplicates, pixel_hash, tell_duplicates
from client.data.images import CHANGED, DECODERS, changed_ns
from client.data.keyed import PUBLIC_KEY, keyed_hash
from client.data.manifest import SPLITS, Example, ImageDataset, Manifest, Provenance
from client.data.npz_members import (
    COPY_HINT,
    EXPORT_HINT,
    Member,
    items,
    member,
    missing,
    opened,
    whole,
)
from client.data.pictures import MAX_PIXELS
from client.data.stored import StoredImages
from strategies import cli
from strategies.errors import DataError

KEYS = tuple(f"{split}_{part}" for split in SPLITS for part in ("images", "labels"))
# A hundred times the largest published set. Labels and hashes are held in memory.
MAX_IMAGES = 1 << 24


class NpzFile(NamedTuple):
    """A file as it was when its MD5 was taken.

    Attributes:
        path: Where it lies.
        md5: Of its bytes.
        state: Its size, and when it was last changed.
    """

    path: Path
    md5: str
    state: tuple[int, int]

    def require_unchanged(self) -> None:
        """Refuses what was read of a file that is not the same any more."""
        if _state(self.path) != self.state:
            raise DataError(
                f"file={self.path.name} cannot be read: {CHANGED}",
                "start again when nothing writes the file any more",
            )


def identified(path: Path) -> NpzFile:
    """Takes the MD5 of an npz file.

    Raises:
        DataError: The file is absent, no file, unreadable, truncated or of another format.
    """
    require_npz(path)
    state = _state(path)
    return NpzFile(path, md5_of(path), state)


def require_npz(path: Path) -> None:
    """Refuses a path that is no complete npz file, before anything reads it in full.

    Raises:
        DataError: The file is absent, no file, unreadable, truncated or of another format.
    """
    if not path.is_file():
        raise DataError(f"file={path} expected an existing npz file", "check the path")
    try:
        complete = zipfile.is_zipfile(path)
    except OSError as error:
        raise DataError(
            f"file={path} cannot be read: {error.strerror}", "check who may read the file"
        ) from error
    if not complete:
        raise DataError(
            f"file={path} expected a complete npz archive; it is truncated or no npz file",
            COPY_HINT,
        )


def read_npz_layout(
    file: NpzFile,
    *,
    dataset: str,
    classes: tuple[str, ...],
    cache_dir: Path,
    official: bool | None = None,
    channels: int | None = None,
    site: str = "",
    key: bytes = PUBLIC_KEY,
    dedupe: bool = False,
) -> ImageDataset:
    """Reads a file in MedMNIST's layout.

    Args:
        file: From `identified`.
        dataset: Name of the data set, for the manifest.
        classes: Class names in label order.
        cache_dir: Where the images are kept, as many bytes as they have uncompressed.
        official: Whether the MD5 is the published one; None where nothing is published.
        channels: 1 or 3 where the data set is known to be grey or RGB.
        site: The site that all examples belong to.
        key: The site's key, for the examples' ids.
        dedupe: Keep one of several identical images; otherwise they are only counted.

    Returns:
        All three splits, in the order train, val, test.

    Raises:
        DataError: The file cannot be read, lacks an array, contradicts itself or the classes, or
            changes meanwhile; or the disk has no room.
    """
    with opened(file.path) as archive:
        lacking = missing(archive, KEYS)
        if lacking:
            raise DataError(f"file={file.path.name} lacks {', '.join(lacking)}", EXPORT_HINT)
        images = [member(archive, f"{split}_images") for split in SPLITS]
        shape = _shape(images, channels)
        labels = [
            _labels(archive, member(archive, f"{split}_labels"), of.shape[0])
            for split, of in zip(SPLITS, images, strict=True)
        ]
        file.require_unchanged()
        cache = _cached(file, archive, images, shape, cache_dir, dataset)
    hashes = [digest.tobytes().hex() for digest in cache.digests]
    source = f"{file.path.name}:{file.md5}"
    examples = _examples(images, np.concatenate(labels), hashes, source, site, key)
    provenance = Provenance(file=file.path.name, md5=file.md5)
    if official is not None:
        provenance["official"] = official
    manifest = Manifest(dataset, classes, examples)
    # No image names a patient: copies are nobody's.
    splits = [example.split for example in examples]
    copies = find_duplicates(hashes, manifest.labels.tolist(), splits, [""] * len(hashes))
    tell_duplicates(dataset, copies, removed=dedupe)
    data = ImageDataset(manifest, StoredImages(cache, np.arange(len(hashes))), provenance)
    return data.subset(copies.kept) if dedupe and copies.groups else data


def _examples(
    images: Sequence[Member],
    labels: npt.NDArray[np.int64],
    hashes: Sequence[str],
    source: str,
    site: str,
    key: bytes,
) -> tuple[Example, ...]:
    places = [
        (split, frame)
        for split, of in zip(SPLITS, images, strict=True)
        for frame in range(of.shape[0])
    ]
    examples: list[Example] = []
    # Identical images are told apart by a number.
    seen: Counter[str] = Counter()
    for (split, frame), label, digest in zip(places, labels.tolist(), hashes, strict=True):
        example_id = keyed_hash(key, "example", digest, seen[digest])
        seen[digest] += 1
        examples.append(Example(example_id, source, frame, label, example_id, site, split))
    return tuple(examples)


def _cached(
    file: NpzFile,
    archive: zipfile.ZipFile,
    images: Sequence[Member],
    shape: tuple[int, int, int],
    cache_dir: Path,
    dataset: str,
) -> ImageCache:
    """Opens the cache of a file's images, (c, h, w) each; the first time, reads them into it."""
    num_images = sum(of.shape[0] for of in images)

    def fill() -> Generator[tuple[int, Stored]]:
        row = 0
        with cli.progress() as progress:
            bar = progress.add_task("reading images", total=num_images)
            for of in images:
                for image in items(archive, of):
                    pixels = np.atleast_3d(image.astype(np.uint8, copy=False))
                    yield row, np.moveaxis(pixels, 2, 0)
                    row += 1
                    progress.advance(bar)
        file.require_unchanged()

    slot = ("npz", dataset, str(file.path))
    return open_cache(
        cache_dir,
        slot=cache_key(slot),
        content=cache_key((slot, file.md5, DECODERS)),
        shape=(num_images, *shape),
        dtype=np.dtype(np.uint8),
        fill=fill,
        digest=lambda image: bytes.fromhex(pixel_hash(np.moveaxis(image, 0, 2))),
    )


def _shape(images: Sequence[Member], channels: int | None) -> tuple[int, int, int]:
    """Returns channels, height and width of the images of all splits."""
    for found in images:
        _require_images(found, channels)
    if len({found.shape[1:] for found in images}) > 1:
        shapes = ", ".join(
            f"{split} {found.shape[1:]}" for split, found in zip(SPLITS, images, strict=True)
        )
        raise DataError(
            f"file={images[0].file} expected one image shape, found {shapes}", EXPORT_HINT
        )
    if not images[0].shape[0]:
        raise DataError(
            f"file={images[0].file} train_images=0 expected at least one image", EXPORT_HINT
        )
    _, height, width, *rgb = images[0].shape
    return 3 if rgb else 1, height, width


def _require_images(found: Member, channels: int | None) -> None:
    shape = found.shape
    if found.dtype != np.uint8 or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
        raise DataError(f"{found} expected uint8 (n, h, w) or (n, h, w, 3)", EXPORT_HINT)
    num_images, height, width, *rgb = shape
    if not height * width:
        raise DataError(f"{found} expected images of at least one pixel", EXPORT_HINT)
    if height * width > MAX_PIXELS or num_images > MAX_IMAGES:
        raise DataError(
            f"{found} expected at most {MAX_IMAGES} images of at most {MAX_PIXELS} pixels",
            "make the images smaller, or several files",
        )
    if channels is not None and channels != (3 if rgb else 1):
        kind = "grey (n, h, w)" if channels == 1 else "RGB (n, h, w, 3)"
        raise DataError(f"{found} expected {kind} images", "get the official file")
    if found.fortran_order:
        raise DataError(
            f"{found} is in Fortran order, expected image after image",
            "write the file again with numpy.ascontiguousarray of each array",
        )


def _labels(archive: zipfile.ZipFile, found: Member, num_images: int) -> npt.NDArray[np.int64]:
    if found.dtype.kind not in "iu":
        raise DataError(f"{found} expected integers", EXPORT_HINT)
    if len(found.shape) == 2 and found.shape[1] > 1:
        raise DataError(
            f"{found} expected one label per image; several (multi-label) are not supported yet",
            "choose a single-label data set",
        )
    if found.shape not in ((num_images,), (num_images, 1)):
        raise DataError(
            f"{found} expected ({num_images},) or ({num_images}, 1), one label per image",
            EXPORT_HINT,
        )
    return whole(archive, found).reshape(-1).astype(np.int64)


def _state(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return (-1, -1)
    return status.st_size, changed_ns(status)
