"""Files become batches at a model's size: the right pixels, decoded once, from unchanged files."""

import os
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from client.data import images as images_module
from client.data.images import Facts, Look, Shape, changed_ns, decode, fit, look
from client.data.manifest import ImageDataset
from client.data.rows import Listing, Row
from client.data.transforms import prepare
from fakes.pictures import CLASSES, built, listing, picture
from strategies.errors import DataError, RefusalError

DICOM = Path(pydicom.__file__).parent / "data" / "test_files"


def dataset_of(folder: Path, arrays: list[np.ndarray]) -> ImageDataset:
    """One PNG per array; examples are in the order of ids, so rows are looked up by file."""
    rows = []
    for i, pixels in enumerate(arrays):
        Image.fromarray(pixels).save(folder / f"{i}.png")
        rows.append(Row(f"{i}.png", 0, CLASSES[i % 2]))
    return built(Listing("made", folder, CLASSES, rows), folder / "cache")


def by_file(dataset: ImageDataset, batch: torch.Tensor) -> list[torch.Tensor]:
    names = [int(e.file.removesuffix(".png")) for e in dataset.manifest.examples]
    return [batch[names.index(i)] for i in range(len(names))]


def noise(*shape: int, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    high = int(np.iinfo(dtype).max) + 1
    return np.random.default_rng(seed).integers(0, high, shape).astype(dtype)


def test_images_of_any_size_come_as_prepare_gives_them(tmp_path):
    arrays = [noise(20, 24, 3), noise(64, 40, 3, seed=1), noise(16, 16, 3, seed=2)]
    data = dataset_of(tmp_path, arrays)
    prepared = data.images.prepared(16, 3, workers=0)
    batch = prepared.batch(np.arange(3))
    assert batch.shape == (3, 3, 16, 16)
    assert batch.dtype == torch.float32
    for got, pixels in zip(by_file(data, batch), arrays, strict=True):
        expected = prepare(pixels[None], 16, 3)[0]
        # Rounded once, to 8 bits.
        torch.testing.assert_close(got, expected, rtol=0, atol=0.5 / 255 + 1e-5)
    # Nothing is lost of an image that has the model's size already.
    assert torch.equal(by_file(data, batch)[2], prepare(arrays[2][None], 16, 3)[0])


def test_work_that_is_given_up_leaves_no_cache(tmp_path):
    """A site whose round is over must not decode a hospital's whole archive first."""
    data = dataset_of(tmp_path, [noise(20, 24, 3, seed=i) for i in range(6)])
    asked = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise RefusalError("stopped", "leaving")

    with pytest.raises(RefusalError):
        data.images.prepared(16, 3, workers=0, check=check)
    assert len(asked) == 3
    assert list((tmp_path / "cache").glob("*.images")) == []
    assert list((tmp_path / "cache").glob(".*.part")) == []
    assert len(data.images.prepared(16, 3, workers=0)) == 6


@settings(deadline=None, max_examples=40)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    side=st.integers(1, 70),
    rgb=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_filter_is_that_of_prepare(height, width, side, rgb, seed):
    pixels = noise(height, width, *([3] if rgb else []), seed=seed)
    got = fit(pixels, Shape(side, 3 if rgb else 1, "resize", 8))
    expected = prepare(pixels[None], side, 3 if rgb else 1)[0].numpy() * 255
    assert got.dtype == np.uint8
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 0.51


def test_padding_invents_no_pixel(tmp_path):
    arrays = [noise(10, 7, 3), noise(16, 3, 3, seed=1)]
    data = dataset_of(tmp_path, arrays)
    batch = data.images.prepared(16, 3, "pad", workers=0).batch(np.arange(2))
    for got, pixels in zip(by_file(data, batch), arrays, strict=True):
        assert torch.equal(got, prepare(pixels[None], 16, 3, "pad")[0])
    with pytest.raises(DataError, match="expected at least 16 to pad 16x7 images"):
        data.images.prepared(15, 3, "pad", workers=0)


def test_grey_takes_one_channel_on_disk_and_three_in_a_batch(tmp_path):
    data = dataset_of(tmp_path, [noise(16, 16), noise(16, 16, seed=1)])
    for channels in (1, 3):
        prepared = data.images.prepared(16, channels, workers=0)
        assert prepared.cache.pixels.shape == (2, 1, 16, 16)
        batch = prepared.batch(np.arange(2))
        assert batch.shape == (2, channels, 16, 16)
        assert batch.is_contiguous()
        assert torch.equal(by_file(data, batch)[0], prepare(noise(1, 16, 16), 16, channels)[0])
    assert len(list((tmp_path / "cache").glob("*.images"))) == 1


def test_grey_stored_as_rgb_is_grey_and_colour_needs_three_channels(tmp_path):
    grey = noise(16, 16)
    (tmp_path / "grey").mkdir()
    stored = dataset_of(tmp_path / "grey", [np.stack([grey] * 3, axis=-1), grey])
    assert stored.images.prepared(16, 1, workers=0).batch(np.arange(2)).shape == (2, 1, 16, 16)
    mixed = dataset_of(tmp_path, [grey, noise(16, 16, 3)])
    with pytest.raises(DataError, match="in_channels=1 expected 3, the images are RGB"):
        mixed.images.prepared(16, 1, workers=0)
    batch = mixed.images.prepared(16, 3, workers=0).batch(np.arange(2))
    assert torch.equal(by_file(mixed, batch)[0], prepare(grey[None], 16, 3)[0])


def test_sixteen_bits_are_kept_until_the_batch(tmp_path):
    deep, flat = noise(8, 8, dtype=np.uint16), noise(8, 8, seed=1)
    data = dataset_of(tmp_path, [deep, flat])
    prepared = data.images.prepared(8, 1, workers=0)
    assert prepared.cache.pixels.dtype == np.uint16
    first, second = by_file(data, prepared.batch(np.arange(2)))
    assert torch.equal(first[0], torch.from_numpy(deep.astype(np.float32)) / 65535)
    torch.testing.assert_close(second[0], torch.from_numpy(flat.astype(np.float32)) / 255)


def test_subsets_follow_their_rows_and_share_one_cache(tmp_path):
    data = built(listing(tmp_path), tmp_path / "cache")
    whole = data.images.prepared(16, 3, workers=0)
    part = data.subset([7, 2, 5]).subset([2, 0])
    assert [e.file for e in part.manifest.examples] == [
        data.manifest.examples[i].file for i in (5, 7)
    ]
    prepared = part.images.prepared(16, 3, workers=0)
    assert len(prepared) == len(part.images) == 2
    assert torch.equal(prepared.batch(np.array([1, 0])), whole.batch(np.array([7, 5])))
    assert np.array_equal(part.images.read(0), data.images.read(5))
    assert len(list((tmp_path / "cache").glob("*.images"))) == 1
    assert len(data.subset([]).images.prepared(16, 3, workers=0)) == 0


def test_images_are_decoded_once_for_each_size(tmp_path, monkeypatch):
    data = built(listing(tmp_path), tmp_path / "cache")
    data.images.prepared(16, 3, workers=0)

    def refuse(task):
        raise AssertionError("decoded again")

    monkeypatch.setattr(images_module, "render", refuse)
    again = built(listing(tmp_path), tmp_path / "cache")
    again.images.prepared(16, 3, workers=0)
    again.subset([3]).images.prepared(16, 3, workers=0)
    with pytest.raises(AssertionError):
        again.images.prepared(17, 3, workers=0)


def test_worker_processes_give_the_same_bytes(tmp_path):
    data = built(listing(tmp_path), tmp_path / "cache")
    here = data.images.prepared(16, 3, workers=0).cache.path.read_bytes()
    other = built(listing(tmp_path), tmp_path / "other", workers=2)
    assert other.manifest == data.manifest
    assert other.images.prepared(16, 3, workers=2).cache.path.read_bytes() == here


def test_a_file_that_changed_before_its_image_was_kept_is_refused_then_read_anew(tmp_path):
    found = listing(tmp_path)
    data = built(found, tmp_path / "cache")
    picture(tmp_path, "no/000.png", 99)
    with pytest.raises(
        DataError,
        match="images=12 no_longer_readable=1 x file changed since it was first read",
    ) as error:
        data.images.prepared(16, 3, workers=0)
    assert error.value.hint.startswith("start again")
    again = built(found, tmp_path / "cache")
    assert again.manifest.fingerprint() != data.manifest.fingerprint()
    assert len(again.images.prepared(16, 3, workers=0)) == 12


def test_a_file_that_changed_after_its_image_was_kept_changes_no_running_site(tmp_path):
    found = listing(tmp_path)
    data = built(found, tmp_path / "cache")
    before = data.images.prepared(16, 3, workers=0).batch(np.arange(12))
    picture(tmp_path, "no/000.png", 99)
    assert torch.equal(data.images.prepared(16, 3, workers=0).batch(np.arange(12)), before)
    again = built(found, tmp_path / "cache")
    after = again.images.prepared(16, 3, workers=0).batch(np.arange(12))
    changed = {e.example_id for e in again.manifest.examples} - {
        e.example_id for e in data.manifest.examples
    }
    assert len(changed) == 1
    rows = [i for i, e in enumerate(again.manifest.examples) if e.file == "no/000.png"]
    expected = prepare(decode(tmp_path / "no/000.png", "picture", 0, None)[None].copy(), 16, 3)
    torch.testing.assert_close(after[rows], expected, rtol=0, atol=0.5 / 255 + 1e-5)


def test_a_file_that_is_gone_is_a_reason(tmp_path):
    data = built(listing(tmp_path), tmp_path / "cache")
    (tmp_path / "no/000.png").unlink()
    with pytest.raises(DataError, match=r"file cannot be read \(No such file or directory\)"):
        data.images.prepared(16, 3, workers=0)
    assert list((tmp_path / "cache").glob("*.images")) == []


# --- what looking at a file tells


def test_a_look_tells_shape_depth_and_content(tmp_path):
    Image.fromarray(noise(5, 9, dtype=np.uint16)).save(tmp_path / "a.png")
    facts = look(Look(str(tmp_path / "a.png"), "picture", (0,), None))
    status = os.stat(tmp_path / "a.png")
    assert facts[:2] == (status.st_size, changed_ns(status))
    assert len(facts.digest) == 32
    assert facts.frames == {0: Facts(facts.frames[0].pixels, 5, 9, 1, 16)}


def test_equal_pixels_have_equal_hashes_in_any_format(tmp_path):
    pixels = noise(6, 6)
    hashes = set()
    for name, image in (("a.png", pixels), ("b.bmp", pixels), ("c.png", np.dstack([pixels] * 3))):
        Image.fromarray(image).save(tmp_path / name)
        hashes.add(look(Look(str(tmp_path / name), "picture", (0,), None)).frames[0].pixels)
    assert len(hashes) == 1
    Image.fromarray(pixels.reshape(4, 9)).save(tmp_path / "d.png")
    other = look(Look(str(tmp_path / "d.png"), "picture", (0,), None)).frames[0].pixels
    assert other not in hashes


def test_a_file_that_changes_while_it_is_read_is_a_reason(tmp_path, monkeypatch):
    picture(tmp_path, "a.png", 0)

    def slow(path, kind, frame, options):
        picture(tmp_path, "a.png", 1, (30, 30))
        return decode(path, kind, frame, options)

    monkeypatch.setattr(images_module, "decode", slow)
    facts = look(Look(str(tmp_path / "a.png"), "picture", (0,), None))
    assert facts.frames == {0: "file changed while it was read"}


def test_whatever_a_decoder_raises_is_a_reason_without_the_files_name(tmp_path, monkeypatch):
    def faulty(path):
        raise RuntimeError(f"cannot read {path}")

    monkeypatch.setattr(images_module, "read_picture", faulty)
    picture(tmp_path, "Smith.png", 0)
    facts = look(Look(str(tmp_path / "Smith.png"), "picture", (0,), None))
    assert facts.frames == {0: "decoder failed (RuntimeError)"}
    gone = look(Look(str(tmp_path / "gone.png"), "picture", (0, 1), None))
    assert gone.frames == dict.fromkeys((0, 1), "file cannot be opened (No such file or directory)")


def test_dicom_is_decoded_by_its_reader_frame_by_frame(tmp_path):
    rows = [
        Row("CT_small.dcm", 0, "no"),
        *(Row("examples_ybr_color.dcm", frame, "yes") for frame in (0, 29)),
        Row("MR_truncated.dcm", 0, "no"),
    ]
    found = Listing("dicom", DICOM, CLASSES, rows, kind="dicom")
    from client.data.dicom import DicomOptions, read_frame

    options = DicomOptions()
    data = built(found, tmp_path, options=options, max_unreadable_share=0.5)
    assert sorted((e.file, e.frame) for e in data.manifest.examples) == [
        row[:2] for row in rows[:3]
    ]
    for row, example in enumerate(data.manifest.examples):
        expected = read_frame(DICOM / example.file, example.frame, options)
        assert np.array_equal(data.images.read(row), expected)
    batch = data.images.prepared(32, 3, workers=0).batch(np.arange(3))
    assert batch.shape == (3, 3, 32, 32)
    assert 0 <= batch.min() <= batch.max() <= 1
