"""Work for other processes, which import it by name: one that crashes on some tasks."""

from __future__ import annotations

import os
import time
from pathlib import Path

CRASH = -1


def fragile(task: int) -> int:
    """Squares a number, or ends its process as a decoder with a fault does."""
    if task == CRASH:
        os._exit(139)
    time.sleep(0.005)
    return task * task


def once(path: str) -> str:
    """Ends its process the first time that a path is seen, as the out-of-memory killer may."""
    if not Path(path).exists():
        Path(path).touch()
        os._exit(137)
    return "done"


def failing(task: int) -> int:
    """Raises what no task should."""
    raise KeyError(task)
