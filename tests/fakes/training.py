"""A site with made images, a tiny run, and what two updates have in common."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch

from client.data.manifest import SPLITS, Example, ImageDataset, Manifest
from client.site import Site
from client.site_config import SiteConfig
from fakes.orders import membership
from medmamba.model import MedMamba
from medmamba.weights import to_arrays
from strategies.arrays import Arrays
from strategies.run_config import RunConfig

TINY = {
    "model.depths": "1,1",
    "model.dims": "8,16",
    "model.image-size": 16,
    "model.in-channels": 1,
    "training.batch-size": 4,
    "training.local-steps": 2,
    "training.learning-rate": 1e-2,
    "training.schedule": "constant",
    "num-server-rounds": 4,
}


def make_run(**changes) -> RunConfig:
    """``training__batch_size=2`` stands for ``training.batch-size``."""
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in changes.items()}
    return RunConfig.parse({**TINY, **named})


def make_dataset(labels=(0, 1, 2, 0, 1, 2, 0, 1, 2), split="train", seed=0) -> ImageDataset:
    labels = list(labels)
    counts = {name: len(labels) if name == split else 3 for name in SPLITS}
    kinds = {name: labels if name == split else [0, 1, 2] for name in SPLITS}
    examples = tuple(
        Example(f"{name}-{i}", "made", i, kinds[name][i], f"{name}-{i}", "", name)
        for name in SPLITS
        for i in range(counts[name])
    )
    pixels = np.random.default_rng(seed).integers(0, 256, (len(examples), 16, 16), dtype=np.uint8)
    return ImageDataset(Manifest("made", ("a", "b", "c"), examples), pixels)


def site_in(folder: Path, name: str = "A", dataset: ImageDataset | None = None) -> Site:
    config = SiteConfig.model_validate(
        {"site": name, "state-dir": str(folder / name), "device": "cpu", "data": {}}
    )
    return Site(config, lambda: make_dataset() if dataset is None else dataset, membership(name))


def initial(run: RunConfig, seed: int = 1) -> Arrays:
    torch.manual_seed(seed)
    return to_arrays(MedMamba.from_name(run.model.size, **run.model.architecture))


def same(first: Arrays, second: Arrays) -> bool:
    assert first.keys() == second.keys()
    return all(np.array_equal(first[name], second[name]) for name in first)


def norm(update: Arrays) -> float:
    return math.sqrt(sum(float((value.astype(np.float64) ** 2).sum()) for value in update.values()))
