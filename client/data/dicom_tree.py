"""A hospital's DICOM as a listing: a folder tree or a DICOMDIR, joined with a table of labels.

Headers alone are read; `dicom_patients` makes patients of what they and the table say.

Invariant: every file found and every key of the table is either used or counted with a reason, and
what comes out does not depend on the order in which a file system lists its files. Patients and
UIDs stay in the listing's rows and in no reason, log or error.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Literal, NamedTuple, get_args

from pydicom import dcmread, uid

from client.data.dicom_file import DAMAGED_HEADER, NO_IMAGE, missing_image, quiet, read_header
from client.data.dicom_labels import LABEL_KEYS, Label, choose_key, read_labels
from client.data.dicom_patients import Claim, name_patients
from client.data.folder import require_folder
from client.data.pictures import EMPTY
from client.data.rows import Listing, Row, reasons
from client.data.workers import in_workers, num_workers
from strategies import cli
from strategies.errors import DataError

logger = logging.getLogger(__name__)

DICOMDIR = "DICOMDIR"

CLOSED_FOLDER = "folder cannot be read"
LOOP = "folder or file reached a second time by a link"
OUTSIDE = "file named by the DICOMDIR is outside its folder"
ABSENT = "file named by the DICOMDIR is not there"
ODD_NAME = "file name is not printable UTF-8"
SECOND_COPY = "second copy of an instance"
NO_LABEL = "image without a label"
NO_FILE = "label without an image"
CRASHED = "reading the header crashed"

BURNED_IN = "annotation burned into the pixels"
SECONDARY = "secondary capture"
NO_HOUNSFIELD = "window in Hounsfield units on an image that is not CT"
BROKEN_DICOMDIR = "DICOMDIR cannot be read: the folder was searched instead"

# Reading this many headers takes longer than starting workers.
MANY = 2000

# They have rows and columns, and are no pictures of a patient.
_NO_PICTURES = {
    str(uid.SegmentationStorage): "segmentation",
    str(uid.RTDoseStorage): "radiotherapy dose",
    str(uid.ParametricMapStorage): "parametric map",
}
_SECONDARY_CAPTURES = {
    uid.SecondaryCaptureImageStorage,
    uid.MultiFrameSingleBitSecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    uid.MultiFrameGrayscaleWordSecondaryCaptureImageStorage,
    uid.MultiFrameTrueColorSecondaryCaptureImageStorage,
}
_UIDS = tuple(LABEL_KEYS.values())[:-1]
_TAGS = (
    *("SOPClassUID", "PatientID", "IssuerOfPatientID", *_UIDS),
    *("Rows", "Columns", "NumberOfFrames", "BurnedInAnnotation", "Modality"),
)

Frames = Literal["first", "middle", "all"]


class _Image(NamedTuple):
    """What a header tells of an image file."""

    names: dict[str, str]
    patient_id: str
    issuer: str
    modality: str
    num_frames: int
    flags: tuple[str, ...]


def list_dicom(
    root: Path,
    labels: Path,
    *,
    label_key: str | None = None,
    frames: Frames = "middle",
    classes: Sequence[str] = (),
    window: str = "auto",
    dataset: str = "dicom",
) -> Listing:
    """Finds the labelled images of a folder.

    Args:
        root: Folder tree, or a folder that holds a DICOMDIR (or that file): then what it names.
        labels: CSV `key,label[,patient,split]`.
        label_key: One of `LABEL_KEYS`; None finds it out.
        frames: Which images of a file of several.
        classes: Class names in label order; empty takes the names found, sorted.
        window: How grey will be shown (`dicom.DicomOptions`), which does not fit every image.
        dataset: Name of the data set.

    Returns:
        One row per image, and the counts of what was left out or is worth a look.

    Raises:
        DataError: The folder or the table cannot be read, or too few of their keys meet.
    """
    if frames not in get_args(Frames):
        raise DataError(f"frames={frames} expected one of {', '.join(get_args(Frames))}")
    if root.name.upper() == DICOMDIR and root.is_file():
        root = root.parent
    table = read_labels(labels, classes)
    skipped, flagged, unreadable = Counter(table.skipped), Counter[str](), Counter[str]()
    files = _files(root, skipped, flagged, unreadable, leave_out=labels)
    images = dict(_images(root, files, skipped, unreadable))
    left_out = reasons(skipped + unreadable)
    if not images:
        raise DataError(
            f"dataset={dataset} images=0 expected at least one: {left_out or 'no file'}",
            "check the folder, and that its files are DICOM images",
        )
    key = choose_key(table, label_key, (image.names for image in images.values()))
    by_file = {file: table.labels.get(image.names[key]) for file, image in images.items()}
    used = {file: label for file, label in by_file.items() if label}
    skipped[NO_LABEL] += len(images) - len(used)
    without = len(table.labels.keys() - {images[file].names[key] for file in used})
    skipped[NO_FILE] += without
    if 2 * without > len(table.labels):
        raise DataError(
            f"labels={len(table.labels)} without_image={without} "
            f"unreadable_files={unreadable.total()} expected at most half without an image"
            + (f"; left out: {left_out}" if left_out else ""),
            "check folder and label-key, and keep the rows of this folder alone in the table",
        )
    claims = [_claim(image, by_file[file]) for file, image in images.items()]
    patients = dict(zip(images, name_patients(claims, flagged), strict=True))
    rows: list[Row] = []
    for file, label in used.items():
        image = images[file]
        flagged.update(image.flags)
        if image.modality != "CT" and window not in ("auto", "none"):
            flagged[NO_HOUNSFIELD] += 1
        chosen = {"first": [0], "middle": [image.num_frames // 2]}.get(frames)
        for frame in chosen or range(image.num_frames):
            rows.append(Row(file, frame, label.label, patients[file], "", label.split))
    found = tuple(classes) or tuple(sorted({row.label for row in rows}))
    logger.info("dataset=%s label-key=%s files=%d images=%d", dataset, key, len(files), len(rows))
    return Listing(dataset, root, found, rows, "dicom", +skipped, +flagged, unreadable)


def _files(
    root: Path,
    skipped: Counter[str],
    flagged: Counter[str],
    unreadable: Counter[str],
    leave_out: Path,
) -> list[str]:
    """Returns paths relative to the root, with forward slashes, sorted."""
    require_folder(root)
    named = [
        name
        for name in sorted(os.listdir(root))
        if name.upper() == DICOMDIR and (root / name).is_file()
    ]
    listed = _listed(root, root / named[0], skipped) if named else None
    if named and listed is None:
        flagged[BROKEN_DICOMDIR] += 1
    if listed is None:
        walked = _walk(root, skipped, unreadable)
        listed = [file for file in walked if not _same(root / file, leave_out)]
    usable = {file for file in listed if file.isprintable()}  # bytes that are not UTF-8 are not
    skipped[ODD_NAME] += len(set(listed) - usable)
    return sorted(usable)


def _walk(root: Path, skipped: Counter[str], unreadable: Counter[str]) -> Generator[str]:
    """Yields every file below, each once: links are followed, loops are not."""

    def closed(_: OSError) -> None:
        unreadable[CLOSED_FOLDER] += 1

    seen: set[tuple[int, int]] = set()

    def is_new(path: str) -> bool:
        try:
            status = os.stat(path)
        except OSError:
            return True  # a dead link or a loop of links: reading it will tell
        identity = (status.st_dev, status.st_ino)
        if identity in seen:
            skipped[LOOP] += 1
            return False
        seen.add(identity)
        return True

    is_new(str(root))
    for folder, folders, files in os.walk(root, followlinks=True, onerror=closed):
        # Real folders before links to them, so that the shorter path wins.
        inside = sorted(
            folders, key=lambda name: (os.path.islink(os.path.join(folder, name)), name)
        )
        folders[:] = [name for name in inside if is_new(os.path.join(folder, name))]
        for name in sorted(files):
            path = os.path.join(folder, name)
            if name.upper() != DICOMDIR and is_new(path):
                yield Path(path).relative_to(root).as_posix()


def _listed(root: Path, directory: Path, skipped: Counter[str]) -> list[str] | None:
    """Returns the files that a DICOMDIR names; None where it cannot be read."""
    # pydicom's FileSet refuses directories with damaged offsets; the records are all that is
    # needed. PS3.3 F.3: a file's name is a list of components below the DICOMDIR's folder.
    with quiet():
        try:
            records = dcmread(directory).DirectoryRecordSequence
            named = [record.get("ReferencedFileID") for record in records]
            parts = [[one] if isinstance(one, str) else list(one) for one in named if one]
        except Exception:
            return None
    files: list[str] = []
    top = root.resolve()
    names = functools.cache(_names)
    for components in parts:
        path = PureWindowsPath(*map(str, components))  # some writers join them by themselves
        file = _as_on_disk(top, path.as_posix(), names)
        if path.is_absolute() or not (top / (file or path.as_posix())).resolve().is_relative_to(
            top
        ):
            skipped[OUTSIDE] += 1
        elif file is None:
            skipped[ABSENT] += 1
        else:
            files.append(file)
    return files


def _as_on_disk(
    top: Path, file: str, names: Callable[[Path], Mapping[str, list[str]]]
) -> str | None:
    """Return how the disk spells a file; a CD may be mounted with lower-case names."""
    if os.path.lexists(top / file):
        return file
    place = top
    for part in PurePosixPath(file).parts:
        spelt = names(place).get(part.casefold(), [])
        if len(spelt) != 1:
            return None
        place /= spelt[0]
    return place.relative_to(top).as_posix()


def _names(folder: Path) -> dict[str, list[str]]:
    """Return the names in a folder by what they are without upper case."""
    found: dict[str, list[str]] = {}
    with suppress(OSError):
        for name in os.listdir(folder):
            found.setdefault(name.casefold(), []).append(name)
    return found


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _images(
    root: Path, files: list[str], skipped: Counter[str], unreadable: Counter[str]
) -> Generator[tuple[str, _Image]]:
    tasks = [(str(root), file) for file in files]
    looks: list[_Image | str] = [CRASHED] * len(files)
    with cli.progress() as progress:
        bar = progress.add_task("reading headers", total=len(files))
        workers = num_workers() if len(files) >= MANY else 0
        for position, image in in_workers(_look, tasks, crashed=CRASHED, workers=workers):
            looks[position] = image
            progress.advance(bar)
    instances: set[str] = set()
    for file, image in zip(files, looks, strict=True):
        instance = "" if isinstance(image, str) else image.names["sop-instance-uid"]
        if isinstance(image, str):
            # Any of these may have been an image.
            damaged = image in (DAMAGED_HEADER, CRASHED, EMPTY) or image.startswith("file cannot")
            (unreadable if damaged else skipped)[image] += 1
        elif instance in instances:
            skipped[SECOND_COPY] += 1
        else:
            instances |= {instance} - {""}
            yield file, image


def _look(task: tuple[str, str]) -> _Image | str:
    """Reads what a header tells of an image; a reason where there is none. Runs in a worker."""
    root, file = task
    path = Path(root, file)
    try:
        header = read_header(path, _TAGS)
    except DataError as error:
        return str(error)
    try:
        kind = str(header.get("SOPClassUID") or "")
        if reason := missing_image(header):
            return reason
        if kind in _NO_PICTURES:
            return f"{NO_IMAGE} ({_NO_PICTURES[kind]})"
        num_frames = int(header.get("NumberOfFrames") or 1)
        # A frame takes a byte at least: damage shall not list a billion.
        if not 0 < num_frames <= path.stat().st_size:
            return DAMAGED_HEADER
        names = {key: _text(header.get(tag)) for key, tag in zip(LABEL_KEYS, _UIDS, strict=False)}
        flags = [SECONDARY] if kind in _SECONDARY_CAPTURES else []
        if _text(header.get("BurnedInAnnotation")).upper() == "YES":
            flags.append(BURNED_IN)
        patient, issuer = (_text(header.get(tag)) for tag in ("PatientID", "IssuerOfPatientID"))
        modality = _text(header.get("Modality"))
        return _Image({**names, "file": file}, patient, issuer, modality, num_frames, tuple(flags))
    except Exception:  # values of any type where a damaged header has them
        return DAMAGED_HEADER


def _text(value: object) -> str:
    return "" if value is None else str(value).strip(" \0")


def _claim(image: _Image, label: Label | None) -> Claim:
    return Claim(
        label.patient if label else "",
        image.patient_id,
        image.issuer,
        image.names["study-instance-uid"],
        label is not None,
    )
