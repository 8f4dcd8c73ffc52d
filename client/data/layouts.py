"""The official layouts of the file-backed sets, read as downloaded.

What is tolerated: archives still packed (unpacked once, beside themselves), a folder or two around
the data, another case of folder names, `_mask` files, what a table does not know. What is missing
or not understood is counted in the listing, never guessed.

Invariant: a row's label is one of the catalogue's classes, its file was there and not empty, and
its site can name a site of a federation.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from client.data.archives import PICTURES, fetch, folders, listed, unpack_official
from client.data.catalogue import Entry, catalogue, entry
from client.data.medmnist import DATA_DIR_VARIABLE
from client.data.official_tables import TABLES, UNKNOWN_SPLIT, table_path, table_rows
from client.data.rows import Listing, Row
from strategies.errors import DataError

RESOLUTION = "resolution"
# Kvasir's three groups. Of version 2's 8000 images 5138, 2122 and 740 are in them.
GROUPS = ((720 * 576, "upto-720x576"), (1280 * 1024, "upto-1280x1024"))
LARGEST_GROUP = "over-1280x1024"

MASK = "segmentation mask"
NO_PICTURE = "no picture by its name"
EMPTY = "empty file"
REPEATED = "file of a name that came before"
NOT_IN_TABLE = "file that the table does not name"
MISSING = "row whose file is missing"
REPEATED_ROW = "row of a file that came before"
UNKNOWN_LABEL = "row of an unknown class"
NO_SPLIT = "row whose split is neither 0 nor 1"
NO_SIZE = "file whose size cannot be read"
MOVED = "image of a patient at several sites, counted to the one with most"


def read(name: str, data_dir: Path, *, site_column: str = "", download: bool = False) -> Listing:
    """Lists the images of a file-backed set of the catalogue.

    Args:
        name: The catalogue's name.
        data_dir: Folder of the official files, packed or unpacked.
        site_column: What to take for a site, one of the entry's `site_columns`; empty takes the
            entry's default. A patient found at several sites is counted to the one with most of
            their images.
        download: Fetch the official archive when neither it nor its content is there.

    Returns:
        Rows with the catalogue's class names. A set with an official split has `train` and `test`;
        the others have none.

    Raises:
        DataError: An unknown name or column, no such folder, or no official files in it.
    """
    facts = entry(name)
    column = site_column or facts.default_site_column
    if column and column not in facts.site_columns:
        expected = ", ".join(facts.site_columns) or "none: the set tells no sites"
        raise DataError(
            f"site-column={column} expected {expected}",
            f"`python -m client data show {name}` says what a site may be",
        )
    if download and not _is_there(facts, data_dir):
        fetch(facts, data_dir)
    if not data_dir.is_dir():
        raise DataError(f"data-dir={data_dir} expected a folder", "check the path")
    reader = _with_table if name in TABLES else _class_folders
    return _one_site_a_patient(reader(facts, data_dir, column))


def _is_there(facts: Entry, data_dir: Path) -> bool:
    packed = bool(facts.archive) and (data_dir / facts.archive).exists()
    return packed or any(_ranked(facts, data_dir, _matches_of(facts)))


def located(facts: Entry, data_dir: Path) -> Path:
    """The folder that holds a set's table or class folders; unpacks its archives if need be.

    Raises:
        DataError: There is none.
    """
    is_root = _matches_of(facts)
    for attempt in range(2):
        best = max(_ranked(facts, data_dir, is_root), default=None)
        if best is not None:
            return best[-1]
        if attempt == 0:
            unpack_official(facts, data_dir)
    if facts.access == "private":
        raise DataError(f"dataset={facts.name} is private and not in {data_dir}", facts.how)
    raise DataError(
        f"dataset={facts.name} not found in {data_dir}: expected {facts.layout}",
        f"`python -m client data fetch {facts.name} --data-dir {data_dir}`, or name the folder "
        f"with data-dir or the variable {DATA_DIR_VARIABLE}",
    )


def _matches_of(facts: Entry) -> Callable[[Path], int]:
    """How many of a set's class folders, or the one table, a folder holds."""
    if facts.name in TABLES:
        return lambda folder: table_path(facts, folder) is not None
    return lambda folder: len(_class_paths(facts, folder))


def _ranked(
    facts: Entry, data_dir: Path, matches: Callable[[Path], int]
) -> Iterator[tuple[int, bool, int, Path]]:
    """Folders that may be the set's: most classes first, then the official name, then the first."""
    others = {e.folder for e in catalogue().values() if e.folder} - {facts.folder}
    enough = 1 if facts.name in TABLES else 2
    for turn, folder in enumerate(folders(data_dir)):
        inside = {data_dir.resolve().name, *folder.relative_to(data_dir).parts}
        found = matches(folder)
        # Kvasir's two versions have the same class folders.
        if found >= enough and not others & inside:
            yield found, facts.folder in inside, -turn, folder


def _class_paths(facts: Entry, folder: Path) -> dict[str, Path]:
    """The class folders in a folder, whatever their case."""
    wanted = {_plain(name): name for name in facts.classes}
    try:
        names, _ = listed(folder)
    except OSError:
        return {}
    return {wanted[_plain(name)]: folder / name for name in names if _plain(name) in wanted}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _class_folders(facts: Entry, data_dir: Path, column: str) -> Listing:
    """Reads one folder a class: CPN, Kvasir and the private sets."""
    root = located(facts, data_dir)
    listing = Listing(facts.name, root, tuple(facts.classes), [])
    paths = _class_paths(facts, root)
    for label in facts.classes:
        for path in _pictures(paths[label], listing.skipped) if label in paths else ():
            site = ""
            if column == RESOLUTION:
                site = _group(path)
                if not site:
                    listing.skipped[NO_SIZE] += 1
                    continue
            file = path.relative_to(root).as_posix()
            listing.rows.append(Row(file, 0, label, site=site))
    return listing


def _group(path: Path) -> str:
    """Which of the groups of resolutions a picture belongs to; empty when it cannot be told."""
    try:
        with Image.open(path) as image:
            pixels = image.width * image.height
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError):
        return ""
    return next((name for most, name in GROUPS if pixels <= most), LARGEST_GROUP)


def _with_table(facts: Entry, data_dir: Path, column: str) -> Listing:
    """Brings the rows of a set's table together with the files below the table's folder."""
    root = located(facts, data_dir)
    unpack_official(facts, root)
    listing = Listing(facts.name, root, tuple(facts.classes), [])
    files: dict[str, str] = {}
    for folder in folders(root):
        for path in _pictures(folder, listing.skipped, all_pictures=False):
            if path.name in files:
                listing.skipped[REPEATED] += 1
            else:
                files[path.name] = path.relative_to(root).as_posix()
    left = dict(files)
    for row in table_rows(facts, root, column):
        file = left.pop(row.file, None)
        if file is None:
            listing.skipped[REPEATED_ROW if row.file in files else MISSING] += 1
        elif row.label not in facts.classes:
            listing.skipped[UNKNOWN_LABEL] += 1
        elif row.split == UNKNOWN_SPLIT:
            listing.skipped[NO_SPLIT] += 1
        else:
            listing.rows.append(row._replace(file=file))
    if left:
        listing.skipped[NOT_IN_TABLE] += len(left)
    return listing


def _pictures(folder: Path, skipped: Counter[str], *, all_pictures: bool = True) -> list[Path]:
    """The pictures in a folder, in name order; counts what else lies there.

    Args:
        folder: Where to look, not below.
        skipped: Takes the counts.
        all_pictures: Whether all files there should be; around a table others are expected.
    """
    kept: list[Path] = []
    try:
        _, names = listed(folder)
    except OSError as error:
        skipped[f"folder that cannot be read ({error.strerror})"] += 1
        return kept
    for path in (folder / name for name in names if not name.startswith(".")):
        if path.suffix.lower() not in PICTURES:
            if all_pictures:
                skipped[NO_PICTURE] += 1
        elif re.search(r"_mask(_\d+)?$", path.stem.lower()):
            skipped[MASK] += 1
        elif _size(path) == 0:
            skipped[EMPTY] += 1
        else:
            kept.append(path)
    return kept


def _size(path: Path) -> int:
    """Bytes of a file; -1 where it cannot be told, and reading it will say why."""
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _one_site_a_patient(listing: Listing) -> Listing:
    """Counts every image of a patient to one site, so that no patient is at two."""
    seen: dict[str, Counter[str]] = {}
    for row in listing.rows:
        if row.patient:
            seen.setdefault(row.patient, Counter())[row.site] += 1
    home = {patient: min(c, key=lambda site: (-c[site], site)) for patient, c in seen.items()}
    moved = sum(row.site != home.get(row.patient, row.site) for row in listing.rows)
    if moved:
        listing.flagged[MOVED] += moved
        listing.rows = [row._replace(site=home.get(row.patient, row.site)) for row in listing.rows]
    return listing
