"""The files of a finished run, the report written from them, and the words a reader sees in it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from server.metrics import auc_interval, metrics, worst_site
from server.report import write_report
from strategies.evaluation import EvaluationSums

CLASSES = ["normal", "benign", "malignant"]
SIZES = {"A": 240, "B": 90, "C": 160, "D": 40}
ROUNDS = 6


def sums(seed: int, n: int, margin: float, num_classes: int = 3) -> EvaluationSums:
    generator = np.random.default_rng(seed)
    labels = generator.choice(num_classes, n, p=[0.6, 0.25, 0.15])
    logits = generator.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += margin
    return EvaluationSums.from_logits(logits, labels)


def final(parts: EvaluationSums) -> dict[str, Any]:
    low, high = auc_interval(parts, resamples=100) or (None, None)
    confusion = parts.confusion.tolist()
    return {**metrics(parts), "auc_low_95": low, "auc_high_95": high, "confusion": confusion}


def history_lines() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for server_round in range(ROUNDS + 1):
        parts = {
            site: sums(10 * server_round + index, n, 0.2 + 0.35 * server_round - 0.15 * index)
            for index, (site, n) in enumerate(SIZES.items())
        }
        if server_round:
            loss = 1.1 - 0.1 * server_round
            lines.append(
                {
                    "type": "round",
                    "server_round": server_round,
                    "seconds": 11.5 + server_round,
                    "num_sites": 4,
                    "num_examples": 2120,
                    "train_loss": loss,
                }
            )
            for index, (site, n) in enumerate(SIZES.items()):
                refused = site == "D" and server_round in (3, 4, 5)
                lines.append(
                    {
                        "type": "site",
                        "server_round": server_round,
                        "site": site,
                        "status": "refused" if refused else "ok",
                        "reason": "cohort: 3 sites are fewer than this site's 4" if refused else "",
                        "num_examples": None if refused else 4 * n,
                        "train_loss": None if refused else loss + 0.05 * index,
                        "seconds": None if refused else 9.0,
                    }
                )
        lines.append(
            {
                "type": "evaluation",
                "server_round": server_round,
                "split": "val",
                "pooled": metrics(sum(parts.values(), EvaluationSums.zeros(3))),
                "sites": {site: metrics(part) for site, part in parts.items()},
            }
        )
    reason = "val-loss-sum=nan: expected a finite number of at least 0"
    lines.append(
        {
            "type": "site",
            "server_round": 2,
            "site": "C",
            "status": "dropped",
            "reason": reason,
            "num_examples": None,
            "train_loss": None,
            "seconds": None,
        }
    )
    return lines


def make_files() -> dict[str, Any]:
    """Return the files of a finished simulated run, as Python values."""
    parts = {site: sums(900 + i, n, 1.9 - 0.25 * i) for i, (site, n) in enumerate(SIZES.items())}
    sites = {site: final(part) for site, part in parts.items()}
    return {
        "config.json": {
            "run_uuid": "7b7d1f6e-0f0e-4ef5-9d35-5f1c5d0f6a11",
            "command": "simulation/run.py --scenario demo --data-dir /home/ada/scans --seed 7",
            "run_config": {
                "dataset": "phantom",
                "num-server-rounds": ROUNDS,
                "seed": 7,
                "model": {"size": "nano", "norm": "group", "depths": ""},
                "training": {"learning-rate": 0.0003, "augment": True, "batch-size": 64},
                "privacy": {"mode": "off"},
            },
            "seed": 7,
            "git_commit": "0123456789abcdef",
            "versions": {"torch": "2.13.0", "flwr": "1.41.0"},
            "provenance": {"scan_backend": "native", "device": "cpu", "num_threads": 2},
        },
        "history.jsonl": history_lines(),
        "summary.json": {
            "run_uuid": "7b7d1f6e-0f0e-4ef5-9d35-5f1c5d0f6a11",
            "dataset": "phantom",
            "classes": CLASSES,
            "strategy": "fedavg",
            "num_server_rounds": ROUNDS,
            "best_round": 5,
            "selection": {"metric": "auc", "split": "val", "value": 0.9123},
            "pooled": final(sum(parts.values(), EvaluationSums.zeros(3))),
            "sites": sites,
            "worst_site": worst_site(sites),
            "not_tested": {},
            "baselines": {"pooled": final(sums(990, 530, 2.0))},
            "privacy": {"mode": "off"},
            "encryption": {"mode": "off"},
            "seconds": 133.2,
            "simulated": True,
        },
        "partition.json": {
            "scheme": "dirichlet",
            "alpha": 0.5,
            "classes": CLASSES,
            "sites": {
                site: {
                    "train": [3 * n, (index + 1) * n // 3, (4 - index) * n // 4],
                    "val": [n // 2, n // 4, n // 4],
                    "test": [n // 2, n // 4, n // 4],
                    "num_patients": 2 * n,
                }
                for index, (site, n) in enumerate(SIZES.items())
            },
        },
    }


FILES = make_files()


def write_files(run_dir: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    """Write the run directory, after ``change`` was made to a copy of its files."""
    files = copy.deepcopy(FILES)
    change(files)
    run_dir.mkdir(exist_ok=True)
    for name, content in files.items():
        if name.endswith(".jsonl"):
            text = "".join(json.dumps(line) + "\n" for line in content)
        else:
            text = json.dumps(content)
        (run_dir / name).write_text(text, encoding="utf-8")
    return run_dir


def render(
    run_dir: Path, change: Callable[[dict[str, Any]], object], *, charts: bool = False
) -> tuple[str, str]:
    """Return the page, and the words a reader sees in it.

    Drawing takes most of the time, so without ``charts`` there is nothing to draw.
    """

    def prepare(files: dict[str, Any]) -> None:
        if not charts:
            del files["partition.json"]
            lines = [line for line in files["history.jsonl"] if line["type"] != "evaluation"]
            files["history.jsonl"] = [{**line, "train_loss": None} for line in lines]
        change(files)

    page = write_report(write_files(run_dir, prepare)).read_text(encoding="utf-8")
    return page, visible(page)


def visible(page: str) -> str:
    """Return the words of a page, joined by single spaces."""
    parser = _Words()
    parser.feed(page)
    return " ".join(" ".join(parser.words).split())


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.hidden = False

    def handle_starttag(self, tag, attrs):
        self.hidden = tag == "style" or self.hidden

    def handle_endtag(self, tag):
        self.hidden = self.hidden and tag != "style"

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)
