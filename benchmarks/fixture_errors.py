"""How far the model is from the official code: errors against its float64 results.

    python benchmarks/fixture_errors.py [--fixtures DIR] [--quick] [--json]

The fixtures are arrays that the official code computed in float64. Both sides run in float64 here,
so an error is a difference in arithmetic order (1e-12 or less) or a difference in meaning. An error
is the largest absolute difference over the largest expected value of that tensor, or over ``FLOOR``
where the true value is 0 and rounding is all there is. ``error_native_forward`` and
``error_native_gradient`` are those of the native scan in float32: alone, in SS2D and in a block.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from medmamba.blocks import PatchMerge, SSConvSSM
from medmamba.config import MedMambaConfig
from medmamba.model import MedMamba
from medmamba.scan import active_backend, path_order, reference, selective_scan
from medmamba.scan.paths import each_path
from medmamba.ss2d import SS2D
from medmamba.weights import load_official, official_name, to_official

FIXTURES = Path(__file__).resolve().parents[2] / "shared" / "fixtures"
FLOOR = 1e-5
SCAN_INPUTS = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
# Where a part sits in the model: by our names and by the official ones.
BLOCK = ("stages.0.blocks.0.", "layers.0.blocks.0.")
SSM = ("stages.0.blocks.0.ssm.", "layers.0.blocks.0.self_attention.")
MERGE = ("stages.0.merge.", "layers.0.downsample.")

Arrays = Mapping[str, Tensor]
Errors = dict[str, float]


def read(path: Path, dtype: torch.dtype = torch.float64) -> Arrays:
    """Read the arrays of a fixture; floating ones as ``dtype``."""
    with np.load(path) as archive:
        arrays = {name: archive[name] for name in archive.files}
    tensors = {name: torch.from_numpy(a) for name, a in arrays.items() if a.dtype.kind != "U"}
    return {k: t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    if got.shape != expected.shape:
        raise ValueError(f"got.shape={tuple(got.shape)} expected {tuple(expected.shape)}")
    scale = max(float(expected.abs().max()), FLOOR)
    return float((got.detach() - expected).abs().max()) / scale


def scan_errors(path: Path, dtype: torch.dtype = torch.float64) -> Errors:
    """Compare the scan, its last state and the gradients of all its inputs."""
    data = read(path, dtype)
    inputs = {name: data[name].requires_grad_() for name in SCAN_INPUTS if name in data}
    softplus = bool(data["delta_softplus"])
    u, delta, A, B, C = (inputs[name] for name in SCAN_INPUTS[:5])
    D, z, bias = (inputs.get(name) for name in SCAN_INPUTS[5:])
    out, state = selective_scan(u, delta, A, B, C, D, z, bias, softplus, return_last_state=True)
    (out * data["dy"]).sum().backward()
    errors = {"out": relative_error(out, data["out"])}
    errors["last_state"] = relative_error(state, data["last_state"])
    return errors | {f"grad {k}": _gradient_error(t, data[f"grad_{k}"]) for k, t in inputs.items()}


def ss2d_errors(path: Path, dtype: torch.dtype = torch.float64) -> Errors:
    """Compare SS2D, and what each of the four paths gives before they are summed."""
    data = read(path, dtype)
    module = SS2D(d_model=8, d_state=16).to(dtype)
    errors = _module_errors(module, data, SSM)
    inner = data["core_in"].permute(0, 2, 3, 1)  # (b, h, w, d)
    scan, order = module.scan, path_order(*inner.shape[1:3], inner.device)
    paths = each_path(  # (b, l, k, d)
        reference.selective_scan,
        inner.flatten(1, 2),
        module.x_proj(inner.flatten(1, 2)),
        *scan.parameters_of_paths(len(inner)),
        order,
    )
    for name, path_index in {"y1": 0, "y2": 2, "y3": 1, "y4": 3}.items():
        errors[name] = relative_error(paths[:, :, path_index].transpose(1, 2), data[name])
    return errors


def block_errors(path: Path, dtype: torch.dtype = torch.float64) -> Errors:
    """Compare one block in evaluation mode."""
    block = SSConvSSM(channels=16, d_state=16, norm="batch", drop_path=0.0).to(dtype).eval()
    return _module_errors(block, read(path, dtype), BLOCK)


def merge_errors(path: Path) -> Errors:
    """Compare the merging of positions."""
    return _module_errors(PatchMerge(channels=8).double(), read(path), MERGE)


def model_errors(path: Path) -> Errors:
    """Compare a whole model: logits, loss, every gradient's norm, running statistics."""
    data, names = read(path), np.load(path)["grad_norm_names"]
    config = MedMambaConfig((1, 1, 1, 1), (16, 32, 64, 128), num_classes=5, drop_path=0.0)
    model = MedMamba(config).double().train("train" in path.stem)
    load_official(model, _part(read(path.with_name("model_tiny_state.npz")), "sd/"))
    images = data["x"].requires_grad_()
    logits = model(images)
    loss = functional.cross_entropy(logits, data["y"])
    loss.backward()
    grads = {official_name(name): p.grad for name, p in model.named_parameters()}
    errors = {
        "logits": relative_error(logits, data["logits"]),
        "loss": relative_error(loss, data["loss"]),
        "grad x": _gradient_error(images, data["grad_x"]),
    }
    norms = zip(names.tolist(), data["grad_norms"], strict=True)
    errors |= {f"|grad {k}|": relative_error(_gradient(grads[k]).norm(), v) for k, v in norms}
    for name, expected in _part(data, "grad/").items():
        errors[f"grad {name}"] = relative_error(_gradient(grads[name]).view_as(expected), expected)
    after = to_official(model)
    for name, expected in _part(data, "after/").items():
        errors[f"after {name}"] = relative_error(after[name], expected)
    return errors


GROUPS = {
    "scan": ("scan_*.npz", scan_errors),
    "merge": ("merge_*.npz", merge_errors),
    "ss2d": ("ss2d_*.npz", ss2d_errors),
    "block": ("block_*.npz", block_errors),
    "model": ("model_*_*_*.npz", model_errors),
}


def _module_errors(module: nn.Module, data: Arrays, place: tuple[str, str]) -> Errors:
    """Compare output, gradients and buffers of a module that sits at ``place`` in the model."""
    ours, theirs = place
    state = module.state_dict()
    names = {name: official_name(ours + name).removeprefix(theirs) for name in state}
    given = _part(data, "sd/")
    module.load_state_dict({k: given[names[k]].reshape(t.shape) for k, t in state.items()})
    x = data["x"].requires_grad_()
    out = module(x)
    (out * data["dy"]).sum().backward()
    errors = {"out": relative_error(out, data["out"]), "grad x": _gradient_error(x, data["grad_x"])}
    for name, parameter in module.named_parameters():
        expected = data[f"grad/{names[name]}"].reshape(parameter.shape)
        errors[f"grad {name}"] = _gradient_error(parameter, expected)
    for name, buffer in module.named_buffers():
        if f"after/{names[name]}" in data:
            errors[f"after {name}"] = relative_error(buffer, data[f"after/{names[name]}"])
    return errors


def _part(data: Arrays, prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): t for k, t in data.items() if k.startswith(prefix)}


def _gradient(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        raise ValueError("gradient=None expected a tensor")
    return gradient


def _gradient_error(tensor: Tensor, expected: Tensor) -> float:
    return relative_error(_gradient(tensor.grad), expected)


def main(arguments: list[str] | None = None) -> int:
    """Print the largest error of each fixture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--fixtures", type=Path, default=FIXTURES, help="folder of the arrays")
    parser.add_argument("--quick", action="store_true", help="without the whole models")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if not options.fixtures.is_dir():
        print(f"error: --fixtures={options.fixtures} expected a folder", file=sys.stderr)
        print("hint: name the folder that holds scan_*.npz with --fixtures", file=sys.stderr)
        return 2
    figures: dict[str, float] = {}
    rows: list[tuple[str, str, float]] = []
    for group, (pattern, errors_of) in GROUPS.items():
        if options.quick and group == "model":
            continue
        for path in sorted(options.fixtures.glob(pattern)):
            errors = errors_of(path)
            worst = max(errors, key=errors.__getitem__)
            rows.append((path.stem, worst, errors[worst]))
            figures[f"error_{group}"] = max(figures.get(f"error_{group}", 0.0), errors[worst])
    with_scan = {"scan": scan_errors, "ss2d": ss2d_errors, "block": block_errors}
    for group, errors_of in with_scan.items():
        if active_backend("cpu") != "native":
            print("native: left out, it cannot run here", file=sys.stderr)
            break
        for path in sorted(options.fixtures.glob(GROUPS[group][0])):
            errors = errors_of(path, torch.float32)
            for kind, chosen in {"forward": False, "gradient": True}.items():
                found = {k: v for k, v in errors.items() if ("grad" in k) is chosen}
                worst, figure = max(found, key=found.__getitem__), f"error_native_{kind}"
                rows.append((f"native {path.stem}", worst, found[worst]))
                figures[figure] = max(figures.get(figure, 0.0), found[worst])
    if options.json:
        machine = {"processor": platform.machine(), "torch": torch.__version__}
        print(json.dumps({"machine": machine, "figures": figures}))
        return 0
    print(f"{'fixture':32} {'largest error':>13}  of")
    for fixture, worst, error in rows:
        print(f"{fixture:32} {error:13.1e}  {worst}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
