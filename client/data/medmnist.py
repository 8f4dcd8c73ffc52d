"""The MedMNIST data sets: facts, finding, fetching, reading.

Source: Yang et al., Scientific Data 10, 2023. Published facts lie in `medmnist.toml`. Altered
copies of these files circulate under the official names, so every file's MD5 is compared with the
published one before its content is used.

Invariant: a file with another MD5 is never read unless the caller said `allow_altered`, and then
the log and the provenance say so.
"""

from __future__ import annotations

import logging
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from types import MappingProxyType

from client.data.download import download
from client.data.keyed import PUBLIC_KEY
from client.data.manifest import ImageDataset
from client.data.npz import identified, read_npz_layout
from strategies.cli import nearest
from strategies.errors import DataError

logger = logging.getLogger(__name__)

SIZES = (28, 64, 128, 224)
DATA_DIR_VARIABLE = "FEDERATION_DATA"
CACHE_DIR = Path("~/.cache/medmamba-federation")


@dataclass(frozen=True)
class DatasetInfo:
    """Published facts of one data set.

    Attributes:
        name: MedMNIST's name, which is also the file's.
        title: What the images show.
        task: MedMNIST's word for the kind of labels.
        modality: How the images were made.
        channels: 1 (grey) or 3 (RGB).
        classes: Class names in label order.
        examples: Number of images per split.
        licence: Licence of the images.
        md5: MD5 of the official file per image size.
        sites: Where the images come from, as far as it is told; never per image.
        tested: What the reader was tested on.
    """

    name: str
    title: str
    task: str
    modality: str
    channels: int
    classes: tuple[str, ...]
    examples: Mapping[str, int]
    licence: str
    md5: Mapping[int, str]
    sites: str
    tested: str

    @property
    def multi_label(self) -> bool:
        """Whether an image may carry several labels."""
        return self.task.startswith("multi-label")

    def file_name(self, size: int) -> str:
        """Name of the official file of an image size."""
        return f"{self.name}.npz" if size == SIZES[0] else f"{self.name}_{size}.npz"


@cache
def medmnist_facts() -> Mapping[str, DatasetInfo]:
    """All data sets in `medmnist.toml`, by name."""
    return MappingProxyType(
        {
            name: DatasetInfo(
                name=name,
                title=table["title"],
                task=table["task"],
                modality=table["modality"],
                channels=table["channels"],
                classes=tuple(table["classes"]),
                examples=table["examples"],
                licence=table["licence"],
                md5={int(size): md5 for size, md5 in table["md5"].items()},
                sites=table.get("sites", "none: the files do not tell where an image is from"),
                tested=table.get("tested", "official-layout miniature"),
            )
            for name, table in _published().items()
            if isinstance(table, dict)
        }
    )


def record_url() -> str:
    """Address of the official files; holds `{file}`."""
    return _published()["record-url"]


@cache
def _published() -> dict:
    text = resources.files("client.data").joinpath("medmnist.toml").read_text("utf-8")
    return tomllib.loads(text)


def medmnist_info(name: str) -> DatasetInfo:
    """The facts of one data set.

    Raises:
        DataError: No data set has this name.
    """
    facts = medmnist_facts()
    if name not in facts:
        raise DataError(f"dataset={name} expected one of {', '.join(facts)}", nearest(name, facts))
    return facts[name]


def data_directory(data_dir: Path | None) -> Path:
    """The folder of data files: the one given, else FEDERATION_DATA, else the user's cache."""
    if data_dir is not None:
        return data_dir.expanduser()
    return Path(os.environ.get(DATA_DIR_VARIABLE) or CACHE_DIR).expanduser()


def medmnist_path(info: DatasetInfo, size: int, data_dir: Path | None) -> Path:
    """Where the file of a data set belongs, whether or not it is there."""
    return data_directory(data_dir) / info.file_name(checked_size(size))


def find_npz(name: str, size: int = 28, data_dir: Path | None = None) -> Path:
    """Finds the file of a data set.

    Args:
        name: MedMNIST's name.
        size: Image side, one of SIZES.
        data_dir: Where to look; None means FEDERATION_DATA, else the user's cache.

    Raises:
        DataError: Unknown name or size, or no such file there.
    """
    info = medmnist_info(name)
    path = medmnist_path(info, size, data_dir)
    if not path.is_file():
        raise DataError(
            f"file={path.name} not found in {path.parent}",
            "allow the download (in a file `download = true`, on the command line "
            f"`--set data.download=true`), copy it from {_url(info, size)}, or name its folder "
            f"with data-dir or the variable {DATA_DIR_VARIABLE}",
        )
    return path


def fetch(name: str, size: int = 28, data_dir: Path | None = None) -> Path:
    """Downloads the official file of a data set, continuing an earlier attempt.

    Args:
        name: MedMNIST's name.
        size: Image side, one of SIZES.
        data_dir: Where it goes; None means FEDERATION_DATA, else the user's cache.

    Returns:
        The file, whose MD5 is the published one.

    Raises:
        DataError: Unknown name or size, or the download failed.
    """
    info = medmnist_info(name)
    return download(_url(info, size), medmnist_path(info, size, data_dir), info.md5[size])


def read_npz(
    path: Path,
    info: DatasetInfo,
    size: int = 28,
    *,
    cache_dir: Path,
    allow_altered: bool = False,
    site: str = "",
    key: bytes = PUBLIC_KEY,
    dedupe: bool = False,
) -> ImageDataset:
    """Reads a MedMNIST file.

    Args:
        path: The file.
        info: Facts of its data set.
        size: Which of the published sizes it is.
        cache_dir: Where its images are kept.
        allow_altered: Accept a file whose MD5 is not the published one, with a warning.
        site: The site that all examples belong to.
        key: The site's key, for the examples' ids.
        dedupe: Keep one of several identical images; otherwise they are only counted.

    Returns:
        The images of all splits; `provenance` tells the MD5 and whether it is the official one.

    Raises:
        DataError: A multi-label data set, an unreadable or altered file, or one whose content
            contradicts the published facts.
    """
    refuse_multi_label(info)
    expected, file = info.md5[checked_size(size)], identified(path)
    actual = file.md5
    if actual != expected:
        if not allow_altered:
            raise DataError(
                f"{path.name} md5={actual} expected={expected}; altered",
                f"get the official file from {_url(info, size)}, "
                "or accept this one with allow-altered = true",
            )
        logger.warning(
            "file=%s md5=%s expected=%s altered file allowed", path.name, actual, expected
        )
    return read_npz_layout(
        file,
        dataset=info.name,
        classes=info.classes,
        cache_dir=cache_dir,
        official=actual == expected,
        channels=info.channels,
        site=site,
        key=key,
        dedupe=dedupe,
    )


def refuse_multi_label(info: DatasetInfo) -> None:
    """Refuses a data set whose images carry several labels."""
    if info.multi_label:
        raise DataError(
            f"dataset={info.name} task={info.task} is multi-label, which is not supported yet",
            "choose a single-label data set",
        )


def checked_size(size: int) -> int:
    """Refuses an image side that MedMNIST is not published in; returns it otherwise."""
    if size not in SIZES:
        raise DataError(
            f"image-size={size} expected one of {', '.join(map(str, SIZES))}",
            "MedMNIST is published in these sizes only",
        )
    return size


def _url(info: DatasetInfo, size: int) -> str:
    return record_url().format(file=info.file_name(size))
