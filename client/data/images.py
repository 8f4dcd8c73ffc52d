"""Images that stay in their files until a model's input size is known.

`FileImages` stands where an array of images would: it is dealt out by rows, and `prepared` gives
batches at the model's size from a memory-mapped cache (`cache.py`) that is written once. Each file
is decoded twice in its life: once when the manifest is built (`look`), and once per input size.

Invariant: what is served is what the manifest describes. A file that has changed since is refused,
and a cache belongs to the content it was made from, not to file names.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from client.data.cache import ImageCache, cache_key, open_cache
from client.data.duplicates import pixel_hash
from client.data.manifest import IntArray
from client.data.pictures import Pixels, read_picture, require_file
from client.data.rows import Kind, reasons
from client.data.workers import in_workers, num_workers
from strategies import cli
from strategies.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

# Part of every cache's key: raise it when other pixels come out of the same file.
DECODERS = 2

CRASHED = "decoder crashed"
CHANGED = "file changed while it was read"

READ_CHUNK_BYTES = 1 << 20


class Facts(NamedTuple):
    """What decoding an image tells of it.

    Attributes:
        pixels: Hash of the decoded pixels, their shape and type, 32 hexadecimal digits.
        height: In pixels.
        width: In pixels.
        channels: 1 or 3; an RGB image whose channels are equal is grey.
        bits: 8 or 16 per channel.
    """

    pixels: str
    height: int
    width: int
    channels: int
    bits: int


class FileFacts(NamedTuple):
    """What reading a file tells of it.

    Attributes:
        size: In bytes.
        changed_ns: When it was last changed.
        digest: BLAKE2b of its bytes, 32 hexadecimal digits.
        frames: By position in the file: what it shows, or the reason why it cannot be decoded.
    """

    size: int
    changed_ns: int
    digest: str
    frames: dict[int, Facts | str]


class Look(NamedTuple):
    """A file to look at: everything a worker needs."""

    path: str
    kind: Kind
    frames: tuple[int, ...]
    options: object


class Frame(NamedTuple):
    """One image and the state of the file that it was found in."""

    file: str
    frame: int
    size: int
    changed_ns: int
    digest: str
    facts: Facts


class Shape(NamedTuple):
    """What a model takes, and how much of an image's depth a cache keeps."""

    image_size: int
    channels: int
    small_images: Literal["resize", "pad"]
    bits: int


class Render(NamedTuple):
    """An image to bring to a model's size: everything a worker needs."""

    root: str
    kind: Kind
    options: object
    frame: Frame
    shape: Shape


def changed_ns(status: os.stat_result) -> int:
    """Return when a file was last changed, also by a tool that keeps the time of writing."""
    return max(status.st_mtime_ns, status.st_ctime_ns)


def look(task: Look) -> FileFacts:
    """Reads and decodes a file; a reason takes the place of what cannot be had."""
    path = Path(task.path)
    try:
        require_file(path)
        before, digest = path.stat(), _digest(path)
        frames = {frame: _facts(path, task.kind, frame, task.options) for frame in task.frames}
        after = path.stat()
    except DataError as error:
        return FileFacts(0, 0, "", dict.fromkeys(task.frames, str(error)))
    except OSError as error:
        reason = f"file cannot be read ({error.strerror})"
        return FileFacts(0, 0, "", dict.fromkeys(task.frames, reason))
    if (before.st_size, changed_ns(before)) != (after.st_size, changed_ns(after)):
        return FileFacts(0, 0, "", dict.fromkeys(task.frames, CHANGED))
    return FileFacts(before.st_size, changed_ns(before), digest, frames)


def decode(path: Path, kind: Kind, frame: int, options: object) -> Pixels:
    """Decodes one image.

    Returns:
        uint8 or uint16, (h, w), or (h, w, 3) where the channels differ.

    Raises:
        DataError: It cannot be decoded; the text is a reason without the file's name.
    """
    try:
        if kind == "picture":
            pixels = read_picture(path)
        else:
            from client.data.dicom import read_frame  # pydicom only where there is DICOM

            pixels = read_frame(path, frame, options)  # pyright: ignore[reportArgumentType]
    except DataError:
        raise
    except Exception as error:  # whatever a damaged file makes a decoder do is one more reason
        raise DataError(f"decoder failed ({type(error).__name__})", "check the file") from error
    if pixels.ndim == 3 and (pixels[..., :1] == pixels[..., 1:]).all():
        return np.ascontiguousarray(pixels[..., 0])
    return np.ascontiguousarray(pixels)


def fit(pixels: Pixels, shape: Shape) -> Pixels:
    """Brings one image to a model's size.

    The filter is that of `transforms.prepare` (triangle, widened where it shrinks), by Pillow in
    float32, so that a worker needs no PyTorch; then rounded to the cache's depth.

    Args:
        pixels: From `decode`.
        shape: The size s, channels c and bits wanted.

    Returns:
        uint8 or uint16, (c, s, s).
    """
    most = np.iinfo(pixels.dtype).max
    planes = np.moveaxis(np.atleast_3d(pixels), 2, 0)  # (1 or 3, h, w)
    side, height, width = shape.image_size, *pixels.shape[:2]
    if shape.small_images == "pad":
        top, left = (side - height) // 2, (side - width) // 2
        placed = np.zeros((len(planes), side, side), np.float32)
        placed[:, top : top + height, left : left + width] = planes
    elif (height, width) == (side, side):
        placed = planes.astype(np.float32)
    else:
        placed = np.stack([_resized(plane, side) for plane in planes])
    scale = (2**shape.bits - 1) / most
    stored = np.rint(placed * scale).astype(np.uint8 if shape.bits == 8 else np.uint16)
    return np.broadcast_to(stored, (shape.channels, side, side))


def _resized(plane: npt.NDArray[np.generic], side: int) -> npt.NDArray[np.float32]:
    image = Image.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((side, side), Image.Resampling.BILINEAR))


def render(task: Render) -> Pixels | str:
    """Decodes an image and brings it to a model's size; a reason where that cannot be done."""
    frame = task.frame
    path = Path(task.root, frame.file)
    try:
        if not _unchanged(path, frame):
            return "file changed since it was first read"
        pixels = decode(path, task.kind, frame.frame, task.options)
        if not _unchanged(path, frame):
            return CHANGED
    except DataError as error:
        return str(error)
    except OSError as error:
        return f"file cannot be read ({error.strerror})"
    return fit(pixels, task.shape)


@dataclass(frozen=True, eq=False)
class FileImages:
    """Images in files, by row.

    Attributes:
        dataset: Name of the data set.
        root: Folder that the frames' files are relative to.
        kind: How the files are decoded.
        options: How DICOM becomes pixels; None for pictures.
        cache_dir: Where prepared images are kept.
        frames: All images of the data set; subsets share them, and so share one cache.
        rows: Which of them these are.
    """

    dataset: str
    root: Path
    kind: Kind
    options: object
    cache_dir: Path
    frames: tuple[Frame, ...]
    rows: IntArray

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: Sequence[int] | IntArray) -> FileImages:
        """Some of these images, in the order given."""
        return replace(self, rows=self.rows[np.asarray(rows, dtype=np.int64)])

    @property
    def extent(self) -> tuple[int, int, bool]:
        """Largest height, largest width, and whether any is RGB; over the whole data set."""
        facts = [frame.facts for frame in self.frames]
        return (
            max((f.height for f in facts), default=0),
            max((f.width for f in facts), default=0),
            any(f.channels == 3 for f in facts),
        )

    @property
    def bits(self) -> int:
        """Bits per channel that a cache keeps of each image, 8 or 16."""
        return max((frame.facts.bits for frame in self.frames), default=8)

    def cache_bytes(self, image_size: int) -> int:
        """How much a model of this size adds to the disk."""
        channels = 3 if self.extent[2] else 1
        return len(self.frames) * channels * image_size**2 * self.bits // 8

    def read(self, row: int) -> Pixels:
        """Decodes one image at its own size, as `decode` does."""
        frame = self.frames[int(self.rows[row])]
        return decode(self.root / frame.file, self.kind, frame.frame, self.options)

    def prepared(
        self,
        image_size: int,
        in_channels: int,
        small_images: Literal["resize", "pad"] = "resize",
        *,
        workers: int | None = None,
        check: Callable[[], object] = lambda: None,
    ) -> PreparedImages:
        """Opens these images at a model's size; the first time, decodes all of the data set.

        Args:
            image_size: Side s of the model input in pixels.
            in_channels: 1, or 3; grey images are repeated in all three.
            small_images: As in `transforms.prepare`.
            workers: Processes that decode; None means one a core.
            check: Called after each image; what it raises ends the work, and nothing of it stays.

        Raises:
            DataError: As `transforms.require_fit`; a file has changed or cannot be decoded any
                more; or the disk has no room.
        """
        from client.data.transforms import require_fit

        require_fit(self, image_size, in_channels, small_images)
        shape = Shape(image_size, 3 if self.extent[2] else 1, small_images, self.bits)
        slot = (self.dataset, str(self.root), self.kind, repr(self.options), shape, DECODERS)
        content = [(frame.digest, frame.frame) for frame in self.frames]
        cache = open_cache(
            self.cache_dir,
            slot=cache_key(slot),
            content=cache_key((slot, content)),
            shape=(len(self.frames), shape.channels, image_size, image_size),
            dtype=np.dtype(np.uint8 if shape.bits == 8 else np.uint16),
            fill=lambda: self._rendered(
                shape, num_workers() if workers is None else workers, check
            ),
        )
        return PreparedImages(cache, self.rows, in_channels)

    def _rendered(
        self, shape: Shape, workers: int, check: Callable[[], object]
    ) -> Generator[tuple[int, Pixels]]:
        tasks = [Render(str(self.root), self.kind, self.options, f, shape) for f in self.frames]
        failed: Counter[str] = Counter()
        with cli.progress() as progress:
            bar = progress.add_task("preparing images", total=len(tasks))
            for row, result in in_workers(render, tasks, crashed=CRASHED, workers=workers):
                progress.advance(bar)
                check()
                if isinstance(result, str):
                    failed[result] += 1
                else:
                    yield row, result
        if failed:
            raise DataError(
                f"dataset={self.dataset} images={len(tasks)} no_longer_readable={reasons(failed)}",
                "start again: changed files are read anew",
            )


@dataclass(frozen=True, eq=False)
class PreparedImages:
    """Images at a model's size, read from the cache a batch at a time.

    Attributes:
        cache: All images of the data set.
        rows: Which of them these are.
        in_channels: What the model takes.
    """

    cache: ImageCache
    rows: IntArray
    in_channels: int

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, rows: IntArray) -> Tensor:
        """Returns some images, float32 in [0, 1], shape (b, in_channels, s, s)."""
        import torch  # workers import this file and do without

        stored = self.cache.read(self.rows[rows])  # (b, 1 or 3, s, s)
        images = torch.from_numpy(stored).float().div_(np.iinfo(stored.dtype).max)
        return images.expand(-1, self.in_channels, -1, -1).contiguous()


def _facts(path: Path, kind: Kind, frame: int, options: object) -> Facts | str:
    try:
        pixels = decode(path, kind, frame, options)
    except DataError as error:
        return str(error)
    height, width = pixels.shape[:2]
    channels = 1 if pixels.ndim == 2 else 3
    return Facts(pixel_hash(pixels), height, width, channels, 8 * pixels.itemsize)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(READ_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def _unchanged(path: Path, frame: Frame) -> bool:
    status = os.stat(path)
    return (status.st_size, changed_ns(status)) == (frame.size, frame.changed_ns)
