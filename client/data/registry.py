"""From a declared data source to images: the one place that knows every kind of data set.

Invariant: `load` returns checked data or raises one error that a person can act on; it falls back
to nothing and downloads only where the source says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from client.data.download import md5_of
from client.data.manifest import ImageDataset
from client.data.medmnist import (
    fetch,
    find_npz,
    medmnist_info,
    medmnist_path,
    read_npz,
    refuse_multi_label,
)
from client.data.npz import read_npz_layout, require_npz
from client.data.phantom import phantom
from client.data.source import NPZ, PHANTOM, DataSource


def load(source: DataSource, sites: Sequence[str]) -> ImageDataset:
    """Loads the images that a data source declares.

    Args:
        source: What to load.
        sites: Phantom: the sites to generate. Files: with one name, all examples belong to it; with
            several, the examples belong to none yet, and a partition deals them out.

    Returns:
        The images with their manifest and, for files, their provenance.

    Raises:
        DataError: The data are missing, unreadable, altered, multi-label or not what was declared.
    """
    if source.dataset == PHANTOM:
        return phantom(sites, source.patients_per_site, source.stored_size, source.seed)
    site = sites[0] if len(sites) == 1 else ""
    if source.dataset == NPZ:
        assert source.file is not None  # DataSource demands it for dataset=npz
        return _own_file(source.file.expanduser(), source.classes, site)
    info = medmnist_info(source.dataset)
    refuse_multi_label(info)
    size = source.stored_size
    wanted = medmnist_path(info, size, source.data_dir)
    find = fetch if source.download and not wanted.exists() else find_npz
    path = find(info.name, size, source.data_dir)
    return read_npz(path, info, size, allow_altered=source.allow_altered, site=site)


def _own_file(path: Path, classes: tuple[str, ...], site: str) -> ImageDataset:
    require_npz(path)
    return read_npz_layout(path, dataset=NPZ, classes=classes, md5=md5_of(path), site=site)
