"""Where a site's images come from: the data section of a site file or a scenario.

Invariant: a `DataSource` that exists names a known data set and holds only settings that this data
set uses; a setting without effect is refused, never ignored. It stays at the site.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, model_validator

from client.data.medmnist import SIZES, checked_size, medmnist_facts
from client.data.phantom import MIN_IMAGE_SIZE
from strategies.cli import nearest
from strategies.errors import DataError
from strategies.run_config import Section, kebab

PHANTOM = "phantom"
NPZ = "npz"
PHANTOM_IMAGE_SIZE = 64


def dataset_names() -> tuple[str, ...]:
    """Every name that `dataset` may take."""
    return (PHANTOM, NPZ, *medmnist_facts())


class DataSource(Section):
    """One source of labelled images.

    Raises:
        DataError: An unknown data set, or settings that do not belong together.
    """

    dataset: str = Field(PHANTOM, description="phantom, npz, or the name of a MedMNIST data set")
    image_size: int | None = Field(
        None,
        gt=0,
        description="side of the stored images, pixels: MedMNIST 28 (absent), 64, 128 or 224; "
        "phantom 64 (absent) or any from 16; the run's model.image-size is what the model sees",
    )
    data_dir: Path | None = Field(
        None,
        strict=False,
        description="MedMNIST: folder of the files, relative to the file it stands in; absent: "
        "$FEDERATION_DATA, else the cache",
    )
    allow_altered: bool = Field(
        False, description="MedMNIST: accept a file whose MD5 is not the published one"
    )
    download: bool = Field(
        False, description="MedMNIST: fetch the official file when it is not there"
    )
    file: Path | None = Field(
        None,
        strict=False,
        description="npz: the site's own file in MedMNIST's layout, relative to the file it "
        "stands in",
    )
    classes: tuple[str, ...] = Field(
        (), strict=False, description="npz: class names in label order, at least two"
    )
    patients_per_site: Annotated[int, Field(gt=0)] = Field(
        40, description="phantom: generated patients per site, 2 to 4 images each"
    )
    seed: Annotated[int, Field(ge=0)] = Field(0, description="phantom: root of every draw")

    @model_validator(mode="after")
    def _belong_together(self) -> Self:
        if self.dataset not in dataset_names():
            raise DataError(
                f"dataset={self.dataset} expected one of {', '.join(dataset_names())}",
                nearest(self.dataset, dataset_names()),
            )
        used = {
            PHANTOM: {"image_size", "patients_per_site", "seed"},
            NPZ: {"file", "classes"},
        }.get(self.dataset, {"image_size", "data_dir", "allow_altered", "download"})
        fields = type(self).model_fields
        for name in sorted(fields.keys() - used - {"dataset"}):
            if getattr(self, name) != fields[name].default:
                setting = f"{kebab(name)}={getattr(self, name)}"
                raise DataError(
                    f"{setting} has no effect with dataset={self.dataset}",
                    f"remove {kebab(name)}, or name the data set it is meant for",
                )
        if self.dataset == NPZ and not (self.file and self.classes):
            raise DataError(
                "dataset=npz expected file and classes",
                'add file = "PATH" and classes = ["first", "second"] in label order',
            )
        if self.dataset == NPZ and len(self.classes) < 2:
            raise DataError(
                f"classes={', '.join(self.classes)}: expected at least two classes",
                "name every class in label order, also one that this site has no images of",
            )
        if self.dataset in medmnist_facts():
            checked_size(self.stored_size)
        elif self.dataset == PHANTOM and self.stored_size < MIN_IMAGE_SIZE:
            raise DataError(
                f"image-size={self.stored_size} expected at least {MIN_IMAGE_SIZE}",
                "raise image-size",
            )
        return self

    @property
    def stored_size(self) -> int:
        """Side of the stored images in pixels, where the data set leaves a choice."""
        default = PHANTOM_IMAGE_SIZE if self.dataset == PHANTOM else SIZES[0]
        return self.image_size or default
