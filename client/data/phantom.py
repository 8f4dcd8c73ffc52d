"""An ultrasound-like data set made by code: for demonstrations and tests, no download, no patient.

Images are simulated breast ultrasound (`ultrasound.py` forms them; this file draws what they show).
Classes differ by what a radiologist looks at (BI-RADS): a benign lesion is oval, smooth, wider than
tall and brightens what lies below it; a malignant one is irregular, spiculated, taller and casts a
shadow. The signs overlap, and brightness and distractors vary in every class.

Invariant: a site's images follow from (seed, site, patients_per_site, image_size) alone, so adding
a site changes no other site, and all views of one patient show the same lesion. A site's scanner
follows from its name, whatever the seed.

It stands in for no clinical data: a result on it says that the software works, nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from client.data.manifest import Example, ImageArray, ImageDataset, Manifest, split_patients
from client.data.ultrasound import Anatomy, Floats, Scanner, render
from strategies.errors import DataError
from strategies.seeds import derive_seed

CLASSES = ("normal", "benign", "malignant")
SPLIT_FRACTIONS = (0.6, 0.2, 0.2)
VIEWS_PER_PATIENT = (2, 4)
MIN_IMAGE_SIZE = 16


def phantom(
    sites: Sequence[str], patients_per_site: int, image_size: int = 64, seed: int = 0
) -> ImageDataset:
    """Generates the phantom data set of some sites.

    Patients are spread evenly over the classes; each has 2 to 4 views; the split is 60/20/20 by
    patient within each site.

    Args:
        sites: Names of the sites; each name stands for one scanner.
        patients_per_site: Patients at each site.
        image_size: Side of the square images in pixels.
        seed: Root of every draw.

    Returns:
        Grey images (n, image_size, image_size) of all sites, in the order of the sites.

    Raises:
        DataError: No site, a site named twice, or a size or count that is too small.
    """
    if not sites or len(set(sites)) != len(sites):
        raise DataError(f"sites={list(sites)} expected distinct names", "name each site once")
    for name, value, least in (
        ("patients_per_site", patients_per_site, 1),
        ("image_size", image_size, MIN_IMAGE_SIZE),
        ("seed", seed, 0),
    ):
        if value < least:
            raise DataError(f"{name}={value} expected at least {least}", f"raise {name}")
    images: list[ImageArray] = []
    examples: list[Example] = []
    for site in sites:
        rng = np.random.default_rng(derive_seed(seed, "phantom", site))
        owners, labels = _patients(patients_per_site, rng)
        anatomy = draw_anatomy(owners, labels, rng)
        images.append(render(anatomy, scanner(site), image_size, rng))
        examples.extend(_examples(site, owners, labels, f"phantom:{seed}:{image_size}", seed))
    return ImageDataset(Manifest("phantom", CLASSES, tuple(examples)), np.concatenate(images))


def scanner(site: str) -> Scanner:
    """The scanner of a site; the same for a name in every run."""
    rng = np.random.default_rng(derive_seed(0, "scanner", site))
    return Scanner(
        gain=rng.uniform(-4, 4),
        dynamic_range=rng.uniform(46, 62),
        gamma=rng.uniform(0.8, 1.5),
        axial_grain=rng.uniform(0.4, 0.7),
        lateral_grain=rng.uniform(0.6, 1.2),
        blur=rng.uniform(0.4, 0.8),
        attenuation=rng.uniform(8, 26),
        noise_floor=rng.uniform(-45, -32),
    )


def _patients(count: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], list[int]]:
    """Returns the patient of each image and the class of each patient."""
    fewest, most = VIEWS_PER_PATIENT
    labels = rng.permutation(np.arange(count) % len(CLASSES))
    return np.repeat(np.arange(count), rng.integers(fewest, most + 1, size=count)), labels.tolist()


def _examples(
    site: str, owners: npt.NDArray[np.int64], labels: Sequence[int], source: str, seed: int
) -> list[Example]:
    patients = [f"{site}/patient-{owner:04d}" for owner in owners]
    image_labels = [labels[owner] for owner in owners]
    splits = split_patients(patients, image_labels, SPLIT_FRACTIONS, seed)
    return [
        Example(f"{source}/{patient}/{index:05d}", source, index, label, patient, site, split)
        for index, (patient, label, split) in enumerate(
            zip(patients, image_labels, splits, strict=True)
        )
    ]


def draw_anatomy(
    owners: npt.NDArray[np.int64], labels: Sequence[int], rng: np.random.Generator
) -> Anatomy:
    """Draws patients, then a view of its patient for each image.

    Args:
        owners: The patient of each image, shape (n,), from 0.
        labels: The class of each patient.
        rng: Source of every draw.
    """
    patients, views = len(labels), len(owners)
    kind = np.asarray(labels)
    malignant = kind == CLASSES.index("malignant")

    def patient(low: float, high: float, *shape: int) -> Floats:
        return rng.uniform(low, high, (patients, *shape))[owners]

    def view(low: float, high: float, *shape: int) -> Floats:
        return rng.uniform(low, high, (views, *shape))

    def by_class(benign: tuple[float, float], cancer: tuple[float, float], least: float) -> Floats:
        """Draws a normal value per patient, mean and deviation by class, no lower than least."""
        mean, deviation = np.where(malignant, np.array([cancer]).T, np.array([benign]).T)
        return np.maximum(rng.normal(mean, deviation), least)[owners]

    def grid(axial: int, lateral: int) -> Floats:
        """Draws standard normal nodes that the views of a patient share in part."""
        shared = rng.standard_normal((patients, axial, lateral))[owners]
        return 0.8 * shared + 0.6 * rng.standard_normal(shared.shape)

    size = patient(0.09, 0.2) * view(0.85, 1.1)
    aspect = by_class((0.68, 0.1), (0.95, 0.18), least=0.45)
    irregularity = by_class((0.03, 0.025), (0.11, 0.045), least=0)
    spiculation = by_class((0, 0), (0.35, 0.2), least=0)
    drawn = Anatomy(
        fat_depth=patient(0.1, 0.28) * view(0.85, 1.15),
        muscle_depth=patient(0.65, 1.1) + view(-0.04, 0.04),
        levels=_table(patient(-12, -3), patient(-3, 3), patient(-10, -2)),
        tilt=_table(view(0.0, 0.025, 3), view(0.3, 2.2, 3), view(0, 2 * np.pi, 3)),
        texture=grid(8, 6),
        fibres=grid(18, 5),
        strength=_table(patient(1.5, 5), patient(3, 14)),
        lesion=(kind != CLASSES.index("normal"))[owners],
        position=_table(patient(0.28, 0.72), patient(0.32, 0.55)) + view(-0.07, 0.07, 2),
        radii=_table(size, size * aspect),
        rotation=patient(-0.3, 0.3) + view(-0.15, 0.15),
        lobes=_table(irregularity[:, None] * patient(0.3, 1.0, 5), patient(0, 2 * np.pi, 5)),
        spicules=_table(
            spiculation[:, None] * view(0.2, 1.0, 7),
            patient(0, 2 * np.pi, 7),
            patient(0.08, 0.2, 7),
        ),
        margin=by_class((0.09, 0.03), (0.16, 0.05), least=0.04),
        depression=by_class((13, 4), (14, 4), least=4),
        halo=by_class((1.5, 1.5), (3, 2), least=0),
        posterior=by_class((3.5, 2.5), (-6, 4), least=-20) + view(-1.5, 1.5),
        lobule=_table(
            view(0, 1), view(0.1, 0.75), view(0.05, 0.18), view(0.03, 0.09), view(-10, 2)
        ),
        band=_table(view(0, 1), view(0.03, 0.14), np.minimum(view(-9, 5), 0)),
    )
    return Anatomy(*(values.astype(np.float32) for values in drawn))


def _table(*columns: Floats) -> Floats:
    return np.stack(columns, axis=-1)
