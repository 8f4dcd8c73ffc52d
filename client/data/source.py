"""Where a site's images come from: the data section of a site file or a scenario.

Invariant: a `DataSource` that exists names a known data set and holds only settings that this data
set uses; a setting without effect is refused, never ignored. It stays at the site.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from client.data.catalogue import entry, names
from client.data.medmnist import SIZES, checked_size, medmnist_facts
from client.data.phantom import MIN_IMAGE_SIZE
from strategies.cli import nearest
from strategies.errors import DataError
from strategies.run_config import Section, kebab

PHANTOM = "phantom"
NPZ = "npz"
FOLDER = "folder"
CSV = "csv"
DICOM = "dicom"
PHANTOM_IMAGE_SIZE = 64

LabelKey = Literal[
    "sop-instance-uid", "series-instance-uid", "study-instance-uid", "accession-number", "file"
]
Frames = Literal["first", "middle", "all"]

WINDOW_PRESETS = ("lung", "bone", "brain", "soft-tissue")
WINDOW_WORDS = ("auto", "none", *WINDOW_PRESETS)
WINDOW_PATTERN = re.compile(r"(-?\d+(?:\.\d+)?)/(\d+(?:\.\d+)?)")

# The settings that hold a path; relative ones are relative to the file they stand in.
PATHS = ("data_dir", "file", "folder", "labels")

# What a source of single files uses beside where the files are.
_FILES = {"split_fractions", "seed", "dedupe", "max_unreadable_share", "label_map"}
_USED = {
    PHANTOM: {"image_size", "patients_per_site", "seed", "label_map"},
    NPZ: {"file", "classes", "dedupe", "label_map"},
    FOLDER: {"folder", "classes", *_FILES},
    CSV: {"file", "folder", "classes", *_FILES},
    DICOM: {"folder", "labels", "label_key", "frames", "window", "classes", *_FILES},
}
_MEDMNIST = {"image_size", "data_dir", "allow_altered", "download", "dedupe", "label_map"}
_CATALOGUE = {"data_dir", "download", "site_column", *_FILES}


def dataset_names() -> tuple[str, ...]:
    """Every name that `dataset` may take."""
    return (*_USED, *names())


class DataSource(Section):
    """One source of labelled images.

    Raises:
        DataError: An unknown data set, or settings that do not belong together.
    """

    dataset: str = Field(
        PHANTOM,
        description="phantom, npz, folder, csv, dicom, or a name of `python -m client data list`",
    )
    image_size: int | None = Field(
        None,
        gt=0,
        description="side of the stored images, pixels: MedMNIST 28 (absent), 64, 128 or 224; "
        "phantom 64 (absent) or any from 16; the run's model.image-size is what the model sees",
    )
    data_dir: Path | None = Field(
        None,
        strict=False,
        description="published sets: folder of the official files; absent: $FEDERATION_DATA, else "
        "the cache",
    )
    allow_altered: bool = Field(
        False, description="MedMNIST: accept a file whose MD5 is not the published one"
    )
    download: bool = Field(
        False, description="published sets: fetch the official file when it is not there"
    )
    site_column: str = Field(
        "",
        description="published sets that name one: what a simulation takes for a site; empty: the "
        "set's own choice",
    )
    file: Path | None = Field(
        None,
        strict=False,
        description="npz: the site's own file in MedMNIST's layout; csv: the table",
    )
    folder: Path | None = Field(
        None,
        strict=False,
        description="folder: holds one folder a class; csv: where the table's files are (absent: "
        "beside it); dicom: the tree, or where the DICOMDIR is",
    )
    labels: Path | None = Field(None, strict=False, description="dicom: the CSV of labels")
    label_key: LabelKey | None = Field(
        None,
        description="dicom: what the CSV of labels names an image by; absent: its first column's "
        "header, else the only one that matches the files",
    )
    frames: Frames = Field("middle", description="dicom: which images of a file of several")
    window: str = Field(
        "auto",
        description="dicom: auto (the file's own), none (the full range), CENTRE/WIDTH in "
        "Hounsfield units such as 40/400, or lung, bone, brain, soft-tissue",
    )
    classes: tuple[str, ...] = Field(
        (),
        strict=False,
        description="class names in label order, at least two; npz needs them; folder, csv and "
        "dicom: empty takes the names found, sorted",
    )
    label_map: dict[str, str] = Field(
        {}, description="own class name to the run's class name, where they differ"
    )
    split_fractions: tuple[float, float, float] = Field(
        (0.7, 0.1, 0.2),
        strict=False,
        description="shares of patients in train, val and test where the source names no split",
    )
    dedupe: bool = Field(
        False,
        description="keep one of several identical images, the test copy first; false: they are "
        "counted and told",
    )
    max_unreadable_share: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        0.05, description="largest share of unreadable images; more is refused"
    )
    patients_per_site: Annotated[int, Field(gt=0)] = Field(
        40, description="phantom: generated patients per site, 2 to 4 images each"
    )
    seed: Annotated[int, Field(ge=0)] = Field(
        0, description="root of every draw: the phantom's images, a split by patient"
    )

    @field_validator("window")
    @classmethod
    def _window(cls, value: str) -> str:
        numbers = WINDOW_PATTERN.fullmatch(value)
        if value not in WINDOW_WORDS and not (numbers and float(numbers[2]) >= 1):
            raise DataError(
                f"window={value} expected {', '.join(WINDOW_WORDS)} or CENTRE/WIDTH",
                'for example window = "40/400": 400 Hounsfield units wide around 40',
            )
        return value

    @field_validator("split_fractions")
    @classmethod
    def _shares(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        # Written so that a NaN fails.
        if not (min(value) >= 0 and value[0] > 0 and abs(sum(value) - 1) <= 1e-9):
            raise DataError(
                f"split-fractions={'/'.join(f'{share:g}' for share in value)} expected shares of "
                "train, val and test that sum to 1 with train above 0",
                "for example split-fractions = [0.7, 0.1, 0.2]",
            )
        return value

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.dataset not in dataset_names():
            raise DataError(
                f"dataset={self.dataset} expected one of {', '.join(dataset_names())}",
                nearest(self.dataset, dataset_names()),
            )
        self._require_effect()
        self._require_needed()
        self._require_classes()
        if self.site_column and self.site_column not in entry(self.dataset).site_columns:
            choices = entry(self.dataset).site_columns
            raise DataError(
                f"site-column={self.site_column} expected "
                f"{', '.join(choices) or 'none: the set tells no sites'}",
                nearest(self.site_column, choices) if choices else "remove site-column",
            )
        if self.dataset in medmnist_facts():
            checked_size(self.stored_size)
        elif self.dataset == PHANTOM and self.stored_size < MIN_IMAGE_SIZE:
            raise DataError(
                f"image-size={self.stored_size} expected at least {MIN_IMAGE_SIZE}",
                "raise image-size",
            )
        return self

    def _require_effect(self) -> None:
        fallback = _MEDMNIST if self.dataset in medmnist_facts() else _CATALOGUE
        fields = type(self).model_fields
        used = {"dataset", *_USED.get(self.dataset, fallback)}
        for name in sorted(fields.keys() - used):
            if getattr(self, name) != fields[name].default:
                setting = f"{kebab(name)}={getattr(self, name)}"
                raise DataError(
                    f"{setting} has no effect with dataset={self.dataset}",
                    f"remove {kebab(name)}, or name the data set it is meant for",
                )

    def _require_needed(self) -> None:
        needed, example = {
            NPZ: (
                ("file", "classes"),
                'file = "PATH" and classes = ["first", "second"] in label order',
            ),
            FOLDER: (("folder",), 'folder = "PATH", which holds one folder a class'),
            CSV: (("file",), 'file = "PATH", a table with the columns file and label'),
            DICOM: (
                ("folder", "labels"),
                'folder = "PATH", the DICOM files, and labels = "PATH", the CSV of their labels',
            ),
        }.get(self.dataset, ((), ""))
        if not all(getattr(self, name) for name in needed):
            raise DataError(
                f"dataset={self.dataset} expected {' and '.join(needed)}", f"add {example}"
            )

    def _require_classes(self) -> None:
        shown = f"classes={', '.join(self.classes)}"
        if len(self.classes) == 1:
            raise DataError(
                f"{shown}: expected at least two classes",
                "name every class in label order, also one that this site has no images of",
            )
        if len(set(self.classes)) < len(self.classes) or not all(map(str.strip, self.classes)):
            raise DataError(
                f"{shown}: expected no empty name and none twice",
                "name every class once, in label order",
            )

    @property
    def names_classes(self) -> bool:
        """Whether the label order is only that of the names found: another site's may differ."""
        return self.dataset in (FOLDER, CSV, DICOM) and not self.classes

    @property
    def stored_size(self) -> int:
        """Side of the stored images in pixels, where the data set leaves a choice."""
        default = PHANTOM_IMAGE_SIZE if self.dataset == PHANTOM else SIZES[0]
        return self.image_size or default
