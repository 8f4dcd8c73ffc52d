"""Thousands of damaged DICOM files end in pixels or in a `DataError`; no decoder crashes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pydicom
import pytest

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
WHEEL = Path(pydicom.__file__).parent / "data" / "test_files"
# Every encoding that has a decoder, grey and colour, and what goes through a lookup table.
FILES = (
    "CT_small",
    "J2K_pixelrep_mismatch",
    "JPEGLSNearLossless_16",
    "MR_small_RLE",
    "MR_small_bigendian",
    "MR_small_implicit",
    "MR_small_jp2klossless",
    "MR_small_jpeg_ls_lossless",
    "SC_rgb_dcmtk_+eb+cy+s2",
    "SC_rgb_gdcm_KY",
    "SC_rgb_jls_lossy_line",
    "SC_rgb_rle_2frame",
    "SC_rgb_small_odd_jpeg",
    "SC_ybr_full_422_uncompressed",
    "examples_palette",
    "image_dfl",
    "liver_1frame",
)
CASES = 500  # of each seed; others by hand: tests/fakes/dicom_fuzz.py SEED CASES FILES


@pytest.mark.parametrize("seed", [0, 1])
def test_damaged_files_are_read_or_refused(seed):
    result = subprocess.run(
        [
            *(sys.executable, ROOT / "tests" / "fakes" / "dicom_fuzz.py", str(seed), str(CASES)),
            *(WHEEL / f"{name}.dcm" for name in FILES),
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=110,
        check=False,
    )
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode == 0, f"{last} {result.stdout[-2000:]}"
    report = json.loads(result.stdout)
    assert report["cases"] == CASES
    # Damage must reach every layer, or this tests nothing.
    for reached in (
        "read",
        "DICOM header truncated or damaged",
        "pixel data truncated or damaged",
    ):
        assert report["outcomes"].get(reached), report["outcomes"]
