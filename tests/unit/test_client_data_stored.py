"""Images in a cache at their own size become batches at a model's size."""

import numpy as np
import pytest
import torch

from client.data.manifest import ImageDataset
from client.data.npz import identified, read_npz_layout
from client.data.transforms import prepare
from fakes.npz_files import arrays, write_members
from strategies.errors import DataError, RefusalError


def loaded(folder, *, rgb: bool) -> tuple[ImageDataset, np.ndarray]:
    """A data set and its pixels."""
    contents = arrays(rgb=rgb)
    file = identified(write_members(folder / "toy.npz", contents))
    data = read_npz_layout(file, dataset="toy", classes=("a", "b"), cache_dir=folder / "cache")
    pixels = [contents[f"{split}_images"] for split in ("train", "val", "test")]
    return data, np.concatenate(pixels)


def caches(folder) -> int:
    return len(list((folder / "cache").glob("*.images")))


@pytest.mark.parametrize("small_images", ["resize", "pad"])
@pytest.mark.parametrize(("rgb", "channels"), [(False, 1), (False, 3), (True, 3)])
def test_a_model_of_the_stored_size_gets_the_bits_of_prepare(tmp_path, rgb, channels, small_images):
    data, pixels = loaded(tmp_path, rgb=rgb)
    prepared = data.images.prepared(8, channels, small_images)
    assert torch.equal(prepared.batch(np.arange(11)), prepare(pixels, 8, channels, small_images))
    assert caches(tmp_path) == 1
    assert data.images.cache_bytes(8) == 0


@pytest.mark.parametrize(("side", "small_images"), [(5, "resize"), (13, "resize"), (13, "pad")])
@pytest.mark.parametrize(("rgb", "channels"), [(False, 1), (False, 3), (True, 3)])
def test_another_size_has_a_cache_of_its_own(tmp_path, rgb, channels, side, small_images):
    data, pixels = loaded(tmp_path, rgb=rgb)
    got = data.images.prepared(side, channels, small_images).batch(np.arange(11))
    expected = prepare(pixels, side, channels, small_images)
    torch.testing.assert_close(got, expected, rtol=0, atol=0.5 / 255 + 1e-5)
    assert data.images.cache_bytes(side) == 11 * (3 if rgb else 1) * side**2
    part = data.subset([7, 2, 5]).subset([2, 0])
    again = part.images.prepared(side, channels, small_images)
    assert torch.equal(again.batch(np.arange(2)), got[[5, 7]])
    assert caches(tmp_path) == 2


def test_a_model_that_cannot_take_them_is_refused(tmp_path):
    data, _ = loaded(tmp_path, rgb=True)
    with pytest.raises(DataError, match="in_channels=1 expected 3, the images are RGB"):
        data.images.prepared(8, 1)
    with pytest.raises(DataError, match="expected at least 8 to pad 8x8 images"):
        data.images.prepared(7, 3, "pad")


def test_work_that_is_given_up_leaves_no_cache(tmp_path):
    data, _ = loaded(tmp_path, rgb=False)
    asked: list[int] = []

    def check() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise RefusalError("stopped", "leaving")

    with pytest.raises(RefusalError):
        data.images.prepared(5, 1, check=check)
    assert len(asked) == 3
    assert caches(tmp_path) == 1
    assert len(data.images.prepared(5, 1)) == 11
