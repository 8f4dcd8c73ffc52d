"""One picture file to pixels: PNG, JPEG, BMP, TIFF, WebP, by content and whatever the name says.

What comes out is what a viewer shows: palettes and CMYK become RGB, an orientation noted by a
camera (EXIF) is applied, transparency is dropped (the published loaders do so too, and the RGBA
files of PAD-UFES-20 are opaque). Grey of 16 bits keeps them; RGB of 16 bits comes as 8, as Pillow
reads it. Of several pages or animation frames the first is used. White is the highest value, also
where a TIFF says that its white is zero: Pillow turns 8 bits round itself, and 16 are turned here.

Invariant: `read_picture` returns sound pixels or raises a `DataError` whose text is one of a few
reasons: it names no file, so that reasons can be counted and logged.
"""

from __future__ import annotations

import stat
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from strategies.errors import DataError

Pixels = npt.NDArray[np.uint8 | np.uint16]

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
# The largest mammograms have 15 million. A small file may claim far more than memory holds.
MAX_PIXELS = 100_000_000
# A tag of TIFF 6.0, section 8, and its value for inverted grey.
PHOTOMETRIC_INTERPRETATION, WHITE_IS_ZERO = 262, 0

EMPTY = "empty file"
IRREGULAR = "not a regular file"
UNKNOWN = f"not a picture ({', '.join(FORMATS)})"
DAMAGED = "truncated or damaged picture"
NO_MEMORY = "picture needs more memory than there is"
TOO_LARGE = f"picture of more than {MAX_PIXELS // 1_000_000} million pixels"

_HINT = "remove or replace the file"


def read_picture(path: Path) -> Pixels:
    """Reads one picture.

    Args:
        path: The file; its name's ending does not matter.

    Returns:
        uint8 or uint16, (h, w) grey or (h, w, 3) RGB. 0 is taken for black and the type's highest
        value for white: nothing in a picture tells that 12 bits were put into 16, and such a one
        stays dark.

    Raises:
        DataError: The file cannot be opened, is empty, no picture, damaged, too large, or of a kind
            of pixels (floating point, 32-bit) whose black and white nobody knows.
    """
    require_file(path)
    try:
        with warnings.catch_warnings(), path.open("rb") as file:
            # Pillow warns of oddities that do not keep it from decoding.
            warnings.simplefilter("ignore")
            return _decode(file)
    except DataError:
        raise
    except MemoryError as error:
        raise DataError(NO_MEMORY, _HINT) from error
    except Exception as error:  # a damaged file makes a decoder raise anything
        raise DataError(DAMAGED, _HINT) from error


def require_file(path: Path) -> None:
    """Refuses what is no file with content, before a decoder waits for a pipe.

    Raises:
        DataError: It cannot be opened (a loop of links, no permission), is no file, or is empty.
    """
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode):
            path.open("rb").close()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "impossible name"
        raise DataError(
            f"file cannot be opened ({reason})", "check the file and who may read it"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise DataError(IRREGULAR, _HINT)
    if not status.st_size:
        raise DataError(EMPTY, _HINT)


def _decode(file: object) -> Pixels:
    try:
        image = Image.open(file, formats=FORMATS)  # pyright: ignore[reportArgumentType]
    except Image.DecompressionBombError as error:
        raise DataError(TOO_LARGE, _HINT) from error
    except Image.UnidentifiedImageError as error:
        raise DataError(UNKNOWN, _HINT) from error
    with image:
        if image.width * image.height > MAX_PIXELS:
            raise DataError(TOO_LARGE, _HINT)
        image.load()
        pixels = _pixels(_upright(image))
        # Asked of the file: an image that was turned upright has no tags.
        return 65535 - pixels if _is_inverted(image) else pixels


def _is_inverted(image: Image.Image) -> bool:
    """Whether 0 is white and Pillow left it so, which it does with 16 bits of grey alone."""
    tags = getattr(image, "tag_v2", {})
    return image.mode.startswith("I;16") and tags.get(PHOTOMETRIC_INTERPRETATION) == WHITE_IS_ZERO


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF tells no orientation; the pixels are there all the same
        return image


def _pixels(image: Image.Image) -> Pixels:
    mode = image.mode
    if mode == "F" or (mode == "I" and not _fits_16_bits(image)):
        raise DataError(
            f"picture with {'floating-point' if mode == 'F' else '32-bit'} pixels", _HINT
        )
    if mode == "I" or mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if mode in ("1", "L", "LA", "La"):
        return np.asarray(image.convert("L"))
    if mode == "P" and image.palette is not None and image.palette.mode == "L":
        return np.asarray(image.convert("L"))
    return np.asarray(image.convert("RGB"))


def _fits_16_bits(image: Image.Image) -> bool:
    low, high = image.getextrema()
    return low >= 0 and high <= 65535  # pyright: ignore[reportOperatorIssue]
