"""The official archives of the catalogue's sets: finding, fetching, unpacking.

Invariant: an archive is unpacked beside itself into a folder of its own name, which appears there
only when it is complete; nothing is ever written outside it. What no reader needs (macOS's extra
files, spreadsheets, hidden files) stays inside. An archive that exists unpacked is left alone.
"""

from __future__ import annotations

import lzma
import os
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from client.data import medmnist
from client.data.catalogue import Entry
from client.data.download import download, md5_of
from strategies.cli import progress
from strategies.errors import ConfigError, DataError
from strategies.files import held, sync_folder

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"})
_NEEDED = PICTURES | {".csv", ".zip"}
# Pictures are compressed already: an archive that grows this much on unpacking is no official one.
MAX_GROWTH = 50
MAX_MEMBERS = 500_000
# The official archives have one folder around the data and one around the images.
DEPTH = 3
# What zipfile raises on broken archives; RuntimeError stands for encrypted members.
_BROKEN = (
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    ValueError,
)


def folders(root: Path, depth: int = DEPTH) -> Iterator[Path]:
    """A folder and those below it, level by level, in name order; unreadable ones are left out.

    The depth bounds it, so a loop of links ends too.
    """
    level = [root]
    for step in range(depth + 1):
        yield from level
        if step < depth:
            level = [inner for folder in level for inner in _inner(folder)]


def _inner(folder: Path) -> list[Path]:
    try:
        names, _ = listed(folder)
    except OSError:
        return []
    return [folder / name for name in names if not name.startswith(("_", "."))]


def listed(folder: Path) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, in order; what is neither is left out.

    Raises:
        OSError: The folder cannot be read.
    """
    found: tuple[list[str], list[str]] = ([], [])
    with os.scandir(folder) as entries:
        for inner in entries:
            try:
                if inner.is_dir() or inner.is_file():  # no pipe: opening one would wait
                    found[0 if inner.is_dir() else 1].append(inner.name)
            except OSError:  # a link to itself
                continue
    return sorted(found[0]), sorted(found[1])


def fetch(entry: Entry, data_dir: Path | None, size: int = 28) -> tuple[Path, bool]:
    """Downloads a set's official file unless it is there; continues an earlier attempt.

    Args:
        entry: The data set.
        data_dir: Where it goes; None means FEDERATION_DATA, else the user's cache.
        size: Image side of a MedMNIST set.

    Returns:
        The file, and whether it was there already.

    Raises:
        DataError: The set is private, or the download failed, or another file has its name.
    """
    if entry.access == "private":
        raise DataError(f"dataset={entry.name} is private and cannot be fetched", entry.how)
    if not entry.file_backed:
        path = medmnist.medmnist_path(medmnist.medmnist_info(entry.name), size, data_dir)
        if not path.exists():
            return medmnist.fetch(entry.name, size, data_dir), False
        expected, actual = entry.md5[path.name], md5_of(path)
        if actual != expected:
            raise DataError(
                f"{path.name} md5={actual} expected={expected}; altered",
                "move the file away and run it again",
            )
        return path, True
    path = medmnist.data_directory(data_dir) / entry.archive
    if path.exists():
        return path, True
    return download(entry.download, path, entry.md5.get(entry.archive)), False


def unpack_official(entry: Entry, root: Path) -> None:
    """Unpacks the official archives at and below a folder, and those inside them.

    Raises:
        DataError: An archive is damaged, unsafe, or cannot be written out.
    """
    wanted = {name.casefold() for name in (entry.archive, *entry.inner_archives) if name}
    for _ in range(2):  # the second time for those inside the first ones
        for folder in folders(root):
            try:
                names = [name for name in listed(folder)[1] if name.casefold() in wanted]
            except OSError:
                continue
            for name in names:
                target = (folder / name).with_suffix("")
                if not target.exists():
                    unpack(folder / name, target)


def unpack(archive: Path, target: Path) -> None:
    """Unpacks an archive into a folder that appears when it is complete.

    A single top folder of the target's name is left out, so that `x.zip` with `x/a.png` and one
    with `a.png` give the same `x/a.png`.

    Raises:
        DataError: The archive is damaged, encrypted, names a place outside itself, claims to grow
            beyond all measure, or cannot be written out.
    """
    hint = "fetch it again, or unpack it by hand and name the folder with data-dir"
    busy = ConfigError(
        f"archive={archive.name} is being unpacked by another process", "wait for it to end"
    )
    partial = target.with_name(f".{target.name}.part")
    try:
        with held(target.with_name(f".{target.name}.lock"), busy):
            if target.exists():
                return
            shutil.rmtree(partial, ignore_errors=True)
            try:
                with zipfile.ZipFile(archive) as opened:
                    _write(opened, _members(opened, archive, target.name), archive, partial)
                os.replace(partial, target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            sync_folder(target.parent)
    except _BROKEN as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"archive={archive.name} cannot be unpacked: {reason}", hint) from error
    except OSError as error:
        reason = error.strerror or str(error)
        raise DataError(
            f"archive={archive.name} cannot be unpacked into {target.parent} ({reason})",
            "make room there, or unpack it by hand elsewhere and name the folder with data-dir",
        ) from error


def _members(
    opened: zipfile.ZipFile, archive: Path, name: str
) -> dict[PurePosixPath, zipfile.ZipInfo]:
    """What is to be written, by its place in the target; one bad member refuses them all."""
    infos = [info for info in opened.infolist() if info.filename[-1:] not in ("", "/")]
    size = archive.stat().st_size
    if len(infos) > MAX_MEMBERS or sum(info.file_size for info in infos) > MAX_GROWTH * size:
        raise DataError(
            f"archive={archive.name} claims more than {MAX_MEMBERS} files, or more than "
            f"{MAX_GROWTH} times its size unpacked",
            "it is not the official archive; fetch it again",
        )
    places: dict[PurePosixPath, zipfile.ZipInfo] = {}
    for info in infos:
        place = PurePosixPath(info.filename.replace("\\", "/"))
        if _leaves(place) or stat.S_ISLNK(info.external_attr >> 16):
            raise DataError(
                f"archive={archive.name} names a place outside itself, or holds a link",
                "it is not the official archive; fetch it again",
            )
        hidden = any(part.startswith((".", "__MACOSX")) for part in place.parts)
        if place.suffix.lower() in _NEEDED and not hidden:
            places[place] = info
    if not places:
        raise DataError(
            f"archive={archive.name} holds no pictures and no table",
            "it is not the official archive; fetch it again",
        )
    if all(len(p.parts) > 1 and p.parts[0].casefold() == name.casefold() for p in places):
        return {PurePosixPath(*place.parts[1:]): info for place, info in places.items()}
    return places


def _write(
    opened: zipfile.ZipFile,
    places: dict[PurePosixPath, zipfile.ZipInfo],
    archive: Path,
    partial: Path,
) -> None:
    needed = sum(info.file_size for info in places.values())
    free = shutil.disk_usage(partial.parent).free
    if needed > free:
        raise DataError(
            f"archive={archive.name} needs {needed} bytes unpacked, {free} are free",
            "make room, or unpack it elsewhere and name the folder with data-dir",
        )
    with progress() as bar:
        task = bar.add_task(f"unpacking {archive.name}", total=len(places))
        for place, info in places.items():
            path = partial / place
            path.parent.mkdir(parents=True, exist_ok=True)
            # zipfile reads no more than the declared size and compares the checksum at its end.
            with opened.open(info) as source, path.open("xb") as file:
                shutil.copyfileobj(source, file, 1 << 20)
            bar.advance(task)


def _leaves(place: PurePosixPath) -> bool:
    """Whether a member's name leads out of the folder that it is unpacked into."""
    return place.is_absolute() or ".." in place.parts or ":" in "".join(place.parts[:1])
