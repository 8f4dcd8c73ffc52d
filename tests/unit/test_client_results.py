"""Kept answers: found again whole and for the same question, or worked out anew."""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from client import app as app_module
from client.results import KEEP, Results, _question
from fakes.benches import RUN, Bench, changed, initial, instruction
from fakes.orders import order
from fakes.replies import arrays, reply
from strategies.arrays import Arrays, hash_arrays
from strategies.records import Instruction

ORDER = order(RUN)
WEIGHTS = {"w": np.arange(4, dtype=np.float32)}


def asked(server_round: int = 1, task: str = "train", weights: Arrays = WEIGHTS) -> Instruction:
    return Instruction(ORDER, server_round, task, weights)


@pytest.fixture
def results(tmp_path) -> Results:
    return Results(tmp_path / "results")


def files(results: Results) -> list[str]:
    return sorted(path.name for path in results.folder.iterdir())


# --- the folder


def test_an_answer_is_found_as_it_was_kept_without_its_message_id(results):
    results.keep(asked(), reply())
    found = results.find(asked())
    assert replace(found, update={}) == replace(reply(), message_id="", update={})
    assert hash_arrays(found.update) == hash_arrays(reply().update)


def test_an_answer_outlives_its_process(results):
    results.keep(asked(), reply())
    assert Results(results.folder).find(asked()) is not None


def test_it_is_for_the_sites_eyes_only(results):
    results.keep(asked(), reply())
    assert stat.S_IMODE(results.folder.stat().st_mode) == 0o700
    (path,) = results.folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


OTHER = {
    "round": asked(server_round=2),
    "task": asked(task="val"),
    "weights": asked(weights={"w": WEIGHTS["w"] + np.float32(1e-7)}),
    "run": replace(asked(), order=order(RUN, run_uuid="other")),
}


@pytest.mark.parametrize("question", OTHER.values(), ids=list(OTHER))
def test_the_answer_to_another_question_is_not_found(results, question):
    results.keep(asked(), reply())
    assert results.find(question) is None


@pytest.mark.parametrize("question", OTHER.values(), ids=list(OTHER))
def test_an_answer_under_another_questions_name_is_not_used(results, question, caplog):
    """Files that were restored from a backup under wrong names."""
    results.keep(asked(), reply())
    (path,) = results.folder.iterdir()
    results.keep(question, reply())
    (other,) = set(results.folder.iterdir()) - {path}
    other.write_bytes(path.read_bytes())
    assert results.find(question) is None
    assert "kept answer not used: content and hash do not agree" in caplog.text


def test_the_order_is_no_part_of_the_question(results):
    """A resumed run has a new order."""
    results.keep(asked(), reply())
    resumed = order(RUN, issued_ms=ORDER.manifest.issued_ms + 1)
    assert results.find(replace(asked(), order=resumed)) is not None


def test_the_oldest_goes_first(results):
    for server_round in range(1, KEEP + 1):
        results.keep(asked(server_round), reply())
        path = results._path(_question(asked(server_round)))
        os.utime(path, ns=(server_round, server_round))
    results.keep(asked(KEEP + 1), reply())
    kept = [n for n in range(1, KEEP + 2) if results.find(asked(n)) is not None]
    assert kept == list(range(2, KEEP + 2))


def test_what_a_killed_process_left_is_removed(results):
    results.keep(asked(1), reply())
    left = results.folder / f".{results._path(_question(asked(2))).name}.tmp0"
    left.write_bytes(b"half")
    results.keep(asked(2), reply())
    assert not left.exists()
    assert results.find(asked(1)) is not None


def test_the_newest_stays_though_the_clock_was_set_back(results):
    for server_round in range(1, KEEP + 1):
        results.keep(asked(server_round), reply())
    for path in results.folder.iterdir():
        os.utime(path, (4e9, 4e9))
    results.keep(asked(KEEP + 1), reply())
    assert results.find(asked(KEEP + 1)) is not None
    assert len(files(results)) == KEEP


def test_an_answer_that_is_kept_again_takes_no_second_place(results):
    for _ in range(KEEP + 2):
        results.keep(asked(), reply())
    assert len(files(results)) == 1


# --- damage


SMALL = reply(metrics={"train-loss": 0.7})


def found_or_said(results: Results, caplog) -> bool:
    """Whether the right answer is found; otherwise that none is, and that the log says so."""
    caplog.clear()
    found = results.find(asked())
    if found is None:
        assert "kept answer not used: " in caplog.text
        return False
    assert replace(found, update={}) == replace(SMALL, message_id="", update={})
    assert hash_arrays(found.update) == hash_arrays(arrays())
    return True


def test_a_byte_that_changed_anywhere_is_noticed(results, caplog):
    caplog.set_level(logging.WARNING)
    results.keep(asked(), SMALL)
    (path,) = results.folder.iterdir()
    content = path.read_bytes()
    unnoticed = []
    for place in range(0, len(content), 3):
        broken = bytearray(content)
        broken[place] ^= 1 << place % 8
        path.write_bytes(broken)
        if found_or_said(results, caplog):
            unnoticed.append(bytes(content[place : place + 1]))
    assert set(unnoticed) <= {b" "}  # padding of the header, where a bit makes another space


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(length=st.integers(0, 10_000), more=st.binary(max_size=9))
def test_a_file_that_is_cut_or_goes_on_is_noticed(results, caplog, length, more):
    results.keep(asked(), SMALL)
    (path,) = results.folder.iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:length] + more)
    if path.read_bytes() != content:
        assert not found_or_said(results, caplog)


def test_a_folder_in_its_place_is_not_an_answer(results, caplog):
    results.keep(asked(), reply())
    (path,) = results.folder.iterdir()
    path.unlink()
    path.mkdir()
    assert results.find(asked()) is None
    assert "kept answer not used" in caplog.text


# --- through the ClientApp


@pytest.fixture(scope="module")
def weights() -> Arrays:
    return initial()


@pytest.fixture
def trained(monkeypatch) -> list[int]:
    """The rounds that were trained."""
    rounds: list[int] = []
    train = app_module.train

    def spy(site, run, server_round, weights):
        rounds.append(server_round)
        return train(site, run, server_round, weights)

    monkeypatch.setattr(app_module, "train", spy)
    return rounds


def test_a_lost_reply_is_sent_again_and_not_trained_again(bench, weights, trained):
    first = bench.ask(instruction(weights))
    again = bench.ask(instruction(weights))
    assert trained == [1]
    assert again.message_id != first.message_id  # signed anew: `ask` has verified it
    assert replace(again, message_id="", update={}) == replace(first, message_id="", update={})
    assert {name: value.tobytes() for name, value in again.update.items()} == {
        name: value.tobytes() for name, value in first.update.items()
    }
    assert [e["fields"]["status"] for e in bench.audited("answered")] == ["ok", "ok"]


def test_evaluations_are_kept_too(bench, weights, monkeypatch):
    for task in ("val", "test"):
        first = bench.ask(instruction(weights, task))
        with monkeypatch.context() as patch:
            patch.setattr(app_module, "evaluate", lambda *_: pytest.fail("evaluated"))
            assert bench.ask(instruction(weights, task)).metrics == first.metrics


def test_a_restarted_site_and_a_resumed_run_bring_the_same_answer(bench, weights, trained):
    first = bench.ask(instruction(weights))
    bench.start()
    resumed = order(RUN)
    assert resumed.sha256 != ORDER.sha256
    again = bench.ask(instruction(weights, order=resumed))
    assert trained == [1]
    assert hash_arrays(again.update) == hash_arrays(first.update)


def test_another_question_is_worked_out(bench, weights, trained):
    first = bench.ask(instruction(weights))
    other = {name: value * np.float32(1.01) for name, value in weights.items()}
    answers = [
        bench.ask(instruction(weights, server_round=2)),
        bench.ask(instruction(other)),
        bench.ask(instruction(weights, order=order(RUN, run_uuid="other"))),
    ]
    assert trained == [1, 2, 1, 1]
    assert hash_arrays(answers[2].update) == hash_arrays(first.update)
    assert len({hash_arrays(answer.update) for answer in answers}) == 3


def test_a_damaged_answer_is_worked_out_anew_and_replaced(bench, weights, trained, caplog):
    first = bench.ask(instruction(weights))
    (path,) = (bench.state_dir / "results").iterdir()
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    again = bench.ask(instruction(weights))
    assert "kept answer not used" in caplog.text
    assert trained == [1, 1]
    assert hash_arrays(again.update) == hash_arrays(first.update)
    bench.ask(instruction(weights))
    assert trained == [1, 1]


def test_a_kept_answer_leaves_only_within_the_limits_of_now(bench, weights, trained):
    bench.ask(instruction(weights))
    for limits, code in (
        ({"max-local-steps": 2}, "too-much-work"),
        ({"require-privacy": True}, "privacy-required"),
        ({"min-cohort": 9}, "cohort-too-small"),
        ({"allowed-code": ["0" * 64]}, "code-not-allowed"),
    ):
        before = dict(bench.limits)
        bench.limits.update(limits)
        bench.start()
        assert bench.refusal(instruction(weights)).startswith(f"{code}: ")
        bench.limits = before
    bench.start()
    assert bench.ask(instruction(weights)).status == "ok"
    assert trained == [1]


def test_a_kept_answer_does_not_outlive_its_order(bench, weights):
    bench.ask(instruction(weights))
    bench.ask(instruction(weights, "val", order=order(RUN, run_uuid="newer")))
    assert bench.refusal(instruction(weights)).startswith("order-superseded: ")


def test_a_refusal_is_not_kept(make_bench, weights, trained):
    bench: Bench = make_bench(max_local_steps=2)
    assert bench.refusal(instruction(weights)).startswith("too-much-work: ")
    bench.limits["max-local-steps"] = 3
    bench.start()
    assert bench.ask(instruction(weights)).status == "ok"
    assert trained == [1]


def test_a_failure_is_not_kept(bench, weights, monkeypatch):
    def fail(*_: object) -> None:
        raise RuntimeError("once")

    with monkeypatch.context() as patch:
        patch.setattr(app_module, "train", fail)
        assert bench.refusal(instruction(weights)).startswith("failed: ")
    assert not (bench.state_dir / "results").exists()
    assert bench.ask(instruction(weights)).status == "ok"


def test_an_answer_that_cannot_be_kept_does_not_leave(bench, weights, monkeypatch, trained):
    """It would be worked out, and paid for, a second time if it got lost."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("client.results.write_atomic", full)
        assert bench.refusal(instruction(weights)).startswith("failed: OSError")
    assert bench.ask(instruction(weights)).status == "ok"
    assert trained == [1, 1]


def test_where_answers_are_not_kept_there_is_no_folder(bench, weights, trained):
    bench.site.keep_results = False
    for _ in range(2):
        bench.ask(instruction(weights))
    assert trained == [1, 1]
    assert not (bench.state_dir / "results").exists()


def test_other_settings_are_another_question_because_no_run_changes_its_own(bench, weights):
    bench.ask(instruction(weights))
    later = order(changed(seed=5))
    assert bench.refusal(instruction(weights, order=later)).startswith("run-changed: ")
