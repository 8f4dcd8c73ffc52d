"""A site follows the newest order it has seen, remembers it, and takes no other for it."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from client import app as app_module
from client.orders import MOST_REPEATS, begin_round, finish_round, follow
from fakes.benches import ORDER, RUN, Bench, changed, initial, instruction
from fakes.orders import CODE, ORDER_KEY, order
from fakes.replies import with_envelope
from strategies.errors import RefusalError
from strategies.orders import Order

NOW = time.time_ns() // 1_000_000


def issued(after_ms: int, **changes) -> Order:
    run = changes.pop("run", RUN)
    return order(run, issued_ms=NOW - 10_000 + after_ms, **changes)


def nothing() -> None:
    pass


@pytest.fixture
def path(tmp_path):
    return tmp_path / "orders.json"


def code_of(path, given: Order) -> str:
    with pytest.raises(RefusalError) as caught:
        follow(path, given, lambda: pytest.fail("recorded"))
    return caught.value.code


def test_a_newer_order_replaces_the_one_before(path):
    recorded: list[str] = []
    for name in ("first", "second", "third"):
        follow(path, issued(len(recorded), run_uuid=name), lambda name=name: recorded.append(name))
    assert recorded == ["first", "second", "third"]


def test_the_same_order_is_recorded_once(path):
    recorded: list[int] = []
    for _ in range(3):
        follow(path, ORDER, lambda: recorded.append(1))
    assert recorded == [1]


@pytest.mark.parametrize("again", ["a1b2", "another"])
@pytest.mark.parametrize("after_ms", [-1000, -1])
def test_an_older_order_is_not_followed(path, after_ms, again):
    follow(path, issued(0), nothing)
    before = path.read_bytes()
    assert code_of(path, issued(after_ms, run_uuid=again)) == "order-superseded"
    assert path.read_bytes() == before


def test_of_two_orders_with_one_time_the_first_is_followed(path):
    first, second = issued(0), issued(0, run_uuid="another")
    follow(path, first, nothing)
    assert code_of(path, second) == "order-superseded"
    follow(path, first, nothing)


def test_an_order_that_was_followed_before_the_newest_is_over(path):
    first, second = issued(0), issued(1)
    follow(path, first, nothing)
    follow(path, second, nothing)
    assert code_of(path, first) == "order-superseded"


def test_a_run_that_is_resumed_keeps_its_settings(path):
    follow(path, issued(0), nothing)
    follow(path, issued(1), nothing)
    assert code_of(path, issued(2, run=changed(seed=1))) == "run-changed"
    follow(path, issued(2, run=changed(seed=1), run_uuid="another"), nothing)


def test_another_run_in_between_does_not_make_a_run_forgotten(path):
    follow(path, issued(0), nothing)
    follow(path, issued(1, run_uuid="another", run=changed(seed=1)), nothing)
    assert code_of(path, issued(2, run=changed(seed=2))) == "run-changed"
    follow(path, issued(3), nothing)


def test_sites_may_come_and_go_and_code_may_change_within_a_run(path):
    follow(path, issued(0), nothing)
    follow(path, issued(1, sites="AB", code_sha256="0" * 64), nothing)


def test_an_order_that_cannot_be_recorded_is_not_followed(path):
    def full() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        follow(path, ORDER, full)
    recorded = []
    follow(path, ORDER, lambda: recorded.append(1))
    assert recorded == [1], "as if it had never come"


WHOLE = {"order_sha256": "0" * 64, "issued_ms": 1, "runs": {"a": "b"}}


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "null",
        "[]",
        "3",
        '"x"',
        "{}x",
        json.dumps({**WHOLE, "issued_ms": "1"}),
        json.dumps({**WHOLE, "issued_ms": None}),
        json.dumps({**WHOLE, "issued_ms": float("nan")}),
        json.dumps({**WHOLE, "runs": []}),
        json.dumps({**WHOLE, "runs": {"a": 1}}),
        json.dumps({**WHOLE, "more": 1}),
        "\udcff",
    ],
)
def test_a_file_that_cannot_be_read_is_not_taken_for_none(path, content):
    path.write_bytes(content.encode(errors="surrogateescape"))
    assert code_of(path, ORDER) == "state-unreadable"
    assert path.read_bytes() == content.encode(errors="surrogateescape")


def test_a_folder_in_its_place_is_not_taken_for_none(path):
    path.mkdir()
    assert code_of(path, ORDER) == "state-unreadable"


def test_every_cut_of_the_file_is_unreadable(path):
    follow(path, ORDER, nothing)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        assert code_of(path, issued(1)) == "state-unreadable"


# --- through the ClientApp


@pytest.fixture(scope="module")
def weights():
    return initial()


@pytest.fixture
def no_work(monkeypatch):
    for name in ("train", "evaluate"):
        monkeypatch.setattr(app_module, name, lambda *_, name=name: pytest.fail(f"{name}: worked"))


def test_an_order_that_is_followed_is_audited_once(bench, weights):
    for _ in range(2):
        bench.ask(instruction(weights, "val"))
    (followed,) = bench.audited("order-followed")
    assert followed["fields"] == {
        "run_uuid": "a1b2",
        "order_sha256": ORDER.sha256,
        "code_sha256": CODE,
        "cohort": "A,B,C",
    }


def test_what_a_site_followed_cannot_be_lost_without_notice(bench, weights):
    assert bench.ask(instruction(weights, "val", order=issued(0))).status == "ok"
    (bench.site.config.state_dir / "orders.json").unlink()
    expected = "state-missing: the site has lost what it remembers of its runs"
    assert bench.refusal(instruction(weights, order=issued(1))) == expected


def test_what_read_the_test_split_cannot_be_lost_without_notice(bench, weights):
    assert bench.ask(instruction(weights, "test", order=issued(0))).status == "ok"
    (bench.site.config.state_dir / "test-reads.json").unlink()
    expected = "state-missing: the site has lost what it remembers of its runs"
    assert bench.refusal(instruction(weights, "test", 2, order=issued(1))) == expected


def test_an_older_order_is_refused_by_name_also_after_a_restart(bench, weights, monkeypatch):
    old, new = issued(0, run_uuid="old"), issued(1, run_uuid="new")
    assert bench.ask(instruction(weights, "val", order=old)).status == "ok"
    assert bench.ask(instruction(weights, "val", order=new)).status == "ok"
    monkeypatch.setattr(app_module, "train", lambda *_: pytest.fail("trained"))
    expected = "order-superseded: this site follows a newer order"
    assert bench.refusal(instruction(weights, order=old)) == expected
    bench.start()
    assert bench.refusal(instruction(weights, order=old)) == expected
    assert bench.audited("answered")[-1]["fields"]["run_uuid"] == "old"


def test_a_run_whose_settings_change_is_refused_also_after_a_restart(bench, weights):
    bench.ask(instruction(weights, "val", order=issued(0)))
    bench.start()
    longer = issued(1, run=changed(training__local_steps=9))
    assert bench.refusal(instruction(weights, order=longer)) == (
        "run-changed: this run began with other settings"
    )


@pytest.mark.usefixtures("no_work")
def test_an_instruction_replayed_under_another_order_is_refused(bench, weights):
    """Both orders are the coordinator's; the pair is not."""
    newer = issued(5_000, run_uuid="newer")
    content = instruction(weights).to_content(ORDER_KEY)
    with_envelope(content, order=newer.text, order_signature=newer.signature)
    assert bench.refusal(content).startswith("bad-instruction: signature does not match")
    assert not (bench.state_dir / "orders.json").exists()


ORDERS = {
    "expired": (lambda: order(RUN, issued_ms=1, expires_ms=2), "order-expired"),
    "future": (lambda: order(RUN, issued_ms=NOW + 10**7), "order-from-the-future"),
    "federation": (lambda: order(RUN, federation="heart"), "other-federation"),
    "cohort": (lambda: order(RUN, sites="BC"), "not-in-cohort"),
    "alone": (lambda: order(RUN, sites="AA"), "cohort-too-small"),
}


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("case", ORDERS)
def test_an_order_that_is_not_for_this_site_is_refused_and_not_remembered(bench, weights, case):
    make, code = ORDERS[case]
    for task in ("train", "val", "test"):
        assert bench.refusal(instruction(weights, task, order=make())).startswith(f"{code}: ")
    assert not (bench.state_dir / "orders.json").exists()
    assert bench.audited("order-followed") == []
    assert len(bench.audited("answered")) == 3


@pytest.mark.usefixtures("no_work")
def test_a_malformed_order_is_refused_though_it_is_signed(bench, weights):
    text = ORDER.text.replace('"cohort":["A","B","C"]', '"cohort":[]')
    assert text != ORDER.text
    signed = Order(ORDER.manifest, RUN, text, ORDER_KEY.sign(text.encode()))
    assert bench.refusal(instruction(weights, order=signed)).startswith("bad-order: manifest")


@pytest.mark.usefixtures("no_work")
def test_settings_that_this_version_does_not_know_are_refused_by_name(bench, weights):
    text = ORDER.text.replace('"seed":0', '"sead":0')
    signed = Order(ORDER.manifest, RUN, text, ORDER_KEY.sign(text.encode()))
    assert bench.refusal(instruction(weights, order=signed)) == "bad-order: unknown key sead=0"


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"min_cohort": 4}, "cohort-too-small"),
        ({"allowed_code": ["0" * 64]}, "code-not-allowed"),
    ],
)
def test_the_sites_limits_hold_for_orders(make_bench, weights, limits, code):
    bench: Bench = make_bench(**limits)
    assert bench.refusal(instruction(weights)).startswith(f"{code}: ")


@pytest.mark.usefixtures("no_work")
def test_the_federations_promise_holds_too(tmp_path, monkeypatch, weights):
    monkeypatch.setattr("client.site._SITES", {})
    bench = Bench(tmp_path / "A", min_cohort=4)
    assert bench.refusal(instruction(weights)) == "cohort-too-small: cohort=3; limit 4"


@pytest.mark.usefixtures("no_work")
def test_a_stranger_cannot_make_the_site_deaf(bench, weights):
    """An order that is not the coordinator's, however new, leaves no trace."""
    stranger = Ed25519PrivateKey.generate()
    theirs = order(RUN, key=stranger, issued_ms=NOW + 100_000)
    bench.refusal(instruction(weights, order=theirs).to_content(stranger))
    bench.refusal(instruction(weights, order=theirs))
    assert not (bench.state_dir / "orders.json").exists()


# --- rounds of a run


def test_a_run_goes_on_and_back_one_round(path):
    for server_round in (1, 2, 3, 2, 3, 4, 9, 8):
        begin_round(path, "a1b2", server_round)


@pytest.mark.parametrize("server_round", [1, 2])
def test_a_round_that_the_run_has_left_behind_is_over_for_good(path, server_round):
    begin_round(path, "a1b2", 4)
    begin_round(path, "a1b2", 3)
    with pytest.raises(RefusalError, match=f"round={server_round}: the run is at 4 here") as caught:
        begin_round(path, "a1b2", server_round)
    assert caught.value.code == "round-passed"
    begin_round(path, "another", server_round)
    with pytest.raises(RefusalError):
        begin_round(path, "a1b2", server_round)


def test_a_round_is_begun_again_after_crashes_but_not_for_ever(path):
    for _ in range(1 + MOST_REPEATS):
        begin_round(path, "a1b2", 3)
        finish_round(path, "a1b2")
    with pytest.raises(RefusalError, match="round=2: trained again 10 times here") as caught:
        begin_round(path, "a1b2", 2)
    assert caught.value.code == "round-repeated"
    begin_round(path, "a1b2", 4)
    begin_round(path, "a1b2", 4)
    begin_round(path, "other", 3)


def test_what_ended_without_an_update_does_not_count(bench, monkeypatch):
    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(app_module, "train", fail)
        for _ in range(2 + MOST_REPEATS):
            assert bench.ask(instruction(initial())).status == "refused"
    assert bench.ask(instruction(initial())).status == "ok"


def test_who_asks_with_ever_other_weights_gets_no_more_updates_of_a_round(bench):
    def weights(n):
        return {
            name: array + np.float32(n / 1000) if array.dtype == np.float32 else array
            for name, array in initial().items()
        }

    for n in range(1 + MOST_REPEATS):
        assert bench.ask(instruction(weights(n))).status == "ok"
    refused = bench.ask(instruction(weights(99)))
    assert (refused.status, refused.reason.partition(":")[0]) == ("refused", "round-repeated")
    assert bench.ask(instruction(weights(99), server_round=2)).status == "ok"


def test_rounds_and_orders_are_remembered_beside_each_other(path):
    follow(path, issued(0), nothing)
    begin_round(path, "a1b2", 5)
    follow(path, issued(1), nothing)
    with pytest.raises(RefusalError):
        begin_round(path, "a1b2", 1)
    assert code_of(path, issued(0)) == "order-superseded"


def test_an_instruction_that_somebody_recorded_is_not_trained_again(bench, monkeypatch):
    recorded = instruction(initial(), server_round=1).to_content(ORDER_KEY)
    for server_round in range(1, 7):
        assert bench.ask(instruction(initial(), server_round=server_round)).status == "ok"
    monkeypatch.setattr(app_module, "train", lambda *_: pytest.fail("trained"))
    assert bench.refusal(recorded) == "round-passed: round=1: the run is at 6 here"
    # What may have been lost on its way is sent again.
    assert bench.ask(instruction(initial(), server_round=6)).update
