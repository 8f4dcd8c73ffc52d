"""A DICOM frame comes out as a viewer shows it; expected values are computed here, by hand."""

import logging
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.pixels.decoders.base import _PIXEL_DATA_DECODERS, get_decoder
from pydicom.pixels.utils import pixel_array
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGExtended12Bit,
    JPEGLSLossless,
    RLELossless,
)

from client.data.dicom import WINDOWS, DicomOptions, read_frame
from client.data.dicom_file import missing_decoder
from client.data.source import WINDOW_PRESETS
from fakes.dicoms import NAME, dataset, item, lookup, sequence, write_dicom
from strategies.errors import DataError

WHEEL = Path(pydicom.__file__).parent / "data" / "test_files"
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "dicom"

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def linear(values, centre, width):
    """PS3.3 C.11.2.1.2.1, from 0 to 65535."""
    values = np.asarray(values, np.float64)
    inside = (values - (centre - 0.5)) / (width - 1) + 0.5
    return np.clip(inside, 0, 1) * 65535


def stretched(values):
    values = np.asarray(values, np.float64)
    return (values - values.min()) / (values.max() - values.min()) * 65535


def reason(path, *arguments):
    with pytest.raises(DataError) as raised:
        read_frame(path, *arguments)
    text = str(raised.value)
    assert NAME not in text
    assert path.name not in text
    assert "1.2." not in text
    return text


# Real files of pydicom's wheel.


def test_ct_without_a_window_spans_its_own_range():
    stored = pixel_array(WHEEL / "CT_small.dcm")
    shown = read_frame(WHEEL / "CT_small.dcm")
    assert shown.dtype == np.uint16
    # Stored 128 to 2191, rescaled by -1024; no padding in it.
    assert np.array_equal(shown, np.rint(stretched(stored)))


@pytest.mark.parametrize(("name", "window"), WINDOWS.items())
def test_fixed_windows_apply_to_hounsfield_units(name, window):
    hounsfield = pixel_array(WHEEL / "CT_small.dcm") - 1024.0
    expected = linear(hounsfield, *window)
    for option in (name, "{:g}/{:g}".format(*window)):
        shown = read_frame(WHEEL / "CT_small.dcm", 0, DicomOptions(option))
        assert np.abs(shown - expected).max() <= 0.5


def test_the_files_own_window_is_used_unless_refused():
    stored = pixel_array(WHEEL / "MR_small.dcm")
    shown = read_frame(WHEEL / "MR_small.dcm")
    assert np.abs(shown - linear(stored, 600, 1600)).max() <= 0.5
    full = read_frame(WHEEL / "MR_small.dcm", 0, DicomOptions("none"))
    assert np.abs(full - stretched(stored)).max() <= 0.5


@pytest.mark.parametrize(
    "name",
    ["RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless", "padded"],
)
def test_every_lossless_encoding_of_one_image_gives_the_same_pixels(name):
    one = read_frame(WHEEL / "MR_small.dcm")
    assert np.array_equal(read_frame(WHEEL / f"MR_small_{name}.dcm"), one)


def test_monochrome1_is_turned_and_rescaled():
    file = WHEEL / "dicomdirtests" / "77654033" / "CR1" / "6154"
    values = pixel_array(file) * 0.684 + 200
    assert np.abs(read_frame(file) - (65535 - linear(values, 1600, 2800))).max() <= 0.5


def test_palette_becomes_rgb():
    file = WHEEL / "examples_palette.dcm"
    header = pydicom.dcmread(file)
    entries, first, bits = header.RedPaletteColorLookupTableDescriptor
    assert (first, bits) == (0, 16)
    tables = [
        np.frombuffer(header[f"{colour}PaletteColorLookupTableData"].value, "<u2")
        for colour in ("Red", "Green", "Blue")
    ]
    assert all(len(table) == entries for table in tables)
    expected = np.stack([table[pixel_array(file)] for table in tables], -1) / 257
    shown = read_frame(file)
    assert shown.dtype == np.uint8
    assert np.abs(shown - expected).max() <= 0.5


def test_ybr_becomes_rgb():
    file = WHEEL / "SC_ybr_full_422_uncompressed.dcm"
    ybr = pixel_array(file, raw=True).astype(np.float64)
    y, blue, red = ybr[..., 0], ybr[..., 1] - 128, ybr[..., 2] - 128
    # PS3.3 C.7.6.3.1.2, the other way round.
    rgb = np.stack([y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue], -1)
    shown = read_frame(file)
    assert shown.shape == (100, 100, 3)
    assert np.abs(shown - np.clip(rgb, 0, 255)).max() <= 1
    assert shown[0, 0].tolist() in ([255, 0, 0], [254, 0, 0])  # the first stripe is red


def test_an_rgb_ultrasound_is_as_stored():
    assert np.array_equal(
        read_frame(WHEEL / "examples_rgb_color.dcm"), pixel_array(WHEEL / "examples_rgb_color.dcm")
    )


def test_frames_of_a_cine_are_read_by_position():
    cine = pixel_array(WHEEL / "examples_ybr_color.dcm")
    for frame in (0, 15, 29):
        shown = read_frame(WHEEL / "examples_ybr_color.dcm", frame)
        assert np.array_equal(shown, cine[frame])
    assert reason(WHEEL / "examples_ybr_color.dcm", 30) == "frame is not in the file"


def test_one_bit_becomes_black_and_white():
    shown = read_frame(WHEEL / "liver_1frame.dcm")
    assert shown.dtype == np.uint8
    assert np.array_equal(shown, pixel_array(WHEEL / "liver_1frame.dcm") * 255)


def files_with_their_reasons():
    named = {
        "transfer syntax JPEG Extended (Process 2 and 4) of 12 bits has no decoder here": (
            "JPEG-lossy.dcm",
            "JPGExtended.dcm",
        ),
        "transfer syntax JPEG Lossless, Non-Hierarchical, First-Order Prediction (Process 14 "
        "[Selection Value 1]) has no decoder here": ("SC_rgb_jpeg_gdcm.dcm",),
        "pixel data truncated or damaged": (
            "MR_truncated.dcm",
            "JPEG2000-embedded-sequence-delimiter.dcm",
        ),
        "DICOM header truncated or damaged": (
            "badVR.dcm",
            "no_meta_group_length.dcm",  # an image by its file meta information, and none in it
            "priv_SQ.dcm",
        ),
        "DICOM object without an image": (
            "rtplan.dcm",
            "rtplan_truncated.dcm",
            "rtstruct.dcm",
            "test-SR.dcm",
            "waveform_ecg.dcm",
            "meta_missing_tsyntax.dcm",
            "nested_priv_SQ.dcm",
            "ExplVR_BigEndNoMeta.dcm",
            "ExplVR_LitEndNoMeta.dcm",
            "dicomdirtests/DICOMDIR",
        ),
        "not a DICOM file": ("README.txt", "zipMR.gz", "crayons.icc", "no_meta.dcm"),
    }
    return [(name, text) for text, names in named.items() for name in names]


@pytest.mark.parametrize(("name", "text"), files_with_their_reasons())
def test_what_cannot_be_read_has_a_reason(name, text):
    assert reason(WHEEL / name) == text


def test_every_file_of_the_wheel_is_sound_or_refused():
    refused = dict(files_with_their_reasons())
    read = 0
    for path in sorted(WHEEL.rglob("*")):
        if not path.is_file():
            continue
        name = path.relative_to(WHEEL).as_posix()
        try:
            shown = read_frame(path)
        except DataError:
            # Everything with pixels that is refused stands in the list above.
            assert name in refused or "PixelData" not in pydicom.dcmread(
                path, force=True, stop_before_pixels=False
            ), name
            continue
        assert name not in refused
        assert shown.dtype in (np.uint8, np.uint16)
        assert shown.ndim == 2 or (shown.shape[2] == 3 and shown.dtype == np.uint8)
        assert shown.dtype.isnative
        # Two thumbnails lie wholly above their window.
        assert shown.max() > shown.min() or name.startswith("dicomdirtests/77654033/CT2/171")
        read += 1
    assert read > 80


needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="real DICOM files (shared/data) are not on this disk"
)


@needs_shared
@pytest.mark.parametrize(
    ("name", "shape", "kind"),
    [
        ("1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm", (1024, 1024), np.uint8),
        ("CT1_J2KI.dcm", (512, 512), np.uint16),
        ("MR1_JLSN.dcm", (512, 512), np.uint16),
        ("US1_J2KI.dcm", (480, 640, 3), np.uint8),
        ("US1_RLE.dcm", (480, 640, 3), np.uint8),
    ],
)
def test_hospital_files_are_read(name, shape, kind):
    shown = read_frame(SHARED / name)
    assert (shown.shape, shown.dtype) == (shape, kind)
    assert shown.max() > shown.min()


@needs_shared
def test_the_same_radiograph_as_monochrome1_is_its_negative():
    positive = read_frame(SHARED / "1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm")
    assert np.array_equal(read_frame(SHARED / "Fake_MONOHR1.dcm"), 255 - positive)


@needs_shared
def test_a_lossy_copy_of_an_ultrasound_is_close_to_the_lossless_one():
    lossless = read_frame(SHARED / "US1_RLE.dcm").astype(int)
    lossy = read_frame(SHARED / "US1_J2KI.dcm").astype(int)
    assert np.abs(lossless - lossy).mean() < 3


@needs_shared
def test_a_lossy_ct_keeps_its_contrast_though_its_padding_is_blurred():
    stored = pixel_array(SHARED / "CT1_J2KI.dcm")
    assert (stored.min(), stored.max()) == (-2315, 2409)  # padding was -2000
    shown = read_frame(SHARED / "CT1_J2KI.dcm")
    hounsfield = stored - 1024.0
    expected = np.clip((hounsfield + 1024) / (hounsfield.max() + 1024), 0, 1) * 65535
    assert np.abs(shown - expected).max() <= 0.5


@needs_shared
def test_twelve_bit_jpeg_is_named_as_what_it_is():
    assert "JPEG Extended (Process 2 and 4) of 12 bits" in reason(SHARED / "RG2_JPLY.dcm")


# Files written for one rule each.


def shown(tmp_path, pixels, window="auto", frame=0, **options):
    path = write_dicom(tmp_path / "one.dcm", pixels, **options)
    return read_frame(path, frame, DicomOptions(window))


def test_twelve_bits_fill_sixteen(tmp_path):
    made = shown(tmp_path, RAMP, bits=12)
    assert (made.min(), made.max()) == (0, 65535)
    assert len(np.unique(made)) == 4096


@pytest.mark.parametrize(
    "syntax",
    [ImplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian],
)
def test_native_encodings_of_signed_data(tmp_path, syntax):
    pixels = (RAMP.astype(np.int16) - 2048).astype(np.int16)
    plain = shown(tmp_path, pixels, bits=12)
    assert np.array_equal(shown(tmp_path, pixels, bits=12, syntax=syntax), plain)
    assert np.array_equal(plain, np.rint(stretched(pixels)))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_compressed_encodings_of_twelve_bits(tmp_path, syntax):
    plain = shown(tmp_path, RAMP, bits=12)
    assert np.array_equal(shown(tmp_path, RAMP, bits=12, compress=syntax), plain)


def test_bits_beyond_the_stored_ones_are_cut_off(tmp_path):
    overlay = RAMP | (np.indices(RAMP.shape)[0] % 2 << 15).astype(np.uint16)
    made = dataset(RAMP, bits=12)
    made.PixelData = overlay.tobytes()
    made.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    assert np.array_equal(read_frame(tmp_path / "one.dcm"), shown(tmp_path, RAMP, bits=12))


@pytest.mark.parametrize("bits", [1, 4, 7, 8])
def test_up_to_eight_bits_keep_their_black_and_white(tmp_path, bits):
    top = 2**bits - 1
    pixels = np.array([[0, top // 2, max(top - 1, 0), top // 2]], np.uint8)
    made = shown(tmp_path, pixels, bits=bits)
    assert made.dtype == np.uint8
    assert np.array_equal(made, np.rint(pixels * (255 / top)))


@pytest.mark.parametrize("marked", [-2000, 63536])
def test_padding_is_black_and_takes_no_part(tmp_path, marked):
    pixels = np.array([[-2000, 0, 500, 1000]], np.int16)
    for kind, expected in (
        ("MONOCHROME2", [0, 0, 32768, 65535]),
        ("MONOCHROME1", [0, 65535, 32768, 0]),
    ):
        path = tmp_path / "one.dcm"
        made = dataset(pixels, kind=kind, Modality="MR")
        made.add_new("PixelPaddingValue", "SS" if marked < 0 else "US", marked)
        made.save_as(path, enforce_file_format=True)
        assert np.abs(read_frame(path)[0] - np.array(expected)).max() <= 0.5


def test_a_range_of_padding(tmp_path):
    pixels = np.array([[0, 3, 5, 10, 20, 30]], np.uint16)
    made = shown(tmp_path, pixels, PixelPaddingValue=5, PixelPaddingRangeLimit=0)
    assert made[0].tolist() == [0, 0, 0, 0, 32768, 65535]


@pytest.mark.parametrize("marked", [-2000, 63536])
def test_a_range_of_padding_that_wraps_masks_no_image(tmp_path, marked):
    # -2000 to 0, in a file that stores unsigned values.
    pixels = np.array([[63535, 63536, 65535, 0, 1, 1000]], np.uint16)
    made = dataset(pixels, Modality="MR")
    made.add_new("PixelPaddingValue", "SS" if marked < 0 else "US", marked)
    made.add_new("PixelPaddingRangeLimit", "US", 0)
    path = tmp_path / "one.dcm"
    made.save_as(path, enforce_file_format=True)
    assert read_frame(path)[0].tolist() == [65535, 0, 0, 0, 0, round(999 / 63534 * 65535)]


def test_a_file_cut_anywhere_is_damaged_or_none(tmp_path):
    whole = write_dicom(tmp_path / "whole", RAMP[:4, :4]).read_bytes()
    path = tmp_path / "cut.dcm"
    for size in range(1, len(whole) - 100, 7):
        path.write_bytes(whole[:size])
        expected = "not a DICOM file" if size < 132 else "DICOM header truncated or damaged"
        assert reason(path) in (expected, "pixel data truncated or damaged")


def test_options_may_be_left_out(tmp_path):
    path = write_dicom(tmp_path / "one.dcm", RAMP, WindowCenter="1000", WindowWidth="500")
    assert np.array_equal(read_frame(path, 0, None), read_frame(path))


def test_an_image_of_padding_alone_is_black(tmp_path):
    made = shown(tmp_path, np.full((2, 2), 7, np.uint16), PixelPaddingValue=7, kind="MONOCHROME1")
    assert not made.any()


def test_an_image_of_one_value_is_sound(tmp_path):
    assert np.unique(shown(tmp_path, np.full((2, 2), 7, np.uint16))).tolist() == [0]


def test_a_negative_slope_turns_the_image(tmp_path):
    made = shown(tmp_path, RAMP, RescaleSlope="-2", RescaleIntercept="10", Modality="MR")
    assert np.array_equal(made, np.rint(stretched(RAMP * -2.0)))


def test_an_intercept_alone_is_applied(tmp_path):
    made = shown(tmp_path, RAMP, "40/400", RescaleIntercept="-1024")
    assert np.abs(made - linear(RAMP - 1024.0, 40, 400)).max() <= 0.5


def test_of_several_windows_the_first_is_used(tmp_path):
    made = shown(tmp_path, RAMP, WindowCenter=["1000", "2"], WindowWidth=["500", "3"])
    assert np.abs(made - linear(RAMP, 1000, 500)).max() <= 0.5


def test_window_functions(tmp_path):
    window = {"WindowCenter": "1000", "WindowWidth": "500"}
    exact = shown(tmp_path, RAMP, VOILUTFunction="LINEAR_EXACT", **window)
    assert np.abs(exact - np.clip((RAMP - 1000.0) / 500 + 0.5, 0, 1) * 65535).max() <= 0.5
    curve = shown(tmp_path, RAMP, VOILUTFunction="SIGMOID", **window)
    assert np.abs(curve - 65535 / (1 + np.exp(-4 * (RAMP - 1000.0) / 500))).max() <= 0.5
    other = shown(tmp_path, RAMP, VOILUTFunction="CUBIC", **window)
    assert np.abs(other - linear(RAMP, 1000, 500)).max() <= 0.5


@pytest.mark.parametrize(
    ("centre", "width"),
    [("nan", "500"), ("1", "nan"), ("1", "0"), ("1", "-5"), ("", ""), ("inf", "3")],
)
def test_a_window_that_cannot_be_drawn_counts_as_none(tmp_path, centre, width):
    made = shown(tmp_path, RAMP, WindowCenter=centre, WindowWidth=width)
    assert np.array_equal(made, np.rint(stretched(RAMP)))


@pytest.mark.parametrize(("slope", "intercept"), [("nan", "0"), ("0", "5"), ("1", "inf")])
def test_a_rescale_that_is_no_number_is_refused(tmp_path, slope, intercept):
    path = write_dicom(tmp_path / "one.dcm", RAMP, RescaleSlope=slope, RescaleIntercept=intercept)
    assert reason(path) == "rescale, window or lookup table damaged"


@pytest.mark.parametrize("as_words", [True, False])
def test_a_lookup_table_comes_before_a_window(tmp_path, as_words):
    table = np.arange(4096)[::-1] // 2  # 0 to 2047 of declared 16 bits
    voi = lookup(table, 0, 16, as_words=as_words)
    made = shown(tmp_path, RAMP, VOILUTSequence=voi, WindowCenter="7", WindowWidth="9")
    assert np.array_equal(made, np.rint(table[RAMP] / 2047 * 65535))


@pytest.mark.parametrize("first", [-100, 65436])
def test_a_lookup_table_begins_where_it_says(tmp_path, first):
    pixels = np.array([[-200, -100, -99, 0, 300]], np.int16)
    voi = lookup(np.array([0, 100, 255]), first, 8, as_words=False)
    made = shown(tmp_path, pixels, VOILUTSequence=voi)
    assert np.abs(made[0] / 257 - [0, 0, 100, 255, 255]).max() <= 0.5


def test_a_lookup_table_below_zero_serves_an_image_above_it(tmp_path):
    """Its first value was stored unsigned, and no pixel is negative to tell."""
    table = np.arange(2000)
    pixels = np.array([[0, 500, 999]], np.uint16)
    made = shown(tmp_path, pixels, VOILUTSequence=lookup(table, 64536, 16))  # -1000
    assert np.abs(made[0] / 65535 - (pixels[0] + 1000) / 2047).max() < 1e-4


def test_pixels_in_the_high_bits_of_their_words_are_refused(tmp_path):
    path = write_dicom(tmp_path / "one.dcm", RAMP, bits=12, HighBit=15)
    assert reason(path) == "pixels are not in the lowest bits of their words"


def test_a_table_of_65536_entries(tmp_path):
    table = np.arange(65536) ^ 0xFFFF
    pixels = np.array([[0, 1, 65535]], np.uint16)
    made = shown(tmp_path, pixels, VOILUTSequence=lookup(table, 0, 16))
    assert made[0].tolist() == [65535, 65534, 0]


def test_a_modality_table_comes_before_the_window(tmp_path):
    table = np.sqrt(np.arange(4096)).astype(int)
    made = shown(
        tmp_path,
        RAMP,
        bits=12,
        ModalityLUTSequence=lookup(table, 0, 16),
        WindowCenter="30",
        WindowWidth="20",
    )
    assert np.abs(made - linear(table[RAMP], 30, 20)).max() <= 0.5


def test_a_modality_table_of_signed_values(tmp_path):
    pixels = np.array([[-32768, -10, -9, -8, 32767]], np.int16)
    made = shown(tmp_path, pixels, ModalityLUTSequence=lookup(np.array([5, 15, 25]), -10, 16))
    assert made[0].tolist() == [0, 0, 32768, 65535, 65535]


@pytest.mark.parametrize("bits", [8, 16])
def test_palettes_of_both_depths_and_byte_orders(tmp_path, bits):
    colours = np.array([[0, 10, 255], [1, 20, 254], [3, 4, 5], [250, 30, 3]])  # entry, channel
    depth = "<u2" if bits == 16 else "u1"
    scale = 257 if bits == 16 else 1
    pixels = np.array([[0, 5, 6, 8, 200]], np.uint8)
    elements = {}
    for channel, colour in enumerate(("Red", "Green", "Blue")):
        elements[f"{colour}PaletteColorLookupTableDescriptor"] = [4, 5, bits]
        data = (colours[:, channel] * scale).astype(depth).tobytes()
        elements[f"{colour}PaletteColorLookupTableData"] = data
    expected = colours[[0, 0, 1, 3, 3]][None]
    options = {"kind": "PALETTE COLOR", **elements}
    assert np.array_equal(shown(tmp_path, pixels, **options), expected)
    if bits == 16:
        for channel, colour in enumerate(("Red", "Green", "Blue")):
            data = (colours[:, channel] * scale).astype(">u2").tobytes()
            options[f"{colour}PaletteColorLookupTableData"] = data
        made = shown(tmp_path, pixels, syntax=ExplicitVRBigEndian, **options)
        assert np.array_equal(made, expected)


def test_rgb_of_sixteen_bits_becomes_eight(tmp_path):
    pixels = np.array([[[0, 257, 65535]]], np.uint16)
    assert shown(tmp_path, pixels, kind="RGB").tolist() == [[[0, 1, 255]]]


def test_a_window_does_not_touch_colour(tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert np.array_equal(shown(tmp_path, pixels, "brain", kind="RGB"), pixels)


def test_floating_point_pixels_with_nan(tmp_path):
    values = np.array([[-1.5, 0.0, 1.5, np.nan]], np.float32)
    made = dataset(np.zeros((1, 4), np.uint16), BitsAllocated=32, Modality="MR")
    for keyword in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation"):
        delattr(made, keyword)
    made.FloatPixelData = values.tobytes()
    made.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    assert read_frame(tmp_path / "one.dcm")[0].tolist() == [0, 32768, 65535, 0]


def test_enhanced_objects_keep_values_by_frame(tmp_path):
    frames = np.stack([RAMP, RAMP])
    rescale = sequence(RescaleSlope="2", RescaleIntercept="-100", RescaleType="HU")
    shared = sequence(PixelValueTransformationSequence=rescale)
    windows = [
        item(FrameVOILUTSequence=sequence(WindowCenter=centre, WindowWidth="400"))
        for centre in ("100", "3000")
    ]
    for frame, centre in enumerate((100, 3000)):
        made = shown(
            tmp_path,
            frames,
            frame=frame,
            SharedFunctionalGroupsSequence=shared,
            PerFrameFunctionalGroupsSequence=Sequence(windows),
        )
        assert np.abs(made - linear(RAMP * 2.0 - 100, centre, 400)).max() <= 0.5


def test_orientation_is_left_alone(tmp_path):
    options = {"ImageOrientationPatient": [-1, 0, 0, 0, -1, 0], "PatientOrientation": ["R", "F"]}
    assert np.array_equal(shown(tmp_path, RAMP, **options), shown(tmp_path, RAMP))


# Files as archives have them.


@pytest.mark.parametrize("implicit", [True, False])
def test_a_file_without_preamble_and_meta_is_read(tmp_path, implicit):
    made = dataset(RAMP)
    del made.file_meta
    made.save_as(tmp_path / "bare", implicit_vr=implicit, little_endian=True)
    assert np.array_equal(read_frame(tmp_path / "bare"), shown(tmp_path, RAMP))


def test_a_file_with_an_empty_transfer_syntax_is_read(tmp_path):
    path = write_dicom(tmp_path / "one.dcm", RAMP)
    content = path.read_bytes()
    at = content.index(b"1.2.840.10008.1.2.1\0")
    path.write_bytes(content[: at - 2] + b"\0\0" + content[at + 20 :])
    assert np.array_equal(read_frame(path), shown(tmp_path, RAMP))


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "empty file"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 200, "not a DICOM file"),
        (b"\0" * 128 + b"DICM", "DICOM header truncated or damaged"),
        (b"\0" * 200, "not a DICOM file"),
        (b"\x08\0", "not a DICOM file"),
        (b"file,label\n" * 50, "not a DICOM file"),
    ],
)
def test_other_files_have_a_reason(tmp_path, content, text):
    (tmp_path / "one.dcm").write_bytes(content)
    assert reason(tmp_path / "one.dcm") == text


def test_folders_and_absent_files_have_a_reason(tmp_path):
    assert reason(tmp_path) == "not a regular file"
    assert "cannot be opened" in reason(tmp_path / "absent.dcm")


@pytest.mark.parametrize(
    ("elements", "text"),
    [
        ({"Rows": 65535, "Columns": 65535}, "picture of more than 100 million pixels"),
        ({"Rows": 0}, "pixel data truncated or damaged"),
        ({"Rows": 65}, "pixel data truncated or damaged"),
        ({"SamplesPerPixel": 2}, "colour space or number of samples is not read"),
        ({"PhotometricInterpretation": "HSV"}, "colour space or number of samples is not read"),
        ({"PhotometricInterpretation": "RGB"}, "colour space or number of samples is not read"),
        ({"PhotometricInterpretation": None}, "DICOM header truncated or damaged"),
        ({"BitsAllocated": 13}, "pixel data truncated or damaged"),
        ({"NumberOfFrames": "-3"}, "frame is not in the file"),
        ({"PixelData": b""}, "pixel data truncated or damaged"),
        ({"PixelData": None}, "pixel data truncated or damaged"),
    ],
)
def test_headers_that_lie_have_a_reason(tmp_path, elements, text):
    assert reason(write_dicom(tmp_path / "one.dcm", RAMP, **elements)) == text


@pytest.mark.parametrize(
    ("name", "marker", "place"),
    [
        ("SC_rgb_jpeg_dcmtk", b"\xff\xc0", 5),
        ("MR_small_jpeg_ls_lossless", b"\xff\xf7", 5),
        ("MR_small_jp2klossless", b"\xff\x4f\xff\x51", 8),
    ],
)
def test_a_codestream_that_claims_gigapixels_is_not_decoded(
    tmp_path, monkeypatch, name, marker, place
):
    content = (WHEEL / f"{name}.dcm").read_bytes()
    at = content.index(marker) + place
    path = tmp_path / "one.dcm"
    path.write_bytes(content[:at] + b"\x7f\xff\x7f\xff" + content[at + 4 :])
    monkeypatch.setattr("client.data.dicom.pixel_array", lambda *_, **__: pytest.fail("decoded"))
    assert reason(path) == "pixel data truncated or damaged"


def test_a_video_has_no_decoder(tmp_path):
    path = write_dicom(tmp_path / "one.dcm", RAMP)
    content = path.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.4.102"[:20])
    path.write_bytes(content)
    assert reason(path).endswith("has no decoder here")


def test_a_patients_name_reaches_no_log(tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    made = dataset(RAMP)
    made.save_as(tmp_path / "one.dcm", enforce_file_format=True)
    content = (tmp_path / "one.dcm").read_bytes()
    # A date that is a name is what pydicom's checks quote.
    (tmp_path / "one.dcm").write_bytes(content.replace(b"CT", b"\xff\xfe"))
    read_frame(tmp_path / "one.dcm")
    reason(WHEEL / "badVR.dcm")
    assert not [record for record in caplog.records if record.name.startswith("pydicom")]


@pytest.mark.parametrize(
    "window", ["40", "40/0", "a/b", "40/400/1", "nan/400", "1/inf", "AUTO", ""]
)
def test_windows_that_are_none_are_refused(window):
    with pytest.raises(DataError, match=r"window=.* expected auto, none, lung, bone"):
        DicomOptions(window)


def test_settings_and_reader_know_the_same_windows():
    assert set(WINDOW_PRESETS) == set(WINDOWS)


@given(
    centre=st.floats(-2000, 3000),
    width=st.floats(1, 5000),
    pixels=st.lists(st.integers(-3000, 4000), min_size=2, max_size=30),
)
def test_a_window_never_changes_the_order_of_values(tmp_path_factory, centre, width, pixels):
    path = tmp_path_factory.getbasetemp() / "window.dcm"
    values = np.array([sorted(pixels)], np.int16)
    write_dicom(path, values)
    made = read_frame(path, 0, DicomOptions(f"{centre}/{width}"))[0].astype(int)
    assert (np.diff(made) >= 0).all()
    assert (made[values[0] < centre - width] == 0).all()
    assert (made[values[0] > centre + width] == 65535).all()


# docs/dicom.md


def test_the_page_tells_the_decoders_as_they_are(repository):
    page = (repository / "docs" / "dicom.md").read_text(encoding="utf-8")
    lines = [
        line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| 1.2.")
    ]
    told = {syntax: (name, bare, with_plugins) for syntax, name, bare, with_plugins in lines}
    assert set(told) == set(_PIXEL_DATA_DECODERS)
    for syntax, (name, bare, with_plugins) in told.items():
        assert name == UID(syntax).name
        header = dataset(RAMP, syntax=syntax)
        assert (missing_decoder(header) == "") == with_plugins.startswith("yes"), name
        own = {"pydicom", "pillow"} & set(get_decoder(syntax).available_plugins)
        native = not UID(syntax).is_encapsulated
        eight_bits = syntax == JPEGExtended12Bit
        assert bare.startswith("yes") == (native or (bool(own) and not eight_bits)), name
