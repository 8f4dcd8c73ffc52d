"""Images of one file that were brought, at the size they are stored in, into a mapped cache.

`StoredImages` stands where `images.FileImages` does for files of their own. A model of the stored
size reads that cache itself; one of another size has its own, made from it.

Invariant: memory does not grow with the number of images, and nothing is read from the file that
the images came from.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from client.data.cache import ImageCache, cache_key, open_cache
from client.data.images import DECODERS, PreparedImages, Shape, fit
from client.data.manifest import IntArray
from client.data.pictures import Pixels
from strategies import cli


@dataclass(frozen=True, eq=False)
class StoredImages:
    """8-bit images of one size, by row.

    Attributes:
        cache: All images of the data set, at their own size; subsets share it.
        rows: Which of them these are.
    """

    cache: ImageCache
    rows: IntArray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Sequence[int] | IntArray) -> StoredImages:
        """Some of these images, in the order given."""
        return replace(self, rows=self.rows[np.asarray(rows, dtype=np.int64)])

    @property
    def extent(self) -> tuple[int, int, bool]:
        """Height, width, and whether they are RGB."""
        _, channels, height, width = self.cache.pixels.shape
        return height, width, channels == 3

    def cache_bytes(self, image_size: int) -> int:
        """How much a model of this size adds to the disk."""
        num_images, channels, *size = self.cache.pixels.shape
        return 0 if size == [image_size] * 2 else num_images * channels * image_size**2

    def prepared(
        self,
        image_size: int,
        in_channels: int,
        small_images: Literal["resize", "pad"] = "resize",
        *,
        check: Callable[[], object] = lambda: None,
    ) -> PreparedImages:
        """Opens these images at a model's size; the first time, fits all of the data set to it.

        Arguments and errors are those of `FileImages.prepared`.
        """
        from client.data.transforms import require_fit

        require_fit(self, image_size, in_channels, small_images)
        num_images, channels, height, width = self.cache.pixels.shape
        if (height, width) == (image_size, image_size):
            return PreparedImages(self.cache, self.rows, in_channels)
        shape = Shape(image_size, channels, small_images, bits=8)
        slot, _, content = self.cache.path.stem.partition("-")
        cache = open_cache(
            self.cache.path.parent,
            slot=cache_key((slot, shape, DECODERS)),
            content=cache_key((content, shape, DECODERS)),
            shape=(num_images, channels, image_size, image_size),
            dtype=np.dtype(np.uint8),
            fill=lambda: self._fitted(shape, check),
        )
        return PreparedImages(cache, self.rows, in_channels)

    def _fitted(self, shape: Shape, check: Callable[[], object]) -> Generator[tuple[int, Pixels]]:
        with cli.progress() as progress:
            rows = range(len(self.cache.pixels))
            for row in progress.track(rows, description="preparing images"):
                check()
                image = self.cache.read(np.array([row]))[0]  # (1 or 3, h, w)
                yield row, fit(image[0] if len(image) == 1 else np.moveaxis(image, 0, 2), shape)
