"""An npz file of any size goes into the cache image by image, whole or not at all."""

import os
import signal
import subprocess
import sys
import time
import zipfile

import numpy as np
import pytest

from client.data import npz as npz_module
from client.data.manifest import ImageDataset
from client.data.npz import KEYS, identified, read_npz_layout
from client.data.npz_members import MAX_HEADER_BYTES
from fakes.npz_files import arrays, member, write_members
from strategies.errors import DataError

IMAGE_BYTES, IMAGES_BYTES = 8 * 8, 6 * 8 * 8
HEADER = 128
ANNOUNCED = HEADER + IMAGES_BYTES


def read(path) -> ImageDataset:
    return read_npz_layout(
        identified(path), dataset="toy", classes=("a", "b"), cache_dir=path.parent / "cache"
    )


def refused(path) -> str:
    """The one line that a file is refused with; what it leaves behind is nothing."""
    with pytest.raises(DataError) as error:
        read(path)
    assert "\n" not in str(error.value)
    assert str(path.parent) not in str(error.value)
    assert left_behind(path) == []
    return str(error.value)


def left_behind(path) -> list[str]:
    folder = path.parent / "cache"
    return [p.name for p in folder.iterdir() if p.suffix != ".lock"] if folder.exists() else []


def stored(data: ImageDataset) -> np.ndarray:
    return data.images.cache.read(data.images.rows)[:, 0]


def test_the_file_is_unpacked_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path = write_members(tmp_path / "toy.npz", arrays())
    first = read(path)
    monkeypatch.setattr(npz_module, "items", None)
    again = read(path)
    assert again.manifest == first.manifest
    assert np.array_equal(stored(again), stored(first))
    monkeypatch.undo()
    changed = arrays()
    changed["val_images"] = 255 - changed["val_images"]
    write_members(path, changed)
    assert np.array_equal(stored(read(path))[6:9], changed["val_images"])
    assert len(left_behind(path)) == 1
    # Who had the images open goes on with them.
    assert np.array_equal(stored(first)[6:9], arrays()["val_images"])


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_no_more_than_an_image_is_asked_for_at_a_time(tmp_path, monkeypatch, method):
    path = write_members(tmp_path / "toy.npz", arrays(), method=method)
    asked: list[int] = []
    whole = zipfile.ZipExtFile.read

    def counting(self, n=-1):
        asked.append(n if n is not None and n >= 0 else 2**60)
        return whole(self, n)

    monkeypatch.setattr(zipfile.ZipExtFile, "read", counting)
    read(path)
    assert asked.count(IMAGE_BYTES) == 11
    assert max(asked) < MAX_HEADER_BYTES
    assert max(size for size in asked if size > IMAGE_BYTES) <= HEADER


GROWTH = """
import re, sys
from pathlib import Path
from client.data.npz import identified, read_npz_layout

def peak_mib():
    return int(re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

before, path = peak_mib(), Path(sys.argv[1])
data = read_npz_layout(
    identified(path), dataset="toy", classes=("a", "b"), cache_dir=path.parent / "cache"
)
print(len(data), peak_mib() - before)
"""


def test_memory_does_not_grow_with_the_file(tmp_path):
    count, side = 600, 224  # 86 MiB
    few = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    contents = {key: array[:0] for key, array in arrays(rgb=True).items()}
    empty = np.zeros((0, side, side, 3), np.uint8)
    contents |= {f"{split}_images": empty for split in ("val", "test")}
    contents["train_labels"] = np.arange(count) % 2
    path = tmp_path / "large.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for key in KEYS[1:]:
            archive.writestr(f"{key}.npy", member(contents[key]))
        with archive.open("train_images.npy", "w") as file:
            file.write(member(empty, shape=(count, side, side, 3)))
            for i in range(count):
                file.write(np.roll(few, i, axis=0).tobytes())
    command = [sys.executable, "-c", GROWTH, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    read_images, grown = done.stdout.split()
    assert int(read_images) == count
    assert float(grown) < 32


STOPPED = """
import itertools, sys, time
from pathlib import Path
from client.data import npz

items = npz.items

def slow(archive, member):
    yield from itertools.islice(items(archive, member), 3)
    print("half", flush=True)
    time.sleep(600)

npz.items = slow
path = Path(sys.argv[1])
npz.read_npz_layout(
    npz.identified(path), dataset="toy", classes=("a", "b"), cache_dir=path.parent / "cache"
)
"""


def test_what_a_killed_process_left_is_made_anew(tmp_path):
    path = write_members(tmp_path / "toy.npz", arrays())
    command = [sys.executable, "-c", STOPPED, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    (half,) = left_behind(path)
    assert half.endswith(".part")
    expected = np.concatenate([arrays()[key] for key in KEYS if key.endswith("images")])
    assert np.array_equal(stored(read(path)), expected)
    (name,) = left_behind(path)
    assert name.endswith(".images")


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = write_members(tmp_path / "toy.npz", arrays())
    items = npz_module.items

    def meddling(archive, found):
        for image in items(archive, found):
            yield image
            os.utime(path, ns=(time.time_ns(), time.time_ns()))

    monkeypatch.setattr(npz_module, "items", meddling)
    assert refused(path) == "file=toy.npz cannot be read: file changed while it was read"
    monkeypatch.undo()
    assert len(read(path)) == 11


@pytest.mark.parametrize("way", ["replaced", "removed"])
def test_a_file_that_changes_after_its_md5_was_taken_is_refused(tmp_path, way):
    path = write_members(tmp_path / "toy.npz", arrays())
    file = identified(path)
    other = write_members(tmp_path / "other.npz", arrays(flat_labels=True))
    other.replace(path)
    if way == "removed":
        path.unlink()
    with pytest.raises(DataError, match=r"toy\.npz cannot be read: (file changed|No such file)"):
        read_npz_layout(file, dataset="toy", classes=("a", "b"), cache_dir=tmp_path / "cache")
    assert left_behind(path) == []


IMAGES = arrays()["train_images"]


@pytest.mark.parametrize(
    ("value", "announced", "message"),
    [
        (member(IMAGES, shape=(2**40, 8, 8)), None, "fill the 384 bytes"),
        (member(IMAGES, shape=(2**40, 8, 8)), HEADER + 2**46, "expected at most 16777216 images"),
        (member(IMAGES, shape=(6, 2**20, 2**20)), HEADER + 6 * 2**40, "at most 100000000 pixels"),
        (member(IMAGES, shape=(2**70, 8, 8)), None, "fill the 384 bytes"),
        (member(IMAGES, shape=(10**2000, 10**2000, 10**2000)), None, "fill the 384 bytes"),
        (member(IMAGES, shape=(-6, -8, 8)), None, "fill the 384 bytes"),
        (member(IMAGES, shape=(5, 8, 8)), None, r"\(5, 8, 8\) expected to fill the 384 bytes"),
        (member(IMAGES, shape=(7, 8, 8)), None, r"\(7, 8, 8\) expected to fill the 384 bytes"),
        # A stream that unpacks to more or to less than both headers say.
        (member(IMAGES) + bytes(2**25), ANNOUNCED, "train_images: Bad CRC-32"),
        (member(IMAGES)[:-9], ANNOUNCED, "train_images: the data end early"),
        (member(IMAGES)[:60], ANNOUNCED, "train_images: expected an array of numpy's format"),
        (member(IMAGES, fortran_order=True), None, "train_images=uint8.* is in Fortran order"),
        (member(IMAGES, descr="|O"), None, "train_images=object.* expected uint8"),
        (member(IMAGES, descr=[("a", "u1")]), None, "expected uint8"),
        (member(IMAGES, shape="(6, 8, 8)"), None, "expected an array of numpy's format"),
        (member(IMAGES, shape=(6, 8.0, 8)), None, "expected an array of numpy's format"),
        (member(IMAGES).replace(b"(6, 8, 8)", b"(6, 8, 8 "), None, "expected an array of numpy's"),
        (member(IMAGES).replace(b"NUMPY\1", b"NUMPY\2"), None, "expected an array of numpy's"),
        (b"\x93NUMPY\2\0\xff\xff\xff\xff" + bytes(2**25), None, "expected an array of numpy's"),
        (b"", None, "train_images: expected an array of numpy's format"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, value, announced, message):
    sizes = {} if announced is None else {"train_images": announced}
    path = write_members(tmp_path / "toy.npz", arrays() | {"train_images": value}, announced=sizes)
    with pytest.raises(DataError, match=message):
        raise DataError(refused(path))


def test_labels_that_lie_are_refused_unread(tmp_path):
    labels = member(arrays()["train_labels"], shape=(2**33,))
    sizes = {"train_labels": HEADER + 2**33}
    path = write_members(tmp_path / "toy.npz", arrays() | {"train_labels": labels}, announced=sizes)
    assert r"train_labels=uint8(8589934592,) expected (6,) or (6, 1)" in refused(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compression_whose_pieces_have_no_bound_is_refused(tmp_path, method):
    path = write_members(tmp_path / "toy.npz", arrays(), method=method)
    assert f"train_images compression={method} expected stored or deflated" in refused(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("key", KEYS)
def test_a_damaged_member_is_named(tmp_path, method, key):
    path = write_members(tmp_path / "toy.npz", arrays(), method=method)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(f"{key}.npy")
    content = bytearray(path.read_bytes())
    content[info.header_offset + 30 + len(info.filename) + info.compress_size // 2] ^= 255
    path.write_bytes(content)
    assert f"file=toy.npz cannot be read: {key}: " in refused(path)


def test_a_disk_without_room_is_told_before_anything_is_unpacked(tmp_path, monkeypatch):
    path = write_members(tmp_path / "toy.npz", arrays())
    monkeypatch.setattr("client.data.cache.RESERVE_BYTES", 2**60)
    monkeypatch.setattr(npz_module, "items", None)
    assert "image cache needs 0 MiB" in refused(path)
