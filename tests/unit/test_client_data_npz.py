"""A file in MedMNIST's layout is read and checked, or refused in one line."""

import contextlib
import gc
import io
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client.data.download import md5_of
from client.data.keyed import PUBLIC_KEY
from client.data.manifest import ImageDataset
from client.data.npz import KEYS, identified, read_npz_layout
from fakes.npz_files import COUNTS, arrays
from strategies.errors import DataError

KEYED = (b"one", b"another", PUBLIC_KEY)


def write(path, contents):
    np.savez_compressed(path, **contents)
    return path


def read(path, **options) -> ImageDataset:
    chosen = {"dataset": "toy", "classes": ("a", "b"), **options}
    return read_npz_layout(identified(path), cache_dir=path.parent / "cache", **chosen)


def pixels(data: ImageDataset) -> np.ndarray:
    """The images as the file had them."""
    images = np.moveaxis(data.images.cache.read(data.images.rows), 1, 3)
    return images[..., 0] if images.shape[3] == 1 else images


@pytest.mark.parametrize("rgb", [False, True])
@pytest.mark.parametrize("flat_labels", [False, True])
def test_grey_and_rgb_with_flat_or_column_labels_are_read(tmp_path, rgb, flat_labels):
    contents = arrays(rgb=rgb, flat_labels=flat_labels)
    path = write(tmp_path / "toy.npz", contents)
    data = read(path, site="A")
    assert [len(data.manifest.rows(split=s)) for s in COUNTS] == list(COUNTS.values())
    for split in COUNTS:
        rows = data.manifest.rows(split=split)
        assert np.array_equal(pixels(data)[rows], contents[f"{split}_images"])
        assert np.array_equal(data.manifest.labels[rows], contents[f"{split}_labels"].ravel())
        assert [data.manifest.examples[row].frame for row in rows] == list(range(len(rows)))
    assert {e.site for e in data.manifest.examples} == {"A"}
    assert {e.file for e in data.manifest.examples} == {f"toy.npz:{md5_of(path)}"}
    assert len(data.manifest.patients) == sum(COUNTS.values())
    assert data.provenance == {"file": "toy.npz", "md5": md5_of(path)}


def test_one_class_data_are_read(tmp_path):
    contents = {k: v * 0 if k.endswith("labels") else v for k, v in arrays().items()}
    data = read(write(tmp_path / "toy.npz", contents))
    assert data.manifest.class_counts().tolist() == [11, 0]


def test_missing_arrays_are_named(tmp_path):
    contents = arrays()
    del contents["val_images"], contents["test_labels"]
    with pytest.raises(DataError, match=r"toy\.npz lacks val_images, test_labels"):
        read(write(tmp_path / "toy.npz", contents))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_images": np.zeros((6, 8, 8), np.float32)}, r"float32\(6, 8, 8\) expected uint8"),
        ({"val_images": np.zeros((3, 8, 8, 1), np.uint8)}, r"val_images=uint8\(3, 8, 8, 1\) exp"),
        ({"val_images": np.zeros((3, 8, 8, 8), np.uint8)}, r"val_images=uint8\(3, 8, 8, 8\) exp"),
        ({"test_images": np.zeros((2, 9, 9), np.uint8)}, "one image shape, found train"),
        (
            {f"{split}_images": np.zeros((n, 0, 8), np.uint8) for split, n in COUNTS.items()},
            "expected images of at least one pixel",
        ),
        ({"train_labels": np.zeros(5, np.uint8)}, r"expected \(6,\) or \(6, 1\), one label per"),
        ({"train_labels": np.zeros((6, 1), float)}, r"train_labels=float64\(6, 1\) expected int"),
        ({"train_labels": np.zeros((6, 4), np.uint8)}, r"multi-label\) are not supported yet"),
        ({"train_labels": np.full(6, 2, np.uint8)}, "label=2 in 6 examples expected 0..1"),
        ({"train_labels": np.full(6, -1, np.int8)}, "label=-1 in 6 examples expected 0..1"),
        (
            {"train_images": np.zeros((0, 8, 8), np.uint8), "train_labels": np.zeros(0, int)},
            "train_images=0 expected at least one image",
        ),
    ],
)
def test_arrays_that_contradict_themselves_are_refused(tmp_path, changes, message):
    with pytest.raises(DataError, match=message):
        read(write(tmp_path / "toy.npz", arrays() | changes))


@pytest.mark.parametrize(
    ("rgb", "channels", "kind"), [(False, 3, r"RGB \(n, h, w, 3\)"), (True, 1, r"grey \(n, h, w\)")]
)
def test_another_number_of_channels_than_declared_is_refused(tmp_path, rgb, channels, kind):
    path = write(tmp_path / "toy.npz", arrays(rgb=rgb))
    with pytest.raises(DataError, match=f"expected {kind} images"):
        read(path, channels=channels)


def test_a_pickle_in_the_file_is_refused_and_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    contents = arrays() | {"train_labels": np.array([Bomb()] * 6, dtype=object)}
    with pytest.raises(DataError, match=r"train_labels=object\(6,\) expected integers"):
        read(write(tmp_path / "toy.npz", contents))
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_and_a_folder_are_no_npz(tmp_path):
    for path in (tmp_path / "none.npz", tmp_path):
        with pytest.raises(DataError, match="expected an existing npz file"):
            read(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x93NUMPY" + b"\0" * 100])
def test_another_format_is_no_npz(tmp_path, content):
    path = tmp_path / "toy.npz"
    path.write_bytes(content)
    with pytest.raises(DataError, match="truncated or no npz file"):
        read(path)


def test_a_zip_of_something_else_lacks_the_arrays(tmp_path):
    path = tmp_path / "toy.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(DataError, match="lacks " + ", ".join(KEYS)):
        read(path)


@pytest.mark.parametrize("member", ["train_images", "train_images.npy", "test_labels.npy"])
def test_a_member_that_is_no_array_is_named_in_one_line(tmp_path, member):
    key = member.removesuffix(".npy")
    contents = arrays()
    del contents[key]
    path = write(tmp_path / "toy.npz", contents)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(member, "a text\nof two lines")
    with pytest.raises(
        DataError, match=rf"toy\.npz cannot be read: {key}: expected an array"
    ) as error:
        read(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_file_is_refused_in_one_line(tmp_path, share):
    path = write(tmp_path / "toy.npz", arrays())
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(DataError, match="truncated or no npz file") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert error.value.hint == "fetch or copy the file again"


def test_a_damaged_directory_is_refused_and_the_file_is_closed(tmp_path):
    path = write(tmp_path / "toy.npz", arrays())
    path.write_bytes(path.read_bytes().replace(b"PK\x01\x02", b"PK\x01\x03"))
    # A handle left open is a warning, and so an error, as soon as the exception is gone.
    with pytest.raises(DataError, match="cannot be read: Bad magic number for central directory"):
        read(path)
    gc.collect()


def _file_bytes(compressed: bool) -> bytes:
    buffer = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(buffer, **arrays())
    return buffer.getvalue()


FILES = {compressed: _file_bytes(compressed) for compressed in (False, True)}


@given(st.booleans(), st.data())
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_a_damaged_byte_never_passes_unseen_and_never_breaks_the_reader(tmp_path, compressed, data):
    content = bytearray(FILES[compressed])
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= data.draw(st.integers(1, 255))
    path = tmp_path / "damaged.npz"
    path.write_bytes(content)
    intact = arrays()
    with contextlib.suppress(DataError):
        found = read(path)
        # It was read, so the byte carried nothing: a timestamp or an attribute of the archive.
        expected = np.concatenate([intact[f"{split}_images"] for split in COUNTS])
        assert np.array_equal(pixels(found), expected)


def test_one_more_image_changes_no_other_id(tmp_path):
    before = read(write(tmp_path / "toy.npz", arrays()), key=b"key").manifest
    more = arrays()
    more["train_images"] = np.concatenate([np.full((1, 8, 8), 7, np.uint8), more["train_images"]])
    more["train_labels"] = np.concatenate([[[1]], more["train_labels"]])
    after = read(write(tmp_path / "more.npz", more), key=b"key").manifest
    assert [e.example_id for e in after.examples[1:]] == [e.example_id for e in before.examples]
    assert all(e.patient == e.example_id for e in after.examples)


def test_ids_hide_behind_the_sites_key(tmp_path):
    path = write(tmp_path / "toy.npz", arrays())
    ids = {key: {e.example_id for e in read(path, key=key).manifest.examples} for key in KEYED}
    assert len(set.union(*ids.values())) == len(KEYED) * sum(COUNTS.values())
    assert {e.example_id for e in read(path).manifest.examples} == ids[PUBLIC_KEY]


def test_identical_images_have_ids_of_their_own(tmp_path):
    contents = {k: v * 0 if k.endswith("images") else v for k, v in arrays().items()}
    ids = [e.example_id for e in read(write(tmp_path / "toy.npz", contents)).manifest.examples]
    assert len(set(ids)) == sum(COUNTS.values())
    # A copy that goes takes the last number away, and the others keep theirs.
    contents["test_images"], contents["test_labels"] = (
        contents["test_images"][:1],
        contents["test_labels"][:1],
    )
    assert [
        e.example_id for e in read(write(tmp_path / "less.npz", contents)).manifest.examples
    ] == ids[:-1]


def golden_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    found = {}
    for split, count in (("train", 9), ("val", 4), ("test", 3)):
        images = rng.integers(0, 256, (count, 12, 10, 3), dtype=np.uint8)
        images[count // 2 :] = images[count // 2 :, ..., :1]  # grey, stored as RGB
        images[1] = images[0]
        found[f"{split}_images"] = images
        found[f"{split}_labels"] = (np.arange(count) % 2)[:, None]
    return found


@pytest.mark.parametrize(
    ("dedupe", "count", "first", "fingerprint"),
    [
        (False, 16, "bd6b7a438354a586", "e479e7c1dd73a92923ced3f0533ed2f7"),
        (True, 10, "04d8baa79600091e", "30319786e01ba0c366bac1d99eced9c1"),
    ],
)
def test_ids_and_fingerprint_are_those_of_earlier_versions(
    tmp_path, dedupe, count, first, fingerprint
):
    """Runs that began before are continued, and their figures are of the same images."""
    path = write(tmp_path / "toy.npz", golden_arrays())
    manifest = read(path, dataset="npz", site="A", dedupe=dedupe).manifest
    assert len(manifest) == count
    assert manifest.examples[0].example_id == first
    assert manifest.fingerprint()[:32] == fingerprint


def test_identical_images_are_removed_when_asked_to(tmp_path, caplog):
    contents = arrays()
    contents["test_images"][0] = contents["train_images"][2]
    contents["test_labels"][0] = contents["train_labels"][2]
    path = write(tmp_path / "toy.npz", contents)
    assert len(read(path)) == 11
    assert "duplicate_groups=1 images=2 across_splits=1" in caplog.text
    data = read(path, dedupe=True)
    assert len(data) == len(data.images) == 10
    assert np.array_equal(pixels(data)[-2:], contents["test_images"])
    assert np.array_equal(pixels(data)[:5], np.delete(contents["train_images"], 2, axis=0))
