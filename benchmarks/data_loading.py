"""How fast images come from files and from the cache, at 224 pixels, in batches of 32.

    python benchmarks/data_loading.py [--quick] [--json]

* ``warm_images_per_second``: from our cache of PNG files (RGB) to a shuffled float32 batch in
  [0, 1]; ``_dicom`` (16-bit grey, repeated to three channels) and ``_npz`` (RGB) beside it;
  ``_augmented`` is that of PNG with the augmentation of training.
* ``warm_monai_images_per_second``: MONAI's PersistentDataset behind a DataLoader of one worker a
  core, each image loaded from its own file of the cache; ``warm_folder_images_per_second``: a plain
  loader of a folder, which decodes and resizes every time, with as many workers.
* ``warm_vs_monai``, ``warm_vs_folder``: medians of the ratios over rounds in which all run.
* ``cold_images_per_second_png``, ``_dicom``: the first time: hash, decode, build the manifest,
  decode again and write the cache; ``_npz``: the same in one pass, the MD5 apart;
  ``cold_monai_images_per_second``: PersistentDataset's first pass over the PNG files.

The files are generated: 512 pixels a side, smooth with noise (PNG 8-bit RGB, DICOM 16-bit grey
without compression); the npz holds 224 pixels. They are read from the page cache, so a disk slower
than memory is not measured.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from pathlib import Path

# Worker processes import this file: what is slow to import is imported in `main`.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the commands set it


def main() -> None:
    """Print a table, or one JSON object."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="fewer images and rounds")
    options.add_argument("--json", action="store_true", help="one JSON object")
    given = options.parse_args()
    from loading_works import measure
    from measuring import describe_machine, print_figures

    warnings.simplefilter("ignore")  # MONAI's of its own dependencies
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), *((256, 3) if given.quick else (1024, 7)))
    print_figures(describe_machine(), figures, as_json=given.json)


if __name__ == "__main__":
    main()
