"""One site behind a Grid, and what the coordinator's end sees of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Message, RecordDict

from client.app import app
from client.data.manifest import SPLITS, Example, ImageDataset, Manifest
from client.site import Site, register
from client.site_config import SIGNING_KEY, SiteConfig
from fakes.orders import ORDER_KEY, membership, order
from medmamba.model import MedMamba
from medmamba.weights import to_arrays
from simulation.grid import RUN_ID, LocalGrid
from strategies.arrays import Arrays
from strategies.identity import create_signing_key
from strategies.orders import Order
from strategies.records import Instruction, Reply
from strategies.run_config import RunConfig

NODE = 7

RUN = RunConfig.parse(
    {
        "dataset": "made",
        "num-server-rounds": 9,
        "model.depths": "1,1",
        "model.dims": "8,16",
        "model.image-size": 16,
        "model.in-channels": 1,
        "training.batch-size": 4,
        "training.local-steps": 3,
    }
)
# One for all instructions: a site follows the newest.
ORDER = order(RUN)


def changed(**settings: Any) -> RunConfig:
    """``training__batch_size=2`` stands for ``training.batch-size``."""
    named = {name.replace("__", ".").replace("_", "-"): value for name, value in settings.items()}
    return RunConfig.parse({**RUN.flatten(), **named})


def dataset() -> ImageDataset:
    examples = tuple(
        Example(f"{split}-{i}", "made", i, i % 3, f"{split}-{i}", "A", split)
        for split, count in zip(SPLITS, (6, 3, 4), strict=True)
        for i in range(count)
    )
    images = np.random.default_rng(0).integers(0, 256, (13, 16, 16), dtype=np.uint8)
    return ImageDataset(Manifest("made", ("a", "b", "c"), examples), images)


def initial() -> Arrays:
    torch.manual_seed(1)
    return to_arrays(MedMamba.from_name(RUN.model.size, **RUN.model.architecture))


def instruction(
    weights: Arrays, task: Any = "train", server_round: int = 1, order: Order = ORDER
) -> Instruction:
    return Instruction(order, server_round, task, weights, RUN_ID)


class Bench:
    """One site behind a Grid.

    Args:
        state_dir: The site's folder.
        min_cohort: The federation's policy.
        limits: The site's own, in its file's spelling with underscores.
    """

    def __init__(self, state_dir: Path, *, min_cohort: int = 1, **limits: Any) -> None:
        self.state_dir, self._min_cohort = state_dir, min_cohort
        self.limits = {
            "require-privacy": False,
            "require-encryption": False,
            "allowed-sizes": ["custom"],
            "max-local-epochs": 10_000,
            **{name.replace("_", "-"): value for name, value in limits.items()},
        }
        self.start()
        self.site.audit.create()

    def start(self) -> Site:
        """Begin anew on the same folder, as after a restart of the site's program."""
        config = {
            "site": "A",
            "state-dir": str(self.state_dir),
            "task": "made",
            "device": "cpu",
            "data": {},
            "limits": self.limits,
        }
        key = create_signing_key(_made(self.state_dir) / SIGNING_KEY)
        self.keys = {"A": key.public_key()}
        joined = membership("A", key, min_cohort=self._min_cohort)
        self.site = Site(SiteConfig.model_validate(config), dataset, joined)
        register(self.site)
        return self.site

    def send(
        self,
        content: Instruction | RecordDict,
        kind: str | None = None,
        run_config: dict[str, Any] | None = None,
        site: str = "A",
    ) -> Message:
        """Deliver one message and return what comes back."""
        grid = LocalGrid(app, {NODE: site}, RUN.flatten() if run_config is None else run_config)
        if isinstance(content, Instruction):
            kind = kind or ("train" if content.task == "train" else "evaluate")
            content = content.to_content(ORDER_KEY)
        message = Message(content, NODE, kind or "train", ttl=60.0, group_id="1")
        self.message_ids = list(grid.push_messages([message]))
        (reply,) = grid.pull_messages(self.message_ids)
        assert reply.metadata.reply_to_message_id == self.message_ids[0]
        return reply

    def ask(self, content: Instruction | RecordDict, **options: Any) -> Reply:
        """Deliver one instruction and return the verified reply."""
        reply = Reply.from_content(self.send(content, **options).content, self.keys)
        assert [reply.message_id] == self.message_ids
        return reply

    def refusal(self, content: Instruction | RecordDict, **options: Any) -> str:
        """Deliver one instruction that is refused and return why."""
        reply = self.ask(content, **options)
        assert (reply.status, reply.update, reply.num_examples) == ("refused", {}, 0)
        return reply.reason

    def audited(self, event: str = "") -> list[dict[str, Any]]:
        """The log's entries after the one that begins it, of one kind where it is named."""
        self.site.audit.verify()
        lines = (self.state_dir / "audit.jsonl").read_text().splitlines()[1:]
        entries = [json.loads(line) for line in lines]
        return [entry for entry in entries if event in ("", entry["event"])]


def everything_sent(message: Message) -> str:
    """All that leaves the site, as text."""
    if message.has_error():
        return str(message.error.reason)
    return repr({name: record for name, record in message.content.items()})


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
