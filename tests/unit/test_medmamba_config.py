"""A configuration that exists can be built; one that cannot says which value is wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

import medmamba
from medmamba.config import SIZES, MedMambaConfig, ModelError, dt_rank, num_groups

NANO = {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128), "num_classes": 5}


@pytest.mark.parametrize(
    ("name", "depths", "dims"),
    [
        ("nano", (1, 1, 1, 1), (16, 32, 64, 128)),
        ("tiny", (2, 2, 4, 2), (96, 192, 384, 768)),
        ("small", (2, 2, 8, 2), (96, 192, 384, 768)),
        ("base", (2, 2, 12, 2), (128, 256, 512, 1024)),
    ],
)
def test_named_sizes_are_those_of_the_official_code(name, depths, dims):
    config = MedMambaConfig.from_name(name, num_classes=6)
    assert (config.depths, config.dims, config.num_classes) == (depths, dims, 6)
    assert (config.norm, config.drop_path, config.patch_size, config.d_state) == (
        "batch",
        0.1,
        4,
        16,
    )


def test_there_are_four_named_sizes():
    assert list(SIZES) == ["nano", "tiny", "small", "base"]


def test_overrides_win_over_the_named_size():
    config = MedMambaConfig.from_name("base", num_classes=6, depths=(2, 2, 16, 2), norm="group")
    assert (config.depths, config.norm) == ((2, 2, 16, 2), "group")


@pytest.mark.parametrize(
    ("name", "hint"), [("tny", "did you mean 'tiny'?"), ("bse", "did you mean 'base'?")]
)
def test_an_unknown_name_gets_the_nearest_one(name, hint):
    with pytest.raises(ModelError) as error:
        MedMambaConfig.from_name(name, num_classes=6)
    assert str(error.value) == f"name={name!r} expected one of nano, tiny, small, base"
    assert error.value.hint == hint


def test_an_unknown_override_gets_the_nearest_field():
    with pytest.raises(
        ModelError, match=r"patchsize=2 is no field of a model; expected one of"
    ) as e:
        MedMambaConfig.from_name("nano", num_classes=6, patchsize=2)
    assert e.value.hint == "did you mean 'patch_size'?"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("depths", (1, 1), r"depths=\(1, 1\) and dims=.* expected one entry per stage in both"),
        ("depths", (), r"depths=\(\) and dims=.* expected one entry per stage"),
        ("depths", (1, 0, 1, 1), r"depths=\(1, 0, 1, 1\) expected integers of at least 1"),
        ("depths", "1111", r"depths='1111' expected a list of integers"),
        ("depths", 4, r"depths=4 expected a list of integers"),
        ("dims", (15, 30, 60, 120), r"dims=\(15, 30, 60, 120\) expected even numbers"),
        ("dims", (16, 32, 64, 96), r"dims=.* expected each stage to be twice the one before"),
        ("dims", (16.0, 32, 64, 128), r"dims=\(16.0, .* expected integers of at least 1"),
        ("num_classes", 0, r"num_classes=0 expected integers of at least 1"),
        ("num_classes", True, r"num_classes=True expected integers of at least 1"),
        ("in_channels", -1, r"in_channels=-1 expected integers of at least 1"),
        ("patch_size", "4", r"patch_size='4' expected integers of at least 1"),
        ("d_state", 1.5, r"d_state=1.5 expected integers of at least 1"),
        ("norm", "layer", r"norm='layer' expected 'batch' or 'group'"),
        ("drop_path", 1.0, r"drop_path=1.0 expected a number in \[0, 1\)"),
        ("drop_path", -0.1, r"drop_path=-0.1 expected a number in \[0, 1\)"),
        ("drop_path", float("nan"), r"drop_path=nan expected a number in \[0, 1\)"),
        ("drop_path", "0.1", r"drop_path='0.1' expected a number in \[0, 1\)"),
    ],
)
def test_a_value_outside_its_range_is_named(field, value, message):
    with pytest.raises(ModelError, match=f"^{message}"):
        MedMambaConfig(**{**NANO, field: value})


def test_lists_become_tuples_so_that_a_configuration_can_be_compared_and_hashed():
    listed = MedMambaConfig(depths=[1, 1, 1, 1], dims=[16, 32, 64, 128], num_classes=5)  # pyright: ignore
    assert listed == MedMambaConfig(**NANO)
    assert hash(listed) == hash(MedMambaConfig(**NANO))


@given(
    st.integers(1, 5), st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.floats(0, 0.99)
)
def test_a_configuration_survives_its_dictionary(stages, half, classes, patch, drop_path):
    dims = tuple(2 * half * 2**stage for stage in range(stages))
    config = MedMambaConfig((1,) * stages, dims, classes, "group", drop_path, 1, patch, 4)
    assert MedMambaConfig(**config.to_dict()) == config
    assert config.minimum_image_size == patch * 2 ** (stages - 1)


@pytest.mark.parametrize(("patch_size", "smallest"), [(4, 32), (2, 16), (1, 8)])
def test_minimum_image_size_leaves_the_last_stage_one_position(patch_size, smallest):
    config = MedMambaConfig.from_name("nano", num_classes=2, patch_size=patch_size)
    assert config.minimum_image_size == smallest


@pytest.mark.parametrize(
    ("channels", "groups"), [(8, 8), (48, 16), (64, 32), (192, 32), (6, 2), (5, 1)]
)
def test_groups_are_the_greatest_common_divisor_with_32(channels, groups):
    assert num_groups(channels) == groups


@pytest.mark.parametrize(("d_model", "rank"), [(8, 1), (16, 1), (17, 2), (48, 3), (384, 24)])
def test_dt_rank_is_a_sixteenth_rounded_up(d_model, rank):
    assert dt_rank(d_model) == rank


def test_a_configuration_costs_no_torch():
    code = "import sys, medmamba, medmamba.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_exports_what_it_lists():
    assert {
        name: getattr(medmamba, name).__name__ for name in medmamba.__all__ if name != "SIZES"
    } == {name: name for name in medmamba.__all__ if name != "SIZES"}
    assert medmamba.SIZES is SIZES
    for name in ("scan", "weights"):  # reachable without an import of their own
        assert medmamba.__getattr__(name).__name__ == f"medmamba.{name}"
    with pytest.raises(AttributeError, match="'medmamba' has no attribute 'Medmamba'"):
        medmamba.Medmamba  # noqa: B018 # pyright: ignore
