"""From stored values of a DICOM frame to what a viewer shows.

In the order of PS3.3 C.11 and PS3.4 N.2: stored values, modality values (rescale or lookup table,
Hounsfield units for CT), values of interest (lookup table before window), MONOCHROME1 turned so
that larger is brighter. Pixels that the file calls padding take no part and end black. A lookup
table is applied to each of its entries by pydicom, and to the image as an index.

Invariant: black is 0 and white the type's largest value; grey is rounded once, at the end. Damaged
attributes raise whatever they raise: `dicom.read_frame` turns that into a reason.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from pydicom.dataset import Dataset, FileDataset
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi,
    apply_windowing,
)

from client.data.pictures import Pixels
from strategies.errors import DataError

# Lower values of a CT mean "outside the reconstruction", whether the file says so or not.
LOWEST_HOUNSFIELD = -1024.0

DAMAGED_VALUES = "rescale, window or lookup table damaged"
LARGE_PALETTE = "palette of more than 256 colours of 8 bits is not read"

RESCALE = ("RescaleSlope", "RescaleIntercept")
WINDOW = ("WindowCenter", "WindowWidth", "VOILUTFunction")
PALETTE = tuple(
    f"{kind}{colour}PaletteColorLookupTable{part}"
    for colour in ("Red", "Green", "Blue")
    for kind, part in (("", "Descriptor"), ("", "Data"), ("Segmented", "Data"))
)
# Of the header, what is used here beside rows and columns.
VALUE_TAGS = (
    *("Modality", "PhotometricInterpretation", "BitsAllocated", "BitsStored", "HighBit"),
    *("PixelRepresentation", "PixelPaddingValue", "PixelPaddingRangeLimit"),
    *("ModalityLUTSequence", "VOILUTSequence", *RESCALE, *WINDOW, *PALETTE),
)

Stored = npt.NDArray[Any]
Values = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


def show_grey(
    stored: Stored, header: Dataset, fixed: tuple[float, float] | None, *, by_file: bool
) -> Pixels:
    """Shows grey.

    Args:
        stored: (h, w), integers or floating point.
        header: Of the file, for this frame.
        fixed: Centre and width of a window in modality values, instead of the file's.
        by_file: Without a fixed window: use the file's lookup table or window if it has one.

    Returns:
        (h, w), uint8 where the file stores up to 8 bits, otherwise uint16.
    """
    bits = int(header.get("BitsStored") or header.BitsAllocated)
    values = _modality(stored, header)
    masked = _padding(stored, header) | ~np.isfinite(values)
    values[masked] = 0.0
    shown = None
    if fixed:
        shown = _windowed(values, *fixed)
    elif by_file:
        shown = _voi_table(values, header)
        shown = _voi_window(values, header) if shown is None else shown
    if shown is None:
        low, high = _full_range(stored, values, masked, header, bits)
        shown = (
            np.clip((values - low) / (high - low), 0, 1) if high > low else np.zeros_like(values)
        )
    if header.PhotometricInterpretation == "MONOCHROME1":
        shown = 1.0 - shown
    shown[masked] = 0.0
    if bits <= 8:
        return np.rint(shown * 255).astype(np.uint8)
    return np.rint(shown * 65535).astype(np.uint16)


def _padding(stored: Stored, header: Dataset) -> Mask:
    """Marks padding: one stored value, or all from it to a limit (PS3.3 C.7.5.1.1.2)."""
    ends = [header.get(name) for name in ("PixelPaddingValue", "PixelPaddingRangeLimit")]
    ends = [end for end in ends if end is not None]
    if not ends or stored.dtype.kind not in "iu":
        return np.zeros(stored.shape, np.bool_)
    # Some machines write -2000 as the unsigned 63536, or the reverse.
    ends = np.sort(np.array(ends[:2], np.int64).astype(stored.dtype))
    low, high = ends[0], ends[-1]
    # -2000 to 0 is then 63536 to 0, round the end of the type; no padding is most of a type.
    if 2 * (int(high) - int(low)) > 256**stored.dtype.itemsize:
        return (stored >= high) | (stored <= low)
    return (stored >= low) & (stored <= high)


def _modality(stored: Stored, header: Dataset) -> Values:
    if header.get("ModalityLUTSequence"):
        first, last = _span(header.ModalityLUTSequence[0], "LUTDescriptor", stored)
        table = apply_modality_lut(np.arange(first, last + 1, dtype=np.int32), header)
        return table[np.clip(stored.astype(np.int64), first, last) - first].astype(np.float64)
    values = stored.astype(np.float64)
    slope, intercept = (header.get(name) for name in RESCALE)
    slope = 1.0 if slope is None else float(slope)
    intercept = 0.0 if intercept is None else float(intercept)
    if not (slope and np.isfinite(slope) and np.isfinite(intercept)):
        raise DataError(DAMAGED_VALUES, "remove or replace the file")
    return values if (slope, intercept) == (1.0, 0.0) else values * slope + intercept


def _span(item: Dataset, keyword: str, values: npt.NDArray[Any]) -> tuple[int, int]:
    """First and last value that a lookup table maps; PS3.3 C.11.1.1: 0 entries mean 65536."""
    entries, first, bits = (int(part) for part in item[keyword].value)
    if first > 32767 and (values.min() < 0 or values.max() < first):
        first -= 65536  # it was read as unsigned, because the stored values are
        item[keyword].value = [entries, first, bits]  # pydicom looks there
    return first, first + (entries or 65536) - 1


def _voi_table(values: Values, header: Dataset) -> Values | None:
    """Applies the file's lookup table, the first of several."""
    items = header.get("VOILUTSequence") or []
    if not items or items[0].get("LUTData") is None or items[0].get("LUTDescriptor") is None:
        return None
    first, last = _span(items[0], "LUTDescriptor", values)
    table = apply_voi(np.arange(first, last + 1, dtype=np.int32), header)
    # Descriptors that claim 16 bits for entries of 12 are common: what the entries need counts.
    top = 2 ** int(table.max()).bit_length() - 1
    return table[np.clip(np.rint(values), first, last).astype(np.int64) - first] / max(top, 1)


def _voi_window(values: Values, header: Dataset) -> Values | None:
    """Applies the file's first window; one that cannot be drawn counts as none."""
    try:
        centre, width = (float(np.atleast_1d(header.get(name))[0]) for name in WINDOW[:2])
    except (TypeError, ValueError, IndexError):
        return None
    function = str(header.get("VOILUTFunction") or "LINEAR").upper()
    if function not in ("LINEAR", "LINEAR_EXACT", "SIGMOID"):
        function = "LINEAR"
    smallest = 1.0 if function == "LINEAR" else np.finfo(np.float32).tiny
    if not (np.isfinite(centre) and np.isfinite(width) and width >= smallest):
        return None
    return _windowed(values, centre, width, function)


def _windowed(values: Values, centre: float, width: float, function: str = "LINEAR") -> Values:
    """Applies a window to modality values; 0 is black, 1 is white."""
    view = Dataset()
    # pydicom spreads a window over the range of the stored bits: 16 unsigned ones give 0 to 65535.
    view.PhotometricInterpretation, view.BitsStored, view.PixelRepresentation = "MONOCHROME2", 16, 0
    view.WindowCenter, view.WindowWidth, view.VOILUTFunction = centre, width, function
    return np.clip(apply_windowing(values, view) / 65535.0, 0, 1)


def _full_range(
    stored: Stored, values: Values, masked: Mask, header: Dataset, bits: int
) -> tuple[float, float]:
    """What is black and white where no window says so.

    Up to 8 bits it is what the bits hold, as such images were made to be looked at; above, it is
    what this image holds, because few use all 16.
    """
    if bits <= 8 and stored.dtype.kind in "iu":
        low = -(2 ** (bits - 1)) if stored.dtype.kind == "i" else 0
        ends = _modality(np.array([low, low + 2**bits - 1], stored.dtype), header)
        return float(ends.min()), float(ends.max())
    if masked.all():
        return 0.0, 0.0
    low, high = float(values[~masked].min()), float(values[~masked].max())
    hounsfield = header.get("Modality") == "CT" and header.get("RescaleIntercept") is not None
    return (max(low, LOWEST_HOUNSFIELD) if hounsfield else low), high


def show_colour(stored: Stored, header: FileDataset) -> npt.NDArray[np.uint8]:
    """Shows colour.

    Args:
        stored: (h, w, 3) RGB, or (h, w) places in a palette.
        header: Of the file.

    Returns:
        (h, w, 3) RGB.

    Raises:
        DataError: A palette that pydicom would apply wrongly.
    """
    bits = int(header.BitsStored)
    if header.PhotometricInterpretation == "PALETTE COLOR":
        first, last = _span(header, PALETTE[0], stored)
        table = apply_color_lut(np.arange(first, last + 1, dtype=np.int32), header)[:, :3]
        if table.dtype == np.uint8 and len(table) > 256:
            raise DataError(LARGE_PALETTE, "have the archive send RGB")
        if table.dtype == np.uint16 and not header.file_meta.TransferSyntaxUID.is_little_endian:
            table = table.byteswap()
        # Old machines declare 16 bits and write 8.
        bits = 16 if table.max() > 255 else 8
        stored = table[np.clip(stored.astype(np.int64), first, last) - first]
    if bits == 8:
        return stored.astype(np.uint8)
    return np.rint(stored * (255 / (2**bits - 1))).astype(np.uint8)
