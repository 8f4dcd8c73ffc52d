"""A picture file gives the pixels that a viewer shows, or one countable reason."""

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from client.data import pictures
from client.data.pictures import DAMAGED, EMPTY, IRREGULAR, TOO_LARGE, UNKNOWN, read_picture
from strategies.errors import DataError

PAD = Path(__file__).resolve().parents[3] / "shared" / "data" / "layouts" / "pad_ufes_20"

GREY = np.arange(6 * 8, dtype=np.uint8).reshape(6, 8) * 5
RGB = np.stack([GREY, 255 - GREY, GREY // 2], axis=-1)


def saved(path: Path, image: Image.Image, **options) -> Path:
    image.save(path, **options)
    return path


def reason(path: Path) -> str:
    with pytest.raises(DataError) as error:
        read_picture(path)
    assert path.name not in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp"])
def test_every_lossless_format_gives_its_pixels(tmp_path, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    colour = read_picture(saved(tmp_path / f"c.{suffix}", Image.fromarray(RGB), **options))
    assert colour.dtype == np.uint8
    assert np.array_equal(colour, RGB)
    if suffix != "webp":  # which has no grey
        grey = read_picture(saved(tmp_path / f"g.{suffix}", Image.fromarray(GREY)))
        assert np.array_equal(grey, GREY)


def test_a_jpeg_is_close_to_what_was_saved(tmp_path):
    smooth = np.linspace(0, 255, 64, dtype=np.uint8)[None].repeat(64, axis=0)
    read = read_picture(saved(tmp_path / "a.jpg", Image.fromarray(smooth), quality=95))
    assert read.shape == (64, 64)
    assert np.abs(read.astype(int) - smooth).max() < 8


def test_the_content_decides_and_not_the_name(tmp_path):
    path = saved(tmp_path / "really.png", Image.fromarray(GREY), format="BMP")
    assert np.array_equal(read_picture(path), GREY)


def test_transparency_is_dropped_and_not_painted(tmp_path):
    alpha = np.full((6, 8), 7, np.uint8)
    colour = Image.fromarray(np.dstack([RGB, alpha]))
    assert np.array_equal(read_picture(saved(tmp_path / "a.png", colour)), RGB)
    grey = Image.merge("LA", (Image.fromarray(GREY), Image.fromarray(alpha)))
    assert np.array_equal(read_picture(saved(tmp_path / "b.png", grey)), GREY)


def test_palettes_and_bitmaps_become_what_they_show(tmp_path):
    flat = np.zeros((4, 4, 3), np.uint8)
    flat[:2] = (200, 10, 30)
    palette = Image.fromarray(flat).quantize(4)
    assert palette.mode == "P"
    assert np.array_equal(read_picture(saved(tmp_path / "p.png", palette)), flat)
    see_through = saved(tmp_path / "t.png", palette, transparency=0)
    assert np.array_equal(read_picture(see_through), flat)
    bits = Image.fromarray(np.eye(8, dtype=np.uint8) * 255).convert("1")
    assert np.array_equal(read_picture(saved(tmp_path / "1.png", bits)), np.eye(8) * 255)


def test_cmyk_becomes_rgb(tmp_path):
    image = Image.new("CMYK", (5, 4), (0, 255, 255, 0))
    read = read_picture(saved(tmp_path / "c.tiff", image))
    assert read.shape == (4, 5, 3)
    assert (read == (255, 0, 0)).all()


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_of_grey_are_kept(tmp_path, suffix):
    deep = np.array([[0, 1, 256], [257, 40_000, 65_535]], np.uint16)
    read = read_picture(saved(tmp_path / f"d.{suffix}", Image.fromarray(deep)))
    assert read.dtype == np.uint16
    assert np.array_equal(read, deep)


def test_big_endian_grey_has_the_machines_byte_order(tmp_path):
    deep = np.array([[1, 515]], np.uint16)
    image = Image.frombytes("I;16B", (2, 1), deep.astype(">u2").tobytes())
    read = read_picture(saved(tmp_path / "b.tiff", image))
    assert read.dtype == np.dtype(np.uint16)
    assert np.array_equal(read, deep)


def tiff(pixels: np.ndarray, photometric: int, orientation: int = 1) -> bytes:
    """A TIFF of one strip; Pillow writes none whose white is zero."""
    height, width = pixels.shape
    content = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
    tags = [
        (256, width),
        (257, height),
        (258, 8 * pixels.dtype.itemsize),
        (259, 1),
        (262, photometric),
        (273, 8),
        (274, orientation),
        (277, 1),
        (278, height),
        (279, len(content)),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<I", 8 + len(content)) + content
    return head + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize("orientation", [1, 3])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_a_tiff_whose_white_is_zero_is_shown_as_it_is_meant(tmp_path, kind, orientation):
    pixels = np.array([[0, 1, 100], [2, 50, 255]], kind)
    path = tmp_path / "a.tiff"
    path.write_bytes(tiff(pixels, 1, orientation))
    black_is_zero = read_picture(path)
    turned = pixels if orientation == 1 else pixels[::-1, ::-1]
    assert np.array_equal(black_is_zero, turned)
    path.write_bytes(tiff(pixels, 0, orientation))
    white_is_zero = read_picture(path)
    assert white_is_zero.dtype == kind
    assert np.array_equal(white_is_zero, np.iinfo(kind).max - black_is_zero)


def test_a_noted_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    path = saved(tmp_path / "r.png", Image.fromarray(RGB), exif=exif)
    assert np.array_equal(read_picture(path), np.rot90(RGB, -1))


def test_damaged_notes_do_not_lose_the_picture(tmp_path):
    path = saved(tmp_path / "n.jpg", Image.fromarray(RGB), exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff")
    assert read_picture(path).shape == RGB.shape


def test_the_first_of_several_pages_is_read(tmp_path):
    pages = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    path = saved(tmp_path / "m.tiff", pages[0], save_all=True, append_images=pages[1:])
    assert np.array_equal(read_picture(path), GREY)


def test_pixels_without_black_and_white_are_refused(tmp_path):
    real = Image.fromarray(np.ones((3, 3), np.float32))
    assert reason(saved(tmp_path / "f.tiff", real)) == "picture with floating-point pixels"
    wide = Image.fromarray(np.full((3, 3), 70_000, np.int32))
    assert reason(saved(tmp_path / "i.tiff", wide)) == "picture with 32-bit pixels"
    fits = Image.fromarray(np.full((3, 3), 60_000, np.int32))
    assert read_picture(saved(tmp_path / "j.tiff", fits)).dtype == np.uint16


def test_what_is_no_picture_says_why(tmp_path):
    empty = tmp_path / "empty.png"
    empty.touch()
    assert reason(empty) == EMPTY
    text = tmp_path / "text.png"
    text.write_text("patient,label\n")
    assert reason(text) == UNKNOWN
    gif = saved(tmp_path / "g.png", Image.fromarray(GREY), format="GIF")
    assert reason(gif) == UNKNOWN
    assert reason(tmp_path) == IRREGULAR
    assert reason(tmp_path / "gone.png") == "file cannot be opened (No such file or directory)"
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    assert reason(loop) == "file cannot be opened (Too many levels of symbolic links)"
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    assert reason(pipe) == IRREGULAR  # and does not wait for a writer


@pytest.mark.parametrize("suffix", ["png", "jpg", "bmp", "tiff", "webp"])
def test_a_truncated_picture_is_not_filled_up(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(tmp_path / f"a.{suffix}", Image.fromarray(noise))
    whole.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    assert reason(whole) in (DAMAGED, UNKNOWN)


def test_a_file_that_claims_more_than_memory_is_refused_before_it_is_decoded(tmp_path):
    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    for side in (10_001, 100_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
        bomb = tmp_path / f"{side}.png"
        bomb.write_bytes(
            b"\x89PNG\r\n\x1a\n"
            + chunk(b"IHDR", header)
            + chunk(b"IDAT", zlib.compress(bytes(1000)))
            + chunk(b"IEND", b"")
        )
        assert reason(bomb) == TOO_LARGE


def test_a_decoder_without_memory_is_a_reason(tmp_path, monkeypatch):
    def decode(file: object) -> None:
        raise MemoryError

    monkeypatch.setattr(pictures, "_decode", decode)
    path = saved(tmp_path / "a.png", Image.fromarray(GREY))
    assert reason(path) == "picture needs more memory than there is"


def encoded(suffix: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, suffix)
    return file.getvalue()


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP"]).map(encoded),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=6),
    st.integers(0, 60),
)
def test_a_damaged_picture_gives_pixels_or_a_reason(tmp_path, content, changes, cut):
    broken = bytearray(content[: len(content) - cut])
    for place, value in changes:
        broken[place % len(broken)] = value
    path = tmp_path / "fuzzed"
    path.write_bytes(broken)
    try:
        pixels = read_picture(path)
    except DataError as error:
        assert "fuzzed" not in str(error)  # noqa: PT017
    else:
        assert pixels.dtype in (np.uint8, np.uint16)
        assert pixels.ndim == 2 or pixels.shape[2:] == (3,)
        assert pixels.size


@pytest.mark.skipif(
    not PAD.is_dir(), reason="the official layouts' files (shared/data) are not on this disk"
)
def test_the_real_rgba_files_of_pad_ufes_are_rgb():
    files = sorted(PAD.glob("images/*/*.png"))
    assert len(files) == 7
    for file in files:
        with Image.open(file) as image:
            expected = np.asarray(image)[..., :3]
        assert np.array_equal(read_picture(file), expected)
