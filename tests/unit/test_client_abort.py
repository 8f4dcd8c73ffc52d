"""Work that is aborted, or takes longer than the site allows, ends, and nothing of it is kept."""

from __future__ import annotations

import threading

import pytest

from client import app as app_module
from client import site as site_module
from fakes.benches import Bench, changed, dataset, initial, instruction
from fakes.orders import order
from strategies.arrays import Arrays, hash_arrays

ENDLESS = order(changed(training__local_steps=10_000), run_uuid="endless")


@pytest.fixture(scope="module")
def weights() -> Arrays:
    return initial()


@pytest.fixture
def at_step(monkeypatch):
    """Call something when a step of the work begins; returns how many have begun."""

    def _at_step(bench: Bench, number: int, act) -> list[int]:
        steps: list[int] = []
        check = bench.site.check_work

        def count() -> None:
            steps.append(1)
            if len(steps) == number:
                act()
            check()

        monkeypatch.setattr(bench.site, "check_work", count)
        return steps

    return _at_step


def from_another_thread(bench: Bench, reason: str):
    def act() -> None:
        thread = threading.Thread(target=bench.site.abort, args=(reason,))
        thread.start()
        thread.join()

    return act


def test_an_abort_from_another_thread_ends_training_at_its_next_step(bench, weights, at_step):
    # One step of validation comes first.
    steps = at_step(bench, 4, from_another_thread(bench, "the coordinator stopped the run"))
    reason = bench.refusal(instruction(weights, order=ENDLESS))
    assert reason == "stopped: the coordinator stopped the run"
    assert len(steps) == 4
    assert bench.audited("answered")[-1]["fields"]["reason"] == reason
    assert not (bench.state_dir / "results").exists()


def test_the_next_instruction_works_and_is_not_answered_by_the_aborted_one(
    bench, weights, at_step, tmp_path
):
    expected = bench.ask(instruction(weights))
    (bench.state_dir / "results").rename(tmp_path / "forgotten")
    at_step(bench, 2, lambda: bench.site.abort("leaving"))
    assert bench.refusal(instruction(weights)) == "stopped: leaving"
    again = bench.ask(instruction(weights))
    assert again.status == "ok"
    assert hash_arrays(again.update) == hash_arrays(expected.update)


def test_an_abort_while_the_data_are_read_is_not_forgotten(bench, weights):
    """They are read at first need, which may take minutes."""

    def reads():
        bench.site.abort("the coordinator stopped the run")
        return dataset()

    bench.site.load = reads
    assert bench.refusal(instruction(weights)) == "stopped: the coordinator stopped the run"


@pytest.mark.parametrize("task", ["val", "test"])
def test_an_evaluation_can_be_aborted(bench, weights, at_step, task):
    at_step(bench, 1, lambda: bench.site.abort("leaving"))
    assert bench.refusal(instruction(weights, task)) == "stopped: leaving"


def test_an_abort_between_instructions_changes_nothing(bench, weights):
    bench.site.abort("of another run")
    assert bench.ask(instruction(weights)).status == "ok"


def test_work_beyond_the_sites_time_is_refused(make_bench, weights, at_step, monkeypatch):
    bench = make_bench(max_round_seconds=3600)
    later = [0.0]
    clock = site_module.time.monotonic
    monkeypatch.setattr(site_module.time, "monotonic", lambda: clock() + later[0])
    steps = at_step(bench, 3, lambda: later.__setitem__(0, 3601.0))
    reason = bench.refusal(instruction(weights, order=ENDLESS))
    assert reason == "too-long: the work took longer than 3600 s, this site's limit"
    assert len(steps) == 3
    assert not (bench.state_dir / "results").exists()
    assert bench.ask(instruction(weights, "val", order=ENDLESS)).status == "ok"


def test_a_real_second_is_enough_to_end_work(make_bench, weights):
    bench = make_bench(max_round_seconds=1)
    reason = bench.refusal(instruction(weights, order=ENDLESS))
    assert reason == "too-long: the work took longer than 1 s, this site's limit"


def test_an_answer_that_is_ready_leaves_though_the_run_was_stopped(bench, weights, monkeypatch):
    """Stopping spares work; what is worked out is kept for a run that goes on."""
    train = app_module.train

    def stopped_at_the_end(*arguments):
        result = train(*arguments)
        bench.site.abort("too late")
        return result

    monkeypatch.setattr(app_module, "train", stopped_at_the_end)
    first = bench.ask(instruction(weights))
    assert first.status == "ok"
    monkeypatch.setattr(app_module, "train", lambda *_: pytest.fail("trained"))
    assert hash_arrays(bench.ask(instruction(weights)).update) == hash_arrays(first.update)
