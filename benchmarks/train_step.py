"""What a training step costs on this machine, and what it cost with the published scan.

    python benchmarks/train_step.py [--quick] [--json]

* ``train_vs_published``: forward and backward of the published reference loop (it indexes
  ``x[:, :, t]``, whose backward is quadratic in the length) over those of the native scan, at
  MedMamba's first stage for 64-pixel images, batch 4; median over rounds in which both run.
* ``seconds_per_example_<size>``: a training step of the whole model, 64 pixels.
"""

from __future__ import annotations

import argparse
import os
import statistics
from functools import partial

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the commands set it

import torch
from measuring import (
    check,
    describe_machine,
    mean_seconds,
    median_ratio,
    need_native,
    print_figures,
    seconds,
)
from scan_peers import make_inputs, train
from torch.nn import functional

from medmamba import MedMamba


def scan_ratio(rounds: int) -> float:
    """Return the median over rounds of published time over ours, forward and backward."""
    inputs, grad_y = make_inputs(d=384, l=256, batch=4)
    works = {name: partial(train, name, inputs, grad_y) for name in ("published", "native")}
    check("published", works["published"](), works["native"]())
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            times[name].append(mean_seconds(work))
    return median_ratio(times["published"], times["native"])


def step_seconds(size: str, batch: int, rounds: int) -> float:
    """Return the median seconds an example of one forward and backward of a named size."""
    model = MedMamba.from_name(size, num_classes=2, norm="group")
    images = torch.randn(batch, 3, 64, 64)
    labels = torch.zeros(batch, dtype=torch.long)

    def step() -> None:
        functional.cross_entropy(model(images), labels).backward()

    step()
    return statistics.median(seconds(step) for _ in range(rounds)) / batch


def main() -> None:
    """Print a table, or one JSON object."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--quick", action="store_true", help="fewer rounds")
    options.add_argument("--json", action="store_true", help="one JSON object")
    given = options.parse_args()
    need_native()
    rounds = 2 if given.quick else 5
    figures = {
        "train_vs_published": scan_ratio(rounds),
        "seconds_per_example_nano": step_seconds("nano", 32, rounds),
        "seconds_per_example_tiny": step_seconds("tiny", 8, rounds),
    }
    machine = describe_machine()
    print_figures(machine, figures, as_json=given.json)


if __name__ == "__main__":
    main()
