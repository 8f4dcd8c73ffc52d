"""The parts of data_loading.py: generated files, ways to load them, and what is measured."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import median_ratio, seconds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from client.data.images import PreparedImages
from client.data.manifest import ImageDataset
from client.data.registry import load
from client.data.source import DataSource
from client.data.transforms import augment_batch, augmentation, prepare
from client.data.workers import num_workers

SIDE, BATCH, FILE_SIDE = 224, 32, 512
CLASSES = ("no", "yes")


def pixels(number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return a smooth image with a little noise in [0, 1]: compresses as a photograph does."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[: shape[0], : shape[1]] / shape[0]
    wave = 0.5 + 0.4 * np.sin(5 * x + number) * np.cos(7 * y)
    wave = wave if len(shape) == 2 else wave[..., None] * np.array([1.0, 0.7, 0.5])
    return np.clip(wave + rng.normal(0, 0.02, shape), 0, 1)


def write_files(folder: Path, count: int) -> dict[str, DataSource]:
    """Write the same number of images as PNG, DICOM and npz; return how they are declared."""
    labels = ["file,label"]
    for i in range(count):
        name = CLASSES[i % 2]
        png = folder / "png" / name / f"{i}.png"
        png.parent.mkdir(parents=True, exist_ok=True)
        colour = np.rint(255 * pixels(i, (FILE_SIDE, FILE_SIDE, 3))).astype(np.uint8)
        Image.fromarray(colour).save(png)
        write_dicom(folder / "dicom" / f"{i}.dcm", pixels(i, (FILE_SIDE, FILE_SIDE)))
        labels.append(f"{i}.dcm,{name}")
    (folder / "labels.csv").write_text("\n".join(labels) + "\n")
    small = np.stack(
        [np.rint(255 * pixels(i, (SIDE, SIDE, 3))).astype(np.uint8) for i in range(count)]
    )
    arrays = {"train": small, "val": small[:0], "test": small[:0]}
    np.savez(
        folder / "images.npz",
        **{f"{split}_images": images for split, images in arrays.items()},
        **{f"{split}_labels": np.arange(len(images)) % 2 for split, images in arrays.items()},
    )
    return {
        "png": _source(dataset="folder", folder=folder / "png"),
        "dicom": _source(
            dataset="dicom",
            folder=folder / "dicom",
            labels=folder / "labels.csv",
            label_key="file",
        ),
        "npz": _source(dataset="npz", file=folder / "images.npz", classes=CLASSES),
    }


def _source(**values: Any) -> DataSource:
    return DataSource.model_validate({key.replace("_", "-"): v for key, v in values.items()})


def write_dicom(path: Path, image: np.ndarray) -> None:
    """Write 12 bits of grey as a CT does."""
    from pydicom.dataset import Dataset as Elements
    from pydicom.dataset import FileMetaDataset
    from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    elements = Elements()
    elements.file_meta = meta
    elements.SOPClassUID, elements.SOPInstanceUID = CTImageStorage, generate_uid()
    meta.MediaStorageSOPClassUID = elements.SOPClassUID
    meta.MediaStorageSOPInstanceUID = elements.SOPInstanceUID
    elements.Modality, elements.PatientID = "CT", path.stem
    elements.PhotometricInterpretation, elements.SamplesPerPixel = "MONOCHROME2", 1
    elements.BitsAllocated, elements.BitsStored, elements.HighBit = 16, 12, 11
    elements.PixelRepresentation = 0
    elements.Rows, elements.Columns = image.shape
    elements.RescaleSlope, elements.RescaleIntercept = 1, -1024
    elements.PixelData = np.rint(4095 * image).astype("<u2").tobytes()
    path.parent.mkdir(exist_ok=True)
    elements.save_as(path, enforce_file_format=True)


def ours(dataset: ImageDataset) -> Callable[[Tensor], Tensor]:
    """Return what gives batches, as `Site.split` makes it."""
    if isinstance(dataset.images, np.ndarray):
        images = prepare(dataset.images, SIDE, 3)
        return lambda rows: images[rows]
    prepared: PreparedImages = dataset.images.prepared(SIDE, 3)
    return lambda rows: prepared.batch(rows.numpy())


def epoch(batches: Callable[[Tensor], Tensor], count: int) -> None:
    """Collate every image once, shuffled."""
    for rows in torch.randperm(count).split(BATCH):
        check(batches(rows))


def check(batch: Tensor) -> None:
    """Refuse a contestant that gives something else."""
    assert batch.shape[1:] == (3, SIDE, SIDE), batch.shape
    assert batch.dtype == torch.float32


class Folder(Dataset[Tensor]):
    """A plain loader: open, convert, resize, every time."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> Tensor:
        with Image.open(self.files[place]) as image:
            small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(small)).permute(2, 0, 1).float().div_(255)


def monai_dataset(files: list[Path], cache: Path) -> Dataset:
    """Return MONAI's PersistentDataset with its own transforms for the same task."""
    from monai.data.dataset import PersistentDataset
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.array import ScaleIntensityRange
    from monai.transforms.io.array import LoadImage
    from monai.transforms.spatial.array import Resize
    from monai.transforms.utility.array import EnsureType

    transform = Compose(
        [
            LoadImage(reader="PILReader", image_only=True, ensure_channel_first=True),
            ScaleIntensityRange(0, 255, 0, 1),
            Resize((SIDE, SIDE), mode="bilinear", anti_aliasing=True),
            EnsureType(dtype=torch.float32, track_meta=False),
        ]
    )
    return PersistentDataset([str(file) for file in files], transform, cache_dir=cache)


def loader(dataset: Dataset) -> DataLoader:
    """Return a DataLoader with a worker for each core, started once."""
    return DataLoader(
        dataset, BATCH, shuffle=True, num_workers=num_workers(), persistent_workers=True
    )


def run(batches: Iterable[Tensor]) -> None:
    """Take every batch."""
    for batch in batches:
        check(batch)


def measure(folder: Path, count: int, rounds: int) -> dict[str, float]:
    """Return the figures."""
    figures: dict[str, float] = {}
    sources = write_files(folder, count)
    batches: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, source in sources.items():
        state = folder / f"state-{name}"

        def first(name: str = name, source: DataSource = source, state: Path = state) -> None:
            batches[name] = ours(load(source, ["A"], state))

        figures[f"cold_images_per_second_{name}"] = count / seconds(first)
    files = sorted((folder / "png").glob("*/*.png"))
    persistent = loader(monai_dataset(files, folder / "monai"))
    plain = loader(Folder(files))
    figures["cold_monai_images_per_second"] = count / seconds(lambda: run(persistent))
    transform = augmentation(SIDE, 0)
    some = torch.arange(4 * BATCH).split(BATCH)

    def augmented() -> None:
        for rows in some:
            check(augment_batch(batches["png"](rows), transform))

    works: dict[str, tuple[Callable[[], object], int]] = {
        "": (lambda: epoch(batches["png"], count), count),
        "_dicom": (lambda: epoch(batches["dicom"], count), count),
        "_npz": (lambda: epoch(batches["npz"], count), count),
        "_augmented": (augmented, 4 * BATCH),
        "_monai": (lambda: run(persistent), count),
        "_folder": (lambda: run(plain), count),
    }
    times: dict[str, list[float]] = {name: [] for name in works}
    for name, (work, _) in works.items():
        if name != "_monai":
            work()  # starts its workers, checks the cache's images
    for _ in range(rounds):
        for name, (work, images) in works.items():
            times[name].append(seconds(work) / images)
    for name, taken in times.items():
        peer = name in ("_monai", "_folder")
        key = f"warm{name}_images_per_second" if peer else f"warm_images_per_second{name}"
        figures[key] = 1 / statistics.median(taken)
    figures["warm_vs_monai"] = median_ratio(times["_monai"], times[""])
    figures["warm_vs_folder"] = median_ratio(times["_folder"], times[""])
    return figures
