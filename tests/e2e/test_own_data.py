"""Three hospitals whose images are of three kinds train one model: DICOM, a class folder, an npz.

The images are made: a bright disc on noise is *malignant*, a dark one *benign*.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fakes.dicoms import NAME, uid, write_dicom
from fakes.federations import Federation, federation_in

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

CLASSES = ("benign", "malignant")
PER_CLASS = 15
SIDE = 40


def lesion(label: int, number: int) -> np.ndarray:
    """An image in [0, 1], (h, w) float."""
    generator = np.random.default_rng((label, number))
    rows, columns = np.mgrid[:SIDE, :SIDE] - generator.integers(14, 26, 2)[:, None, None]
    disc = rows**2 + columns**2 < 60
    return np.clip(0.5 + 0.1 * generator.normal(size=disc.shape) + disc * (0.6 * label - 0.3), 0, 1)


def dicom_tree(folder: Path) -> None:
    """CT files in the hospital's own folders, and a table that names their series."""
    with (folder / "labels.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["SeriesInstanceUID", "label"])
        for label, name in enumerate(CLASSES):
            for number in range(PER_CLASS):
                study = f"{name}{number}"
                hounsfield = 400 * lesion(label, number) - 200
                write_dicom(
                    folder / "pacs" / study / "image.dcm",
                    (hounsfield + 1024).astype(np.int16),
                    study=study,
                    RescaleIntercept=-1024,
                    RescaleSlope=1,
                )
                table.writerow([uid(study, "1"), name])


def class_folder(folder: Path) -> None:
    """PNG files, in the hospital's own words for the classes."""
    for label, name in enumerate(("gutartig", "boesartig")):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(PER_CLASS):
            pixels = (255 * lesion(label, 100 + number)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "images" / name / f"Mueller{number}.png")


def npz_file(folder: Path) -> None:
    """One archive with splits of its own."""
    arrays = {}
    for split, numbers in {"train": range(9), "val": range(9, 12), "test": range(12, 15)}.items():
        pairs = [(label, 200 + number) for label in (0, 1) for number in numbers]
        arrays[f"{split}_images"] = np.stack(
            [(255 * lesion(*pair)).astype(np.uint8) for pair in pairs]
        )
        arrays[f"{split}_labels"] = np.array([[label] for label, _ in pairs], np.uint8)
    np.savez(folder / "images.npz", **arrays)


SOURCES = {
    "A": (
        dicom_tree,
        'dataset = "dicom"\nfolder = "a/pacs"\nlabels = "a/labels.csv"\nwindow = "0/400"\n',
    ),
    "B": (
        class_folder,
        'dataset = "folder"\nfolder = "b/images"\n'
        'label-map = { gutartig = "benign", boesartig = "malignant" }\n',
    ),
    "C": (npz_file, 'dataset = "npz"\nfile = "c/images.npz"\nclasses = ["benign", "malignant"]\n'),
}


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[Federation]:
    with federation_in(tmp_path) as federation:
        for site, (write, section) in SOURCES.items():
            folder = federation.folder / "sites" / site.lower()
            folder.mkdir()
            write(folder)
            path = federation.folder / "sites" / f"{site}.toml"
            text = re.sub(
                r"\[data\].*?(?=\[limits\])", f"[data]\n{section}\n", path.read_text(), flags=re.S
            )
            path.write_text(f'task = "lesions"\n{text}')
        yield federation


def test_dicom_pictures_and_an_archive_train_one_model(federation: Federation) -> None:
    federation.start_superlink()
    for site in SOURCES:
        said = federation.call("client", "check", "--site", site).stdout
        assert re.search(r"^ok +data ", said, re.MULTILINE), said
    federation.start_sites()
    federation.call(
        *federation.run_words(
            dataset="lesions",
            classes="benign,malignant",
            model__num_classes=2,
            model__in_channels=1,
            strategy__min_sites=3,
            num_server_rounds=2,
            training__local_steps=40,
            training__batch_size=4,
            training__learning_rate=0.003,
        )
    )
    assert federation.outcomes() == {
        (server_round, site): "ok" for server_round in (1, 2) for site in SOURCES
    }
    summary = json.loads((federation.run_dir / "summary.json").read_text())
    assert {site: found["num_examples"] for site, found in summary["sites"].items()} == {
        "A": 6, "B": 6, "C": 6
    }  # fmt: skip
    # The task is easy, so a hospital whose labels or intensities are turned round would show.
    assert summary["worst_site"]["auc"] > 0.7, summary
    # Names of patients and files stay where they are.
    for path in [*federation.folder.glob("*.log"), *federation.run_dir.rglob("*")]:
        if path.is_file():
            content = path.read_bytes()
            assert NAME.encode() not in content
            assert b"Mueller" not in content
            assert b"image.dcm" not in content
