"""Official archives are unpacked once, whole, and never outside their own folder."""

import io
import os
import shutil
import stat
import zipfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.data import archives
from client.data.archives import fetch, folders, unpack, unpack_official
from client.data.catalogue import entry
from client.data.layouts import read
from fakes.miniatures import miniature, official, picture, write, zipped
from strategies.errors import ConfigError, DataError
from strategies.files import held

PICTURE = picture(0, 0)


def archive_of(folder, content, name="x.zip"):
    folder.mkdir(exist_ok=True, parents=True)
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else zipped(content))
    return path


def below(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_an_archive_becomes_a_folder_of_its_name(tmp_path):
    path = archive_of(tmp_path, {"b/a.png": PICTURE, "t.csv": b"x"})
    unpack(path, tmp_path / "x")
    assert below(tmp_path / "x") == ["b/a.png", "t.csv"]
    assert (tmp_path / "x" / "b" / "a.png").read_bytes() == PICTURE


@pytest.mark.parametrize("top", ["x", "X"])
def test_a_top_folder_of_the_same_name_is_not_doubled(top, tmp_path):
    unpack(archive_of(tmp_path, {f"{top}/a.png": PICTURE}), tmp_path / "x")
    assert below(tmp_path / "x") == ["a.png"]


def test_a_single_top_folder_of_another_name_stays(tmp_path):
    unpack(archive_of(tmp_path, {"COVID/a.png": PICTURE}), tmp_path / "x")
    assert below(tmp_path / "x") == ["COVID/a.png"]


def test_what_no_reader_needs_stays_inside(tmp_path):
    files = {
        "a.png": PICTURE,
        "__MACOSX/._a.png": b"x",
        ".DS_Store": b"x",
        "run.sh": b"x",
        "t.xlsx": b"x",
        ".hidden/a.png": b"x",
    }
    unpack(archive_of(tmp_path, files), tmp_path / "x")
    assert below(tmp_path / "x") == ["a.png"]


def test_backslashes_of_other_systems_are_folders(tmp_path):
    unpack(archive_of(tmp_path, {"COVID\\a.png": PICTURE}), tmp_path / "x")
    assert below(tmp_path / "x") == ["COVID/a.png"]


@pytest.mark.parametrize(
    "name", ["../a.png", "a/../../a.png", "/a.png", "C:\\a.png", "..\\a.png", "b/..\\..\\a.png"]
)
def test_a_member_that_leads_outside_refuses_the_archive(name, tmp_path):
    path = archive_of(tmp_path / "data", {"ok.png": PICTURE, name: PICTURE})
    with pytest.raises(DataError, match=r"archive=x.zip names a place outside itself, or holds a"):
        unpack(path, tmp_path / "data" / "x")
    assert below(tmp_path) == ["data/.x.lock", "data/x.zip"]


def test_a_link_refuses_the_archive(tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as opened:
        link = zipfile.ZipInfo("a.png")
        link.external_attr = (stat.S_IFLNK | 0o777) << 16
        opened.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match="holds a link"):
        unpack(archive_of(tmp_path, content.getvalue()), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_an_archive_that_grows_beyond_measure_is_refused_before_it_is_written(tmp_path):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as opened:
        opened.writestr("a.png", bytes(10_000_000))
    path = archive_of(tmp_path, content.getvalue())
    with pytest.raises(DataError, match="claims more than 500000 files, or more than 50 times"):
        unpack(path, tmp_path / "x")
    assert below(tmp_path) == [".x.lock", "x.zip"]


def test_a_declared_size_that_is_too_small_does_not_let_more_through(tmp_path):
    content = bytearray(zipped({"a.png": PICTURE}))
    for signature, offset in ((b"PK\3\4", 22), (b"PK\1\2", 24)):
        at = content.index(signature) + offset
        content[at : at + 4] = (10).to_bytes(4, "little")
    with pytest.raises(DataError, match=r"archive=x.zip cannot be unpacked: Bad CRC-32"):
        unpack(archive_of(tmp_path, bytes(content)), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_damaged_archive_leaves_nothing(tmp_path):
    content = bytearray(zipped({"a.png": PICTURE, "b.png": PICTURE}))
    content[content.index(PICTURE) + 40] ^= 1
    for broken in (bytes(content), bytes(content[:-40]), b"", b"PK"):
        with pytest.raises(DataError, match=r"archive=x.zip cannot be unpacked: "):
            unpack(archive_of(tmp_path, broken), tmp_path / "x")
        assert below(tmp_path) == [".x.lock", "x.zip"]


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_damage_in_another_compression_is_told_too(tmp_path, method):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", method) as opened:
        opened.writestr("a.png", PICTURE)
        info = opened.getinfo("a.png")
    damaged = bytearray(content.getvalue())
    start, end = 30 + len(info.filename) + 9, 30 + len(info.filename) + info.compress_size
    damaged[start:end] = b"\xff" * (end - start)  # behind what describes the compression
    with pytest.raises(DataError, match=r"archive=x.zip cannot be unpacked"):
        unpack(archive_of(tmp_path, bytes(damaged)), tmp_path / "x")
    assert below(tmp_path) == [".x.lock", "x.zip"]


def test_an_archive_without_pictures_or_tables_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no pictures and no table"):
        unpack(archive_of(tmp_path, {"readme.txt": b"x"}), tmp_path / "x")


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(archives.shutil, "disk_usage", lambda path: usage)
    path = archive_of(tmp_path, {"a.png": PICTURE})
    with pytest.raises(DataError, match=f"needs {len(PICTURE)} bytes unpacked, 10 are free"):
        unpack(path, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch):
    def refuse(source, target, length):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(archives.shutil, "copyfileobj", refuse)
    with pytest.raises(DataError, match=r"cannot be unpacked into .* \(Read-only file") as error:
        unpack(archive_of(tmp_path, {"a.png": PICTURE}), tmp_path / "x")
    assert "unpack it by hand elsewhere" in error.value.hint
    assert below(tmp_path) == [".x.lock", "x.zip"]


def test_what_an_interrupted_attempt_left_is_cleared(tmp_path):
    write(tmp_path / ".x.part", {"half.png": b"half"})
    unpack(archive_of(tmp_path, {"a.png": PICTURE}), tmp_path / "x")
    assert below(tmp_path) == [".x.lock", "x.zip", "x/a.png"]


def test_two_processes_do_not_unpack_at_once(tmp_path):
    path = archive_of(tmp_path, {"a.png": PICTURE})
    with (
        held(tmp_path / ".x.lock", ConfigError("unused")),
        pytest.raises(ConfigError, match=r"archive=x.zip is being unpacked by another process"),
    ):
        unpack(path, tmp_path / "x")
    unpack(path, tmp_path / "x")
    assert below(tmp_path / "x") == ["a.png"]


def test_unpacked_archives_are_left_alone(tmp_path):
    data = miniature("pad-ufes-20", tmp_path, per_class=4)
    read("pad-ufes-20", data)
    (table,) = data.rglob("metadata.csv")
    before = {path: os.stat(path).st_mtime_ns for path in data.rglob("*")}
    table.parent.joinpath("images", "imgs_part_1").joinpath("note.txt").write_text("mine")
    read("pad-ufes-20", data)
    after = {path: os.stat(path).st_mtime_ns for path in before if path.is_file()}
    assert after == {path: before[path] for path in after}
    assert (table.parent / "images" / "imgs_part_1" / "note.txt").exists()


def test_only_the_sets_own_archives_are_unpacked(tmp_path):
    for name in ("pad-ufes-20", "cpn-xray"):
        miniature(name, tmp_path, per_class=2)
    unpack_official(entry("cpn-xray"), tmp_path)
    assert not (tmp_path / "zr7vgbcyr2-1").exists()
    assert len(list((tmp_path / "dvntn9yhd2-1").rglob("*.png"))) == 6


names = st.text(alphabet=st.sampled_from("ab./\\:_ é\0~"), min_size=1, max_size=12)


@pytest.mark.filterwarnings("ignore:Duplicate name")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(names.map("{}.png".format), st.binary(max_size=20), min_size=1, max_size=5))
def test_nothing_is_ever_written_outside_the_target(tmp_path_factory, files):
    root = tmp_path_factory.mktemp("root")
    path = archive_of(root / "in", zipped(files))
    target, refused = root / "in" / "x", ""
    try:
        unpack(path, target)
    except DataError as error:
        refused = str(error)
    assert target.exists() == (not refused)
    outside = [name for name in below(root) if not name.startswith("in/x/")]
    assert outside == ["in/.x.lock", "in/x.zip"]
    assert all(not p.is_symlink() for p in root.rglob("*"))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_one_error_or_none(tmp_path_factory, data):
    content = bytearray(zipped({"a.png": PICTURE[:60], "b/c.png": b"1"}))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    root = tmp_path_factory.mktemp("damage")
    path = archive_of(root, bytes(content))
    said = None
    try:
        unpack(path, root / "x")
    except DataError as error:
        said = str(error)
    assert said is None or said.startswith("archive=x.zip ")
    assert (root / "x").exists() == (said is None)


def test_folders_come_level_by_level_and_no_deeper(tmp_path):
    for name in ("b/c/d/e", "a", "_cache", ".git"):
        (tmp_path / name).mkdir(parents=True)
    found = [path.relative_to(tmp_path).as_posix() for path in folders(tmp_path)]
    assert found == [".", "a", "b", "b/c", "b/c/d"]
    assert [p.name for p in folders(tmp_path / "nowhere")] == ["nowhere"]


def test_a_private_set_cannot_be_fetched(tmp_path):
    with pytest.raises(DataError) as error:
        fetch(entry("otoscopy2024"), tmp_path)
    assert str(error.value) == "dataset=otoscopy2024 is private and cannot be fetched"
    assert error.value.hint == entry("otoscopy2024").how


def test_fetch_asks_for_the_official_address_and_md5(tmp_path, monkeypatch):
    asked = []

    def record(url, target, md5):
        asked.append((url, target, md5))
        return target

    monkeypatch.setattr(archives, "download", record)
    monkeypatch.setattr("client.data.medmnist.download", record)
    assert fetch(entry("kvasir"), tmp_path) == (tmp_path / "kvasir-dataset.zip", False)
    assert fetch(entry("breastmnist"), tmp_path, 64)[1] is False
    assert asked == [
        (
            "https://datasets.simula.no/downloads/kvasir/kvasir-dataset.zip",
            tmp_path / "kvasir-dataset.zip",
            None,
        ),
        (
            "https://zenodo.org/records/10519652/files/breastmnist_64.npz?download=1",
            tmp_path / "breastmnist_64.npz",
            "742edef2a1fd1524b2efff4bd7ba9364",
        ),
    ]


def test_what_is_there_is_not_fetched_again_and_an_altered_file_is_named(tmp_path, monkeypatch):
    monkeypatch.delattr(archives, "download")
    (tmp_path / "kvasir-dataset.zip").write_bytes(b"x")
    assert fetch(entry("kvasir"), tmp_path) == (tmp_path / "kvasir-dataset.zip", True)
    (tmp_path / "breastmnist.npz").write_bytes(b"x")
    with pytest.raises(
        DataError, match=r"breastmnist.npz md5=9dd4e461268c8034f5c8564e155c67a6 exp"
    ):
        fetch(entry("breastmnist"), tmp_path)


def test_a_set_that_is_allowed_to_be_downloaded_is_fetched_only_where_it_is_missing(
    tmp_path, monkeypatch
):
    fetched = []

    def deliver(url, target, md5):
        fetched.append(url)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(zipped(official("kvasir", 1)))
        return target

    monkeypatch.setattr(archives, "download", deliver)
    data = tmp_path / "new"
    assert len(read("kvasir", data, download=True).rows) == 8
    (data / "kvasir-dataset.zip").unlink()
    assert len(read("kvasir", data, download=True).rows) == 8
    assert len(fetched) == 1
