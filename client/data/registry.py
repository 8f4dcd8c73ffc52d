"""From a declared data source to images: the one place that knows every kind of data set.

Invariant: `load` returns checked data or raises one error that a person can act on; it falls back
to nothing and downloads only where the source says so. What it keeps of a hospital's data (hashes,
prepared images) lies in the site's state folder and nowhere else.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client.data.build import SplitRule, build
from client.data.keyed import PUBLIC_KEY, site_data_key
from client.data.manifest import ImageDataset
from client.data.medmnist import (
    CACHE_DIR,
    DATA_DIR_VARIABLE,
    data_directory,
    fetch,
    find_npz,
    medmnist_facts,
    medmnist_info,
    medmnist_path,
    read_npz,
    refuse_multi_label,
)
from client.data.npz import identified, read_npz_layout
from client.data.phantom import phantom
from client.data.rows import Listing
from client.data.source import CSV, DICOM, FOLDER, NPZ, PHANTOM, DataSource

SITE_CACHE = "cache"


def load(source: DataSource, sites: Sequence[str], state_dir: Path | None = None) -> ImageDataset:
    """Loads the images that a data source declares.

    Args:
        source: What to load.
        sites: Phantom: the sites to generate. Files: with one name, all examples belong to it; with
            several, they belong to their natural site or to none, and a partition deals them out.
        state_dir: The hospital's state folder, for its key and caches. None in a simulation, where
            hashes of published data hide nothing and their caches lie beside them; somebody's own
            images have key and cache in their user's cache folder.

    Returns:
        The images with their manifest and, for single archives, their provenance.

    Raises:
        DataError: The data are missing, unreadable, altered, multi-label or not what was declared.
    """
    if source.dataset == PHANTOM:
        return phantom(sites, source.patients_per_site, source.stored_size, source.seed)
    site = sites[0] if len(sites) == 1 else ""
    is_own = source.dataset in (NPZ, FOLDER, CSV, DICOM)
    cache = cache_folder(state_dir, private=is_own)
    if source.dataset == NPZ or source.dataset in medmnist_facts():
        archive_key = PUBLIC_KEY if state_dir is None else site_data_key(state_dir)
        read = _own_file if source.dataset == NPZ else _medmnist
        return read(source, cache_dir=cache, site=site, key=archive_key, dedupe=source.dedupe)
    listing, options = listing_of(source)
    return build(
        listing,
        key=site_data_key(cache if state_dir is None else state_dir)
        if is_own or state_dir is not None
        else PUBLIC_KEY,
        split=SplitRule(source.split_fractions, source.seed),
        dedupe=source.dedupe,
        cache_dir=cache,
        site=site,
        max_unreadable_share=source.max_unreadable_share,
        options=options,
    )


def listing_of(source: DataSource) -> tuple[Listing, object]:
    """Lists a source of single files, without decoding any; beside it, how DICOM is decoded.

    Raises:
        DataError: The files, or the table that names them, are missing or not what was declared.
    """
    # Each reader is imported where it is needed: most sites need one.
    if source.dataset == FOLDER:
        from client.data.folder import list_folder

        assert source.folder is not None  # DataSource demands what its data set needs
        return list_folder(source.folder.expanduser(), source.classes), None
    if source.dataset == CSV:
        from client.data.table import list_table

        assert source.file is not None
        table = source.file.expanduser()
        root = source.folder.expanduser() if source.folder else table.parent
        return list_table(table, root, source.classes), None
    if source.dataset == DICOM:
        from client.data.dicom import DicomOptions
        from client.data.dicom_tree import list_dicom

        assert source.folder is not None
        assert source.labels is not None
        listing = list_dicom(
            source.folder.expanduser(),
            source.labels.expanduser(),
            label_key=source.label_key,
            frames=source.frames,
            classes=source.classes,
            window=source.window,
        )
        return listing, DicomOptions(source.window)
    from client.data import layouts

    listing = layouts.read(
        source.dataset,
        data_directory(source.data_dir),
        site_column=source.site_column,
        download=source.download,
    )
    return listing, None


def cache_folder(state_dir: Path | None, *, private: bool = False) -> Path:
    """Where manifests and prepared images are kept.

    A simulation keeps those of published data beside them, where it may write there.

    Args:
        state_dir: The hospital's state folder; None in a simulation.
        private: Whether the images are somebody's own: they go where their user alone may read.
    """
    if state_dir is not None:
        return state_dir / SITE_CACHE
    shared = os.environ.get(DATA_DIR_VARIABLE)
    if not private and shared and os.access(Path(shared).expanduser(), os.W_OK):
        return Path(shared).expanduser() / "cache"
    return CACHE_DIR.expanduser() / "images"


def _medmnist(source: DataSource, **how: Any) -> ImageDataset:
    info = medmnist_info(source.dataset)
    refuse_multi_label(info)
    size = source.stored_size
    wanted = medmnist_path(info, size, source.data_dir)
    find = fetch if source.download and not wanted.exists() else find_npz
    path = find(info.name, size, source.data_dir)
    return read_npz(path, info, size, allow_altered=source.allow_altered, **how)


def _own_file(source: DataSource, **how: Any) -> ImageDataset:
    assert source.file is not None  # DataSource demands it for dataset=npz
    file = identified(source.file.expanduser())
    return read_npz_layout(file, dataset=NPZ, classes=source.classes, **how)
