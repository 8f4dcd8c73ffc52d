"""A folder of made pictures, and the listing that a reader would make of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from client.data.build import SplitRule, build
from client.data.manifest import ImageDataset
from client.data.rows import Listing, Row

CLASSES = ("no", "yes")


def picture(folder: Path, name: str, seed: int, shape: Sequence[int] = (20, 24, 3)) -> None:
    """Writes a PNG of noise that follows from the seed; the channels of RGB differ."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


def listing(folder: Path, count: int = 12, **columns: str) -> Listing:
    """``count`` different pictures, labels in turn; columns hold a name with ``{}`` for the row."""
    rows = []
    for i in range(count):
        name = f"{CLASSES[i % 2]}/{i:03d}.png"
        picture(folder, name, i)
        values = {column: text.format(i) for column, text in columns.items()}
        rows.append(Row(name, 0, CLASSES[i % 2], **values))
    return Listing("made", folder, CLASSES, rows)


def built(found: Listing, cache_dir: Path, **changes) -> ImageDataset:
    """The data set of a listing, decoded in this process."""
    settings = {"key": b"key", "split": SplitRule(), "dedupe": False, "site": "A", "workers": 0}
    return build(found, cache_dir=cache_dir, **{**settings, **changes})
