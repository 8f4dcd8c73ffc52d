"""The phantom is reproducible, split by patient, different per site, and shows what it claims."""

import numpy as np
import pytest

from client.data import ultrasound
from client.data.phantom import CLASSES, draw_anatomy, phantom, scanner
from client.data.ultrasound import Anatomy, Scanner, render
from strategies.errors import DataError

PLAIN = Scanner(
    gain=0,
    dynamic_range=60,
    gamma=1,
    axial_grain=0.5,
    lateral_grain=1.0,
    blur=0.0,
    attenuation=0,
    noise_floor=-80,
)


@pytest.fixture(scope="module")
def data():
    return phantom(["A", "B", "C"], patients_per_site=30, image_size=32, seed=0)


def tissue(**changes) -> Anatomy:
    """One image of even tissue with a round lesion in the middle, all signs switched off."""
    values = {
        "fat_depth": [-1],
        "muscle_depth": [2],
        "levels": [[-10, -10, -10]],
        "tilt": np.zeros((1, 3, 3)),
        "texture": np.zeros((1, 4, 4)),
        "fibres": np.ones((1, 4, 4)) * 9,
        "strength": [[0, 0]],
        "lesion": [1],
        "position": [[0.5, 0.4]],
        "radii": [[0.15, 0.15]],
        "rotation": [0],
        "lobes": np.zeros((1, 5, 2)),
        "spicules": np.stack([np.zeros((1, 7))] * 2 + [np.ones((1, 7)) * 0.2], axis=-1),
        "margin": [0.05],
        "depression": [0],
        "halo": [0],
        "posterior": [0],
        "lobule": [[0.5, 0.5, 0.1, 0.1, 0]],
        "band": [[0.5, 0.1, 0]],
    }
    return Anatomy(**{k: np.asarray(v, np.float32) for k, v in (values | changes).items()})


def shown(style: Scanner = PLAIN, size: int = 128, **changes) -> np.ndarray:
    image = render(tissue(**changes), style, size, np.random.default_rng(0))[0]
    return image.astype(float)


def test_the_same_settings_give_the_same_bits(data):
    again = phantom(["A", "B", "C"], patients_per_site=30, image_size=32, seed=0)
    assert np.array_equal(again.images, data.images)
    assert again.manifest == data.manifest


def test_a_site_does_not_depend_on_the_others(data):
    alone = phantom(["B"], patients_per_site=30, image_size=32, seed=0)
    part = data.subset(data.manifest.rows(site="B"))
    assert np.array_equal(alone.images, part.images)
    assert alone.manifest == part.manifest


def test_seed_and_site_change_the_images(data):
    first = data.images[data.manifest.rows(site="A")[:5]]
    other_seed = phantom(["A"], patients_per_site=30, image_size=32, seed=1)
    assert not np.array_equal(other_seed.images[:5], first)
    assert not np.array_equal(data.images[data.manifest.rows(site="B")[:5]], first)
    assert other_seed.manifest.fingerprint() != data.manifest.fingerprint()


def test_sites_with_the_same_scanner_still_have_other_patients(monkeypatch):
    monkeypatch.setattr("client.data.phantom.scanner", lambda site: PLAIN)
    one, other = (phantom([site], 6, 32).images for site in "AB")
    assert not np.array_equal(one[:12], other[:12])


def test_rendering_in_chunks_changes_no_pixel(data, monkeypatch):
    monkeypatch.setattr(ultrasound, "RENDER_CHUNK", 7)
    again = phantom(["A"], patients_per_site=30, image_size=32, seed=0)
    assert np.array_equal(again.images, data.images[data.manifest.rows(site="A")])


def test_every_patient_has_two_to_four_views_of_one_class_in_one_split(data):
    for patient in data.manifest.patients:
        views = [e for e in data.manifest.examples if e.patient == patient]
        assert 2 <= len(views) <= 4
        assert len({(e.label, e.split, e.site) for e in views}) == 1


def test_each_site_holds_every_class_split_60_20_20_by_patient(data):
    for site in "ABC":
        patients = {e.patient: e for e in data.manifest.examples if e.site == site}
        split_of = [e.split for e in patients.values()]
        assert [split_of.count(s) for s in ("train", "val", "test")] == [18, 6, 6]
        labels = [e.label for e in patients.values()]
        assert [labels.count(c) for c in range(3)] == [10, 10, 10]
        train = data.manifest.subset(data.manifest.rows(split="train", site=site))
        assert train.class_counts().min() > 0
    assert data.manifest.classes == CLASSES == ("normal", "benign", "malignant")


def test_the_image_size_is_the_one_asked_for():
    for size in (16, 40):
        data = phantom(["A"], patients_per_site=2, image_size=size)
        assert data.images.shape[1:] == (size, size)
        assert data.images.dtype == np.uint8


def test_larger_images_show_the_same_anatomy():
    small, large = (phantom(["A"], 8, size, seed=3).images.astype(float) for size in (32, 128))
    shrunk = large.reshape(len(large), 32, 4, 32, 4).mean((2, 4))
    for one, other in zip(shrunk, small, strict=True):
        blocks = [image.reshape(8, 4, 8, 4).mean((1, 3)).ravel() for image in (one, other)]
        assert np.corrcoef(*blocks)[0, 1] > 0.8


def test_a_site_keeps_its_scanner_and_sites_differ(data):
    assert scanner("A") == scanner("A")
    assert len({scanner(site) for site in "ABCDE"}) == 5
    brightness = [data.images[data.manifest.rows(site=site)].mean() for site in "ABC"]
    assert max(brightness) - min(brightness) > 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], 3), "sites=.* expected distinct names"),
        ((["A", "A"], 3), "sites=.* expected distinct names"),
        ((["A"], 0), "patients_per_site=0 expected at least 1"),
        ((["A"], 3, 8), "image_size=8 expected at least 16"),
        ((["A"], 3, 64, -1), "seed=-1 expected at least 0"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(DataError, match=message):
        phantom(*arguments)


def test_speckle_is_log_compressed_rayleigh_and_correlated_along_the_grain():
    image = shown(lesion=[0])[20:]
    # A Rayleigh envelope has a standard deviation of 5.57 dB whatever its strength.
    assert image.std() == pytest.approx(5.57 / PLAIN.dynamic_range * 255, rel=0.1)
    assert 0.3 < correlation(image, 0) < correlation(image, 1) < 0.98


@pytest.mark.parametrize("decibel", [6.0, 14.0])
def test_a_lesion_is_darker_than_its_surroundings_by_its_depression(decibel):
    image = shown(depression=[decibel])
    centre, beside = image[44:58, 58:70].mean(), image[44:58, 5:35].mean()
    assert beside - centre == pytest.approx(decibel / PLAIN.dynamic_range * 255, abs=6)


@pytest.mark.parametrize("decibel", [5.0, -8.0])
def test_the_posterior_sign_brightens_or_shadows_what_lies_beneath(decibel):
    image = shown(posterior=[decibel])
    beneath, beside = image[80:120, 58:70].mean(), image[80:120, 5:35].mean()
    above = image[12:38, 58:70].mean()
    assert beneath - beside == pytest.approx(decibel / PLAIN.dynamic_range * 255, abs=6)
    assert above == pytest.approx(image[12:38, 5:35].mean(), abs=6)


@pytest.mark.parametrize(
    "signs",
    [
        {"lobes": np.stack([np.ones((1, 5)) * 0.15, np.zeros((1, 5))], axis=-1)},
        {"spicules": np.stack([np.ones((1, 7)), *[np.ones((1, 7)) * 0.2] * 2], axis=-1)},
        {"margin": [0.5]},
        {"halo": [8]},
        {"radii": [[0.1, 0.2]]},
    ],
)
def test_every_sign_shows_and_only_where_there_is_a_lesion(signs):
    assert not np.array_equal(shown(depression=[14], **signs), shown(depression=[14]))
    without = {"lesion": [0], "depression": [14], "posterior": [9]}
    assert np.array_equal(shown(**without, **signs), shown(**without))


@pytest.mark.parametrize(
    ("change", "sign"), [({"gain": 6.0}, 1), ({"gamma": 1.5}, -1), ({"attenuation": 20.0}, -1)]
)
def test_the_scanner_decides_how_bright_the_image_is(change, sign):
    difference = shown(PLAIN._replace(**change)).mean() - shown().mean()
    assert sign * difference > 10


def test_attenuation_darkens_with_depth():
    image = shown(PLAIN._replace(attenuation=20.0))
    assert image[10:30].mean() - image[100:].mean() > 30


def correlation(image: np.ndarray, axis: int) -> float:
    """Correlation of neighbouring pixels along an axis."""
    one, other = np.delete(image, 0, axis), np.delete(image, -1, axis)
    return float(np.corrcoef(one.ravel(), other.ravel())[0, 1])


def test_blur_softens_in_both_directions():
    sharp, soft = shown()[20:], shown(PLAIN._replace(blur=1.5))[20:]
    for axis in (0, 1):
        assert 1 - correlation(soft, axis) < 0.5 * (1 - correlation(sharp, axis))


def test_skin_is_a_bright_line_on_top():
    image = shown(lesion=[0], size=256)
    assert image[2:9].mean() > image[20:60].mean() + 10


def test_malignant_patients_have_spicules_and_benign_ones_none():
    labels = [CLASSES.index("benign")] * 20 + [CLASSES.index("malignant")] * 20
    anatomy = draw_anatomy(np.arange(40), labels, np.random.default_rng(0))
    tallest = anatomy.spicules[:, :, 0].max(axis=1)
    assert tallest[:20].max() == 0
    assert tallest[20:].mean() > 0.15


def test_fibres_and_relief_vary_the_tissue():
    even = shown().std()
    nodes = np.random.default_rng(1).standard_normal((1, 6, 4))
    assert shown(texture=nodes, strength=[[6, 0]]).std() > 1.1 * even
    assert shown(fibres=nodes, strength=[[0, 20]]).mean() > shown().mean() + 3


def rank_auc(scores: np.ndarray, positive: np.ndarray) -> float:
    ranks = np.argsort(np.argsort(scores)) + 1
    count = positive.sum()
    return (ranks[positive].sum() - count * (count + 1) / 2) / (count * (~positive).sum())


def test_brightness_alone_does_not_tell_the_class_but_dark_spots_do():
    data = phantom(["A", "B", "C"], patients_per_site=60, image_size=64, seed=0)
    images, labels = data.images.astype(float), data.manifest.labels
    for feature in (images.mean((1, 2)), images.std((1, 2))):
        for label in range(3):
            assert 0.3 < rank_auc(feature, labels == label) < 0.7
    # The darkest 8x8 block of the middle depths against the rest of its row finds lesions.
    blocks = images.reshape(-1, 8, 8, 8, 8).mean((2, 4))[:, 2:5]
    spots = (np.median(blocks, axis=2) - blocks.min(axis=2)).max(axis=1)
    assert rank_auc(spots, labels > 0) > 0.7
