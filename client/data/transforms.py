"""From stored images to model input: resizing once, augmentation at each use, normalisation.

`prepare` is deterministic and runs once per data set (`images.fit` is its equal for images that are
prepared one by one). `augmentation` is the random part of
training: random resized crop, flip, rotation, translation, brightness and contrast, from MONAI
transforms whose draws follow from one seed.

Invariant: prepared and augmented images are float32 in [0, 1], shape (n, c, h, w); only `normalise`
leaves that range, so saved or explained images are always viewable.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import torch
from monai.networks.layers.spatial_transforms import AffineTransform
from monai.transforms.compose import Compose
from monai.transforms.intensity.array import (
    RandScaleIntensity,
    RandScaleIntensityFixedMean,
    ScaleIntensityRange,
)
from monai.transforms.transform import RandomizableTransform
from monai.transforms.utility.array import EnsureType
from torch import Tensor
from torch.nn.functional import interpolate

from client.data.manifest import ImageArray
from strategies.errors import DataError

if TYPE_CHECKING:
    from client.data.images import FileImages
    from client.data.stored import StoredImages

SmallImages = Literal["resize", "pad"]

# Bounds the float32 copies made on the way; changes no value.
PREPARE_CHUNK = 512

CROP_AREA = (0.7, 1.0)  # share of the image area that a crop keeps
ROTATION_DEGREES = 15.0
TRANSLATION = 0.1  # share of the image side
BRIGHTNESS = 0.2  # share by which intensities scale
CONTRAST = 0.2  # share by which deviations from the mean scale

# Channel statistics of ImageNet, as used throughout the field for RGB in [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def prepare(
    images: ImageArray,
    image_size: int,
    in_channels: int,
    small_images: SmallImages = "resize",
) -> Tensor:
    """Brings stored images to the model's size and number of channels.

    Args:
        images: uint8, (n, h, w) grey or (n, h, w, 3) RGB.
        image_size: Side s of the model input in pixels.
        in_channels: 1, or 3; grey images are repeated in all three.
        small_images: "resize" scales to s x s, bilinear, smoothed first where that shrinks; "pad"
            centres the image on black, so that no pixel is invented.

    Returns:
        float32 in [0, 1], shape (n, in_channels, s, s).

    Raises:
        DataError: As `require_fit` does.
    """
    require_fit(images, image_size, in_channels, small_images)
    rgb = images.ndim == 4
    height, width = images.shape[1:3]
    prepared = torch.zeros((len(images), in_channels, image_size, image_size))
    for start in range(0, len(images), PREPARE_CHUNK):
        chunk = torch.from_numpy(images[start : start + PREPARE_CHUNK]).float().div_(255)
        chunk = chunk.permute(0, 3, 1, 2) if rgb else chunk[:, None]  # (n, c, h, w)
        placed = prepared[start : start + PREPARE_CHUNK]
        if small_images == "pad":
            top, left = (image_size - height) // 2, (image_size - width) // 2
            placed[..., top : top + height, left : left + width] = chunk
        else:
            placed[:] = _resize(chunk, image_size)
    return prepared


def require_fit(
    images: ImageArray | FileImages | StoredImages,
    image_size: int,
    in_channels: int,
    small_images: SmallImages,
) -> None:
    """Checks what `prepare` would do, without doing it; arguments as there.

    Raises:
        DataError: Another number of channels, RGB for a one-channel model, or an image too large
            to pad.
    """
    if isinstance(images, np.ndarray):
        height, width, rgb = *images.shape[1:3], images.ndim == 4
    else:
        height, width, rgb = images.extent
    if in_channels not in (1, 3):
        raise DataError(f"in_channels={in_channels} expected 1 or 3", "set in-channels to 1 or 3")
    if rgb and in_channels == 1:
        raise DataError(
            "in_channels=1 expected 3, the images are RGB", "set in-channels = 3 for this data set"
        )
    if small_images == "pad" and max(height, width) > image_size:
        raise DataError(
            f"image_size={image_size} expected at least {max(height, width)} to pad "
            f"{height}x{width} images",
            'use small-images = "resize" or a larger image-size',
        )


def _resize(images: Tensor, image_size: int) -> Tensor:
    """Scales (n, c, h, w) to (n, c, s, s), bilinear with antialiasing.

    PyTorch's filter rather than MONAI's Resize, which smooths against zeros beyond the edge and so
    darkens the border of every image that it shrinks.
    """
    if images.shape[2:] == (image_size, image_size):
        return images
    side = (image_size, image_size)
    return interpolate(images, side, mode="bilinear", antialias=True).clamp_(0, 1)


class RandomView(RandomizableTransform):
    """Random resized crop, horizontal flip, rotation and translation in a single resampling.

    The four draws are those of the usual separate steps (crop area and place, flip with probability
    one half, angle, shift) and their maps are multiplied in that order, so each output pixel comes
    from the same place as it would step by step. Two things differ, both for the better: pixels are
    interpolated once instead of three times, and where rotation or shift reach beyond the crop they
    show the tissue that is there, not black. Crops keep the aspect ratio, because the shape of a
    lesion is diagnostic.
    """

    def __init__(self, image_size: int) -> None:
        super().__init__(prob=1.0)
        self._resample = AffineTransform(
            (image_size, image_size), normalized=True, align_corners=False, reverse_indexing=False
        )
        self._theta = torch.eye(2, 3)

    def randomize(self, data: object = None) -> None:
        """Draws one view: the map from output to input coordinates in [-1, 1], shape (2, 3)."""
        scale = math.sqrt(self.R.uniform(*CROP_AREA))
        crop_x, crop_y = self.R.uniform(-1, 1, size=2) * (1 - scale)
        mirror = -1.0 if self.R.random_sample() < 0.5 else 1.0
        angle = math.radians(self.R.uniform(-ROTATION_DEGREES, ROTATION_DEGREES))
        # Coordinates span two units, so a share of the side counts twice.
        shift_x, shift_y = self.R.uniform(-2 * TRANSLATION, 2 * TRANSLATION, size=2)
        cos, sin = scale * math.cos(angle), scale * math.sin(angle)
        # Output -> undo shift -> undo rotation -> undo flip -> place in the crop.
        self._theta = torch.tensor(
            [
                [mirror * cos, mirror * sin, crop_x - mirror * (cos * shift_x + sin * shift_y)],
                [-sin, cos, crop_y + sin * shift_x - cos * shift_y],
            ],
            dtype=torch.float32,
        )

    def draw(self) -> Tensor:
        """Draws a view and returns its map, shape (2, 3)."""
        self.randomize()
        return self._theta

    def show(self, images: Tensor, views: Tensor) -> Tensor:
        """Shows images (b, c, s, s) in drawn views (b, 2, 3); a new tensor of the same shape."""
        return self._resample(images, views)

    def __call__(self, image: Tensor) -> Tensor:
        """Shows an image (c, s, s) in a newly drawn view."""
        return self.show(image[None], self.draw()[None])[0]


def augmentation(image_size: int, seed: int) -> Compose:
    """The random transforms of training, for one image at a time.

    Crop of 70 to 100 percent of the area, horizontal flip, rotation within 15 degrees, translation
    by up to a tenth of the side, then brightness and contrast within 20 percent, clipped to [0, 1].

    Args:
        image_size: Side s of the images in pixels.
        seed: Root of all draws; the same seed and images give the same sequence.

    Returns:
        Maps an image (c, s, s) in [0, 1] to another of the same shape and range.
    """
    transform = Compose(
        [
            RandomView(image_size),
            RandScaleIntensity(factors=BRIGHTNESS, prob=1.0),
            RandScaleIntensityFixedMean(factors=CONTRAST, prob=1.0, fixed_mean=True),
            ScaleIntensityRange(a_min=0.0, a_max=1.0, b_min=0.0, b_max=1.0, clip=True),
            EnsureType(track_meta=False),
        ]
    )
    return transform.set_random_state(seed)


def augment_batch(images: Tensor, transform: Compose) -> Tensor:
    """Augments each image of a batch with its own draws.

    Gives to the bit what the transform gives image by image (a test compares): the draws come in
    the same order, and only the arithmetic is done for the whole batch at once, which is 2 to 6
    times faster.

    Args:
        images: In [0, 1], shape (b, c, s, s), on any device; b may be 0, as in Poisson sampling.
        transform: From `augmentation`.

    Returns:
        A new tensor of the same shape, on the same device.
    """
    if not len(images):
        return images.clone()
    view, brightness, contrast = cast(
        tuple[RandomView, RandScaleIntensity, RandScaleIntensityFixedMean],
        tuple(transform.transforms[:3]),
    )
    views = torch.stack([view.draw() for _ in images]).to(images.device)  # (b, 2, 3)
    augmented = view.show(images, views)  # (b, c, s, s)
    augmented.mul_(_factors(brightness, augmented))
    # Image by image: a sum over a batch may add in another order.
    means = torch.stack([image.mean() for image in augmented]).reshape(-1, 1, 1, 1)
    augmented.sub_(means).mul_(_factors(contrast, augmented)).add_(means)
    return augmented.clamp_(0, 1)


def _factors(transform: RandScaleIntensity | RandScaleIntensityFixedMean, images: Tensor) -> Tensor:
    """Draws what each image's intensities are multiplied with, shape (b, 1, 1, 1)."""
    drawn: list[float] = []
    for _ in images:
        transform.randomize()
        drawn.append(1 + cast(float, transform.factor))
    return images.new_tensor(drawn).reshape(-1, 1, 1, 1)


def normalise(batch: Tensor) -> Tensor:
    """Subtracts ImageNet's channel means and divides by its deviations.

    Args:
        batch: In [0, 1], shape (b, c, h, w). With c = 1 the averages over the channels serve.

    Raises:
        DataError: Neither one nor three channels.
    """
    channels = batch.shape[1]
    if channels not in (1, 3):
        raise DataError(f"channels={channels} expected 1 or 3", "prepare the images first")
    mean, std = batch.new_tensor(IMAGENET_MEAN), batch.new_tensor(IMAGENET_STD)
    if channels == 1:
        mean, std = mean.mean(), std.mean()
    return (batch - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1)  # (b, c, h, w)
