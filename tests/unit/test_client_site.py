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
from strategies.run_config import ModelSection, RunConfig


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


def run_of(num_classes: int, classes: str = "") -> RunConfig:
    return RunConfig.parse({"model.num-classes": num_classes, "classes": classes})


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


# --- classes


def test_a_run_with_another_number_of_classes_is_refused(tmp_path):
    site = make_site(tmp_path)
    site.check_classes(run_of(3))
    with pytest.raises(
        RefusalError, match=r"^model\.num-classes=2; this site's data has 3$"
    ) as error:
        site.check_classes(run_of(2))
    assert error.value.code == "other-classes"


def test_images_get_the_labels_of_the_runs_class_order(tmp_path):
    site = make_site(tmp_path)
    own = site.split("train", model_section()).labels.tolist()
    assert own == [0, 1, 0]
    site.check_classes(run_of(3, "other,yes,no"))
    assert site.split("train", model_section()).labels.tolist() == [2, 1, 2]
    assert site.class_counts().tolist() == [0, 1, 2]
    site.check_classes(run_of(3))  # another run, which names none
    assert site.split("train", model_section()).labels.tolist() == own


def test_own_names_are_mapped_and_a_class_may_be_left_out(tmp_path):
    label_map = {"no": "healthy", "yes": ""}
    site = make_site(tmp_path, data={"label-map": label_map})
    site.check_classes(run_of(2, "ill,healthy"))
    assert site.split("train", model_section()).labels.tolist() == [1, 1]
    assert site.class_counts().tolist() == [0, 2]


def test_a_refusal_tells_how_many_classes_match_none_and_the_log_which(tmp_path, caplog):
    site = make_site(tmp_path, data={"label-map": {"yes": "ill", "odd": "ill"}})
    with pytest.raises(RefusalError) as error:
        site.check_classes(run_of(2, "ill,healthy"))
    # The site's third class has no images and need not be mapped.
    assert str(error.value) == "1 of this site's 3 classes match none of the run's"
    assert error.value.code == "other-classes"
    assert "classes not mapped: no; the run has ill, healthy" in caplog.text
    assert '"no" = "" leaves its images out' in caplog.text
    assert site.class_counts().tolist() == [2, 1, 0]  # as it was


def test_labels_stay_as_they_were_when_another_run_is_refused(tmp_path):
    site = make_site(tmp_path)
    site.check_classes(run_of(3, "other,yes,no"))
    before = site.class_counts().tolist(), site.split("train", model_section()).labels.tolist()
    with pytest.raises(RefusalError):
        site.check_classes(run_of(3, "x,y,z"))
    site.check_classes(run_of(3, "other,yes,no"))
    site._splits.clear()
    after = site.class_counts().tolist(), site.split("train", model_section()).labels.tolist()
    assert after == before


@pytest.mark.parametrize(("classes", "refused"), [((), True), (("no", "yes"), False)])
def test_classes_found_by_name_need_a_run_that_names_them(tmp_path, classes, refused):
    """Of two sites, each with its own words in its own order, label 0 would be two things."""
    data = {"dataset": "folder", "folder": str(tmp_path), "classes": classes}
    site = make_site(tmp_path, data=data)
    if refused:
        with pytest.raises(RefusalError, match=r"^classes=: this site finds its classes by name"):
            site.check_classes(run_of(3))
    else:
        site.check_classes(run_of(3))


def test_what_a_match_leaves_open_is_logged_once_at_the_site(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    site = make_site(tmp_path, data={"label-map": {"odd": "ill"}})
    for _ in range(2):
        site.check_classes(run_of(4, "no,yes,other,ill"))
    lines = [r.getMessage() for r in caplog.records if "classes=" in r.getMessage()]
    assert lines == [
        "site=A classes=no, yes, other, ill; without training images: other, ill; "
        "in label-map and not in the data: odd"
    ]


def test_a_label_map_needs_a_run_that_names_its_classes(tmp_path):
    site = make_site(tmp_path, data={"label-map": {"no": "healthy"}})
    with pytest.raises(RefusalError, match=r"^classes=: this site maps class names"):
        site.check_classes(run_of(3))


def test_a_site_whose_images_are_all_left_out_has_none(tmp_path):
    site = make_site(tmp_path, data={"label-map": {"no": "", "yes": "", "other": ""}})
    site.check_classes(run_of(2, "a,b"))
    assert site.class_counts().tolist() == [0, 0]
    assert len(site.split("train", model_section()).labels) == 0
