"""How much memory and time a large npz file takes a site: 1.5 GiB of images, deflated.

    python benchmarks/npz_memory.py [--quick] [--json]

* ``images_mib``, ``file_mib``: the images, 224 pixels, RGB, and the file that numpy's layout keeps
  them in.
* ``peak_mib_first``: how far the resident memory of a fresh process grows at its peak when a site
  reads the file for the first time: MD5, decompress, hash each image, write the cache, make the
  manifest; ``peak_mib_again``: at the next start.
* ``peak_mib_numpy``: when ``numpy.load`` reads the images, as the package did before.
* ``seconds_first``, ``seconds_again``: what a site waits for.

The file is generated and in the page cache. The peak is Linux's ``VmHWM``, after its reset.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from loading_works import CLASSES, SIDE, pixels
from measuring import describe_machine, print_figures, seconds, status_kib
from numpy.lib import format as npy

from client.data.registry import load
from client.data.source import DataSource

COUNT, QUICK_COUNT = 11_000, 500
MOTIFS = 64
MIB = 2**20


def write_npz(path: Path, count: int) -> None:
    """Write a file of distinct images, one at a time: this process must not grow either."""
    motifs = [np.rint(255 * pixels(i, (SIDE, SIDE, 3))).astype(np.uint8) for i in range(MOTIFS)]
    header = {"descr": "|u1", "fortran_order": False}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for split, number in (("train", count), ("val", 0), ("test", 0)):
            with archive.open(f"{split}_images.npy", "w", force_zip64=True) as member:
                npy.write_array_header_1_0(member, {**header, "shape": (number, SIDE, SIDE, 3)})
                for i in range(number):
                    member.write(np.roll(motifs[i % MOTIFS], i // MOTIFS, axis=0).tobytes())
            with archive.open(f"{split}_labels.npy", "w") as member:
                npy.write_array(member, (np.arange(number) % 2).astype(np.uint8))


def read(path: Path) -> None:
    """Read the file as a site does."""
    values = {"dataset": "npz", "file": path, "classes": CLASSES}
    load(DataSource.model_validate(values), ["A"], path.parent / "state")


def read_by_numpy(path: Path) -> None:
    """Read the training images into memory."""
    with np.load(path) as archive:
        _ = archive["train_images"]


WORKS: dict[str, Callable[[Path], None]] = {"site": read, "numpy": read_by_numpy}


def growth(work: str, path: Path) -> tuple[float, float]:
    """Return the MiB that this process grows by at its peak, and the seconds that it takes."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status_kib("VmRSS")
    taken = seconds(lambda: WORKS[work](path))
    return (status_kib("VmHWM") - before) / 1024, taken


def in_fresh_process(work: str, path: Path) -> tuple[float, float]:
    """Return what `growth` does there."""
    command = [sys.executable, __file__, "--work", work, str(path)]
    return tuple(json.loads(subprocess.check_output(command, text=True)))


def measure(count: int) -> dict[str, float]:
    """Return the figures."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "images.npz")
        write_npz(path, count)
        first, seconds_first = in_fresh_process("site", path)
        again, seconds_again = in_fresh_process("site", path)
        by_numpy, _ = in_fresh_process("numpy", path)
        return {
            "images_mib": count * SIDE * SIDE * 3 / MIB,
            "file_mib": path.stat().st_size / MIB,
            "peak_mib_first": first,
            "peak_mib_again": again,
            "peak_mib_numpy": by_numpy,
            "seconds_first": seconds_first,
            "seconds_again": seconds_again,
        }


def main() -> None:
    """Print a table, or one JSON object."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="a smaller file")
    options.add_argument("--json", action="store_true", help="one JSON object")
    options.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.work:
        work, path = given.work
        print(json.dumps(growth(work, Path(path))))
        return
    figures = measure(QUICK_COUNT if given.quick else COUNT)
    print_figures(describe_machine(), figures, as_json=given.json)


if __name__ == "__main__":
    main()
