"""Decoding in other processes: as fast as there are cores, and safe from a decoder that crashes.

Invariant: every task gets exactly one result. A worker that dies (a decoder with a fault, the
kernel's out-of-memory killer) ends no command: the tasks in its hands are tried again one by one,
and the one that kills its worker twice gets the result that stands for a crash. Workers say
nothing: a decoder's warnings may quote a patient.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import warnings
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

# Tasks handed out at a time for each worker: enough to keep it busy, few to suspect if it dies.
IN_HAND = 4
# Starting processes takes longer than reading so few pictures.
FEW = 64


def num_workers() -> int:
    """Return how many processes decode: one for each core that this process may use."""
    return len(os.sched_getaffinity(0))


def in_workers(
    work: Callable[[Task], Result], tasks: Sequence[Task], *, crashed: Result, workers: int
) -> Generator[tuple[int, Result]]:
    """Does tasks in worker processes.

    Args:
        work: A function of a module, which imports what it needs; its errors are raised here.
        tasks: What it is called with; they and the results are copied between processes.
        crashed: The result of a task whose worker dies.
        workers: Number of processes; 0 works in this one.

    Yields:
        Position of a task and its result, as they come.
    """
    if workers == 0:
        for position, task in enumerate(tasks):
            yield position, work(task)
        return
    waiting = deque(range(len(tasks)))
    while waiting:
        suspects: list[int] = []
        broken = False
        with _pool(min(workers, len(waiting))) as pool:
            running: dict[Future[Result], int] = {}
            while running or (waiting and not broken):
                while waiting and not broken and len(running) < IN_HAND * workers:
                    try:
                        running[pool.submit(work, tasks[waiting[0]])] = waiting[0]
                    except BrokenProcessPool:  # it died with nothing in its hands
                        broken = True
                    else:
                        waiting.popleft()
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    position = running.pop(future)
                    try:
                        result = future.result()
                    except BrokenProcessPool:
                        broken = True
                        suspects.append(position)
                    else:
                        yield position, result
        for position in suspects:
            yield position, _alone(work, tasks[position], crashed)


def _alone(work: Callable[[Task], Result], task: Task, crashed: Result) -> Result:
    with _pool(1) as pool:
        try:
            return pool.submit(work, task).result()
        except BrokenProcessPool:
            return crashed


@contextmanager
def _pool(workers: int) -> Generator[ProcessPoolExecutor]:
    # Spawned, not forked: a fork of a process with threads may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    # Ctrl-C goes to every process of a terminal; the parent ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.disable()
    warnings.simplefilter("ignore")
