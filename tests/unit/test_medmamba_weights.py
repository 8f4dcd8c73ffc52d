"""Weights cross to files and to the official code and back without a bit changed."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medmamba import MedMamba, ModelError, weights
from medmamba.config import MedMambaConfig

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "medmamba_names.json"
FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"


def make(num_classes=5, seed=0, name="nano", **overrides):
    torch.manual_seed(seed)
    return MedMamba.from_name(name, num_classes, **overrides)


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        assert torch.equal(tensor, second[name]), name


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    weights.save(make(), path)
    return path


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_a_saved_model_comes_back_exactly(tmp_path, norm):
    model = make(norm=norm, drop_path=0.2)
    weights.save(model, tmp_path / "model.safetensors")
    loaded = weights.load(tmp_path / "model.safetensors")
    assert loaded.config == model.config
    assert_same(loaded.state_dict(), model.state_dict())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(images), model.eval()(images))


def test_a_loaded_model_trains(file):
    model = weights.load(file)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_loading_into_a_model_replaces_its_weights(file):
    model = make(seed=1, drop_path=0.3)
    assert weights.load(file, into=model) is model
    assert_same(model.state_dict(), make().state_dict())


def test_loading_draws_no_random_number(file):
    before = torch.get_rng_state()
    weights.load(file)
    assert torch.equal(torch.get_rng_state(), before)


def test_half_precision_is_kept(tmp_path):
    weights.save(make(norm="group").bfloat16(), tmp_path / "half")
    assert weights.load(tmp_path / "half").head.weight.dtype == torch.bfloat16


def test_equal_weights_give_equal_bytes(file, tmp_path):
    state = make().state_dict()
    for i, items in enumerate([state.items(), reversed(state.items())]):
        weights.save(dict(items), tmp_path / str(i), make().config)
        assert (tmp_path / str(i)).read_bytes() == file.read_bytes()
    weights.save(make(seed=1), tmp_path / "other")
    assert (tmp_path / "other").read_bytes() != file.read_bytes()


def test_the_file_tells_its_architecture(file):
    config, state = weights.load_state(file)
    assert config == make().config
    assert_same(dict(sorted(state.items())), dict(sorted(make().state_dict().items())))
    with safetensors.safe_open(file, framework="pt") as opened:  # pyright: ignore
        header = json.loads(opened.metadata()["medmamba"])
    assert header["format"] == 1
    assert header["architecture"]["dims"] == [16, 32, 64, 128]


def test_a_state_without_its_architecture_is_refused(tmp_path):
    with pytest.raises(
        ModelError, match=r"^config=None expected the architecture of the state dict"
    ):
        weights.save(make().state_dict(), tmp_path / "model.safetensors")


def test_a_state_of_another_architecture_is_not_saved(tmp_path):
    with pytest.raises(
        ModelError, match=r"^head.weight.shape=\(5, 128\) in the given state expected"
    ):
        weights.save(make().state_dict(), tmp_path / "file", make(num_classes=6).config)
    assert list(tmp_path.iterdir()) == []


def test_a_shape_that_differs_is_named_with_both_shapes(file):
    with pytest.raises(ModelError) as error:
        weights.load(file, into=make(num_classes=6))
    assert str(error.value) == (
        f"head.weight.shape=(5, 128) in {file} expected (6, 128) as in the model"
    )
    assert error.value.hint == f"{file} has num_classes=5; the model has num_classes=6"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"depths": (1, 2, 1, 1)},
            r"34 missing \(stages.1.blocks.1.conv_branch.norm_in.weight, .*\.\.\.\)",
        ),
        (
            {"norm": "group"},
            r"36 unexpected \(stages.0.blocks.0.conv_branch.norm_1.num_batches_tracked, ",
        ),
    ],
)
def test_names_that_differ_are_counted_and_listed(file, overrides, message):
    with pytest.raises(ModelError, match=f"^{file}: names do not fit the model: {message}"):
        weights.load(file, into=make(**overrides))


def test_a_missing_file_or_folder_is_named(tmp_path):
    for read in (weights.load, weights.load_state, lambda p: weights.load_official(make(), p)):
        with pytest.raises(ModelError, match=r"^path=.*/none expected a file$"):
            read(tmp_path / "none")
    for write in (weights.save, weights.save_official):
        with pytest.raises(ModelError, match=r"^path=.*/none/model expected an existing folder$"):
            write(make(), tmp_path / "none" / "model")


def test_a_file_of_somebody_else_is_refused(tmp_path):
    path = tmp_path / "foreign"
    path.write_bytes(safetensors.torch.save({"a": torch.zeros(1)}))
    with pytest.raises(ModelError, match="expected the architecture in its metadata"):
        weights.load(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": 2, "architecture": {}}, "^format=2 of .* expected 1 with the fields d_state, "),
        (
            {"format": 1, "architecture": {"depths": [1]}},
            "^format=1 of .* expected 1 with the fields",
        ),
        ({"format": 1}, "expected a readable architecture: KeyError"),
        ([], "expected a readable architecture"),
    ],
)
def test_a_header_of_another_version_is_refused(tmp_path, header, message):
    path = tmp_path / "later"
    path.write_bytes(
        safetensors.torch.save({"a": torch.zeros(1)}, {"medmamba": json.dumps(header)})
    )
    with pytest.raises(ModelError, match=message):
        weights.load(path)


SMALL = MedMamba(MedMambaConfig((1,), (4,), num_classes=2, d_state=2))


@settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_damaged_file_is_refused_or_read_but_never_a_crash(tmp_path, data):
    path = tmp_path / "damaged"
    weights.save(SMALL, path)
    content = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    else:
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with suppress(ModelError):
        weights.load(path)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.read_bytes()

    def fail(_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        weights.save(make(seed=1), file)
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_a_file_is_replaced_whole(file):
    before = file.read_bytes()
    with file.open("rb") as reader:
        weights.save(make(seed=1), file)
        assert reader.read() == before
    assert_same(weights.load(file).state_dict(), make(seed=1).state_dict())
    assert list(file.parent.iterdir()) == [file]


def test_names_and_shapes_are_frozen():
    """Files in the field depend on them: ours, the official ones, and which is which."""
    golden = json.loads(GOLDEN.read_text())["names"]
    model = make()
    official = weights.to_official(model)
    ours = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    assert ours == {name: row["shape"] for name, row in golden.items()}
    for name, row in golden.items():
        assert weights.official_name(name) == row["official"]
        assert list(official[row["official"]].shape) == row["official_shape"]
    assert len(official) == len(golden)


@pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the official code's results (shared/fixtures) are not here"
)
def test_official_names_and_shapes_are_those_of_the_official_code():
    with np.load(FIXTURES / "model_tiny_state.npz") as archive:
        theirs = {name.removeprefix("sd/"): archive[name].shape for name in archive.files}
    ours = {name: tuple(tensor.shape) for name, tensor in weights.to_official(make()).items()}
    assert ours == theirs


@pytest.mark.parametrize(("name", "depths"), [("nano", (1, 1, 1, 1)), ("tiny", (1, 12, 1, 1))])
def test_official_round_trip_is_exact(name, depths):
    model, other = make(name=name, depths=depths), make(seed=1, name=name, depths=depths)
    weights.load_official(other, weights.to_official(model))
    assert_same(other.state_dict(), model.state_dict())


@pytest.mark.parametrize("nested", [None, "model", "state_dict"])
def test_official_files_load(tmp_path, nested):
    model, other, path = make(), make(seed=1), tmp_path / "official.pth"
    if nested is None:
        weights.save_official(model, path)
    else:
        torch.save({"epoch": 3, nested: weights.to_official(model)}, path)
    weights.load_official(other, str(path))
    assert_same(other.state_dict(), model.state_dict())


def test_a_saved_official_file_holds_official_names(tmp_path):
    weights.save_official(make(), tmp_path / "official.pth")
    content = torch.load(tmp_path / "official.pth", weights_only=True)
    assert_same(content, weights.to_official(make()))


def test_an_official_checkpoint_of_other_classes_is_refused(tmp_path):
    with pytest.raises(ModelError) as error:
        weights.load_official(make(num_classes=9), weights.to_official(make()))
    assert str(error.value) == (
        "head.weight.shape=(5, 128) in the given state expected (9, 128) as in the model"
    )
    assert "num_classes=9" in error.value.hint


def test_an_official_shape_of_equal_size_is_not_bent_to_fit():
    state = weights.to_official(make())
    name = "layers.0.blocks.0.self_attention.x_proj_weight"
    state[name] = state[name].flatten(0, 1)
    with pytest.raises(ModelError, match=rf"^{name}.shape=\(132, 16\) .* expected \(4, 33, 16\)"):
        weights.load_official(make(), state)


def test_batch_norm_statistics_do_not_slip_into_a_group_norm_model():
    with pytest.raises(ModelError, match=r"36 unexpected \(layers.0.blocks.0.conv33.*running_mean"):
        weights.load_official(make(norm="group"), weights.to_official(make()))


class Malicious:
    def __reduce__(self):
        return (os.mkdir, ("was-executed",))


@pytest.mark.parametrize("content", ["malicious", "text", "truncated"])
def test_a_checkpoint_with_more_than_tensors_is_refused(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "official.pth"
    if content == "malicious":
        torch.save({"model": Malicious()}, path)
    elif content == "text":
        path.write_text("hello")
    else:
        weights.save_official(make(), path)
        path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ModelError, match=r"expected a file of torch.save that holds tensors only"):
        weights.load_official(make(), path)
    assert not (tmp_path / "was-executed").exists()


@pytest.mark.parametrize("content", [[1, 2], {"epoch": 3}, {"model": {"a": 1}}, torch.zeros(2)])
def test_a_checkpoint_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "official.pth")
    with pytest.raises(ModelError, match="expected a state dict, alone or under 'model' or"):
        weights.load_official(make(), tmp_path / "official.pth")


def test_floating_state_leaves_integer_buffers_behind():
    model = make()
    state = weights.floating_state(model)
    kept = [name for name in model.state_dict() if not name.endswith("num_batches_tracked")]
    assert list(state) == kept
    assert sum(name.endswith("running_var") for name in state) == 12
    assert state["head.weight"].data_ptr() == model.head.weight.data_ptr()


def test_arrays_are_copies_of_the_floating_state():
    model = make()
    arrays, state = weights.to_arrays(model), weights.floating_state(model)
    assert list(arrays) == list(state)
    assert {array.dtype for array in arrays.values()} == {np.dtype("float32")}
    with torch.no_grad():
        model.head.weight.zero_()
    assert arrays["head.weight"].any()


def test_arrays_round_trip_and_integer_buffers_stay():
    model, other = make(), make(seed=1)
    other(torch.randn(2, 3, 64, 64))
    arrays = weights.to_arrays(model)
    for array in arrays.values():
        array.flags.writeable = False
    weights.load_arrays(other, arrays)
    assert_same(weights.floating_state(other), weights.floating_state(model))
    counts = [t for n, t in other.named_buffers() if n.endswith("num_batches_tracked")]
    assert all(count == 1 for count in counts)


def test_arrays_that_do_not_fit_are_refused():
    arrays = weights.to_arrays(make())
    del arrays["head.bias"]
    with pytest.raises(
        ModelError, match=r"^the given weights: names do not fit the model: 1 missing \(head.bias\)"
    ):
        weights.load_arrays(make(), arrays)
    arrays["head.bias"] = np.zeros(6, np.float32)
    with pytest.raises(
        ModelError, match=r"^head.bias.shape=\(6,\) in the given weights expected \(5,\)"
    ):
        weights.load_arrays(make(), arrays)
