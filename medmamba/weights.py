"""Weights to and from files: our safetensors, and checkpoints of the official code.

Invariant: a state fits a model only if it has exactly the model's names, each with its shape;
nothing is skipped, cut or broadcast. A file is written whole or not at all, and equal weights give
equal bytes. Of a pickled checkpoint only tensors are read. No other file here touches files.

Source: the names on the right of ``_OFFICIAL_NAMES`` are the official code's (commit 104beb3).
"""

from __future__ import annotations

import io
import json
import os
import re
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from medmamba.config import NUM_DIRECTIONS, MedMambaConfig, ModelError
from medmamba.model import MedMamba

State = Mapping[str, Tensor]

# One key, holding JSON: safetensors writes several metadata keys in random order.
METADATA_KEY = "medmamba"
FORMAT_VERSION = 1

# Ours -> official, for modules and for the parameters of the scan; each # is a number. What follows
# a module's name (weight, bias, running_mean, ...) is the same on both sides.
_BLOCK, _OFFICIAL_BLOCK = "stages.#.blocks.#", "layers.#.blocks.#"
_OFFICIAL_NAMES = {
    "stem.projection": "patch_embed.proj",
    "stem.norm": "patch_embed.norm",
    f"{_BLOCK}.conv_branch.norm_in": f"{_OFFICIAL_BLOCK}.conv33conv33conv11.0",
    f"{_BLOCK}.conv_branch.conv_1": f"{_OFFICIAL_BLOCK}.conv33conv33conv11.1",
    f"{_BLOCK}.conv_branch.norm_1": f"{_OFFICIAL_BLOCK}.conv33conv33conv11.2",
    f"{_BLOCK}.conv_branch.conv_2": f"{_OFFICIAL_BLOCK}.conv33conv33conv11.4",
    f"{_BLOCK}.conv_branch.norm_2": f"{_OFFICIAL_BLOCK}.conv33conv33conv11.5",
    f"{_BLOCK}.conv_branch.conv_out": f"{_OFFICIAL_BLOCK}.conv33conv33conv11.7",
    f"{_BLOCK}.ssm_norm": f"{_OFFICIAL_BLOCK}.ln_1",
    f"{_BLOCK}.ssm.in_proj": f"{_OFFICIAL_BLOCK}.self_attention.in_proj",
    f"{_BLOCK}.ssm.depthwise": f"{_OFFICIAL_BLOCK}.self_attention.conv2d",
    f"{_BLOCK}.ssm.x_proj.weight": f"{_OFFICIAL_BLOCK}.self_attention.x_proj_weight",
    f"{_BLOCK}.ssm.scan.dt_weight": f"{_OFFICIAL_BLOCK}.self_attention.dt_projs_weight",
    f"{_BLOCK}.ssm.scan.dt_bias": f"{_OFFICIAL_BLOCK}.self_attention.dt_projs_bias",
    f"{_BLOCK}.ssm.scan.A_log": f"{_OFFICIAL_BLOCK}.self_attention.A_logs",
    f"{_BLOCK}.ssm.scan.D": f"{_OFFICIAL_BLOCK}.self_attention.Ds",
    f"{_BLOCK}.ssm.out_norm": f"{_OFFICIAL_BLOCK}.self_attention.out_norm",
    f"{_BLOCK}.ssm.out_proj": f"{_OFFICIAL_BLOCK}.self_attention.out_proj",
    "stages.#.merge.norm": "layers.#.downsample.norm",
    "stages.#.merge.projection": "layers.#.downsample.reduction",
    "head": "head",
}
# Of these the official code keeps the paths in a dimension of their own: (k, ...) for ((k ...)).
_SPLIT_BY_PATH = ("x_proj_weight", "dt_projs_bias")


def save(
    model_or_state: MedMamba | State, path: Path, config: MedMambaConfig | None = None
) -> None:
    """Write weights and their architecture as safetensors, atomically.

    Args:
        model_or_state: A model, or the state dict of one.
        path: The file; its folder must exist.
        config: The architecture; needed with a state dict, and checked against it.

    Raises:
        ModelError: The state has no or another architecture, or the folder is missing.
    """
    if isinstance(model_or_state, MedMamba):
        config, state = model_or_state.config, model_or_state.state_dict()
    elif config is None:
        raise ModelError(
            "config=None expected the architecture of the state dict", "pass config, or the model"
        )
    else:
        state = dict(model_or_state)
        _check_state(_skeleton(config).state_dict(), state, "the given state", config)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    header = {"format": FORMAT_VERSION, "architecture": config.to_dict()}
    metadata = {METADATA_KEY: json.dumps(header, sort_keys=True)}
    _write_atomically(Path(path), safetensors.torch.save(tensors, metadata))


def load_state(path: Path) -> tuple[MedMambaConfig, dict[str, Tensor]]:
    """Read a file of ``save``.

    Returns:
        The architecture and the state dict, on the CPU; they fit each other.

    Raises:
        ModelError: The file is missing, damaged, not ours, or of a later format.
    """
    path = Path(path)
    _check_is_file(path)
    try:
        # safetensors re-exports this without saying so.
        with safetensors.safe_open(path, framework="pt") as file:  # pyright: ignore[reportPrivateImportUsage]
            metadata: dict[str, str] = file.metadata() or {}
            # Cloned: vector code rounds differently on tensors that start at the file's offsets,
            # and a loaded model must compute what the saved one did, to the last bit.
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(
            f"path={path} expected a safetensors file: {error}",
            "the file is damaged or of another kind; load_official reads official checkpoints",
        ) from error
    config = _read_header(path, metadata)
    _check_state(_skeleton(config).state_dict(), state, str(path), config)
    return config, state


def load(path: Path, into: MedMamba | None = None) -> MedMamba:
    """Read a file of ``save`` into a model.

    Args:
        path: The file.
        into: The model that takes the weights, on its device and in its dtype; None builds the
            model that the file describes.

    Returns:
        The model.

    Raises:
        ModelError: The file cannot be used, or is of another architecture than ``into``.
    """
    config, state = load_state(path)
    if into is None:
        model = _skeleton(config)
        model.load_state_dict(state, assign=True)  # draws no random number, keeps the dtype
        return model
    _check_state(into.state_dict(), state, str(path), into.config, given_config=config)
    into.load_state_dict(state)
    return into


def load_official(model: MedMamba, path_or_state: Path | str | State) -> None:
    """Load a checkpoint of the official code into a model.

    Args:
        model: Built for the checkpoint's architecture and number of classes.
        path_or_state: A file of ``torch.save``, or what it holds: a state dict, possibly under the
            key "model" or "state_dict". Only tensors are unpickled.

    Raises:
        ModelError: The file cannot be read safely, or is of another architecture.
    """
    source = "the given state"
    if isinstance(path_or_state, str | Path):
        source = str(path_or_state)
        path_or_state = _load_pickled_tensors(Path(path_or_state))
    given = _unwrap(path_or_state, source)
    ours = model.state_dict()
    official = {official_name(name): name for name in ours}
    expected = {name: _to_official_shape(name, ours[own]) for name, own in official.items()}
    _check_state(expected, given, source, model.config)
    model.load_state_dict(
        {own: given[name].reshape(ours[own].shape) for name, own in official.items()}
    )


def to_official(model: MedMamba) -> dict[str, Tensor]:
    """Return the model's state under the official names and shapes; memory is shared."""
    renamed = {official_name(name): tensor for name, tensor in model.state_dict().items()}
    return {name: _to_official_shape(name, tensor) for name, tensor in renamed.items()}


def save_official(model: MedMamba, path: Path) -> None:
    """Write a checkpoint that the official code's ``load_state_dict`` takes, atomically."""
    buffer = io.BytesIO()
    torch.save({name: tensor.cpu() for name, tensor in to_official(model).items()}, buffer)
    _write_atomically(Path(path), buffer.getvalue())


def floating_state(model: torch.nn.Module) -> dict[str, Tensor]:
    """Return parameters and floating-point buffers in the order of the state dict.

    What a federation exchanges: integer buffers (counts of batches) stay. Memory is shared.
    """
    state = model.state_dict()
    return {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}


def to_arrays(model: torch.nn.Module) -> dict[str, NDArray[np.float32]]:
    """Return a float32 NumPy copy of ``floating_state``: the weights as a federation sends them."""
    return {
        name: tensor.to("cpu", torch.float32, copy=True).numpy()
        for name, tensor in floating_state(model).items()
    }


def load_arrays(model: MedMamba, arrays: Mapping[str, NDArray[np.float32]]) -> None:
    """Set what ``to_arrays`` returned, here or elsewhere; integer buffers keep their values.

    Raises:
        ModelError: A name is missing or unknown, or a shape differs.
    """
    # torch.tensor copies: received arrays are read-only, which from_numpy warns about.
    state = {name: torch.tensor(array) for name, array in arrays.items()}
    _check_state(floating_state(model), state, "the given weights", model.config)
    model.load_state_dict(state, strict=False)


def official_name(name: str) -> str:
    """Return what the official code calls an entry of our state dict."""
    numbers = iter(re.findall(r"(?<=\.)\d+(?=\.)", name))
    pattern = re.sub(r"(?<=\.)\d+(?=\.)", "#", name)
    row, suffix = pattern, ""
    if pattern not in _OFFICIAL_NAMES:
        row, _, suffix = pattern.rpartition(".")
        suffix = f".{suffix}"
    return re.sub("#", lambda _: next(numbers), _OFFICIAL_NAMES[row]) + suffix


def _to_official_shape(official_name: str, tensor: Tensor) -> Tensor:
    if official_name.endswith(_SPLIT_BY_PATH):
        return tensor.unflatten(0, (NUM_DIRECTIONS, -1))  # ((k f), ...) -> (k, f, ...)
    return tensor


def _skeleton(config: MedMambaConfig) -> MedMamba:
    """Build names and shapes of a model without memory for its weights."""
    with torch.device("meta"):
        return MedMamba(config)


def _check_state(
    expected: State,
    given: State,
    source: str,
    config: MedMambaConfig,
    given_config: MedMambaConfig | None = None,
) -> None:
    """Raise ``ModelError`` unless names and shapes are the expected ones."""
    theirs = {} if given_config is None else given_config.to_dict()
    ours = {k: v for k, v in config.to_dict().items() if theirs.get(k) != v}
    hint = f"the model has {_listed(ours)}"
    if theirs:
        hint = f"{source} has {_listed({k: theirs[k] for k in ours})}; {hint}"
    missing = [name for name in expected if name not in given]
    unexpected = [name for name in given if name not in expected]
    if missing or unexpected:
        parts = [_count("missing", missing), _count("unexpected", unexpected)]
        raise ModelError(
            f"{source}: names do not fit the model: {'; '.join(filter(None, parts))}", hint
        )
    for name, tensor in expected.items():
        if given[name].shape != tensor.shape:
            raise ModelError(
                f"{name}.shape={tuple(given[name].shape)} in {source} "
                f"expected {tuple(tensor.shape)} as in the model",
                hint,
            )


def _count(what: str, names: list[str]) -> str:
    """Say how many names, and the first few of them."""
    if not names:
        return ""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what} ({shown})"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def _read_header(path: Path, metadata: dict[str, str]) -> MedMambaConfig:
    if METADATA_KEY not in metadata:
        raise ModelError(
            f"path={path} expected the architecture in its metadata ({METADATA_KEY!r})",
            "the file was not written by medmamba.weights.save",
        )
    try:
        header: dict[str, Any] = json.loads(metadata[METADATA_KEY])
        version, architecture = header["format"], dict(header["architecture"])
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"path={path} expected a readable architecture: {error!r}") from error
    known = {field.name for field in fields(MedMambaConfig)}
    if version != FORMAT_VERSION or set(architecture) != known:
        raise ModelError(
            f"format={version!r} of {path} expected {FORMAT_VERSION} with the fields "
            f"{', '.join(sorted(known))}",
            "the file was written by another version of this software",
        )
    return MedMambaConfig(**architecture)


def _load_pickled_tensors(path: Path) -> Any:
    _check_is_file(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file fails anywhere inside pickle, zip or torch
        raise ModelError(
            f"path={path} expected a file of torch.save that holds tensors only",
            "where its origin is trusted, save model.state_dict() alone and load that",
        ) from error


def _unwrap(content: Any, source: str) -> State:
    """Find the state dict in what a checkpoint holds."""
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ModelError(
            f"{source} expected a state dict, alone or under 'model' or 'state_dict'",
            "save model.state_dict() with torch.save",
        )
    return content


def _check_is_file(path: Path) -> None:
    if not path.is_file():
        raise ModelError(f"path={path} expected a file", "check the path")


def _write_atomically(path: Path, content: bytes) -> None:
    """Put a whole file in place, or leave what was there."""
    if not path.parent.is_dir():
        raise ModelError(f"path={path} expected an existing folder", f"create {path.parent}")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
