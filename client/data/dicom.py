"""One frame of a DICOM file as the pixels that a viewer shows.

pydicom reads and decodes, with numpy, Pillow, pylibjpeg-openjpeg and pyjpegls; `dicom_values` makes
pixels of the stored values. Orientation is left alone: a network sees what the machine stored.
docs/dicom.md tells each rule to a hospital.

Invariant: `read_frame` returns sound pixels or raises a `DataError` whose text is one of a few
reasons and names no file, no patient and no UID. It needs no torch and is called in worker
processes; not in threads, because it silences warnings.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from pydicom import dcmread
from pydicom.dataset import FileDataset
from pydicom.pixels.utils import pixel_array
from pydicom.uid import UID

from client.data.dicom_codestream import contradicts
from client.data.dicom_file import (
    DAMAGED_HEADER,
    missing_decoder,
    missing_image,
    open_header,
    quiet,
)
from client.data.dicom_values import (
    DAMAGED_VALUES,
    RESCALE,
    VALUE_TAGS,
    WINDOW,
    show_colour,
    show_grey,
)
from client.data.pictures import MAX_PIXELS, TOO_LARGE, Pixels, require_file
from strategies.errors import DataError

# Centre and width in Hounsfield units, as widely used; departments differ.
WINDOWS = {
    "lung": (-600.0, 1500.0),
    "bone": (480.0, 2500.0),
    "brain": (40.0, 80.0),
    "soft-tissue": (40.0, 400.0),
}
DAMAGED_PIXELS = "pixel data truncated or damaged"
NO_SUCH_FRAME = "frame is not in the file"
UNKNOWN_COLOUR = "colour space or number of samples is not read"
HIGH_BITS = "pixels are not in the lowest bits of their words"

_GREY = ("MONOCHROME1", "MONOCHROME2")
_PALETTE = "PALETTE COLOR"
_YBR = ("YBR_FULL", "YBR_FULL_422")
_COLOURS = ("RGB", "YBR_ICT", "YBR_RCT", *_YBR)  # JPEG 2000's decoders turn its two into RGB
_PIXEL_VRS = (b"OB", b"OW", b"OF", b"OD")
_HINT = "remove or replace the file"

_GROUPS = ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence")
_TAGS = (
    *("SOPClassUID", "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PlanarConfiguration"),
    *(*VALUE_TAGS, *_GROUPS),
)


@dataclass(frozen=True)
class DicomOptions:
    """How grey is shown.

    Attributes:
        window: "auto" as the file says (lookup table, else its first window, else the full range);
            "none" the full range; a name of `WINDOWS`, or "CENTRE/WIDTH", in modality values.

    Raises:
        DataError: Another window.
    """

    window: str = "auto"

    def __post_init__(self) -> None:
        if self.window not in ("auto", "none"):
            _ = self.fixed

    @property
    def fixed(self) -> tuple[float, float] | None:
        """Centre and width, where they do not depend on the file."""
        if self.window in ("auto", "none"):
            return None
        if self.window in WINDOWS:
            return WINDOWS[self.window]
        try:
            centre, width = (float(part) for part in self.window.split("/"))
        except ValueError:
            centre = width = 0.0
        if not (width >= 1 and np.isfinite(centre) and np.isfinite(width)):
            raise DataError(
                f"window={self.window} expected auto, none, {', '.join(WINDOWS)} or CENTRE/WIDTH",
                'for example window = "40/400": 400 Hounsfield units wide around 40',
            )
        return centre, width


AS_THE_FILE_SAYS = DicomOptions()


def read_frame(path: Path, frame: int = 0, options: DicomOptions | None = None) -> Pixels:
    """Reads one image of a DICOM file.

    Args:
        path: The file.
        frame: Position of the image, from 0.
        options: How grey is shown; None means as the file says.

    Returns:
        uint8 or uint16, (h, w) grey, or uint8, (h, w, 3) RGB.

    Raises:
        DataError: No DICOM file, no such frame, no decoder for its transfer syntax, or damage.
    """
    options = options or AS_THE_FILE_SAYS
    require_file(path)
    with quiet(), np.errstate(all="ignore"):
        try:
            with path.open("rb") as file:
                header = open_header(file, _TAGS)
                _require_image(header, frame)
                stored = _stored(file, header, frame)
        except OSError:
            raise DataError("file cannot be read", _HINT) from None
        try:
            _settle_frame(header, frame)
            if header.PhotometricInterpretation in _GREY:
                by_file = options.window == "auto"
                return show_grey(stored, header, options.fixed, by_file=by_file)
            return show_colour(stored, header)
        except DataError:
            raise
        except Exception:  # errors of pydicom quote what they read
            raise DataError(DAMAGED_VALUES, _HINT) from None


def _require_image(header: FileDataset, frame: int) -> None:
    if reason := missing_image(header):
        raise DataError(reason, _HINT)
    if reason := missing_decoder(header):
        raise DataError(reason, "have the archive send an uncompressed copy")
    try:
        size = header.Rows * header.Columns
        frames = int(header.get("NumberOfFrames") or 1)
        kind, samples = str(header.PhotometricInterpretation), int(header.SamplesPerPixel)
        bits = int(header.get("BitsStored") or header.BitsAllocated)
        high = int(header.HighBit) if header.get("HighBit") is not None else bits - 1
    except Exception:
        raise DataError(DAMAGED_HEADER, _HINT) from None
    # PS3.5 8.1.1; older writers did otherwise, and nothing here would shift them.
    if high != bits - 1 and not header.file_meta.TransferSyntaxUID.is_encapsulated:
        raise DataError(HIGH_BITS, "have the archive send a copy by the current standard")
    if size > MAX_PIXELS:
        raise DataError(TOO_LARGE, _HINT)
    if not 0 <= frame < frames:
        raise DataError(NO_SUCH_FRAME, "the file has changed, or its header is damaged")
    expected = {1: (*_GREY, _PALETTE), 3: _COLOURS}
    # pydicom's conversion from YBR knows 8 bits alone.
    if kind not in expected.get(samples, ()) or (kind in _YBR and bits != 8):
        raise DataError(UNKNOWN_COLOUR, "have the archive send RGB or grey")


def _stored(file: BinaryIO, header: FileDataset, frame: int) -> npt.NDArray[Any]:
    """Decode one frame: signed where the header says so, YBR turned into RGB."""
    syntax = header.file_meta.TransferSyntaxUID
    try:
        if _is_in_place(file, syntax):
            if contradicts(file, header, frame):
                raise ValueError("size")
            stored = pixel_array(file, index=frame, transfer_syntax_uid=syntax)
        else:
            file.seek(0)
            whole = dcmread(file, force=True)
            whole.file_meta.TransferSyntaxUID = syntax
            stored = pixel_array(whole, index=frame)
    except Exception:  # decoders raise anything
        raise DataError(DAMAGED_PIXELS, _HINT) from None
    shape = (header.Rows, header.Columns) + ((3,) if header.SamplesPerPixel == 3 else ())
    if stored.shape != shape or 0 in shape:
        raise DataError(DAMAGED_PIXELS, _HINT)
    return stored.astype(stored.dtype.newbyteorder("="), copy=False)


def _is_in_place(file: BinaryIO, syntax: UID) -> bool:
    """Tell whether one frame can be read where it lies; leaves the file where it is.

    It cannot in a deflated file, nor where elements are encoded otherwise than declared: pydicom
    then reads the data set as a whole.
    """
    element = file.read(6)  # tag, and VR where it is explicit
    file.seek(-len(element), 1)
    return len(element) == 6 and (element[4:] in _PIXEL_VRS) != syntax.is_implicit_VR


def _settle_frame(header: FileDataset, frame: int) -> None:
    """Brings an enhanced object's values for this frame to where a classic one has them."""
    for name in _GROUPS:
        groups = header.get(name) or []
        position = frame if name.startswith("PerFrame") else 0
        if position >= len(groups):
            continue
        for sequence, tags in (
            ("PixelValueTransformationSequence", RESCALE),
            ("FrameVOILUTSequence", WINDOW),
        ):
            for item in (groups[position].get(sequence) or [])[:1]:
                for tag in tags:
                    if item.get(tag) is not None:
                        header[tag] = item[tag]
