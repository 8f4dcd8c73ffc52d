"""A folder of classes: one folder a class, its pictures anywhere below.

Tolerated: one more folder around the classes; folders train, val and test around them (also
training, valid, validation, testing); class names of another case than the declared ones.

Invariant: nothing is decoded and nothing raises but a folder that is not there; whatever is not
used is counted. Each folder is read once, so loops of links end.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from client.data.labels import class_finder
from client.data.rows import Listing, Row
from client.data.splits import split_named
from strategies.errors import DataError

# By name alone: what a file holds is decided when it is decoded.
PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
MASK_STEM = re.compile(r"_mask(_\d+)?$", re.IGNORECASE)

HIDDEN_PREFIXES = (".", "__MACOSX")

HIDDEN = "hidden file or folder"
MASK = "segmentation mask (_mask)"
NO_PICTURE = "no picture by its name"
IRREGULAR = "broken link, or neither file nor folder"
SEEN = "link to a folder that is read anyway"
NOT_UTF8 = "folder whose name is not UTF-8"
NO_CLASS = "picture outside the class folders"
OTHER_CLASS = "picture of a class that is not declared"


def list_folder(root: Path, classes: Sequence[str] = (), dataset: str = "folder") -> Listing:
    """List the pictures of a folder of classes.

    Args:
        root: Holds the class folders, or one folder or the splits around them.
        classes: Class names in label order; empty takes the folders' names, sorted.
        dataset: Name of the data set.

    Returns:
        One row a picture, without patients. Splits are those of the folders, or none.

    Raises:
        DataError: The folder is not there or cannot be read.
    """
    require_folder(root)
    listing = Listing(dataset, root, tuple(classes), [])
    tree = Tree(root, listing.skipped)
    find = class_finder(classes)
    names: dict[str, str] = {}
    for split, name, folder in _class_folders(tree, classes):
        # Without declared classes, train/Normal and test/normal are one class.
        label = find(name) if classes else names.setdefault(name.casefold(), name)
        for file in tree.pictures_below(folder):
            if label is None:
                listing.skipped[OTHER_CLASS] += 1
            else:
                place = file.relative_to(root).as_posix()
                listing.rows.append(Row(place, 0, label, split=split))
    if not classes:
        listing.classes = tuple(sorted(names.values()))
    return listing


def require_folder(root: Path) -> None:
    """Refuse what is no folder that can be read.

    Raises:
        DataError: It is not there, no folder, or not this user's to read.
    """
    try:
        with os.scandir(root):
            return
    except OSError as error:
        raise DataError(
            f"folder={root} cannot be read ({error.strerror})",
            "check the path, and who may read the folder",
        ) from error


class Folder(NamedTuple):
    """Names in one folder, sorted."""

    pictures: list[str]
    folders: list[str]


class Tree:
    """A folder and those below it, each read once; what is not used is counted.

    A link to a folder elsewhere is followed. One to a folder inside the tree or around it is not:
    its pictures are counted where they lie.
    """

    def __init__(self, root: Path, skipped: Counter[str]) -> None:
        self.root, self._skipped = root, skipped
        self._real = root.resolve()
        self._seen: set[tuple[int, int]] = set()

    def read(self, folder: Path) -> Folder:
        """Return what lies in a folder; nothing when it was read before or cannot be read."""
        pictures: list[str] = []
        folders: list[str] = []
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in self._seen:
                self._skipped[SEEN] += 1
                return Folder([], [])
            self._seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                for entry in entries:
                    reason = self._reason(entry)
                    if reason:
                        self._skipped[reason] += 1
                    else:
                        (folders if entry.is_dir() else pictures).append(entry.name)
        except OSError as error:
            self._skipped[f"folder that cannot be read ({error.strerror})"] += 1
        return Folder(sorted(pictures), sorted(folders))

    def pictures_below(self, folder: Path) -> Iterator[Path]:
        """Yield the pictures in a folder and below, in the order of their names."""
        waiting = [folder]  # not by recursion: folders may lie deeper than Python's stack
        while waiting:
            current = waiting.pop()
            inside = self.read(current)
            yield from (current / name for name in inside.pictures)
            waiting += [current / name for name in reversed(inside.folders)]

    def count(self, reason: str, number: int) -> None:
        """Count what is left out for a reason that the tree does not see."""
        if number:
            self._skipped[reason] += number

    def _reason(self, entry: os.DirEntry[str]) -> str:
        """Why an entry is not used; empty when it is."""
        if entry.name.startswith(HIDDEN_PREFIXES):
            return HIDDEN
        try:
            if entry.is_dir():
                return SEEN if entry.is_symlink() and self._leads_back(entry.path) else ""
            if not entry.is_file():
                return IRREGULAR
        except OSError:  # a loop of links
            return IRREGULAR
        stem, suffix = os.path.splitext(entry.name)
        if suffix.lower() not in PICTURE_SUFFIXES:
            return NO_PICTURE
        return MASK if MASK_STEM.search(stem) else ""

    def _leads_back(self, link: str) -> bool:
        target = Path(os.path.realpath(link))
        return target.is_relative_to(self._real) or self._real.is_relative_to(target)


def _class_folders(tree: Tree, classes: Sequence[str]) -> Iterator[tuple[str, str, Path]]:
    """Yield split, name and path of each class folder; count what lies beside them."""
    find = class_finder(classes)
    top, inside = tree.root, tree.read(tree.root)
    if len(inside.folders) == 1 and not inside.pictures and not find(inside.folders[0]):
        # Either the one class, or a folder around the classes: those hold folders alone.
        within = Tree(tree.root, Counter()).read(tree.root / inside.folders[0])
        if within.folders and not within.pictures:
            top = tree.root / inside.folders[0]
            inside = tree.read(top)
    splits = {name: split_named(name) for name in inside.folders}
    by_split = "train" in splits.values() and not any(find(name) for name in splits if splits[name])
    outside = len(inside.pictures)
    for name in inside.folders:
        if not by_split:
            yield from _printable("", name, top / name, tree)
        elif splits[name]:
            within = tree.read(top / name)
            outside += len(within.pictures)
            for label in within.folders:
                yield from _printable(splits[name], label, top / name / label, tree)
        else:
            outside += sum(1 for _ in tree.pictures_below(top / name))
    tree.count(NO_CLASS, outside)


def _printable(split: str, name: str, path: Path, tree: Tree) -> Iterator[tuple[str, str, Path]]:
    try:
        name.encode()  # a class's name is printed, a file's is not
    except UnicodeEncodeError:
        tree.count(NOT_UTF8, 1)
    else:
        yield split, name, path
