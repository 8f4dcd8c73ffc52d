"""Preparation is exact and bounded; augmentation is the published protocol, drawn from one seed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from client.data.transforms import (
    CROP_AREA,
    ROTATION_DEGREES,
    TRANSLATION,
    RandomView,
    augment_batch,
    augmentation,
    normalise,
    prepare,
)
from strategies.errors import DataError


def random_images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


class Chosen:
    """Stands in for the random state of RandomView; by default nothing moves."""

    def __init__(self, area=1.0, crop=(0, 0), mirror=False, degrees=0.0, shift=(0, 0)):
        self.values = [area, np.array(crop), degrees, np.array(shift)]
        self.mirror = mirror

    def uniform(self, low, high, size=None):
        return self.values.pop(0)

    def random_sample(self):
        return 0.0 if self.mirror else 0.9


def view_of(image: torch.Tensor, **draws: object) -> torch.Tensor:
    view = RandomView(image.shape[-1])
    view.R = Chosen(**draws)
    return view(image)


# ---- prepare


def test_images_of_the_right_size_only_change_type_and_range():
    images = random_images(5, 20, 20)
    prepared = prepare(images, 20, 1)
    assert prepared.dtype == torch.float32
    assert type(prepared) is torch.Tensor
    assert torch.equal(prepared, torch.from_numpy(images).float().div(255)[:, None])


def test_grey_is_repeated_and_rgb_keeps_its_channels():
    grey = prepare(random_images(2, 8, 8), 8, 3)
    assert grey.shape == (2, 3, 8, 8)
    assert torch.equal(grey[:, 0], grey[:, 2])
    rgb = random_images(2, 8, 8, 3)
    expected = torch.from_numpy(rgb).float().div(255).permute(0, 3, 1, 2)
    assert torch.equal(prepare(rgb, 8, 3), expected)


def test_enlarging_is_bilinear():
    images = random_images(3, 28, 28)
    expected = interpolate(
        torch.from_numpy(images).float().div(255)[:, None], (64, 64), mode="bilinear"
    )
    torch.testing.assert_close(prepare(images, 64, 1), expected)


def test_shrinking_keeps_an_even_image_even_up_to_its_border():
    prepared = prepare(np.full((1, 64, 64), 204, np.uint8), 16, 1)
    torch.testing.assert_close(prepared, torch.full_like(prepared, 0.8))


def test_shrinking_smooths_first():
    stripes = np.zeros((1, 64, 64), np.uint8)
    stripes[:, :, ::4] = 255  # one column in four: picking columns would lose or double it
    inside = prepare(stripes, 16, 1)[..., 2:-2]
    torch.testing.assert_close(inside, torch.full_like(inside, 0.25), atol=0.1, rtol=0)


def test_padding_centres_the_image_on_black_and_keeps_every_pixel():
    images = random_images(2, 28, 28)
    prepared = prepare(images, 64, 1, small_images="pad")
    assert torch.equal(prepared[:, 0, 18:46, 18:46] * 255, torch.from_numpy(images).float())
    prepared[:, :, 18:46, 18:46] = 0
    assert not prepared.any()


def test_many_images_are_prepared_like_few(monkeypatch):
    images = random_images(7, 10, 10, 3)
    whole = prepare(images, 16, 3)
    monkeypatch.setattr("client.data.transforms.PREPARE_CHUNK", 2)
    assert torch.equal(prepare(images, 16, 3), whole)


def test_no_images_give_an_empty_tensor():
    assert prepare(random_images(0, 28, 28), 32, 3).shape == (0, 3, 32, 32)


@given(
    side=st.integers(4, 40), height=st.integers(4, 40), width=st.integers(4, 40), rgb=st.booleans()
)
@settings(deadline=None, max_examples=30)
def test_prepared_images_stay_in_range_whatever_their_shape(side, height, width, rgb):
    prepared = prepare(random_images(2, height, width, *([3] if rgb else [])), side, 3)
    assert prepared.shape == (2, 3, side, side)
    assert prepared.min() >= 0
    assert prepared.max() <= 1


@pytest.mark.parametrize(
    ("shape", "arguments", "message"),
    [
        ((1, 8, 8, 3), (8, 1), "in_channels=1 expected 3, the images are RGB"),
        ((1, 8, 8), (8, 2), "in_channels=2 expected 1 or 3"),
        ((1, 8, 9), (8, 1, "pad"), "image_size=8 expected at least 9 to pad 8x9 images"),
    ],
)
def test_impossible_preparations_are_refused(shape, arguments, message):
    with pytest.raises(DataError, match=message):
        prepare(random_images(*shape), *arguments)


# ---- the random view


def ramp(size: int = 40) -> torch.Tensor:
    """An image whose values tell where each pixel comes from: x in one channel, y in the other."""
    places = (torch.arange(size) * 2 + 1) / size - 1
    return torch.stack(torch.meshgrid(places, places, indexing="xy"))


def inner(image: torch.Tensor) -> torch.Tensor:
    return image[:, 10:-10, 10:-10]


def test_a_view_that_moves_nothing_shows_the_image():
    image = torch.rand(3, 16, 16)
    torch.testing.assert_close(view_of(image), image)


def test_the_flip_is_horizontal():
    image = torch.rand(1, 16, 16)
    torch.testing.assert_close(view_of(image, mirror=True), image.flip(-1))


def test_a_shift_moves_the_image_right_and_down_and_leaves_black():
    image = torch.rand(1, 20, 20)
    moved = view_of(image, shift=(0.2, 0.1))  # 2 and 1 pixels: the side spans two units
    torch.testing.assert_close(moved[:, 1:, 2:], image[:, :-1, :-2])
    assert moved[:, :1].abs().max() < 1e-5
    assert moved[:, :, :2].abs().max() < 1e-5


def test_a_crop_is_the_resized_part_of_the_image():
    image = torch.rand(1, 40, 40)
    # A crop of 3/4 of the side, pushed fully to the right and to the top.
    crop = view_of(image, area=0.5625, crop=(1, -1))
    expected = interpolate(image[None, :, :30, 10:], (40, 40), mode="bilinear")[0]
    torch.testing.assert_close(inner(crop), inner(expected), atol=1e-5, rtol=0)


def test_a_rotation_turns_by_its_angle_about_the_centre():
    turned = inner(view_of(ramp(), degrees=15.0))
    x, y = inner(ramp())
    cos, sin = math.cos(math.radians(15)), math.sin(math.radians(15))
    torch.testing.assert_close(turned, torch.stack([cos * x + sin * y, cos * y - sin * x]))


draws = st.fixed_dictionaries(
    {
        "area": st.floats(0.7, 1.0),
        "crop": st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
        "mirror": st.booleans(),
        "degrees": st.floats(-15, 15),
        "shift": st.tuples(st.floats(-0.2, 0.2), st.floats(-0.2, 0.2)),
    }
)


@given(draws)
@settings(deadline=None, max_examples=50)
def test_one_resampling_finds_the_place_that_crop_flip_rotation_and_shift_find_in_turn(drawn):
    x, y = inner(ramp())
    # Backwards from an output pixel, one step at a time.
    x, y = x - drawn["shift"][0], y - drawn["shift"][1]
    angle = math.radians(drawn["degrees"])
    cos, sin = math.cos(angle), math.sin(angle)
    x, y = cos * x + sin * y, cos * y - sin * x
    x = -x if drawn["mirror"] else x
    scale = math.sqrt(drawn["area"])
    x, y = (scale * p + c * (1 - scale) for p, c in zip((x, y), drawn["crop"], strict=True))
    torch.testing.assert_close(
        inner(view_of(ramp(), **drawn)), torch.stack([x, y]), atol=1e-4, rtol=0
    )


def test_draws_cover_the_protocol_and_stay_inside_it():
    view = RandomView(16)
    view.set_random_state(0)
    maps = []
    for _ in range(2000):
        view.randomize()
        maps.append(view._theta.clone())
    a, b = torch.stack(maps).double()[:, :, :2].unbind(1)  # rows of the linear part, (m, 2)
    mirror = torch.sign(a[:, 0])
    area = b.square().sum(1)
    degrees = torch.rad2deg(torch.atan2(-b[:, 0], b[:, 1]))
    assert area.min() >= CROP_AREA[0] - 1e-6
    assert area.max() <= CROP_AREA[1] + 1e-6
    assert area.std() == pytest.approx(0.3 / math.sqrt(12), rel=0.1)
    assert degrees.abs().max() <= ROTATION_DEGREES
    assert degrees.std() == pytest.approx(2 * ROTATION_DEGREES / math.sqrt(12), rel=0.1)
    assert mirror.mean().abs() < 0.1
    torch.testing.assert_close(a, mirror[:, None] * torch.stack([b[:, 1], -b[:, 0]], dim=1))
    # Crop and shift together: at most the crop's slack plus the shift along the turned axes.
    reach = 1 - area.sqrt() + area.sqrt() * 2 * TRANSLATION * math.sqrt(2)
    offsets = torch.stack(maps).double()[:, :, 2]
    assert (offsets.abs() <= reach[:, None] + 1e-6).all()
    assert offsets.std() > 0.1


# ---- augmentation


def test_the_same_seed_gives_the_same_sequence_and_another_seed_another():
    images = prepare(random_images(4, 16, 16), 16, 3)
    one, same, other = (augment_batch(images, augmentation(16, seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 7, 32])
def test_a_batch_is_augmented_as_its_images_would_be_one_by_one(channels, count):
    images = torch.from_numpy(np.random.default_rng(count).random((count, channels, 16, 16)))
    batch, single = augmentation(16, 3), augmentation(16, 3)
    for _ in range(2):  # the second draws go on where the first ended
        expected = torch.stack([single(image) for image in images.float()])
        assert torch.equal(augment_batch(images.float(), batch), expected)


def test_every_image_and_every_call_gets_its_own_draw():
    image = prepare(random_images(1, 16, 16), 16, 1)
    transform = augmentation(16, 0)
    batch = augment_batch(image.repeat(3, 1, 1, 1), transform)
    assert len({tuple(x.flatten().tolist()) for x in batch}) == 3
    assert not torch.equal(augment_batch(image, transform), augment_batch(image, transform))


def test_draws_do_not_depend_on_other_random_generators():
    image = prepare(random_images(1, 16, 16), 16, 1)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    one = augment_batch(image, augmentation(16, 5))
    torch.manual_seed(2)
    np.random.seed(2)  # noqa: NPY002
    assert torch.equal(augment_batch(image, augmentation(16, 5)), one)


def test_augmented_images_are_plain_tensors_in_range_and_the_originals_stay():
    images = prepare(random_images(32, 16, 16), 16, 3)
    before = images.clone()
    augmented = augment_batch(images, augmentation(16, 0))
    assert type(augmented) is torch.Tensor
    assert augmented.shape == images.shape
    assert augmented.dtype == torch.float32
    assert augmented.min() >= 0
    assert augmented.max() <= 1
    assert torch.equal(images, before)


def test_an_empty_poisson_batch_stays_empty():
    empty = torch.empty(0, 3, 16, 16)
    assert augment_batch(empty, augmentation(16, 0)).shape == (0, 3, 16, 16)
    assert normalise(empty).shape == (0, 3, 16, 16)


def test_brightness_and_contrast_vary_within_a_fifth():
    grey = torch.full((200, 1, 16, 16), 0.5)
    centre = augment_batch(grey, augmentation(16, 0))[:, 0, 8, 8]
    # Contrast pivots on the mean, which black corners lower a little.
    assert 0.5 * 0.8 - 0.03 < centre.min() < 0.44
    assert 0.56 < centre.max() < 0.5 * 1.2 + 0.03


def test_contrast_changes_the_spread_beyond_what_brightness_does():
    halves = torch.full((300, 1, 16, 16), 0.4)
    halves[:, :, 8:] = 0.6
    seen = augment_batch(halves, augmentation(16, 0))[:, 0]
    ratio = seen[:, 12, 8] / seen[:, 4, 8]
    # Brightness scales both halves and leaves 1.5; contrast pulls them apart or together.
    assert ratio.std() > 0.03


# ---- normalise


def test_normalise_uses_the_channel_statistics_of_imagenet():
    batch = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1).repeat(2, 1, 4, 4)
    torch.testing.assert_close(normalise(batch), torch.zeros_like(batch))
    one_std = batch + torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    torch.testing.assert_close(normalise(one_std), torch.ones_like(batch))


def test_normalise_uses_their_averages_for_one_channel():
    batch = torch.full((1, 1, 2, 2), (0.485 + 0.456 + 0.406) / 3)
    torch.testing.assert_close(normalise(batch), torch.zeros_like(batch), atol=1e-6, rtol=0)
    one_std = batch + (0.229 + 0.224 + 0.225) / 3
    torch.testing.assert_close(normalise(one_std), torch.ones_like(batch))


def test_normalise_refuses_other_channels():
    with pytest.raises(DataError, match="channels=2 expected 1 or 3"):
        normalise(torch.zeros(1, 2, 4, 4))
