"""The published data sets in miniature: the exact official layout, a few small images a class.

The same call gives the same bytes of every picture. Classes, names of files and folders, columns
and their odd spellings are the official ones; only counts and pixels are made up.
"""

from __future__ import annotations

import csv
import io
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from client.data.catalogue import Entry, entry

Files = dict[str, bytes]

PAD_COLUMNS = (
    *("patient_id", "lesion_id", "smoke", "drink", "background_father", "background_mother"),
    *("age", "pesticide", "gender", "skin_cancer_history", "cancer_history", "has_piped_water"),
    *("has_sewage_system", "fitspatrick", "region", "diameter_1", "diameter_2", "diagnostic"),
    *("itch", "grew", "hurt", "changed", "bleed", "elevation"),
    *("img_id", "biopsed"),
)
# Parts 1 and 2 hold all diagnoses, part 3 these alone.
PART_3 = ("ACK", "NEV", "SEK")
PLANE_NUMBERS = {
    "Other": 1,
    "Fetal abdomen": 2,
    "Fetal brain": 3,
    "Maternal cervix": 4,
    "Fetal femur": 5,
    "Fetal thorax": 6,
}
MACHINES = ("Voluson E6", "Voluson S10", "Aloka", "Other")
OPERATORS = ("Op. 1", "Op. 2", "Op. 3", "Other")
# Of Kvasir version 2, as width and height.
RESOLUTIONS = ((720, 576), (1280, 1024), (1920, 1072))
CPN_INNER = "Covid19-Pneumonia-Normal Chest X-Ray Images Dataset"


def miniature(name: str, folder: Path, *, per_class: int = 12, packed: bool = True) -> Path:
    """Make a set in its official layout.

    Args:
        name: The catalogue's name.
        folder: Where the archive, the npz file or (unpacked) the official folder goes.
        per_class: Images of each class; of an npz file, in each split.
        packed: Leave the archives packed as they are downloaded.

    Returns:
        The folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    facts = entry(name)
    if not facts.file_backed:
        _npz(facts, folder / f"{name}.npz", per_class)
    elif packed and facts.archive:
        (folder / facts.archive).write_bytes(zipped(official(name, per_class)))
    else:
        root = folder if facts.archive else folder / facts.folder
        write(root, official(name, per_class, packed=packed))
    return folder


def official(name: str, per_class: int = 12, *, packed: bool = True) -> Files:
    """Return what the outer archive of a set holds, by path."""
    facts = entry(name)
    make = {"pad-ufes-20": _pad_ufes, "fetal-planes": _fetal_planes, "cpn-xray": _cpn}
    return make.get(name, _class_folders)(facts, per_class, packed)


def zipped(files: Files) -> bytes:
    """Pack files as a zip archive; pictures are stored, as they do not shrink."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path, data in files.items():
            archive.writestr(zipfile.ZipInfo(path), data)
    return content.getvalue()


def write(folder: Path, files: Files) -> None:
    """Write files below a folder."""
    for path, data in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)


def picture(
    seed: int, label: int, mode: str = "RGB", size: tuple[int, int] = (24, 20), kind: str = "PNG"
) -> bytes:
    """Make a picture whose brightness tells its class, with some coarse noise."""
    generator = np.random.default_rng([seed, label])
    coarse = generator.integers(0, 60, (4, 4, 3)) + 20 * (label % 9)
    image = Image.fromarray(coarse.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
    content = io.BytesIO()
    image.convert(mode).save(content, kind)
    return content.getvalue()


def _pad_ufes(facts: Entry, per_class: int, packed: bool) -> Files:
    parts: dict[int, Files] = {1: {}, 2: {}, 3: {}}
    rows: list[dict[str, str]] = []
    for label, diagnosis in enumerate(facts.classes):
        for number in range(per_class):
            # Two images a patient, so that a split by image would be seen.
            patient, lesion = f"PAT_{100 * label + number // 2}", str(1000 * label + number)
            image = f"{patient}_{lesion}_{number + 7}.png"
            part = (1, 2, 3)[number % 3] if diagnosis in PART_3 else (1, 2)[number % 2]
            mode = "RGBA" if number % 2 else "RGB"
            side = 20 + number
            parts[part][f"imgs_part_{part}/{image}"] = picture(number, label, mode, (side, side))
            known = {"background_father": "POMERANIA", "fitspatrick": "2.0"}
            known = known if number // 2 % 2 else {}  # 804 of the official rows miss these
            row = {
                "patient_id": patient,
                "lesion_id": lesion,
                "age": "55",
                "region": "NECK",
                "diagnostic": diagnosis,
                "itch": "UNK",
                "img_id": image,
                "biopsed": "True",
            }
            rows.append({**dict.fromkeys(PAD_COLUMNS, ""), **known, **row})
    table = io.StringIO()
    writer = csv.DictWriter(table, PAD_COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files = {"metadata.csv": table.getvalue().encode()}
    for part, pictures in parts.items():
        if packed and pictures:
            files[f"images/imgs_part_{part}.zip"] = zipped(pictures)
        if not packed:
            files |= {f"images/{path}": data for path, data in pictures.items()}
    return files


def _fetal_planes(facts: Entry, per_class: int, packed: bool) -> Files:
    lines = ["Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train "]
    files: Files = {}
    for patient in range(1, per_class + 1):
        machine, operator = MACHINES[patient % 4], OPERATORS[patient // 2 % 4]
        train = 0 if patient % 3 == 0 else 1
        for label, plane in enumerate(facts.classes):
            name = f"Patient{patient:05d}_Plane{PLANE_NUMBERS[plane]}_1_of_1"
            brain = "Trans-thalamic" if plane == "Fetal brain" else "Not A Brain"
            lines.append(f"{name};{patient};{plane};{brain};{operator};{machine};{train} ")
            mode, size = ("L", "RGB", "RGBA")[patient % 3], (26 + patient % 3, 22)
            grey = Image.open(io.BytesIO(picture(patient, label, "L", size))).convert(mode)
            content = io.BytesIO()
            grey.save(content, "PNG")
            files[f"Images/{name}.png"] = content.getvalue()
    table = "\n".join([*lines, ""]).encode()
    return {
        "FETAL_PLANES_DB_data.csv": table,
        "FETAL_PLANES_DB_data.xlsx": b"PK not read",
        **files,
    }


def _cpn(facts: Entry, per_class: int, packed: bool) -> Files:
    inner = dict(_folders(facts, per_class, "PNG"))
    if packed:
        return {f"{facts.folder}/{CPN_INNER}.zip": zipped(inner)}
    return {f"{facts.folder}/{CPN_INNER}/{path}": data for path, data in inner.items()}


def _class_folders(facts: Entry, per_class: int, packed: bool) -> Files:
    if not facts.archive:
        return dict(_folders(facts, per_class, "PNG"))
    files = dict(_folders(facts, per_class, "JPEG", resolutions=RESOLUTIONS))
    return {f"{facts.folder}/{path}": data for path, data in files.items()}


def _folders(
    facts: Entry,
    per_class: int,
    kind: str,
    resolutions: tuple[tuple[int, int], ...] = ((24, 20), (20, 24)),
) -> Iterator[tuple[str, bytes]]:
    ending = {"PNG": "png", "JPEG": "jpg"}[kind]
    mode = "L" if facts.channels == 1 else "RGB"
    for label, name in enumerate(facts.classes):
        for number in range(per_class):
            size = resolutions[number % len(resolutions)]
            yield f"{name}/{label}-{number:04d}.{ending}", picture(number, label, mode, size, kind)


def _npz(facts: Entry, path: Path, per_class: int) -> None:
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "val", "test"):
        labels = np.repeat(np.arange(len(facts.classes), dtype=np.uint8), per_class)
        colour = (3,) if facts.channels == 3 else ()
        noise = np.random.default_rng(len(split)).integers(0, 60, (len(labels), 28, 28, *colour))
        bright = labels.reshape(-1, *[1] * (noise.ndim - 1)) * 15
        arrays[f"{split}_images"] = (noise + bright).astype(np.uint8)
        if facts.multi_label:
            arrays[f"{split}_labels"] = np.eye(len(facts.classes), dtype=np.uint8)[labels]
        else:
            arrays[f"{split}_labels"] = labels.reshape(-1, 1)
    np.savez_compressed(path, **arrays)  # pyright: ignore[reportArgumentType]
