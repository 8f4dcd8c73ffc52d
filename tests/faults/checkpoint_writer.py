"""A program that writes checkpoints until it is killed: ``python checkpoint_writer.py FOLDER``.

It goes on from the newest checkpoint, as a resumed server does, and prints each round once its
checkpoint is on disk. All values of a round are the round's number, so that a reader can tell a
whole checkpoint from a mixture of two.
"""

from __future__ import annotations

import sys
from itertools import count
from pathlib import Path

import numpy as np

from server.checkpoint import State, load_checkpoint, save_checkpoint
from strategies.arrays import Arrays

RUN_UUID = "a1b2"
ARRAYS, LENGTH = 8, 1 << 19  # 16 MiB of weights, and as much of the best ones


def values(server_round: int) -> Arrays:
    return {f"layer{n}": np.full(LENGTH, server_round, np.float32) for n in range(ARRAYS)}


def state(server_round: int) -> State:
    return State(
        run_uuid=RUN_UUID,
        server_round=server_round,
        history_bytes=server_round,
        best_round=server_round,
        best_value=None,
        best_sums={},
        chosen=False,
        seconds=0.0,
    )


def main(folder: Path) -> None:
    found = load_checkpoint(folder, RUN_UUID)
    for server_round in count(1 if found is None else found[0].server_round + 1):
        save_checkpoint(folder, state(server_round), values(server_round), values(-server_round))
        print(server_round, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
