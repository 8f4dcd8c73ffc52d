"""Reading a file in MedMNIST's npz layout: six arrays, images and labels of train, val and test.

Invariant: what is returned agrees with itself (types, shapes, counts, label range) and nothing in
the file is ever unpickled. The layout carries no patients, so each image counts as its own patient.
An image's id follows from its pixels and the site's key: other images in the file do not change it.
"""

from __future__ import annotations

import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import numpy.typing as npt

from client.data.duplicates import pixel_hash
from client.data.keyed import PUBLIC_KEY, keyed_hash
from client.data.manifest import SPLITS, Example, ImageArray, ImageDataset, Manifest, Provenance
from strategies.errors import DataError

KEYS = tuple(f"{split}_{part}" for split in SPLITS for part in ("images", "labels"))

_EXPORT_HINT = "write the file again: docs/data.md describes the six arrays"
# What numpy and zipfile raise on broken archives; RuntimeError stands for encrypted members.
READ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
)


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
        raise _unreadable(path, error) from error
    if not complete:
        raise DataError(
            f"file={path} expected a complete npz archive; it is truncated or no npz file",
            "fetch or copy the file again",
        )


def read_npz_layout(
    path: Path,
    *,
    dataset: str,
    classes: tuple[str, ...],
    md5: str,
    official: bool | None = None,
    channels: int | None = None,
    site: str = "",
    key: bytes = PUBLIC_KEY,
) -> ImageDataset:
    """Reads a file in MedMNIST's layout.

    Args:
        path: The file.
        dataset: Name of the data set, for the manifest.
        classes: Class names in label order.
        md5: MD5 of the file, for the manifest and the provenance.
        official: Whether that MD5 is the published one; None where nothing is published.
        channels: 1 or 3 where the data set is known to be grey or RGB.
        site: The site that all examples belong to.
        key: The site's key, for the examples' ids.

    Returns:
        All three splits, in the order train, val, test.

    Raises:
        DataError: The file cannot be read, lacks an array, or contradicts itself or the classes.
    """
    require_npz(path)
    arrays = _read_arrays(path)
    images = [_images(path, split, arrays[f"{split}_images"], channels) for split in SPLITS]
    if len({array.shape[1:] for array in images}) > 1:
        shapes = ", ".join(f"{s} {a.shape[1:]}" for s, a in zip(SPLITS, images, strict=True))
        raise DataError(f"file={path} expected one image shape, found {shapes}", _EXPORT_HINT)
    source = f"{path.name}:{md5}"
    examples: list[Example] = []
    # Identical images are told apart by a number.
    seen: Counter[str] = Counter()
    for split, split_images in zip(SPLITS, images, strict=True):
        labels = _labels(path, split, arrays[f"{split}_labels"], len(split_images))
        for index, label in enumerate(labels.tolist()):
            digest = pixel_hash(split_images[index])
            example_id = keyed_hash(key, "example", digest, seen[digest])
            seen[digest] += 1
            examples.append(Example(example_id, source, index, label, example_id, site, split))
    if not len(images[0]):
        raise DataError(f"file={path} train_images=0 expected at least one image", _EXPORT_HINT)
    provenance = Provenance(file=path.name, md5=md5)
    if official is not None:
        provenance["official"] = official
    manifest = Manifest(dataset, classes, tuple(examples))
    return ImageDataset(manifest, np.concatenate(images), provenance)


def _read_arrays(path: Path) -> dict[str, npt.NDArray[np.generic]]:
    try:
        # Opened here, because np.load leaves its own file open when the archive is damaged.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [key for key in KEYS if key not in archive]
            if missing:
                raise DataError(f"file={path} lacks {', '.join(missing)}", _EXPORT_HINT)
            arrays = {key: archive[key] for key in KEYS}
    except READ_ERRORS as error:
        raise _unreadable(path, error) from error
    for key, array in arrays.items():
        # numpy hands out the bytes of a member that is not in its own format.
        if not isinstance(array, np.ndarray):
            raise DataError(f"file={path} {key} expected an array of numpy's format", _EXPORT_HINT)
    return arrays


def _unreadable(path: Path, error: BaseException) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(f"file={path} cannot be read: {reason}", "fetch or copy the file again")


def _images(
    path: Path, split: str, array: npt.NDArray[np.generic], channels: int | None
) -> ImageArray:
    found = f"file={path} {split}_images={array.dtype}{array.shape}"
    if array.dtype != np.uint8 or not (
        array.ndim == 3 or (array.ndim == 4 and array.shape[3] == 3)
    ):
        raise DataError(f"{found} expected uint8 (n, h, w) or (n, h, w, 3)", _EXPORT_HINT)
    if 0 in array.shape[1:3]:
        raise DataError(f"{found} expected images of at least one pixel", _EXPORT_HINT)
    if channels is not None and channels != (1 if array.ndim == 3 else 3):
        kind = "grey (n, h, w)" if channels == 1 else "RGB (n, h, w, 3)"
        raise DataError(f"{found} expected {kind} images", "get the official file")
    return array.astype(np.uint8, copy=False)


def _labels(
    path: Path, split: str, array: npt.NDArray[np.generic], num_images: int
) -> npt.NDArray[np.int64]:
    found = f"file={path} {split}_labels={array.dtype}{array.shape}"
    if array.dtype.kind not in "iu":
        raise DataError(f"{found} expected integers", _EXPORT_HINT)
    if array.ndim == 2 and array.shape[1] > 1:
        raise DataError(
            f"{found} expected one label per image; several (multi-label) are not supported yet",
            "choose a single-label data set",
        )
    if array.shape not in ((num_images,), (num_images, 1)):
        raise DataError(
            f"{found} expected ({num_images},) or ({num_images}, 1), one label per image",
            _EXPORT_HINT,
        )
    return array.reshape(-1).astype(np.int64)
