"""The model agrees with float64 results of the official code, forward and gradients."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from medmamba.scan import native
from medmamba.scan.native import library

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT.parent / "shared" / "fixtures"
TOLERANCE = 1e-9  # measured: below 1e-14, but for gradients whose true value is 0

spec = importlib.util.spec_from_file_location(
    "fixture_errors", ROOT / "benchmarks" / "fixture_errors.py"
)
assert spec is not None
assert spec.loader is not None
fixture_errors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fixture_errors)

needs_fixtures = pytest.mark.skipif(
    not FIXTURES.is_dir(), reason="the official code's results (shared/fixtures) are not here"
)

CASES = [
    ("scan", "scan_a_g1_L7_N3"),
    ("scan", "scan_b_g4_L49_N16"),
    ("scan", "scan_c_noD_nobias_nosoftplus"),
    ("scan", "scan_d_z"),
    ("scan", "scan_e_extreme"),
    ("scan", "scan_f_L1_N1"),
    ("merge", "merge_c8_even"),
    ("merge", "merge_c8_odd"),
    ("ss2d", "ss2d_d8_5x7"),
    ("block", "block_c16_4x6_eval"),
    ("model", "model_tiny_32_eval"),
    ("model", "model_tiny_32_train"),
]
# What each comparison must have covered: output, gradients, and more where the fixture has more.
COVERED = {
    "scan": {"out", "last_state", "grad u", "grad delta", "grad A", "grad B", "grad C"},
    "merge": {"out", "grad x", "grad projection.weight", "grad norm.weight", "grad norm.bias"},
    "ss2d": {"out", "grad x", "y1", "y2", "y3", "y4", "grad scan.A_log", "grad x_proj.weight"},
    "block": {"out", "grad x", "grad ssm.scan.D", "after conv_branch.norm_in.running_mean"},
    "model": {"logits", "loss", "grad x", "|grad head.weight|", "grad head.weight"},
}


@needs_fixtures
@pytest.mark.parametrize(("group", "name"), CASES, ids=[name for _, name in CASES])
def test_results_are_those_of_the_official_code(group, name):
    errors = fixture_errors.GROUPS[group][1](FIXTURES / f"{name}.npz")
    assert COVERED[group] <= set(errors)
    assert {k: v for k, v in errors.items() if not v <= TOLERANCE} == {}


NATIVE_CASES = [case for case in CASES if case[0] in ("scan", "ss2d", "block")]


@needs_fixtures
@pytest.mark.skipif(native.unavailable() is not None, reason="the native scan kernel is not built")
@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize(("group", "name"), NATIVE_CASES, ids=[name for _, name in NATIVE_CASES])
def test_the_native_scan_is_as_precise_as_promised(group, name, isa, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    errors = fixture_errors.GROUPS[group][1](FIXTURES / f"{name}.npz", torch.float32)
    bounds = {k: 1e-4 if "grad" in k else 1e-5 for k in errors}
    assert {k: v for k, v in errors.items() if not v <= bounds[k]} == {}


@needs_fixtures
def test_the_training_fixture_compares_running_statistics_that_moved():
    before = fixture_errors.read(FIXTURES / "model_tiny_state.npz")
    after = fixture_errors.read(FIXTURES / "model_tiny_32_train.npz")
    name = "layers.0.blocks.0.conv33conv33conv11.0.running_var"
    assert fixture_errors.relative_error(before[f"sd/{name}"], after[f"after/{name}"]) > 1e-3
    errors = fixture_errors.model_errors(FIXTURES / "model_tiny_32_train.npz")
    assert errors[f"after {name}"] <= TOLERANCE


@needs_fixtures
def test_every_fixture_is_compared():
    compared = {
        path.stem
        for pattern, _ in fixture_errors.GROUPS.values()
        for path in FIXTURES.glob(pattern)
    }
    assert compared == {name for _, name in CASES}
    assert {path.stem for path in FIXTURES.glob("*.npz")} - compared == {"model_tiny_state"}


@needs_fixtures
def test_the_script_prints_one_json_object(capsys):
    assert fixture_errors.main(["--quick", "--json", "--fixtures", str(FIXTURES)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"machine", "figures"}
    exact = {"error_scan", "error_merge", "error_ss2d", "error_block"}
    assert set(printed["figures"]) - exact <= {"error_native_forward", "error_native_gradient"}
    assert max(printed["figures"][name] for name in exact) <= TOLERANCE


@needs_fixtures
def test_the_script_prints_a_line_for_each_fixture(capsys):
    assert fixture_errors.main(["--quick", "--fixtures", str(FIXTURES)]) == 0
    lines = capsys.readouterr().out.splitlines()
    exact = [line.split()[0] for line in lines[1:] if not line.startswith("native ")]
    assert exact == [n for g, n in CASES if g != "model"]


def test_the_script_says_where_it_looked(capsys, tmp_path):
    assert fixture_errors.main(["--fixtures", str(tmp_path / "none")]) == 2
    assert "expected a folder\nhint: name the folder" in capsys.readouterr().err
