"""One DICOM file opened: is it one, what its header says, and which decoder its pixels need.

Reading is lenient, because a hospital's archive holds files of thirty years: a file without
preamble or without file meta information (PS3.10, 7.1) is read where its first element is one of
DICOM's, and a transfer syntax that nobody wrote down is taken from how the elements are encoded.

Invariant: a header is returned, or a `DataError` raised whose text is one of a few reasons. pydicom
quotes values in its warnings, log lines and errors, and a value may be a patient's name; so none of
them leaves this module.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydicom import config, dcmread
from pydicom.dataset import FileDataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
)
from pydicom.valuerep import VR

from client.data.pictures import require_file
from strategies.errors import DataError

NOT_DICOM = "not a DICOM file"
NO_IMAGE = "DICOM object without an image"
DAMAGED_HEADER = "DICOM header truncated or damaged"

_HINT = "remove or replace the file"
_PREAMBLE = 128
_GROUP_LENGTH = 12  # bytes of the first element of file meta, from whose end it counts
_VRS = {str(vr).encode() for vr in VR}
_LARGEST_FIRST_ELEMENT = 1024  # bytes; a group length, a character set, a type of image, a UID

# Checking values gives nothing but complaints that quote them.
config.settings.reading_validation_mode = config.IGNORE
for _library in ("pydicom", "pylibjpeg", "openjpeg", "jpeg_ls"):
    logging.getLogger(_library).setLevel(logging.CRITICAL + 1)


@contextmanager
def quiet() -> Generator[None]:
    """Keeps the warnings of the libraries below from the log; not for threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def read_header(path: Path, tags: Sequence[str]) -> FileDataset:
    """Reads some elements of a file, never its pixels.

    Args:
        path: The file; its name does not matter.
        tags: Keywords of the elements wanted.

    Returns:
        The elements that are there, with a transfer syntax in ``file_meta``.

    Raises:
        DataError: The file cannot be opened, is empty, no DICOM file, or its header is damaged.
    """
    require_file(path)
    with quiet():
        try:
            with path.open("rb") as file:
                return open_header(file, tags)
        except OSError as error:
            raise DataError("file cannot be read", _HINT) from error


def open_header(file: BinaryIO, tags: Sequence[str]) -> FileDataset:
    """As `read_header`, from an open file and within `quiet`; leaves it at the pixel data.

    Raises:
        DataError: No DICOM file, or its header is damaged.
        OSError: Nothing can be read.
    """
    bare = _is_bare(file)
    try:
        header = dcmread(file, stop_before_pixels=True, force=bare, specific_tags=list(tags))
        for tag in tags:  # elements are parsed when asked for; the damage is to show here
            header.get(tag)
        for tag in header.file_meta.dir():
            header.file_meta.get(tag)
        if not bare and _is_cut(file, header.file_meta.get("FileMetaInformationGroupLength")):
            raise EOFError
        if not header.file_meta.get("TransferSyntaxUID"):
            header.file_meta.TransferSyntaxUID = _transfer_syntax(header)
    except Exception:  # a damaged header makes pydicom raise anything, quoting what it read
        raise DataError(DAMAGED_HEADER, _HINT) from None
    return header


def _is_bare(file: BinaryIO) -> bool:
    """Tells a file that starts with its first element from one with preamble; refuses others."""
    head = file.read(_PREAMBLE + 4)
    file.seek(0)
    if head[_PREAMBLE:] == b"DICM":
        return False
    for order in ("little", "big"):
        group = int.from_bytes(head[:2], order)
        # File meta, or the first group of a data set: nothing else can come first.
        if group in (0x0002, 0x0008) and len(head) > 8:
            length = int.from_bytes(head[4:8], order)
            if head[4:6] in _VRS or (order == "little" and 0 < length <= _LARGEST_FIRST_ELEMENT):
                return True
    raise DataError(NOT_DICOM, "only DICOM files are read here")


def _is_cut(file: BinaryIO, meta_length: int | None) -> bool:
    """Tells a file that ends within its file meta information, so says nothing of its kind."""
    return os.fstat(file.fileno()).st_size < _PREAMBLE + 4 + _GROUP_LENGTH + (meta_length or 0)


def _transfer_syntax(header: FileDataset) -> UID:
    implicit, little = header.original_encoding
    if implicit:
        return ImplicitVRLittleEndian
    return ExplicitVRLittleEndian if little else ExplicitVRBigEndian


def missing_image(header: FileDataset) -> str:
    """Return why a file holds no image; empty where it seems to hold one."""
    if header.get("Rows") is not None and header.get("Columns") is not None:
        return ""
    # A file that was cut has its kind, which comes first, and not its size.
    kinds = (header.get("SOPClassUID"), header.file_meta.get("MediaStorageSOPClassUID"))
    is_image = any("Image Storage" in UID(str(kind or "")).name for kind in kinds)
    return DAMAGED_HEADER if is_image else NO_IMAGE


def missing_decoder(header: FileDataset) -> str:
    """Return why the pixels of a file cannot be decoded on this machine; empty where they can."""
    syntax = UID(str(header.file_meta.TransferSyntaxUID))
    # An unknown one is named by nobody, so its digits could be anything.
    name = syntax.name if syntax.type == "Transfer Syntax" else "unknown to the standard"
    try:
        decoder = get_decoder(syntax)
    except NotImplementedError:
        decodable = False
    else:
        decodable = decoder.is_available
        if syntax == JPEGExtended12Bit and header.get("BitsAllocated") != 8:
            # Pillow has this one for 8 bits alone.
            decodable = any(plugin != "pillow" for plugin in decoder.available_plugins)
            name += " of 12 bits"
    return "" if decodable else f"transfer syntax {name} has no decoder here"
