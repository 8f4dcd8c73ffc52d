"""Damages real DICOM files and reads them: a program, because a native decoder may crash.

python dicom_fuzz.py SEED CASES FILE...: prints one line of JSON: what came out, how often.
Standard error names the case that runs, so that a crash can be made again.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np

from client.data.dicom import read_frame
from strategies.errors import DataError

MEMORY = 4 << 30  # a damaged file of some kilobytes must not need more
# Seconds. CharLS takes up to 15 over some damaged JPEG-LS, on two busy cores; it must end.
SLOW = 60.0


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Damage a file in one of the ways that disks, transfers and programs do."""
    data = bytearray(content)
    # Half of the damage goes to the header, however small a part of the file it is.
    end = len(data) if rng.random() < 0.5 else min(len(data), 2500)
    places = rng.integers(128, end, rng.integers(1, 12))
    how = rng.integers(6)
    for place in places:
        if how == 0:
            data[place : place + 1] = bytes([rng.integers(256)])
        elif how == 1:
            data[place : place + 1] = bytes(
                [data[min(place, len(data) - 1)] ^ 1 << rng.integers(8)]
            )
        elif how == 2:
            data[place : place + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
        elif how == 3:
            del data[place : place + int(rng.integers(1, 64))]
        elif how == 4:
            data[place:place] = rng.bytes(rng.integers(1, 64))
    return bytes(data[: places[0]] if how == 5 else data)


def main(seed: int, cases: int, files: list[Path]) -> int:
    """Read so many damaged files; return 1 where anything but a `DataError` came out."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("error")
    contents = {path: path.read_bytes() for path in files}
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []
    slowest, case = 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        one = Path(folder, "one.dcm")
        while case < cases:
            path = files[case % len(files)]
            os.write(2, f"seed={seed} case={case} file={path.name}\n".encode())
            one.write_bytes(damaged(contents[path], np.random.default_rng([seed, case])))
            begin = time.monotonic()
            try:
                image = read_frame(one)
                sound = image.dtype in (np.uint8, np.uint16) and image.ndim in (2, 3) and image.size
                outcomes["read" if sound else "unsound"] += 1
            except DataError as error:
                outcomes[str(error)] += 1
            except Exception:
                outcomes["wrong"] += 1
                wrong.append(f"case={case} file={path.name} {traceback.format_exc()[-600:]}")
            slowest = max(slowest, time.monotonic() - begin)
            case += 1
    report = {"cases": case, "slowest": slowest, "outcomes": outcomes, "wrong": wrong[:5]}
    sys.stdout.write(json.dumps(report) + "\n")
    return int(bool(wrong) or outcomes["unsound"] > 0 or slowest > SLOW)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), [Path(name) for name in sys.argv[3:]]))
