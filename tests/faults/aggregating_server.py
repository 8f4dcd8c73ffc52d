"""One training round at the coordinator with so many sites: ``python aggregating_server.py SITES``.

Strategy, checks and signatures are the real ones. Each site's answer comes to be when the server
asks for it, as an answer that waits at the superlink does. Prints bytes: of the model, and of this
process's memory before the round and at its highest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Message

from fakes.orders import ORDER_KEY, order
from server.rounds import initial_weights
from simulation.grid import LocalGrid
from strategies.arrays import Arrays, num_bytes
from strategies.evaluation import EvaluationSums
from strategies.fedavg import FedAvg
from strategies.records import Reply
from strategies.run_config import RunConfig


class Log:
    """An audit log that keeps nothing."""

    def append(self, event: str, **fields: object) -> None:
        pass


def memory(name: str) -> int:
    """Return a line of this process's status; getrusage would count the parent's memory too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main(num_sites: int) -> None:
    run = RunConfig()
    sites = [f"S{number:02}" for number in range(num_sites)]
    keys = {site: Ed25519PrivateKey.generate() for site in sites}
    signed = order(run, sites=sites)
    weights = initial_weights(run)

    def answer(message: Message, context) -> Message:
        site = context.node_config["site"]
        reply = Reply(
            site=site,
            federation=signed.manifest.federation,
            run_uuid=signed.manifest.run_uuid,
            server_round=1,
            task="train",
            message_id=message.metadata.message_id,
            num_examples=100,
            update=update(weights, sites.index(site)),
            metrics={
                "train-loss": 1.0,
                "num-steps": 1,
                "seconds": 1.0,
                "learning-rate": 1e-3,
                "scan-backend": 0,
                **EvaluationSums.zeros(run.model.num_classes).to_metrics("val"),
            },
        )
        return Message(reply.to_content(keys[site]), reply_to=message)

    strategy = FedAvg(
        signed,
        order_key=ORDER_KEY,
        sites=lambda: {site: key.public_key() for site, key in keys.items()},
        audit=Log(),  # pyright: ignore[reportArgumentType]
    )
    grid = LocalGrid(answer, dict(enumerate(sites, start=2)), run.flatten())  # pyright: ignore[reportArgumentType]
    nodes = strategy.wait_for_cohort(grid, target=num_sites)
    before = memory("VmRSS")
    result, outcomes = strategy.train(grid, nodes, 1, weights)
    assert [o.status for o in outcomes] == ["ok"] * num_sites, outcomes
    moved = (num_sites - 1) / 2 * 1e-3  # the mean of all updates
    assert all(np.allclose(result[name] - weights[name], moved, atol=1e-5) for name in weights)
    print(json.dumps({"model": num_bytes(weights), "before": before, "peak": memory("VmHWM")}))


def update(weights: Arrays, number: int) -> Arrays:
    return {name: np.full_like(value, number * 1e-3) for name, value in weights.items()}


if __name__ == "__main__":
    main(int(sys.argv[1]))
