"""Real DICOM files, written with pydicom: any pixels, any elements, any transfer syntax."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    generate_uid,
)

NAME = "DOE^JANE"  # stands in every file, and must stand in no log and no error


def item(**elements: Any) -> Dataset:
    """Make a data set of elements by keyword."""
    made = Dataset()
    for keyword, value in elements.items():
        setattr(made, keyword, value)
    return made


def sequence(**elements: Any) -> Sequence:
    """Make a sequence of one item."""
    return Sequence([item(**elements)])


def lookup(values: np.ndarray, first: int, bits: int, *, as_words: bool = True) -> Sequence:
    """Make a modality or VOI lookup table, in either of the two forms that the standard allows."""
    made = item(ModalityLUTType="US")
    made.add_new("LUTDescriptor", "SS" if first < 0 else "US", [len(values) % 65536, first, bits])
    if as_words:
        made.add_new("LUTData", "OW", values.astype("<u2").tobytes())
    else:
        made.add_new("LUTData", "US", values.tolist())
    return Sequence([made])


def uid(*words: str) -> str:
    """Make the UID that stands for some words."""
    return str(generate_uid(entropy_srcs=list(words)))


def dataset(
    pixels: np.ndarray | None = None,
    *,
    kind: str = "MONOCHROME2",
    bits: int | None = None,
    syntax: str = ExplicitVRLittleEndian,
    study: str = "1",
    series: str = "1",
    instance: str = "1",
    compress: str = "",
    **elements: Any,
) -> Dataset:
    """Make a data set.

    Args:
        pixels: (h, w), (h, w, 3), or with frames in front; None makes no image.
        kind: Photometric interpretation.
        bits: Stored bits; None means all of the type's.
        syntax: Transfer syntax of the file as it is first made.
        study: Word that stands for the study's UID; likewise series and instance below it.
        series: See study.
        instance: See study.
        compress: Transfer syntax to encode the pixels in.
        elements: By keyword; None takes an element away.
    """
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.SOPClassUID = CTImageStorage
    made.StudyInstanceUID = uid(study)
    made.SeriesInstanceUID = uid(study, series)
    made.SOPInstanceUID = uid(study, series, instance)
    made.Modality = "CT"
    made.PatientName, made.PatientID, made.AccessionNumber = NAME, f"P{study}", f"A{study}"
    if pixels is not None:
        made.set_pixel_data(
            pixels, kind, bits or pixels.dtype.itemsize * 8, generate_instance_uid=False
        )
        if syntax == ExplicitVRBigEndian:
            made["PixelData"].VR = "OB" if pixels.dtype.itemsize == 1 else "OW"
            made.PixelData = pixels.astype(pixels.dtype.newbyteorder(">")).tobytes()
            made.PixelData += b"\0" * (len(made.PixelData) % 2)
    made.file_meta.TransferSyntaxUID = syntax
    for keyword, value in elements.items():
        if value is None:
            delattr(made, keyword)
        else:
            setattr(made, keyword, value)
    if compress:
        made.compress(compress, generate_instance_uid=False)
    made.file_meta.MediaStorageSOPClassUID = made.get("SOPClassUID", CTImageStorage)
    made.file_meta.MediaStorageSOPInstanceUID = made.get("SOPInstanceUID", uid("none"))
    return made


def write_dicom(path: Path, pixels: np.ndarray | None = None, **options: Any) -> Path:
    """Write a file; options are those of `dataset`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    dataset(pixels, **options).save_as(path, enforce_file_format=True)
    return path


def write_dicomdir(path: Path, files: list[list[str]]) -> Path:
    """Write a DICOMDIR whose image records name files by their components."""
    directory = Dataset()
    directory.file_meta = FileMetaDataset()
    directory.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    directory.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
    directory.file_meta.MediaStorageSOPInstanceUID = uid("directory")
    patient = item(DirectoryRecordType="PATIENT", PatientName=NAME, PatientID="P1")
    images = [item(DirectoryRecordType="IMAGE", ReferencedFileID=parts) for parts in files]
    directory.DirectoryRecordSequence = Sequence([patient, *images])
    directory.save_as(path, enforce_file_format=True)
    return path
