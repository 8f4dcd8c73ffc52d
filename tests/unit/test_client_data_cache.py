"""A cache gives back what was written, whole, once, or says that it is damaged."""

import logging
import re
import shutil
import stat
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from client.data import cache as cache_module
from client.data.cache import HEADER_BYTES, open_cache
from strategies.errors import DataError

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 3, 8, 8), dtype=np.uint8)


def opened(folder, images=IMAGES, *, content="c0", slot="s", fill=None, digest=None):
    return open_cache(
        folder,
        slot=slot,
        content=content,
        shape=images.shape,
        dtype=images.dtype,
        fill=fill or (lambda: reversed(list(enumerate(images)))),
        digest=digest,
    )


def never():
    raise AssertionError("filled again")


def files(folder):
    return sorted(path.name for path in folder.glob("*.images"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_was_written_is_read_in_any_order(tmp_path, dtype, channels):
    images = (IMAGES[:, :channels].astype(dtype) * (257 if dtype == np.uint16 else 1)).astype(dtype)
    cache = opened(tmp_path, images)
    rows = np.array([4, 0, 0, 2])
    assert cache.read(rows).dtype == dtype
    assert np.array_equal(cache.read(rows), images[rows])
    again = opened(tmp_path, images, fill=never)
    assert np.array_equal(again.read(np.arange(5)), images)


def test_a_cache_of_no_images_is_one_too(tmp_path):
    assert opened(tmp_path, IMAGES[:0]).read(np.arange(0)).shape == (0, 3, 8, 8)


def first_bytes(image) -> bytes:
    return image.tobytes()[:16]


def test_what_is_kept_beside_each_image_comes_back_without_reading_it(tmp_path):
    for fill in (None, never):
        cache = opened(tmp_path, digest=first_bytes, fill=fill)
        assert [digest.tobytes() for digest in cache.digests] == list(map(first_bytes, IMAGES))
        assert np.array_equal(cache.read(np.arange(5)), IMAGES)
    assert opened(tmp_path, slot="without").digests.shape == (5, 0)


def test_a_digest_that_changed_is_made_anew(tmp_path):
    opened(tmp_path, digest=first_bytes)
    path = next(tmp_path.glob("*.images"))
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)
    again = opened(tmp_path, digest=first_bytes)
    assert again.digests[4].tobytes() == first_bytes(IMAGES[4])


def test_what_is_handed_out_is_a_copy(tmp_path):
    cache = opened(tmp_path)
    cache.read(np.array([1]))[:] = 0
    assert np.array_equal(cache.read(np.array([1])), IMAGES[[1]])


def test_folder_and_file_are_for_their_owner_alone(tmp_path):
    folder = tmp_path / "deep" / "cache"
    opened(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(next(folder.glob("*.images")).stat().st_mode) == 0o600


def test_the_size_is_told_before_anything_is_decoded(tmp_path, caplog):
    caplog.set_level(logging.INFO)

    def fill():
        assert re.search(r"image cache images=5 size=\d+ MiB free=\d+ MiB", caplog.text)
        assert str(tmp_path) not in caplog.text
        return enumerate(IMAGES)

    opened(tmp_path, fill=fill)


def test_a_disk_without_room_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=cache_module.RESERVE_BYTES + 100)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(DataError, match=r"image cache needs 0 MiB, free=200 MiB") as error:
        opened(tmp_path, fill=never)
    assert "model.image-size" in error.value.hint
    assert files(tmp_path) == []


def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch):
    def full(handle, start, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module.os, "posix_fallocate", full)
    with pytest.raises(DataError, match=r"cannot be written \(No space left on device\)"):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["s.lock"]


def test_a_fill_that_stops_or_misses_an_image_leaves_nothing(tmp_path):
    def stops():
        yield 0, IMAGES[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        opened(tmp_path, fill=stops)
    with pytest.raises(DataError, match="lacks 4 images"):
        opened(tmp_path, fill=lambda: [(2, IMAGES[2])])
    assert [path.name for path in tmp_path.iterdir()] == ["s.lock"]
    (tmp_path / ".s.part").write_bytes(b"of a process that was killed")
    assert np.array_equal(opened(tmp_path).read(np.arange(5)), IMAGES)
    assert not (tmp_path / ".s.part").exists()


@pytest.mark.parametrize("end", [0, 100, HEADER_BYTES, HEADER_BYTES + 300, -1])
def test_a_torn_file_is_made_anew(tmp_path, end, caplog):
    opened(tmp_path)
    path = next(tmp_path.glob("*.images"))
    path.write_bytes(path.read_bytes()[:end])
    assert np.array_equal(opened(tmp_path).read(np.arange(5)), IMAGES)
    assert "image cache damaged: it is made anew" in caplog.text


@pytest.mark.parametrize("place", [3, HEADER_BYTES + 5 * 192 + 2, -1])
def test_a_header_or_checksum_that_changed_is_made_anew(tmp_path, place):
    opened(tmp_path)
    path = next(tmp_path.glob("*.images"))
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    assert np.array_equal(opened(tmp_path).read(np.arange(5)), IMAGES)


def test_an_image_that_changed_is_not_handed_out(tmp_path):
    opened(tmp_path)
    path = next(tmp_path.glob("*.images"))
    content = bytearray(path.read_bytes())
    content[HEADER_BYTES + 3 * 192 + 7] ^= 1
    path.write_bytes(content)
    cache = opened(tmp_path, fill=never)
    assert np.array_equal(cache.read(np.array([0, 4])), IMAGES[[0, 4]])
    with pytest.raises(DataError, match="an image is not the one that was written") as error:
        cache.read(np.array([1, 3]))
    assert "made anew" in error.value.hint
    assert np.array_equal(opened(tmp_path).read(np.arange(5)), IMAGES)


def test_only_the_newest_content_of_a_slot_is_kept_and_an_open_one_goes_on(tmp_path):
    old = opened(tmp_path, content="c0")
    opened(tmp_path, slot="t")
    opened(tmp_path, 255 - IMAGES, content="c1")
    assert files(tmp_path) == ["s-c1.images", "t-c0.images"]
    assert np.array_equal(old.read(np.arange(5)), IMAGES)


def test_of_several_that_need_a_cache_one_writes_it(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    fills, caches = [], []

    def fill():
        fills.append(1)
        time.sleep(0.2)
        return enumerate(IMAGES)

    threads = [
        threading.Thread(target=lambda: caches.append(opened(tmp_path, fill=fill)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(fills) == 1
    assert all(np.array_equal(cache.read(np.arange(5)), IMAGES) for cache in caches)
    assert len(caches) == 4
    assert "another process: waiting" in caplog.text


def test_a_folder_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "s.lock").mkdir()
    with pytest.raises(DataError, match=r"image cache cannot be written \(Is a directory\)"):
        opened(tmp_path)


def anonymous_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1])


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    image = np.random.default_rng(1).integers(0, 256, (3, 128, 128), dtype=np.uint8)
    count = 1500  # 70 MiB
    cache = open_cache(
        tmp_path,
        slot="s",
        content="c",
        shape=(count, 3, 128, 128),
        dtype=np.dtype(np.uint8),
        fill=lambda: ((row, image) for row in range(count)),
    )
    cache.read(np.arange(32))
    before = anonymous_kib()
    total = 0
    for start in range(0, count, 32):
        total += len(cache.read(np.arange(start, min(count, start + 32))))
    assert total == count
    assert anonymous_kib() - before < 8 * 1024
