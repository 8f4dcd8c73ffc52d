"""Prepared images in one memory-mapped file: decoded once, then read by any process, page by page.

Layout: a line of JSON padded to `HEADER_BYTES`; the images, (n, c, s, s); a CRC-32 for each image;
the CRC-32 of those. The size follows from the shape, so it is known and told before anything is
decoded.

Invariant: a file under its final name was written completely by one process (lock, temporary file,
fsync, rename), and no image is handed out whose bytes are not those that were written: each is
checked the first time that a process reads it. Memory does not grow with the number of images,
beyond five bytes for each. The folder is its owner's alone: it holds a hospital's images.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import shutil
import time
import zlib
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from client.data.manifest import IntArray
from strategies.errors import DataError
from strategies.files import make_folder, sync_folder

logger = logging.getLogger(__name__)

FORMAT = 1
HEADER_BYTES = 4096
MIB = 2**20
# Left free on the disk beside a cache: keys, logs and answers of a site need room too.
RESERVE_BYTES = 200 * MIB

Stored = npt.NDArray[np.uint8 | np.uint16]
Fill = Callable[[], Iterable[tuple[int, Stored]]]


@dataclass(frozen=True, eq=False)
class ImageCache:
    """An open cache.

    Attributes:
        path: Its file.
        pixels: (n, c, s, s), mapped, read-only.
        checks: CRC-32 of each image, (n,).
        checked: Which images this process has compared with them, (n,).
    """

    path: Path
    pixels: Stored
    checks: npt.NDArray[np.uint32]
    checked: npt.NDArray[np.bool_]

    def read(self, rows: IntArray) -> Stored:
        """Returns a copy of some images, shape (b, c, s, s).

        Raises:
            DataError: The file does not hold what was written; it is removed.
        """
        images = self.pixels[rows]
        for position, row in enumerate(rows):
            if not self.checked[row]:
                if zlib.crc32(images[position]) != self.checks[row]:
                    self.path.unlink(missing_ok=True)
                    raise _damaged()
                self.checked[row] = True
        return images


def open_cache(
    folder: Path,
    *,
    slot: str,
    content: str,
    shape: tuple[int, int, int, int],
    dtype: np.dtype[np.uint8 | np.uint16],
    fill: Fill,
) -> ImageCache:
    """Opens a cache, and writes it first where it is not there, is damaged, or is of other content.

    Processes that need the same cache wait for the one that writes it. Of a slot (a data set at an
    input size) only the newest content is kept; who has an older one open goes on reading it.

    Args:
        folder: Where it lies; made for its owner alone.
        slot: Names what is cached.
        content: Names the exact images.
        shape: (n, c, s, s).
        dtype: uint8 or uint16.
        fill: Gives every row and its image (c, s, s), in any order.

    Raises:
        DataError: The disk has no room, or `fill` raises or misses images.
    """
    make_folder(folder, secret=True)
    path = folder / f"{slot}-{content}.images"
    header = json.dumps(
        {"format": FORMAT, "content": content, "shape": shape, "dtype": dtype.str}
    ).encode()
    with _alone(folder / f"{slot}.lock"):
        cache = _opened(path, header, shape, dtype)
        if cache is None:
            try:
                _write(path, header, shape, dtype, fill)
            except OSError as error:
                raise DataError(
                    f"image cache cannot be written ({error.strerror})",
                    "check the folder and the disk's free space",
                ) from error
            for other in folder.glob(f"{slot}-*.images"):
                if other != path:
                    other.unlink(missing_ok=True)
            cache = _opened(path, header, shape, dtype)
    if cache is None:
        raise _damaged()
    return cache


def _opened(
    path: Path, header: bytes, shape: tuple[int, ...], dtype: np.dtype
) -> ImageCache | None:
    """Maps a file; None where it is not there or not as it was written."""
    num_bytes = math.prod(shape) * dtype.itemsize
    try:
        with path.open("rb") as file:
            whole = os.fstat(file.fileno()).st_size == _file_bytes(shape, dtype)
            if not whole or file.read(HEADER_BYTES) != header.ljust(HEADER_BYTES):
                raise ValueError
            file.seek(HEADER_BYTES + num_bytes)
            table = file.read(4 * shape[0])
            if zlib.crc32(table) != int.from_bytes(file.read(4), "little"):
                raise ValueError
            pixels = (
                np.memmap(file, dtype, "r", HEADER_BYTES, shape).view(np.ndarray)
                if num_bytes
                else np.empty(shape, dtype)
            )
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        logger.warning("image cache damaged: it is made anew")
        return None
    return ImageCache(path, pixels, np.frombuffer(table, "<u4"), np.zeros(shape[0], np.bool_))


def _write(path: Path, header: bytes, shape: tuple[int, ...], dtype: np.dtype, fill: Fill) -> None:
    size, free = _file_bytes(shape, dtype), shutil.disk_usage(path.parent).free
    logger.info(
        "image cache images=%d size=%.0f MiB free=%.0f MiB", shape[0], size / MIB, free / MIB
    )
    if size + RESERVE_BYTES > free:
        raise DataError(
            f"image cache needs {size / MIB:.0f} MiB, free={free / MIB:.0f} MiB and "
            f"{RESERVE_BYTES / MIB:.0f} MiB of that stay free",
            "free some space, or use a smaller model.image-size",
        )
    start = time.monotonic()
    # One writer a slot, so one name will do; what a killed process left is overwritten.
    part = path.with_name(f".{path.name.partition('-')[0]}.part")
    try:
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so now
            file.write(header.ljust(HEADER_BYTES))
            _write_images(file, shape, dtype, fill)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)
    logger.info("image cache written seconds=%.1f", time.monotonic() - start)


def _write_images(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, fill: Fill) -> None:
    checks = np.zeros(shape[0], "<u4")
    missing = np.ones(shape[0], np.bool_)
    image_bytes = math.prod(shape[1:]) * dtype.itemsize
    for row, image in fill():
        data = np.ascontiguousarray(image, dtype)
        assert data.shape == shape[1:], data.shape
        file.seek(HEADER_BYTES + row * image_bytes)
        file.write(data.data)
        checks[row], missing[row] = zlib.crc32(data.data), False
    if missing.any():
        raise DataError(f"image cache lacks {missing.sum()} images", "start again")
    table = checks.tobytes()
    file.seek(HEADER_BYTES + shape[0] * image_bytes)
    file.write(table + zlib.crc32(table).to_bytes(4, "little"))


def _file_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return HEADER_BYTES + math.prod(shape) * dtype.itemsize + 4 * shape[0] + 4


@contextlib.contextmanager
def _alone(lock: Path) -> Generator[None]:
    """Waits until no other process writes; the system lets go of the lock of one that dies."""
    try:
        file = lock.open("w")
    except OSError as error:
        raise DataError(
            f"image cache cannot be written ({error.strerror})", "check the folder's permissions"
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("image cache is being written by another process: waiting")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _damaged() -> DataError:
    return DataError(
        "image cache damaged: an image is not the one that was written",
        "start again, it is made anew; if it happens again, test the disk",
    )
