"""Every task gets one result, whatever becomes of the process that works on it."""

import multiprocessing
import time

import pytest

from client.data.workers import in_workers, num_workers
from fakes.decoders import CRASH, failing, fragile, once


def test_without_workers_the_work_is_done_here_and_in_order():
    assert list(in_workers(fragile, [3, 1, 2], crashed=0, workers=0)) == [(0, 9), (1, 1), (2, 4)]
    assert list(in_workers(fragile, [], crashed=0, workers=2)) == []


def test_workers_that_crash_cost_only_the_tasks_that_crash_them():
    tasks = [*range(20), CRASH, *range(20, 40), CRASH]
    results = list(in_workers(fragile, tasks, crashed=-7, workers=2))
    assert sorted(place for place, _ in results) == list(range(len(tasks)))
    assert dict(results) == {
        place: -7 if task == CRASH else task * task for place, task in enumerate(tasks)
    }


def test_a_task_whose_worker_was_killed_once_is_done(tmp_path):
    assert list(in_workers(once, [str(tmp_path / "seen")], crashed="", workers=1)) == [(0, "done")]


def test_a_worker_that_dies_between_two_tasks_costs_none():
    """As the out-of-memory killer takes one while its results are being written down."""
    done = []
    for place, square in in_workers(fragile, range(12), crashed=-7, workers=1):
        done.append((place, square))
        if len(done) == 2:
            time.sleep(0.5)  # what was handed out is worked off
            for process in multiprocessing.active_children():
                process.kill()
                process.join()
    assert sorted(done) == [(n, n * n) for n in range(12)]


def test_an_error_of_the_work_itself_is_raised():
    with pytest.raises(KeyError, match=r"^[56]$"):
        list(in_workers(failing, [5, 6], crashed=0, workers=1))


def test_who_stops_listening_leaves_no_process_behind():
    results = in_workers(fragile, range(1000), crashed=0, workers=1)
    place, square = next(results)
    assert square == place**2
    results.close()  # returns: the pool is shut down and the rest is not worked on


def test_there_is_at_least_one_worker():
    assert num_workers() >= 1
