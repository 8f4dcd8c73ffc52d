"""Image formation of the phantom: from tissue to the grey image of an ultrasound scanner.

Tissue layers and a lesion give an echo level in decibel at each place. Complex Gaussian scatterers
of that strength, blurred by the scanner's point spread function, give an envelope with
Rayleigh-distributed, correlated speckle; attenuation with depth and log compression give the grey
image (Wagner et al., IEEE Trans. Sonics Ultrason. 30, 1983).

Invariant: an image follows from its `Anatomy`, the `Scanner` and the generator's draws; how many
images are rendered at once changes no pixel. Coordinates are shares of the image side, x across and
z in depth; shapes are (n, h, w), with parameters shaped (n, 1, 1) to combine with them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from client.data.manifest import ImageArray

# Images rendered at once; bounds memory, changes no pixel.
RENDER_CHUNK = 32
# Grain and blur are given in pixels of this size and scale with the image.
REFERENCE_SIZE = 64

Floats = npt.NDArray[np.floating]


class Scanner(NamedTuple):
    """How one site's machine draws tissue.

    Attributes:
        gain: Added to every echo, dB.
        dynamic_range: Span between black and white, dB.
        gamma: Exponent of the grey curve.
        axial_grain: Speckle size along depth, standard deviation in pixels at REFERENCE_SIZE.
        lateral_grain: Speckle size across, in the same unit.
        blur: Smoothing of the grey image, in the same unit.
        attenuation: Loss from the top to the bottom of the image, dB.
        noise_floor: Level of electronic noise, dB.
    """

    gain: float
    dynamic_range: float
    gamma: float
    axial_grain: float
    lateral_grain: float
    blur: float
    attenuation: float
    noise_floor: float


class Anatomy(NamedTuple):
    """What each of n images shows; lengths are shares of the image side, levels are dB.

    Lesion values of a normal patient are drawn too and then given no weight (`lesion` = 0), so that
    every class uses the same draws.
    """

    fat_depth: Floats  # (n,)
    muscle_depth: Floats  # (n,)
    levels: Floats  # (n, 3): fat, gland, muscle
    tilt: Floats  # (n, 3, 3): amplitude, frequency and phase of the waves in the layer boundaries
    texture: Floats  # (n, j, i): coarse grid of the tissue's brightness relief
    fibres: Floats  # (n, j, i): coarse grid whose zero crossings carry bright fibres
    strength: Floats  # (n, 2): of relief and fibres
    lesion: Floats  # (n,): 1 where there is one
    position: Floats  # (n, 2): lateral, depth
    radii: Floats  # (n, 2): lateral, axial
    rotation: Floats  # (n,): radian
    lobes: Floats  # (n, k, 2): amplitude and phase of contour harmonics
    spicules: Floats  # (n, k, 3): height, angle, width
    margin: Floats  # (n,): softness of the edge, share of the radius
    depression: Floats  # (n,): how much darker than its surroundings
    halo: Floats  # (n,): brightness of the rim
    posterior: Floats  # (n,): brightening (or, below zero, shadow) beneath the lesion
    lobule: Floats  # (n, 5): a distractor: lateral, depth, two radii, level
    band: Floats  # (n, 3): a distractor shadow: lateral position, width, level


def render(
    anatomy: Anatomy, style: Scanner, image_size: int, rng: np.random.Generator
) -> ImageArray:
    """Renders one image per row of the anatomy.

    Args:
        anatomy: What each image shows.
        style: The scanner.
        image_size: Side of the images in pixels.
        rng: Draws speckle, image by image.

    Returns:
        Grey images, shape (n, h, w).
    """
    count = len(anatomy.lesion)
    images = np.empty((count, image_size, image_size), dtype=np.uint8)
    for start in range(0, count, RENDER_CHUNK):
        chunk = slice(start, start + RENDER_CHUNK)
        level = _echo_level(Anatomy(*(values[chunk] for values in anatomy)), image_size)
        images[chunk] = _scan(level, style, rng)
    return images


def _echo_level(anatomy: Anatomy, image_size: int) -> Floats:
    """Strength of the echo from each place, dB, shape (n, h, w)."""
    centres = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    x, z = centres[None, None, :], centres[None, :, None]
    level = _layers(anatomy, x, z) + _distractors(anatomy, x, z)
    return level + _lesion(anatomy, x, z, level)


def _boundary(tilt: Floats, x: Floats) -> Floats:
    amplitude, frequency, phase = (tilt[:, :, i, None] for i in range(3))  # (n, k, 1)
    return (amplitude * np.sin(2 * np.pi * frequency * x + phase)).sum(axis=1, keepdims=True)


def _relief(grid: Floats, x: Floats, z: Floats) -> Floats:
    """A smooth random field of unit variance through a coarse grid of nodes, shape (n, h, w)."""

    def weights(places: Floats, nodes: int) -> Floats:
        distance = places.reshape(-1, 1) * (nodes - 1) - np.arange(nodes, dtype=np.float32)
        bumps = np.exp(-(distance**2))
        return bumps / np.sqrt((bumps**2).sum(axis=1, keepdims=True))

    return weights(z, grid.shape[1]) @ grid @ weights(x, grid.shape[2]).T


def _layers(anatomy: Anatomy, x: Floats, z: Floats) -> Floats:
    fat, gland, muscle = (anatomy.levels[:, i, None, None] for i in range(3))
    fat_depth, muscle_depth = (
        depth + _boundary(anatomy.tilt, x)  # (n, 1, w)
        for depth in _columns(anatomy.fat_depth, anatomy.muscle_depth)
    )
    level = fat + (gland - fat) * _step(z - fat_depth, 0.015)
    level += (muscle - gland) * _step(z - muscle_depth, 0.015)
    level += 9 * _ridge(z - 0.02, 0.018)  # skin
    level += 6 * _ridge(z - fat_depth, 0.01) + 9 * _ridge(z - muscle_depth, 0.012)  # fasciae
    relief, bright = _columns(*anatomy.strength.T)
    texture = _relief(anatomy.texture, x, z)
    fibres = _ridge(_relief(anatomy.fibres, x, z), 0.25)
    # Fibres fade in and out with the tissue around them.
    return level + relief * texture + bright * fibres * _step(texture, 0.7)


def _distractors(anatomy: Anatomy, x: Floats, z: Floats) -> Floats:
    """A fat lobule and a shadow from above, in every class."""
    x0, z0, rx, rz, depth = _columns(*anatomy.lobule.T)
    radius = np.hypot((x - x0) / rx, (z - z0) / rz)
    centre, width, dark = _columns(*anatomy.band.T)
    return depth * _step(1 - radius, 0.12) + dark * _ridge(x - centre, width) * _step(z - 0.1, 0.1)


def _lesion(anatomy: Anatomy, x: Floats, z: Floats, surroundings: Floats) -> Floats:
    """What the lesion adds to its surroundings, dB, shape (n, h, w)."""
    x0, z0 = _columns(*anatomy.position.T)
    rx, rz = _columns(*anatomy.radii.T)
    cos, sin = _columns(np.cos(anatomy.rotation), np.sin(anatomy.rotation))
    u = ((x - x0) * cos + (z - z0) * sin) / rx
    v = ((z - z0) * cos - (x - x0) * sin) / rz
    radius = np.hypot(u, v) / _contour(anatomy, np.arctan2(v, u))

    margin, depression, halo, posterior = _columns(
        anatomy.margin, anatomy.depression, anatomy.halo, anatomy.posterior
    )
    inside = _step(1 - radius, margin)
    # The lesion has its own, flatter texture: most of the surrounding relief is replaced.
    added = inside * (-depression - 0.7 * (surroundings - surroundings.mean((1, 2), keepdims=True)))
    added += halo * _ridge(radius - 1.2, 0.2) * (1 - inside)
    beneath = _step(1 - np.abs(x - x0) / (0.9 * rx), 0.15) * _step(z - z0 - 0.5 * rz, 0.02)
    added += posterior * beneath * (1 - inside)
    return added * anatomy.lesion[:, None, None]


def _contour(anatomy: Anatomy, angle: Floats) -> Floats:
    """Radius of the lesion's outline at each angle, relative to its ellipse, shape (n, h, w)."""
    outline = np.ones_like(angle)
    for harmonic, lobe in enumerate(np.moveaxis(anatomy.lobes, 1, 0), start=2):
        amplitude, phase = _columns(*lobe.T)
        outline += amplitude * np.cos(harmonic * angle + phase)
    for spicule in np.moveaxis(anatomy.spicules, 1, 0):
        height, direction, width = _columns(*spicule.T)
        outline += height * np.exp((np.cos(angle - direction) - 1) / width**2)
    return np.maximum(outline, 0.3)


def _scan(level: Floats, style: Scanner, rng: np.random.Generator) -> ImageArray:
    """Turns echo levels into what the scanner shows, shape (n, h, w)."""
    count, image_size = level.shape[:2]
    scale = image_size / REFERENCE_SIZE
    depth = (np.arange(image_size, dtype=np.float32) / image_size)[None, :, None]
    scatter = rng.standard_normal((count, 2, image_size, image_size), dtype=np.float32)
    scatter *= _amplitude(level)[:, None]
    field = _smooth(scatter, style.axial_grain * scale, style.lateral_grain * scale, power=True)
    field *= _amplitude(-style.attenuation * depth)[:, None]
    power = (field**2).sum(axis=1) / 2 + _amplitude(2 * style.noise_floor)
    decibel = 10 * np.log10(power) + style.gain

    top = 16.0  # echoes above this level are shown white
    grey = np.clip((decibel - top) / style.dynamic_range + 1, 0, 1) ** style.gamma
    grey = _smooth(grey[:, None], style.blur * scale, style.blur * scale, power=False)[:, 0]
    return np.rint(255 * np.clip(grey, 0, 1)).astype(np.uint8)


def _smooth(images: Floats, axial: float, lateral: float, *, power: bool) -> Floats:
    """Gaussian smoothing along the last two axes, edges repeated.

    Args:
        images: Shape (n, c, h, w).
        axial: Standard deviation along h, pixels.
        lateral: Standard deviation along w, pixels.
        power: Keep the variance of noise instead of the level of a flat image.
    """
    for axis, deviation in ((2, axial), (3, lateral)):
        reach = int(np.ceil(3 * deviation))
        taps = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(deviation, 1e-6)) ** 2)
        taps /= np.sqrt((taps**2).sum()) if power else taps.sum()
        padding = [(0, 0)] * 4
        padding[axis] = (reach, reach)
        padded = np.pad(images, padding, mode="edge")
        size = images.shape[axis]
        images = np.zeros_like(images)
        for offset, tap in enumerate(taps.astype(np.float32)):
            window = [slice(None)] * 4
            window[axis] = slice(offset, offset + size)
            images += tap * padded[tuple(window)]
    return images


def _amplitude(decibel: Floats | float) -> Floats:
    return np.power(np.float32(10), np.float32(0.05) * np.asarray(decibel, dtype=np.float32))


def _columns(*values: Floats) -> tuple[Floats, ...]:
    """Shapes per-image values (n,) so that they combine with images: (n, 1, 1)."""
    return tuple(value[:, None, None] for value in values)


def _step(distance: Floats, softness: Floats | float) -> Floats:
    """Rises from 0 to 1 where distance crosses zero."""
    return 0.5 + 0.5 * np.tanh(distance / softness)


def _ridge(distance: Floats, width: Floats | float) -> Floats:
    """1 at distance zero, falling off over the width."""
    return np.exp(-0.5 * (distance / width) ** 2)
