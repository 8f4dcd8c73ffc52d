"""npz files: honest ones, and those that no honest program writes."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

COUNTS = {"train": 6, "val": 3, "test": 2}


def arrays(*, rgb: bool = False, flat_labels: bool = False) -> dict[str, np.ndarray]:
    """Six arrays of small random images of two classes."""
    rng = np.random.default_rng(0)
    found = {}
    for split, count in COUNTS.items():
        shape = (count, 8, 8, 3) if rgb else (count, 8, 8)
        found[f"{split}_images"] = rng.integers(0, 256, shape, dtype=np.uint8)
        labels = (np.arange(count) % 2).astype(np.uint8)
        found[f"{split}_labels"] = labels if flat_labels else labels[:, None]
    return found


def member(array: np.ndarray, **header: Any) -> bytes:
    """An array as a .npy file whose header may say something else."""
    buffer = io.BytesIO()
    said = {"descr": npy.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
    npy.write_array_header_1_0(buffer, {**said, **header})
    return buffer.getvalue() + array.tobytes()


def write_members(
    path: Path,
    contents: Mapping[str, np.ndarray | bytes],
    *,
    announced: Mapping[str, int] | None = None,
    method: int = zipfile.ZIP_DEFLATED,
) -> Path:
    """Write an npz file of arrays, or of bytes in their place.

    Args:
        path: The file.
        contents: By key.
        announced: What the archive says a member holds unpacked, where that is not so.
        method: Compression.
    """
    with zipfile.ZipFile(path, "w", method) as archive:
        for key, value in contents.items():
            archive.writestr(f"{key}.npy", value if isinstance(value, bytes) else member(value))
        for key, size in (announced or {}).items():
            archive.getinfo(f"{key}.npy").file_size = size
    return path
