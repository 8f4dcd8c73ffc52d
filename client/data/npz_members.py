"""The arrays in an npz file, a zip of .npy members: their headers first, then a piece at a time.

Stored and deflated members are read alike, through the archive's checksums: a member mapped at its
offset would not be checked, and a file that shrinks would kill the process that has it mapped.

Invariant: nothing is unpickled. A header is believed only where the archive announces exactly as
many bytes as it says, and no more than that is ever read, so neither a header nor a compressed
stream decides how much memory is used. What is wrong is one line that names the file and the array.
"""

from __future__ import annotations

import math
import warnings
import zipfile
import zlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt
from numpy.lib import format as npy

from strategies.errors import DataError

EXPORT_HINT = "write the file again: docs/data.md describes the six arrays"
COPY_HINT = "fetch or copy the file again"
# A header of numpy's own has 118 bytes; format 2.0 lets one claim 4 GiB.
MAX_HEADER_BYTES = 1 << 16
# Labels of as many images as an npz file may hold.
MAX_WHOLE_BYTES = 1 << 28
# What numpy writes. Others are decompressed without a bound on what comes out of one piece.
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# What numpy and zipfile raise on broken archives; RuntimeError stands for encrypted members, and
# OverflowError for places that no file has.
READ_ERRORS = (
    OSError,
    ValueError,
    EOFError,
    MemoryError,
    OverflowError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


class Member(NamedTuple):
    """An array in an npz file, as its header describes it.

    Attributes:
        file: Name of the npz file, without its folder.
        key: Name of the array.
        info: The archive's entry.
        start: Bytes before its data.
        shape: Of the array.
        dtype: Of the array.
        fortran_order: Whether the first axis varies fastest.
    """

    file: str
    key: str
    info: zipfile.ZipInfo
    start: int
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran_order: bool

    def __str__(self) -> str:
        return f"file={self.file} {self.key}={self.dtype}{self.shape}"


@contextmanager
def opened(path: Path) -> Generator[zipfile.ZipFile]:
    """Opens an npz file.

    Raises:
        DataError: It cannot be read, or is no archive.
    """
    with _told(path.name):
        # Opened here, because zipfile leaves its own file open when the archive is damaged.
        file = path.open("rb")
    with file:
        with _told(path.name):
            archive = zipfile.ZipFile(file)
        with archive:
            yield archive


def missing(archive: zipfile.ZipFile, keys: Sequence[str]) -> list[str]:
    """Returns which arrays an archive lacks."""
    names = set(archive.namelist())
    return [key for key in keys if names.isdisjoint((f"{key}.npy", key))]


def member(archive: zipfile.ZipFile, key: str) -> Member:
    """Reads the header of an array.

    Raises:
        DataError: There is no such array, it is not in numpy's format, or the archive announces
            another number of bytes than its header.
    """
    file = Path(archive.filename or "").name
    if missing(archive, [key]):
        raise DataError(f"file={file} lacks {key}", EXPORT_HINT)
    name = f"{key}.npy"
    info = archive.getinfo(name if name in archive.namelist() else key)
    if info.compress_type not in METHODS:
        raise DataError(
            f"file={file} {key} compression={info.compress_type} expected stored or deflated",
            "write the file again with numpy.savez or numpy.savez_compressed",
        )
    with _told(file, key), archive.open(info) as data:
        start = _Start(data)
        try:
            shape, fortran_order, dtype = _header(start)
        except (OSError, zipfile.BadZipFile, zlib.error):
            raise
        except Exception as error:  # whatever numpy's parser makes of damage or of a text
            reason = f"expected an array of numpy's format ({type(error).__name__})"
            raise ValueError(reason) from error
    found = Member(file, key, info, start.taken, shape, dtype, fortran_order)
    announced = info.file_size - start.taken
    fits = min(shape, default=0) >= 0 and math.prod(shape) * dtype.itemsize == announced
    # Of objects nobody knows the size; they are refused unread.
    if not fits and not dtype.hasobject:
        raise DataError(
            f"{found} expected to fill the {announced} bytes that the archive announces", COPY_HINT
        )
    return found


def items(archive: zipfile.ZipFile, member: Member) -> Generator[npt.NDArray[np.generic]]:
    """Yields an array item by item along its first axis, in C order; memory holds one at a time.

    Raises:
        DataError: The data end early, do not match their checksum or cannot be decompressed.
    """
    size = math.prod(member.shape[1:]) * member.dtype.itemsize
    with _told(member.file, member.key), archive.open(member.info) as data:
        data.read(member.start)
        for _ in range(member.shape[0]):
            piece = data.read(size)
            if len(piece) < size:
                raise EOFError("the data end early")
            yield np.frombuffer(piece, member.dtype).reshape(member.shape[1:])


def whole(archive: zipfile.ZipFile, member: Member) -> npt.NDArray[np.generic]:
    """Reads an array into memory: for labels, not for images.

    Raises:
        DataError: As `items`; or it holds objects, or more than labels need.
    """
    if member.info.file_size > MAX_WHOLE_BYTES:
        raise DataError(f"{member} expected at most {MAX_WHOLE_BYTES} bytes", EXPORT_HINT)
    with _told(member.file, member.key), archive.open(member.info) as data:
        return npy.read_array(data, allow_pickle=False)


class _Start:
    """The start of a member, of which numpy reads the header."""

    def __init__(self, data: IO[bytes]) -> None:
        self._data, self.taken = data, 0

    def read(self, length: int = MAX_HEADER_BYTES) -> bytes:
        if self.taken + length > MAX_HEADER_BYTES:
            raise ValueError("the header is too long")
        read = self._data.read(length)
        self.taken += len(read)
        return read


def _header(start: _Start) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    with warnings.catch_warnings(action="ignore"):  # of Python 2, and of odd escapes
        # Format 3.0 differs from 2.0 in names of fields, which no array of numbers has.
        first = npy.read_magic(start) == (1, 0)
        return (npy.read_array_header_1_0 if first else npy.read_array_header_2_0)(start)


@contextmanager
def _told(file: str, key: str = "") -> Generator[None]:
    """Turns what a broken archive raises into a line."""
    try:
        yield
    except READ_ERRORS as error:
        text = error.strerror if isinstance(error, OSError) else str(error)
        reason = ((text or "").splitlines() or [type(error).__name__])[0]
        what = f"{key}: {reason}" if key else reason
        raise DataError(f"file={file} cannot be read: {what}", COPY_HINT) from error
