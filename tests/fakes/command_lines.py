"""What a researcher's command line is given and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TINY = """
[federation]
num-sites = 2
partition = "iid"
min-examples = 1

[run]
dataset = "own"
num-server-rounds = 1

[run.model]
depths = "1,1"
dims = "8,16"
image-size = 16
num-classes = 2
in-channels = 1

[run.training]
local-steps = 1
batch-size = 4

[run.strategy]
min-sites = 1
"""


@dataclass(frozen=True)
class Result:
    """How one command line ended."""

    code: int
    lines: list[str]

    @property
    def error(self) -> str:
        """The text of its only error line."""
        errors = [line for line in self.lines if line.startswith("error: ")]
        assert len(errors) == 1, self.lines
        return errors[0]

    @property
    def hint(self) -> str:
        hints = [line for line in self.lines if line.startswith("hint: ")]
        assert len(hints) == 1, self.lines
        return hints[0]


def layout(num_images: int = 8, shape: Sequence[int] = (16, 16), **changes) -> dict:
    """Make the six arrays of MedMNIST's layout, two classes in turn."""
    generator = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "val", "test"):
        images = generator.integers(0, 256, (num_images, *shape), dtype=np.uint8)
        arrays[f"{split}_images"] = images
        arrays[f"{split}_labels"] = np.arange(num_images).reshape(-1, 1) % 2
    return {**arrays, **changes}
