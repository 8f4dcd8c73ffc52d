"""Prepared images in one memory-mapped file: decoded once, then read by any process, page by page.

Layout: a line of JSON padded to `HEADER_BYTES`; the images, (n, c, h, w); a CRC-32 for each image
and, where asked for, a digest; the CRC-32 of those. The size follows from the shape, so it is known
and told before anything is decoded.

Invariant: a file under its final name was written completely by one process (lock, temporary file,
fsync, rename), and no image is handed out whose bytes are not those that were written: each is
checked the first time that a process reads it. Memory does not grow with the number of images,
beyond a few bytes for each. The folder is its owner's alone: it holds a hospital's images.
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
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from client.data.keyed import PUBLIC_KEY, keyed_hash
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
# What is to be known of an image without reading it again: DIGEST_BYTES of its content.
Digest = Callable[[Stored], bytes]
DIGEST_BYTES = 16


@dataclass(frozen=True, eq=False)
class ImageCache:
    """An open cache.

    Attributes:
        path: Its file.
        pixels: (n, c, h, w), mapped, read-only.
        checks: CRC-32 of each image, (n,).
        digests: What `digest` gave for each image, (n, 16) bytes; (n, 0) where there was none.
        checked: Which images this process has compared with them, (n,).
    """

    path: Path
    pixels: Stored
    checks: npt.NDArray[np.uint32]
    digests: npt.NDArray[np.uint8]
    checked: npt.NDArray[np.bool_]

    def read(self, rows: IntArray) -> Stored:
        """Returns a copy of some images, shape (b, c, h, w).

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


class _Plan(NamedTuple):
    """A cache as it will be, or is to be found."""

    path: Path
    header: bytes
    shape: tuple[int, ...]
    dtype: np.dtype[np.uint8 | np.uint16]
    digest: Digest | None

    @property
    def image_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def digest_bytes(self) -> int:
        return DIGEST_BYTES if self.digest else 0

    @property
    def table_start(self) -> int:
        return HEADER_BYTES + self.shape[0] * self.image_bytes

    @property
    def table_bytes(self) -> int:
        return self.shape[0] * (4 + self.digest_bytes)

    @property
    def file_bytes(self) -> int:
        return self.table_start + self.table_bytes + 4


def cache_key(value: object) -> str:
    """Names something by what it is made from, which JSON can hold."""
    return keyed_hash(PUBLIC_KEY, "cache", json.dumps(value))


def open_cache(
    folder: Path,
    *,
    slot: str,
    content: str,
    shape: tuple[int, int, int, int],
    dtype: np.dtype[np.uint8 | np.uint16],
    fill: Fill,
    digest: Digest | None = None,
) -> ImageCache:
    """Opens a cache, and writes it first where it is not there, is damaged, or is of other content.

    Processes that need the same cache wait for the one that writes it. Of a slot (a data set at an
    input size) only the newest content is kept; who has an older one open goes on reading it.

    Args:
        folder: Where it lies; made for its owner alone.
        slot: Names what is cached.
        content: Names the exact images.
        shape: (n, c, h, w).
        dtype: uint8 or uint16.
        fill: Gives every row and its image (c, h, w), in any order.
        digest: Gives what is kept beside each image; the content names which.

    Raises:
        DataError: The disk has no room, or `fill` raises or misses images.
    """
    make_folder(folder, secret=True)
    path = folder / f"{slot}-{content}.images"
    header = json.dumps(
        {"format": FORMAT, "content": content, "shape": shape, "dtype": dtype.str}
    ).encode()
    plan = _Plan(path, header.ljust(HEADER_BYTES), shape, dtype, digest)
    with _alone(folder / f"{slot}.lock"):
        cache = _opened(plan)
        if cache is None:
            try:
                _write(plan, fill)
            except OSError as error:
                raise DataError(
                    f"image cache cannot be written ({error.strerror})",
                    "check the folder and the disk's free space",
                ) from error
            for other in folder.glob(f"{slot}-*.images"):
                if other != path:
                    other.unlink(missing_ok=True)
            cache = _opened(plan)
    if cache is None:
        raise _damaged()
    return cache


def _opened(plan: _Plan) -> ImageCache | None:
    """Maps a file; None where it is not there or not as it was written."""
    num_images = plan.shape[0]
    try:
        with plan.path.open("rb") as file:
            whole = os.fstat(file.fileno()).st_size == plan.file_bytes
            if not whole or file.read(HEADER_BYTES) != plan.header:
                raise ValueError
            file.seek(plan.table_start)
            table = file.read(plan.table_bytes)
            if zlib.crc32(table) != int.from_bytes(file.read(4), "little"):
                raise ValueError
            pixels = (
                np.memmap(file, plan.dtype, "r", HEADER_BYTES, plan.shape).view(np.ndarray)
                if num_images
                else np.empty(plan.shape, plan.dtype)
            )
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        logger.warning("image cache damaged: it is made anew")
        return None
    checks = np.frombuffer(table, "<u4", num_images)
    digests = np.frombuffer(table, np.uint8)[4 * num_images :]
    return ImageCache(
        plan.path,
        pixels,
        checks,
        digests.reshape(num_images, plan.digest_bytes),
        np.zeros(num_images, np.bool_),
    )


def _write(plan: _Plan, fill: Fill) -> None:
    path, size, free = plan.path, plan.file_bytes, shutil.disk_usage(plan.path.parent).free
    logger.info(
        "image cache images=%d size=%.0f MiB free=%.0f MiB", plan.shape[0], size / MIB, free / MIB
    )
    if size + RESERVE_BYTES > free:
        raise DataError(
            f"image cache needs {size / MIB:.0f} MiB, free={free / MIB:.0f} MiB and "
            f"{RESERVE_BYTES / MIB:.0f} MiB of that stay free",
            "free some space, or use a smaller model.image-size, or MedMNIST's of a smaller "
            "data.image-size",
        )
    start = time.monotonic()
    # One writer a slot, so one name will do; what a killed process left is overwritten.
    part = path.with_name(f".{path.name.partition('-')[0]}.part")
    try:
        handle = os.open(part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(handle, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk says so now
            file.write(plan.header)
            _write_images(file, plan, fill)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)
    logger.info("image cache written seconds=%.1f", time.monotonic() - start)


def _write_images(file: BinaryIO, plan: _Plan, fill: Fill) -> None:
    num_images = plan.shape[0]
    checks = np.zeros(num_images, "<u4")
    digests = np.zeros((num_images, plan.digest_bytes), np.uint8)
    missing = np.ones(num_images, np.bool_)
    for row, image in fill():
        data = np.ascontiguousarray(image, plan.dtype)
        assert data.shape == plan.shape[1:], data.shape
        file.seek(HEADER_BYTES + row * plan.image_bytes)
        file.write(data.data)
        checks[row], missing[row] = zlib.crc32(data.data), False
        if plan.digest:
            digests[row] = np.frombuffer(plan.digest(image), np.uint8)
    if missing.any():
        raise DataError(f"image cache lacks {missing.sum()} images", "start again")
    table = checks.tobytes() + digests.tobytes()
    file.seek(plan.table_start)
    file.write(table + zlib.crc32(table).to_bytes(4, "little"))


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
