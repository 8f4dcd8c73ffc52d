"""How many pixels a compressed frame claims, before a decoder believes it.

Two damaged bytes can make 4 gigapixels of a thumbnail; a decoder then works for seconds and asks
for gigabytes. Only the first marker segments are read. Sources: ITU-T T.81 B.2.2 (JPEG), T.87 C.2.2
(JPEG-LS), T.800 A.5.1 (JPEG 2000).
"""

from __future__ import annotations

import struct
from typing import BinaryIO

from pydicom.dataset import FileDataset
from pydicom.encaps import get_frame

JPEG_START = b"\xff\xd8"
JPEG_2000_START = b"\xff\x4f\xff\x51"
# Where a JP2 file's boxes, which have no place here and occur, may push the codestream.
WITHIN = 512
# Start of frame of JPEG (T.81 table B.1, but for the three that are other segments) and JPEG-LS.
FRAME_MARKERS = {*range(0xC0, 0xD0), 0xF7} - {0xC4, 0xC8, 0xCC}


def claimed_size(codestream: bytes) -> tuple[int, int] | None:
    """Return height and width by a codestream's own header; None where it does not tell.

    >>> claimed_size(bytes.fromhex("ffd8 ffc0 000b 08 0010 0020 01"))
    (16, 32)
    """
    try:
        if codestream.startswith(JPEG_START):
            place = len(JPEG_START)
            while codestream[place] == 0xFF:
                marker, length = codestream[place + 1], 0
                if marker != 0xFF:  # a byte of filling
                    (length,) = struct.unpack_from(">H", codestream, place + 2)
                if marker in FRAME_MARKERS:
                    height, width = struct.unpack_from(">HH", codestream, place + 5)
                    return height, width
                place += 2 + length if length else 1
            return None
        start = codestream.find(JPEG_2000_START, 0, WITHIN)
        if start < 0:
            return None
        right, bottom, left, top = struct.unpack_from(">IIII", codestream, start + 8)
        return bottom - top, right - left
    except (IndexError, struct.error):
        return None


def contradicts(file: BinaryIO, header: FileDataset, frame: int) -> bool:
    """Tell whether a frame claims another size than the file's header.

    Args:
        file: Positioned at the pixel data's element, as reading a header leaves it.
        header: Of the file.
        frame: Position of the frame.
    """
    if not header.file_meta.TransferSyntaxUID.is_encapsulated:
        return False
    try:
        file.seek(12, 1)  # tag, VR and undefined length
        frames = int(header.get("NumberOfFrames") or 1)
        size = claimed_size(get_frame(file, frame, number_of_frames=frames))
    except Exception:  # the decoder will say so
        return False
    # A height of 0 is told later in the stream (T.81 B.2.5).
    return size is not None and size[0] != 0 and size != (header.Rows, header.Columns)
