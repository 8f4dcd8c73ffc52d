"""Every way in ends in the same data set, kept where it belongs, and a site trains on it."""

import stat

import numpy as np
import pytest
import torch
from PIL import Image

from client.data.keyed import DATA_KEY, PUBLIC_KEY, keyed_hash
from client.data.manifest import ImageDataset
from client.data.registry import cache_folder, load
from client.data.source import DataSource
from client.site import Site
from client.site_config import SiteConfig
from client.train import evaluate, train
from fakes.orders import membership
from fakes.pictures import listing
from fakes.training import initial, make_run, same
from simulation.partition import partition
from simulation.scenario import FederationSection

SIZE = 16


def source(**values) -> DataSource:
    return DataSource.model_validate({name.replace("_", "-"): v for name, v in values.items()})


def table(folder, count: int = 20):
    """A CSV with patients beside a folder of classes."""
    rows = listing(folder / "images", count, patient="p{}").rows
    path = folder / "table.csv"
    lines = ["file,label,patient", *(f"{r.file},{r.label},{r.patient}" for r in rows)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_hospitals_folder_and_table_are_kept_in_its_state_folder(tmp_path):
    path = table(tmp_path)
    state = tmp_path / "state"
    folder = load(source(dataset="folder", folder=tmp_path / "images"), ["A"], state)
    rows = load(source(dataset="csv", file=path, folder=tmp_path / "images"), ["A"], state)
    assert {e.example_id for e in folder.manifest.examples} == {
        e.example_id for e in rows.manifest.examples
    }
    assert {e.site for e in rows.manifest.examples} == {"A"}
    key = (state / DATA_KEY).read_bytes()
    assert set(rows.manifest.patients) == {keyed_hash(key, "patient", f"p{i}") for i in range(20)}
    assert sorted(p.name[:9] for p in (state / "cache").iterdir()) == ["manifest-", "manifest-"]
    assert stat.S_IMODE((state / "cache").stat().st_mode) == 0o700


def test_a_simulation_keeps_what_is_published_beside_the_data(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDERATION_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    assert cache_folder(None) == tmp_path / "data" / "cache"


def test_a_simulation_on_somebody_s_own_images_hides_them_as_a_site_does(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("FEDERATION_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    data = load(source(dataset="csv", file=table(tmp_path), folder=tmp_path / "images"), ["A", "B"])
    assert {e.site for e in data.manifest.examples} == {""}
    assert len(data.manifest.patients) == 20
    public = {keyed_hash(PUBLIC_KEY, "patient", f"p{i}") for i in range(20)}
    assert not public & set(data.manifest.patients)
    assert list((tmp_path / "data").iterdir()) == []
    cache = tmp_path / "home" / ".cache" / "medmamba-federation" / "images"
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert {path.suffix for path in cache.iterdir()} == {".json", ".key"}


def test_caches_go_home_where_the_data_folder_is_missing_or_not_told(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    home = tmp_path / ".cache" / "medmamba-federation" / "images"
    monkeypatch.setenv("FEDERATION_DATA", str(tmp_path / "gone"))
    assert cache_folder(None) == home
    monkeypatch.delenv("FEDERATION_DATA")
    assert cache_folder(None) == home
    assert cache_folder(tmp_path / "state") == tmp_path / "state" / "cache"


def test_files_are_dealt_out_to_simulated_sites_and_share_one_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    data = load(source(dataset="folder", folder=table(tmp_path, 40).parent / "images"), ["A", "B"])
    federation = FederationSection.model_validate(
        {"num-sites": 2, "partition": "iid", "min-examples": 1}
    )
    parts = partition(data, federation, 0)
    assert sum(map(len, parts.values())) == 40
    whole = data.images.prepared(SIZE, 3, workers=0)
    place = {e.example_id: i for i, e in enumerate(data.manifest.examples)}
    for part in parts.values():
        prepared = part.images.prepared(SIZE, 3, workers=0)
        rows = np.array([place[e.example_id] for e in part.manifest.examples])
        assert torch.equal(prepared.batch(np.arange(len(part))), whole.batch(rows))
    assert len(list((tmp_path / "home").rglob("*.images"))) == 1


def site_of(dataset: ImageDataset, state) -> Site:
    config = SiteConfig.model_validate(
        {"site": "A", "state-dir": str(state), "device": "cpu", "data": {}}
    )
    return Site(config, lambda: dataset, membership("A"))


@pytest.mark.parametrize("channels", [1, 3])
def test_training_on_files_gives_the_bytes_of_training_on_their_pixels(tmp_path, channels):
    splits = ["train"] * 9 + ["val"] * 4
    pixels = np.random.default_rng(0).integers(0, 256, (13, SIZE, SIZE), dtype=np.uint8)
    folder = tmp_path / "images"
    for i, image in enumerate(pixels):
        path = folder / splits[i] / "abc"[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    in_files = load(source(dataset="folder", folder=folder), ["A"], tmp_path / "state")
    order = [int(e.file.rsplit("/")[-1].removesuffix(".png")) for e in in_files.manifest.examples]
    in_memory = ImageDataset(in_files.manifest, pixels[order])
    assert [e.label for e in in_memory.manifest.examples] == [i % 3 for i in order]
    run = make_run(model__in_channels=channels, training__augment=True)
    weights = initial(run)
    results = [
        (train(site, run, 1, weights), evaluate(site, run, weights, "val"))
        for site in (site_of(d, tmp_path / n) for n, d in (("a", in_files), ("b", in_memory)))
    ]
    (trained, judged), (expected, expected_sums) = results
    assert same(trained.update, expected.update)
    assert trained.loss == expected.loss
    assert judged == expected_sums


def test_an_npz_files_ids_hide_behind_the_sites_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        arrays[f"{split}_images"] = rng.integers(0, 256, (4, 8, 8), dtype=np.uint8)
        arrays[f"{split}_labels"] = np.arange(4) % 2
    np.savez(tmp_path / "own.npz", **arrays)
    own = source(dataset="npz", file=tmp_path / "own.npz", classes=("a", "b"))
    states = (None, tmp_path / "a", tmp_path / "b")
    loaded = [load(own, ["A"], state).manifest for state in states]
    assert len({e.example_id for manifest in loaded for e in manifest.examples}) == 3 * 12
    assert load(own, ["A"], tmp_path / "a").manifest == loaded[1]
