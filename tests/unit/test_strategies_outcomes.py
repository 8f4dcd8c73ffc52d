"""The coordinator's log has every site's outcome of every round; without it the run ends."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fakes.sites import (
    KEYS,
    NODE_OF,
    SITES,
    Answer,
    Sites,
    by_site,
    poke,
    signed,
    silent,
    strategy,
    update,
    weights,
)
from strategies.arrays import hash_arrays, num_bytes
from strategies.audit import AuditLog
from strategies.code import code_sha256
from strategies.errors import ConfigError, FederationError, QuorumError
from strategies.records import REASON_LENGTH, Instruction, Reply

pytestmark = pytest.mark.usefixtures("poll_often")


def refuses(site, message):
    nothing = {"num_examples": 0, "update": {}, "metrics": {}}
    return signed(site, message, status="refused", reason="no: x", **nothing)


@pytest.fixture
def log(tmp_path) -> AuditLog:
    log = AuditLog(tmp_path / "audit.jsonl")
    log.create()
    return log


def entries(log: AuditLog) -> list[dict]:
    log.verify()
    lines = [json.loads(line) for line in log.path.read_text().splitlines()[1:]]
    assert {line["event"] for line in lines} <= {"outcome"}
    return [line["fields"] for line in lines]


def test_a_valid_update_is_named_by_its_hash_size_and_code(log):
    strategy(audit=log).train(Sites(), NODE_OF, 3, weights())
    assert entries(log) == [
        {
            "run_uuid": "a1b2",
            "server_round": 3,
            "task": "train",
            "site": site,
            "status": "ok",
            "reason": "",
            "code_sha256": code_sha256(),
            "bytes": num_bytes(weights()),
            "arrays_sha256": hash_arrays(update(site)),
        }
        for site in SITES
    ]


@pytest.mark.parametrize(
    ("answer", "status", "reason"),
    [
        (refuses, "refused", "no: x"),
        (poke(np.nan), "dropped", "array 'stem.weight' holds values that are not finite"),
        (silent, "missing", "no reply within 0.05 s"),
        (
            lambda site, message: signed("C", message),
            "dropped",
            "its node answered in the name of site=C",
        ),
    ],
    ids=["refused", "dropped", "missing", "impostor"],
)
def test_every_other_outcome_is_there_with_its_reason(log, answer: Answer, status, reason):
    rounds = strategy(audit=log, round_timeout_seconds=0.05)
    rounds.train(Sites({"B": answer}), NODE_OF, 1, weights())
    found = entries(log)
    assert [entry["site"] for entry in found] == list(SITES)
    assert (found[1]["status"], found[1]["reason"]) == (status, reason)
    assert (found[1]["bytes"], found[1]["arrays_sha256"]) == (0, "")
    # Which code it runs is known of a site that signed an answer to this question.
    signed_it = answer is not silent and not reason.startswith("its node")
    assert found[1]["code_sha256"] == (code_sha256() if signed_it else "")


def test_a_register_that_cannot_be_read_ends_the_run_and_blames_no_site(log, tmp_path):
    def admitted():
        if admitted.readable:
            return KEYS
        raise ConfigError(f"{tmp_path}/sites/B.json is damaged")

    admitted.readable = True
    rounds = strategy(audit=log, admitted=admitted)

    def damage(site, message):
        admitted.readable = False
        return signed(site, message)

    with pytest.raises(ConfigError, match=r"B\.json is damaged"):
        rounds.train(Sites({"A": damage}), NODE_OF, 1, weights())
    assert entries(log) == []


def test_each_site_has_one_entry_for_each_round_and_task(log):
    rounds = strategy(audit=log, round_timeout_seconds=0.05)
    for server_round in (1, 2):
        rounds.train(Sites({"C": silent}), NODE_OF, server_round, weights())
    rounds.evaluate(Sites({"A": refuses}), {"A": 11}, 2, weights(), "val")
    found = [(e["server_round"], e["task"], e["site"], e["status"]) for e in entries(log)]
    assert found == [
        (1, "train", "A", "ok"),
        (1, "train", "B", "ok"),
        (1, "train", "C", "missing"),
        (2, "train", "A", "ok"),
        (2, "train", "B", "ok"),
        (2, "train", "C", "missing"),
        (2, "val", "A", "refused"),
        (2, "val", "B", "missing"),
        (2, "val", "C", "missing"),
    ]


def test_a_round_that_misses_its_quorum_is_written_down_too(log):
    with pytest.raises(QuorumError):
        strategy(audit=log, min_sites=3).train(Sites({"A": poke(np.inf)}), NODE_OF, 1, weights())
    assert [entry["status"] for entry in entries(log)] == ["dropped", "ok", "ok"]


@pytest.mark.parametrize("task", ["train", "val"])
@pytest.mark.parametrize("damage", ["gone", "edited", "folder"])
def test_a_log_that_cannot_be_written_ends_the_run_at_the_first_site(log, task, damage):
    if damage == "edited":
        log.path.write_text(log.path.read_text().replace("created", "deleted"))
    else:
        log.path.unlink()
        if damage == "folder":
            log.path.mkdir()
    asked: list[str] = []

    def works(site, message):
        asked.append(site)
        return signed(site, message)

    grid, rounds = Sites(dict.fromkeys(SITES, works)), strategy(audit=log)
    instruction = Instruction(rounds.order, 1, task, weights())
    with pytest.raises((FederationError, OSError)) as caught:
        rounds.ask(grid, NODE_OF, instruction)
    assert not isinstance(caught.value, QuorumError)
    assert asked == ["A"]


def test_what_a_stranger_wrote_is_one_short_line_of_the_log(log):
    forged = 'x"}\n{"event":"outcome","fields":{"site":"C","status":"ok"}}\n\x1b[2J' + "y" * 99
    rounds = strategy(audit=log)
    grid = Sites({"B": lambda s, m: signed(s, m, status="refused", reason=forged, metrics={})})
    _, outcomes = rounds.train(grid, NODE_OF, 1, weights())
    found = entries(log)
    assert len(found) == 3
    assert found[1]["reason"] == by_site(outcomes)["B"].reason
    assert found[1]["reason"].isprintable()


def test_a_reason_of_many_errors_is_cut(log):
    """The words are the coordinator's own, the names in them a site's."""
    odd = {"x" * 300: np.ones(1, np.float32)}
    strategy(audit=log).train(
        Sites({"B": lambda s, m: signed(s, m, update=odd)}), NODE_OF, 1, weights()
    )
    assert len(entries(log)[1]["reason"]) == REASON_LENGTH


def test_a_refusal_brings_no_update_whatever_is_in_it(log):
    """A program that refuses and sends weights all the same."""

    def both(site, message):
        return signed(site, message, status="refused", reason="no: x", metrics={})

    added: list[Reply] = []
    rounds = strategy(audit=log)
    instruction = Instruction(rounds.order, 1, "train", weights())
    outcomes = rounds.ask(Sites({"B": both}), NODE_OF, instruction, added.append)
    assert [reply.site for reply in added] == ["A", "C"]
    assert by_site(outcomes)["B"].reply is None


def test_outcomes_keep_figures_and_no_update(log):
    _, outcomes = strategy(audit=log).train(Sites(), NODE_OF, 1, weights())
    for outcome in outcomes:
        assert outcome.reply is not None
        assert outcome.reply.update == {}
        assert outcome.reply.number("train-loss") == 0.5
