"""A site at run time: data prepared once, test read once for one model, a device or an error."""

import logging
import stat

import numpy as np
import pytest
import torch

from client import site as site_module
from client.data.manifest import Example, ImageDataset, Manifest
from client.site import Site, choose_device, register, registered
from client.site_config import SIGNING_KEY, SiteConfig
from fakes.orders import membership
from strategies.errors import ConfigError, RefusalError
from strategies.identity import create_signing_key, fingerprint
from strategies.run_config import ModelSection


def dataset() -> ImageDataset:
    splits = ["train"] * 3 + ["val"] * 2 + ["test"]
    examples = tuple(
        Example(f"e{i}", "made", i, i % 2, f"p{i}", "A", split) for i, split in enumerate(splits)
    )
    images = np.arange(6, dtype=np.uint8)[:, None, None] * np.ones((1, 16, 16), np.uint8)
    return ImageDataset(Manifest("made", ("no", "yes", "other"), examples), images)


def make_site(state_dir, load=dataset, **values) -> Site:
    config = {"site": "A", "state-dir": str(state_dir), "data": {}, **values}
    return Site(SiteConfig.model_validate(config), load, membership("A"))


def model_section(**values) -> ModelSection:
    return ModelSection.model_validate(
        {"in-channels": 1, "image-size": 16, "patch-size": 2, **values}
    )


def test_the_test_split_is_read_for_one_model_and_again_for_the_same(tmp_path):
    site = make_site(tmp_path)
    site.read_test_once("run", "first")
    site.read_test_once("run", "first")
    with pytest.raises(RefusalError, match="has already read the test split") as error:
        site.read_test_once("run", "second")
    assert error.value.code == "test-read-twice"
    site.read_test_once("run", "first")
    site.read_test_once("another run", "second")


def test_a_restarted_site_remembers_its_test_reads(tmp_path):
    make_site(tmp_path).read_test_once("run", "first")
    restarted = make_site(tmp_path)
    restarted.read_test_once("run", "first")
    with pytest.raises(RefusalError):
        restarted.read_test_once("run", "second")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"run": 3}'])
def test_a_damaged_record_of_test_reads_is_not_taken_for_none(tmp_path, content):
    site = make_site(tmp_path)
    (tmp_path / site_module.TEST_READS).write_text(content)
    with pytest.raises(RefusalError) as caught:
        site.read_test_once("run", "first")
    assert caught.value.code == "state-unreadable"


def test_splits_hold_the_declared_examples_in_order(tmp_path):
    site = make_site(tmp_path)
    train, val, test = (site.split(name, model_section()) for name in ("train", "val", "test"))
    assert train.images.shape == (3, 1, 16, 16)
    assert train.labels.tolist() == [0, 1, 0]
    assert train.labels.dtype == torch.int64
    np.testing.assert_allclose(val.images[:, 0, 0, 0], np.array([3, 4]) / 255, rtol=1e-6)
    assert test.labels.tolist() == [1]


def test_images_are_read_once_and_prepared_once_per_shape(tmp_path):
    reads = []

    def load() -> ImageDataset:
        reads.append(1)
        return dataset()

    site = make_site(tmp_path, load)
    first = site.split("train", model_section())
    assert site.split("train", model_section(norm="batch")) is first
    larger = site.split("train", model_section(**{"image-size": 32}))
    assert larger.images.shape == (3, 1, 32, 32)
    padded = site.split("train", model_section(**{"image-size": 32, "small-images": "pad"}))
    assert padded.images[1, 0, 0, 0] == 0
    assert site.split("train", model_section(**{"in-channels": 3})).images.shape[1] == 3
    assert len(reads) == 1
    assert len(site._splits) == 1  # a coordinator that asks for many shapes fills no memory


def test_class_counts_are_of_the_training_examples(tmp_path):
    assert make_site(tmp_path).class_counts().tolist() == [2, 1, 0]


def test_a_run_with_other_classes_is_refused(tmp_path):
    site = make_site(tmp_path)
    site.check_classes(3)
    with pytest.raises(
        RefusalError, match=r"model\.num-classes=2; this site's data has 3"
    ) as error:
        site.check_classes(2)
    assert error.value.code == "other-classes"


def test_the_signing_key_is_the_one_in_the_state_folder(tmp_path):
    site = make_site(tmp_path / "state")
    key = create_signing_key(tmp_path / "state" / SIGNING_KEY)
    assert site.key_fingerprint == fingerprint(key.public_key())


def test_a_site_without_a_key_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match=r"secret file signing\.key cannot be read") as error:
        make_site(tmp_path).key_fingerprint  # noqa: B018
    assert "`init` makes it" in error.value.hint


def test_a_new_state_folder_is_for_its_owner_alone(tmp_path):
    make_site(tmp_path / "deep" / "state")
    assert stat.S_IMODE((tmp_path / "deep" / "state").stat().st_mode) == 0o700


# --- work that must end


def test_work_goes_on_until_it_is_aborted(tmp_path):
    site = make_site(tmp_path)
    site.begin_work()
    site.check_work()
    site.abort("the coordinator stopped the run")
    for _ in range(2):
        with pytest.raises(RefusalError, match=r"^the coordinator stopped the run$") as error:
            site.check_work()
        assert error.value.code == "stopped"


def test_what_was_aborted_before_is_forgotten(tmp_path):
    site = make_site(tmp_path)
    site.abort("the run before")
    site.begin_work()
    site.check_work()


def test_work_beyond_the_sites_time_ends(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(site_module.time, "monotonic", lambda: now[0])
    site = make_site(tmp_path, limits={"max-round-seconds": 60})
    site.begin_work()
    now[0] += 60
    site.check_work()
    now[0] += 0.1
    with pytest.raises(RefusalError) as error:
        site.check_work()
    assert (error.value.code, str(error.value)) == (
        "too-long",
        "the work took longer than 60 s, this site's limit",
    )
    site.begin_work()
    site.check_work()


def test_a_site_that_has_begun_nothing_may_work(tmp_path):
    """Evaluating by hand, as tests and commands do."""
    make_site(tmp_path, limits={"max-round-seconds": 1}).check_work()


def test_only_a_registered_site_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(site_module, "_SITES", {})
    site = make_site(tmp_path)
    register(site)
    assert registered("A") is site
    for name in ("B", None, ""):
        with pytest.raises(ConfigError, match="is not configured in this process"):
            registered(name)


def test_cuda_is_never_replaced_by_the_cpu_without_a_word(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="device=cuda but PyTorch sees no CUDA device") as error:
        choose_device("cuda")
    assert 'device = "cpu"' in error.value.hint


@pytest.mark.parametrize(
    ("wanted", "cuda", "device", "reason"),
    [
        ("auto", False, "cpu", "no CUDA device"),
        ("cpu", True, "cpu", "asked for"),
        ("auto", True, "cuda", "name=Tester"),
        ("cuda", True, "cuda", "name=Tester"),
    ],
)
def test_the_device_and_why_are_logged(monkeypatch, caplog, wanted, cuda, device, reason):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tester")
    with caplog.at_level(logging.INFO, "client.site"):
        assert choose_device(wanted).type == device
    assert f"device={device}" in caplog.text
    assert reason in caplog.text
