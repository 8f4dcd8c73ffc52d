"""The catalogue of published data sets: what each holds, who may use it, how it is obtained.

Invariant: facts only, from `catalogue.toml` and `medmnist.toml`; where no source was found an entry
says so and nothing is guessed. Reading, fetching and comparing are in `layouts.py`, `archives.py`
and `verify.py`.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import Field

from client.data.medmnist import SIZES, DatasetInfo, medmnist_facts
from strategies.cli import nearest
from strategies.errors import DataError
from strategies.run_config import Section

NOT_PUBLISHED = "not published"
# MedMNIST sets beside the sixteen.
BESIDE_THE_SIXTEEN = ("chestmnist", "tissuemnist")

_MEDMNIST_LAYOUT = (
    "one file {name}.npz ({name}_64, _128 and _224 for the larger sizes) with images and labels of "
    "train, val and test"
)
_LOSSES = {
    "multi-label": "binary cross-entropy of each finding, summed over the findings",
    "": "cross-entropy weighted by class",
}
_METRICS = {
    "multi-label": "AUC of each finding, averaged over the findings",
    "": "AUC, accuracy, balanced accuracy, precision, sensitivity, specificity, F1 (macro)",
}


class Entry(Section):
    """One published data set.

    Attributes:
        name: What `dataset` says in a site file or a scenario.
        title: What the images show.
        sixteen: Whether it is one of the sixteen sets of the MedMamba paper.
        task: Kind of labels.
        modality: How the images were made.
        channels: 1 (grey) or 3 (colour).
        classes: Class names in label order.
        class_counts: Published number of images per class; empty where only totals are published.
        examples: Published number of images per split; empty without an official split.
        patients: Published number of patients; 0 where it is not published.
        licence: Of the images.
        commercial: Whether the licence allows commercial use.
        url: Official page.
        access: `open` can be fetched; `private` has to be asked for.
        how: Where to ask for a private set.
        archive: Name of the official archive; empty for npz files.
        download: Its address.
        md5: MD5 of the official files, by name; empty where none is known.
        inner_archives: Archives inside the archive.
        folder: The folder that the archive holds.
        layout: The official files, in words.
        official_split: What the publisher split.
        split: Where train, val and test come from here.
        site_columns: What may be taken for a site.
        default_site_column: Which of them is, when nothing is said; empty: none.
        sites: The natural sites, in words.
        tested: What the reader was tested on.
    """

    name: str
    title: str
    sixteen: bool = True
    task: str = "multi-class"
    modality: str
    channels: Literal[1, 3]
    classes: Annotated[tuple[str, ...], Field(strict=False)]
    class_counts: dict[str, int] = Field(default={})
    examples: dict[str, int] = Field(default={})
    patients: int = 0
    licence: str
    commercial: Literal["yes", "no", "with written permission", "not published", "not verified"]
    url: str
    access: Literal["open", "private"] = "open"
    how: str = ""
    archive: str = ""
    download: str = ""
    md5: dict[str, str] = Field(default={})
    inner_archives: tuple[str, ...] = Field(default=(), strict=False)
    folder: str = ""
    layout: str
    official_split: str
    split: str
    site_columns: tuple[str, ...] = Field(default=(), strict=False)
    default_site_column: str = ""
    sites: str
    tested: str

    @property
    def images(self) -> int:
        """Published number of images."""
        return sum((self.examples or self.class_counts).values())

    @property
    def loss(self) -> str:
        """What training minimises."""
        return _LOSSES["multi-label" if self.multi_label else ""]

    @property
    def metrics(self) -> str:
        """What an evaluation tells."""
        return _METRICS["multi-label" if self.multi_label else ""]

    @property
    def multi_label(self) -> bool:
        """Whether an image may carry several labels; such a set cannot be trained on yet."""
        return self.task.startswith("multi-label")

    @property
    def file_backed(self) -> bool:
        """Whether the images are files of their own; otherwise the set is one npz file."""
        return self.name not in medmnist_facts()


@cache
def catalogue() -> Mapping[str, Entry]:
    """Every published data set by name, the file-backed ones first."""
    text = resources.files("client.data").joinpath("catalogue.toml").read_text("utf-8")
    entries = {
        name: Entry.model_validate(
            {"name": name, **table, "classes": list(counts), "class-counts": counts}
        )
        for name, table in tomllib.loads(text).items()
        for counts in (table["classes"],)
    }
    entries |= {name: _of_medmnist(info) for name, info in medmnist_facts().items()}
    return MappingProxyType(entries)


def names() -> tuple[str, ...]:
    """The names of all published data sets."""
    return tuple(catalogue())


def file_backed_names() -> tuple[str, ...]:
    """The names of those whose images are files of their own."""
    return tuple(name for name, entry in catalogue().items() if entry.file_backed)


def entry(name: str) -> Entry:
    """The entry of one data set.

    Raises:
        DataError: No published data set has this name.
    """
    known = catalogue()
    if name not in known:
        raise DataError(f"dataset={name} expected one of {', '.join(known)}", nearest(name, known))
    return known[name]


def _of_medmnist(info: DatasetInfo) -> Entry:
    return Entry(
        name=info.name,
        title=info.title,
        sixteen=info.name not in BESIDE_THE_SIXTEEN,
        task=info.task,
        modality=info.modality,
        channels=1 if info.channels == 1 else 3,
        classes=info.classes,
        examples=dict(info.examples),
        licence=info.licence,
        commercial="no" if "NC" in info.licence else "yes",
        url="https://zenodo.org/records/10519652",
        md5={info.file_name(size): info.md5[size] for size in SIZES},
        layout=_MEDMNIST_LAYOUT.format(name=info.name),
        official_split="train, val and test",
        split="official (the files hold no patient ids)",
        sites=info.sites,
        tested=info.tested,
    )
