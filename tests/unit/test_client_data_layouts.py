"""Official layouts are read as downloaded, and what is missing or odd is counted, never guessed."""

import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.data import layouts
from client.data.catalogue import entry, file_backed_names
from client.data.layouts import read
from fakes.miniatures import CPN_INNER, miniature, official, picture, write, zipped
from strategies.enrolment import SITE_NAME
from strategies.errors import DataError

LAYOUTS = Path(__file__).resolve().parents[3] / "shared" / "data" / "layouts"
needs_layouts = pytest.mark.skipif(
    not LAYOUTS.is_dir(), reason="the official layouts' files (shared/data) are not on this disk"
)
SMALL = 6


def made(name, folder, **options):
    return miniature(name, folder, per_class=SMALL, **options)


def described(listing):
    """Rows without their folders, so that two ways of laying files out can be compared."""
    return sorted(row._replace(file=Path(row.file).name) for row in listing.rows)


# --- every set


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", file_backed_names())
def test_every_official_layout_is_read_whole(name, packed, tmp_path):
    listing = read(name, made(name, tmp_path, packed=packed))
    facts = entry(name)
    assert listing.dataset == name
    assert listing.classes == facts.classes
    assert Counter(row.label for row in listing.rows) == dict.fromkeys(facts.classes, SMALL)
    assert not listing.skipped
    assert listing.kind == "picture"
    assert all((listing.root / row.file).is_file() for row in listing.rows)
    assert all(not Path(row.file).is_absolute() and "\\" not in row.file for row in listing.rows)


@pytest.mark.parametrize("name", file_backed_names())
def test_packed_and_unpacked_give_the_same_rows(name, tmp_path):
    packed = read(name, made(name, tmp_path / "packed"))
    unpacked = read(name, made(name, tmp_path / "unpacked", packed=False))
    assert described(packed) == described(unpacked)


@pytest.mark.parametrize("name", file_backed_names())
def test_one_folder_more_around_the_data_is_tolerated(name, tmp_path):
    plain = read(name, made(name, tmp_path / "plain", packed=False))
    moved = tmp_path / "around" / "one folder more"
    made(name, moved, packed=False)
    assert described(read(name, tmp_path / "around")) == described(plain)


@pytest.mark.parametrize("name", file_backed_names())
def test_masks_hidden_and_empty_files_are_left_out_and_counted(name, tmp_path):
    made(name, tmp_path, packed=False)
    beside = next(path for path in sorted(tmp_path.rglob("*.[pj][np]g")) if path.is_file())
    ending = beside.suffix
    shutil.copy(beside, beside.with_name(f"{beside.stem}_mask{ending}"))
    shutil.copy(beside, beside.with_name(f"{beside.stem}_mask_1{ending}"))
    beside.with_name(f".hidden{ending}").write_bytes(b"")
    beside.with_name(f"empty{ending}").write_bytes(b"")
    listing = read(name, tmp_path)
    assert listing.skipped == {layouts.MASK: 2, layouts.EMPTY: 1}
    assert len(listing.rows) == SMALL * len(entry(name).classes)


@pytest.mark.parametrize("name", file_backed_names())
def test_a_site_can_name_a_site_of_a_federation(name, tmp_path):
    made(name, tmp_path)
    for column in ("", *entry(name).site_columns):
        sites = {row.site for row in read(name, tmp_path, site_column=column).rows}
        wanted = column or entry(name).default_site_column
        assert all(re.fullmatch(SITE_NAME, site) for site in sites) if wanted else sites == {""}


@pytest.mark.parametrize("name", file_backed_names())
def test_an_absent_set_is_one_line_and_says_how_to_get_it(name, tmp_path):
    with pytest.raises(DataError) as error:
        read(name, tmp_path)
    assert "\n" not in str(error.value) + error.value.hint
    if entry(name).access == "private":
        assert str(error.value) == f"dataset={name} is private and not in {tmp_path}"
        assert error.value.hint == entry(name).how
    else:
        assert str(error.value) == (
            f"dataset={name} not found in {tmp_path}: expected {entry(name).layout}"
        )
        assert f"python -m client data fetch {name} --data-dir {tmp_path}" in error.value.hint


def test_a_folder_that_is_none_and_a_column_that_is_none_are_named(tmp_path):
    with pytest.raises(DataError, match=r"data-dir=.*nowhere expected a folder"):
        read("kvasir", tmp_path / "nowhere")
    with pytest.raises(DataError, match="site-column=region expected fitspatrick, background_fath"):
        read("pad-ufes-20", tmp_path, site_column="region")
    with pytest.raises(DataError, match="site-column=x expected none: the set tells no sites"):
        read("cpn-xray", tmp_path, site_column="x")


def test_several_sets_in_one_folder_are_kept_apart(tmp_path):
    for name in file_backed_names():
        made(name, tmp_path / name, packed=False)
    for name in file_backed_names():
        listing = read(name, tmp_path)
        assert name in listing.root.relative_to(tmp_path).parts
        assert not listing.skipped


def test_the_two_versions_of_kvasir_are_not_confused(tmp_path):
    made("kvasir-v2", tmp_path, packed=False)
    with pytest.raises(DataError, match="dataset=kvasir not found"):
        read("kvasir", tmp_path)
    with pytest.raises(DataError, match="dataset=kvasir not found"):
        read("kvasir", tmp_path / "kvasir-dataset-v2")
    assert read("kvasir-v2", tmp_path / "kvasir-dataset-v2").rows


def test_a_loop_of_links_ends(tmp_path):
    made("kvasir", tmp_path, packed=False)
    (tmp_path / "kvasir-dataset" / "again").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert len(read("kvasir", tmp_path).rows) == SMALL * 8


# --- tables


def table_of(folder):
    (path,) = folder.rglob("*.csv")
    return path


@pytest.mark.parametrize("place", ["imgs_part_{n}", "images/imgs_part_{n}", "images"])
def test_pads_images_may_lie_in_three_places(place, tmp_path):
    files = official("pad-ufes-20", SMALL, packed=False)
    moved = {}
    for path, data in files.items():
        folder, _, name = path.rpartition("/")
        if folder:
            path = f"{place.format(n=folder[-1])}/{name}"
        moved[path] = data
    write(tmp_path, moved)
    listing = read("pad-ufes-20", tmp_path)
    assert len(listing.rows) == 6 * SMALL
    assert not listing.skipped


def test_pad_tells_its_patients_and_no_split(tmp_path):
    listing = read("pad-ufes-20", made("pad-ufes-20", tmp_path))
    assert {row.split for row in listing.rows} == {""}
    images = Counter(row.patient for row in listing.rows)
    assert set(images.values()) == {2}
    assert all(row.file.split("/")[-1].startswith(f"{row.patient}_") for row in listing.rows)


def test_a_patient_at_several_sites_is_counted_to_one(tmp_path):
    made("pad-ufes-20", tmp_path, packed=False)
    path = table_of(tmp_path)
    lines = path.read_text().splitlines()
    # Three images of one patient: two of type 2, one of type 3.
    patient = lines[1].split(",")[0]
    for position, kind in ((1, "3.0"), (2, "2.0"), (3, "2.0")):
        cells = lines[position].split(",")
        cells[0], cells[13] = patient, kind
        lines[position] = ",".join(cells)
    path.write_text("\n".join(lines))
    listing = read("pad-ufes-20", tmp_path, site_column="fitspatrick")
    assert {row.site for row in listing.rows if row.patient == patient} == {"2-0"}
    assert listing.flagged == {layouts.MOVED: 1}


def test_values_that_are_missing_make_a_site_of_their_own(tmp_path):
    listing = read("pad-ufes-20", made("pad-ufes-20", tmp_path), site_column="background_father")
    assert {row.site for row in listing.rows} == {"POMERANIA", "unknown"}


def test_fetal_planes_has_the_official_test_split_and_machines_for_sites(tmp_path):
    made("fetal-planes", tmp_path)
    listing = read("fetal-planes", tmp_path)
    assert (
        (listing.root / "FETAL_PLANES_DB_data.csv")
        .read_bytes()
        .startswith(b"Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train \n")
    )
    assert {row.site for row in listing.rows} == {"Voluson-E6", "Voluson-S10", "Aloka", "Other"}
    splits = {row.patient: row.split for row in listing.rows}
    assert splits == {str(p): "train" if p % 3 else "test" for p in range(1, SMALL + 1)}
    assert all(row.file == f"Images/{Path(row.file).stem}.png" for row in listing.rows)
    operators = {row.site for row in read("fetal-planes", tmp_path, site_column="Operator").rows}
    assert operators == {"Op-1", "Op-2", "Op-3", "Other"}


@pytest.mark.parametrize("blank", [True, False])
def test_fetal_planes_is_read_with_and_without_the_trailing_blanks(blank, tmp_path):
    made("fetal-planes", tmp_path, packed=False)
    path = table_of(tmp_path)
    if not blank:
        path.write_text(path.read_text().replace(" \n", "\n"))
    assert len(read("fetal-planes", tmp_path).rows) == 6 * SMALL


def test_each_thing_that_is_odd_in_a_table_is_counted(tmp_path):
    made("fetal-planes", tmp_path, packed=False)
    path = table_of(tmp_path)
    lines = path.read_text().splitlines()
    lines[1] = lines[1].replace("Fetal abdomen", "Fetal tail")
    lines[2] = lines[2].replace("_1_of_1", "_9_of_9", 1)  # its file is left without a row
    lines[3] = lines[3][:-2] + "7 "
    lines[4] = lines[5]
    lines.append("")
    path.write_text("\n".join(lines))
    listing = read("fetal-planes", tmp_path)
    assert listing.skipped == {
        layouts.UNKNOWN_LABEL: 1,
        layouts.MISSING: 1,
        layouts.NO_SPLIT: 1,
        layouts.REPEATED_ROW: 1,
        layouts.NOT_IN_TABLE: 2,
    }
    assert len(listing.rows) == 6 * SMALL - 4


def test_a_file_that_lies_there_twice_is_used_once(tmp_path):
    made("pad-ufes-20", tmp_path, packed=False)
    shutil.copytree(tmp_path / "images" / "imgs_part_1", tmp_path / "imgs_part_1")
    listing = read("pad-ufes-20", tmp_path)
    again = len(list((tmp_path / "imgs_part_1").iterdir()))
    assert listing.skipped == {layouts.REPEATED: again}
    assert len({row.file for row in listing.rows}) == len(listing.rows) == 6 * SMALL


@pytest.mark.parametrize("name", ["pad-ufes-20", "fetal-planes"])
def test_a_table_without_a_needed_column_or_not_in_utf8_is_refused(name, tmp_path):
    made(name, tmp_path, packed=False)
    path = table_of(tmp_path)
    good = path.read_bytes()
    needed = {"pad-ufes-20": b"diagnostic", "fetal-planes": b"Plane;"}[name]
    path.write_bytes(good.replace(needed, b"x" * (len(needed) - 1) + needed[-1:], 1))
    with pytest.raises(DataError, match=f"table={path.name} lacks the column"):
        read(name, tmp_path)
    path.write_bytes(good + b"\xff\xfe;\xe9\n")
    with pytest.raises(DataError, match=f"table={path.name} expected UTF-8 text"):
        read(name, tmp_path)


def test_another_sets_metadata_is_not_taken_for_pads(tmp_path):
    made("pad-ufes-20", tmp_path / "pad", packed=False)
    other = tmp_path / "cohen"
    other.mkdir()
    (other / "metadata.csv").write_text("patientid,finding,view\n1,COVID,PA\n")
    assert read("pad-ufes-20", tmp_path).root == tmp_path / "pad"


@pytest.fixture(scope="module")
def fetal(tmp_path_factory):
    return made("fetal-planes", tmp_path_factory.mktemp("fetal"), packed=False)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    body=st.one_of(
        st.binary(max_size=300),
        st.text(alphabet=st.sampled_from('PatientOther;01 \n"\0é,'), max_size=300).map(str.encode),
    )
)
def test_any_table_gives_sound_rows_or_one_error(fetal, body):
    path = table_of(fetal)
    header = b"Image_name;Patient_num;Plane;Brain_plane;Operator;US_Machine;Train \n"
    path.write_bytes(header + body)
    reason = ""
    try:
        listing = read("fetal-planes", fetal)
    except DataError as error:
        reason = str(error)
    if reason:
        assert reason.startswith("table=FETAL_PLANES_DB_data.csv ")
        return
    for row in listing.rows:
        assert row.label in listing.classes
        assert row.split in ("train", "test")
        assert (listing.root / row.file).is_file()
    assert (
        listing.skipped[layouts.NOT_IN_TABLE]
        + len(listing.rows)
        + sum(listing.skipped[reason] for reason in (layouts.UNKNOWN_LABEL, layouts.NO_SPLIT))
        == 6 * SMALL
    )


# --- class folders


def test_class_folders_are_found_in_any_case_and_with_other_separators(tmp_path):
    made("cpn-xray", tmp_path, packed=False)
    inner = tmp_path / "dvntn9yhd2-1" / CPN_INNER
    (inner / "COVID").rename(inner / "covid")
    (inner / "NORMAL").rename(inner / "Normal ")
    listing = read("cpn-xray", tmp_path)
    assert {row.label for row in listing.rows} == {"COVID", "NORMAL", "PNEUMONIA"}
    made("otoscopy2024", tmp_path, packed=False)
    ears = tmp_path / "otoscopy2024"
    (ears / "Acute otitis media").rename(ears / "acute_otitis-media")
    assert len(read("otoscopy2024", tmp_path).rows) == 9 * SMALL


def test_a_class_that_is_missing_is_left_empty(tmp_path):
    made("cervical-us", tmp_path)
    shutil.rmtree(tmp_path / "cervical-us" / "primary")
    listing = read("cervical-us", tmp_path)
    assert listing.classes == ("normal", "benign", "primary", "metastatic")
    assert {row.label for row in listing.rows} == {"normal", "benign", "metastatic"}


def test_other_files_among_pictures_are_counted(tmp_path):
    made("cervical-us", tmp_path)
    (tmp_path / "cervical-us" / "normal" / "Thumbs.db").write_bytes(b"x")
    listing = read("cervical-us", tmp_path)
    assert listing.skipped == {layouts.NO_PICTURE: 1}


def test_kvasirs_sites_are_three_groups_of_resolution(tmp_path):
    folder = tmp_path / "kvasir-dataset" / "polyps"
    (tmp_path / "kvasir-dataset" / "esophagitis").mkdir(parents=True)
    sizes = [(720, 576), (576, 576), (1280, 1024), (1350, 1064), (1920, 1072)]
    write(
        folder,
        {f"{i}.jpg": picture(i, 0, "RGB", size, "JPEG") for i, size in enumerate(sizes)}
        | {"9.jpg": b"no picture"},
    )
    listing = read("kvasir", tmp_path)
    assert [row.site for row in listing.rows] == [
        *["upto-720x576"] * 2,
        "upto-1280x1024",
        *["over-1280x1024"] * 2,
    ]
    assert listing.skipped == {layouts.NO_SIZE: 1}


def test_a_folder_that_may_not_be_read_is_counted(tmp_path, monkeypatch):
    made("cervical-us", tmp_path)
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "benign":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr("client.data.archives.os.scandir", refuse)
    listing = read("cervical-us", tmp_path)
    assert listing.skipped == {"folder that cannot be read (Permission denied)": 1}
    assert {row.label for row in listing.rows} == {"normal", "primary", "metastatic"}


# --- real files


@needs_layouts
def test_the_real_files_of_pad_are_read():
    listing = read("pad-ufes-20", LAYOUTS)
    assert sorted((row.patient, row.label) for row in listing.rows) == [
        ("PAT_117", "BCC"),
        ("PAT_1516", "NEV"),
        ("PAT_1545", "ACK"),
        ("PAT_1549", "SEK"),
        ("PAT_46", "BCC"),
        ("PAT_684", "BCC"),
        ("PAT_778", "BCC"),
    ]
    assert listing.skipped == {layouts.MISSING: 2298 - 7}


@needs_layouts
def test_the_real_rows_of_fetal_planes_are_read(tmp_path):
    shutil.copy(LAYOUTS / "fetal_planes" / "FETAL_PLANES_DB_data.sample.csv", tmp_path)
    names = [line.split(";")[0] for line in next(tmp_path.iterdir()).read_text().splitlines()[1:]]
    write(tmp_path, {f"Images/{name}.png": picture(i, 0) for i, name in enumerate(names)})
    listing = read("fetal-planes", tmp_path)
    assert not listing.skipped
    assert Counter(row.split for row in listing.rows) == {"train": 4, "test": 9}
    assert {row.site for row in listing.rows} == {"Aloka", "Voluson-S10", "Voluson-E6"}


def test_archives_of_another_name_are_left_alone(tmp_path):
    (tmp_path / "FETAL_PLANES_ZENODO.zip").write_bytes(zipped({"x.csv": b"x"}))
    with pytest.raises(DataError, match="kvasir not found"):
        read("kvasir", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["FETAL_PLANES_ZENODO.zip"]
