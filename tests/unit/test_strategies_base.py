"""A round with unreliable sites: bad replies are dropped with a reason, good ones count exactly.

The grid is the in-process one, so every message makes Flower's wire round trip; what a site answers
is written by each test.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

import strategies.base
from medmamba import MedMamba
from medmamba.weights import to_arrays
from simulation.grid import LocalGrid
from strategies.errors import FederationError, QuorumError
from strategies.evaluation import EvaluationSums
from strategies.fedavg import FedAvg
from strategies.records import ARRAYS, BLOB, ENVELOPE, METRICS, Arrays, Instruction, Reply
from strategies.run_config import RunConfig

SITES = ("A", "B", "C")
PRIVATE = {site: Ed25519PrivateKey.generate() for site in SITES}
KEYS = {site: key.public_key() for site, key in PRIVATE.items()}
NODES = {11: "A", 12: "B", 13: "C"}
CAP = 1000

Answer = Callable[[str, Message], RecordDict | Message]


@pytest.fixture(autouse=True)
def _poll_often(monkeypatch):
    monkeypatch.setattr(strategies.base, "POLL_SECONDS", 0.005)


def weights() -> Arrays:
    return {
        "stem.weight": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3),
        "head.bias": np.array([0.1, -0.2], np.float32),
    }


def update(site: str) -> Arrays:
    generator = np.random.default_rng(ord(site))
    return {k: generator.normal(size=v.shape).astype(np.float32) for k, v in weights().items()}


def sums(site: str, num_examples: int = 5) -> EvaluationSums:
    generator = np.random.default_rng(ord(site))
    labels = generator.integers(0, 3, num_examples)
    return EvaluationSums.from_logits(generator.normal(size=(num_examples, 3)), labels)


NUM_EXAMPLES = {"A": 10, "B": 300, "C": 7}


def good(site: str, message: Message, **changes) -> Reply:
    """The reply of a site that works."""
    instruction = Instruction.from_content(message.content)
    train = instruction.task == "train"
    numbers = {"train-loss": 0.5, "num-steps": 2, "seconds": 0.1, "learning-rate": 1e-3}
    return replace(
        Reply(
            site=site,
            federation=instruction.federation,
            run_uuid=instruction.run_uuid,
            server_round=instruction.server_round,
            task=instruction.task,
            message_id=message.metadata.message_id,
            num_examples=NUM_EXAMPLES[site] if train else sums(site).num_examples,
            update=update(site) if train else {},
            metrics={
                **(numbers if train else {}),
                **sums(site).to_metrics("val" if train else instruction.task),
            },
        ),
        **changes,
    )


def signed(site: str, message: Message, **changes) -> RecordDict:
    return good(site, message, **changes).to_content(PRIVATE[site])


def silent(site: str, message: Message) -> RecordDict:
    """A site whose reply is lost."""
    return RecordDict()


class Sites(LocalGrid):
    """Nodes that answer as the test says.

    Args:
        answers: Site to what it answers, content or a whole message; the others work.
        nodes: Node id to site.
        delays: Site to seconds before its reply arrives.
    """

    def __init__(
        self,
        answers: dict[str, Answer] | None = None,
        nodes: dict[int, str] = NODES,
        delays: dict[str, float] | None = None,
    ) -> None:
        super().__init__(self._answer, nodes, RunConfig().flatten(), fault=self._link)
        self._answers, self._delays = answers or {}, delays or {}
        self._due: dict[str, float] = {}
        self.instructions: list[Message] = []

    def _link(self, site: str, message: Message):
        self.instructions.append(message)
        self._due[message.metadata.message_id] = time.monotonic() + self._delays.get(site, 0)
        return "lose" if self._answers.get(site) is silent else "deliver"

    def _answer(self, message: Message, context) -> Message:
        site = context.node_config["site"]
        answer = self._answers.get(site, signed)(site, message)
        return answer if isinstance(answer, Message) else Message(answer, reply_to=message)

    def pull_messages(self, message_ids):
        return super().pull_messages(
            key for key in message_ids if time.monotonic() >= self._due[key]
        )


def strategy(kind=FedAvg, *, sites=SITES, **settings) -> FedAvg:
    values = {
        "strategy.min-sites": 2,
        "strategy.max-num-examples": CAP,
        "strategy.round-timeout-seconds": 30.0,
        "strategy.wait-seconds": 0.05,
        **{f"strategy.{key.replace('_', '-')}": value for key, value in settings.items()},
    }
    return kind(
        RunConfig.parse(values),
        federation="lung",
        run_uuid="a1b2",
        site_keys={site: KEYS[site] for site in sites},
    )


def mean_by_hand(sites) -> Arrays:
    total = sum(NUM_EXAMPLES[site] for site in sites)
    result = {}
    for name, value in weights().items():
        moved = value.astype(np.float64)
        for site in sorted(sites):
            moved = moved + NUM_EXAMPLES[site] / total * update(site)[name].astype(np.float64)
        result[name] = moved.astype(np.float32)
    return result


def assert_same_bits(found: Arrays, expected: Arrays) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == np.float32
        assert found[name].tobytes() == value.tobytes(), name


def by_site(outcomes):
    assert [o.site for o in outcomes] == sorted(o.site for o in outcomes)
    return {o.site: o for o in outcomes}


def test_the_next_weights_are_the_weighted_mean():
    found, outcomes = strategy().train(Sites(), list(NODES), 1, weights())
    assert_same_bits(found, mean_by_hand(SITES))
    assert [(o.site, o.status, o.reason) for o in outcomes] == [(s, "ok", "") for s in SITES]
    assert [o.reply.num_examples for o in outcomes] == [10, 300, 7]
    assert [o.sums == sums(o.site) for o in outcomes] == [True, True, True]


def test_the_sites_get_exactly_the_instruction():
    grid = Sites()
    strategy(round_timeout_seconds=12.0).train(grid, list(NODES), 4, weights())
    assert [m.metadata.dst_node_id for m in grid.instructions] == list(NODES)
    for message in grid.instructions:
        sent = Instruction.from_content(message.content)
        assert (sent.federation, sent.run_uuid, sent.server_round) == ("lung", "a1b2", 4)
        assert sent.task == "train"
        assert_same_bits(sent.weights, weights())
        assert message.metadata.message_type == "train"
        # The instruction dies with the round: a site that comes back later must not work on it.
        assert message.metadata.ttl == 12.0


@pytest.mark.parametrize("arrival", ["ABC", "CBA", "BCA"])
@pytest.mark.parametrize("nodes", [NODES, {3: "C", 5: "A", 9: "B"}])
def test_who_answers_first_does_not_change_a_bit(arrival, nodes):
    grid = Sites(nodes=nodes, delays={site: 0.02 * place for place, site in enumerate(arrival)})
    found, outcomes = strategy().train(grid, list(nodes), 1, weights())
    assert_same_bits(found, mean_by_hand(SITES))
    assert [o.site for o in outcomes] == list(SITES)


def with_arrays(arrays: dict[str, np.ndarray] | bytes) -> Answer:
    """Arrays that no working site sends."""

    def answer(site, message):
        data = arrays if isinstance(arrays, bytes) else safetensors.numpy.save(arrays)
        content = signed(site, message)
        content[ARRAYS] = ArrayRecord({BLOB: Array("uint8", (len(data),), BLOB, data)})
        return content

    return answer


def changed_update(change: Callable[[Arrays], Arrays]) -> Answer:
    return lambda site, message: signed(site, message, update=change(update(site)))


def poke(value: float) -> Answer:
    def change(arrays):
        arrays["stem.weight"][1, 2] = value
        return arrays

    return changed_update(change)


def with_metrics(**changes) -> Answer:
    """A signed reply with other metrics."""
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    return lambda site, message: signed(
        site, message, metrics={**good(site, message).metrics, **named}
    )


def with_record(name: str, record) -> Answer:
    def answer(site, message):
        content = signed(site, message)
        if record is None:
            del content[name]
        else:
            content[name] = record
        return content

    return answer


def with_envelope(**changes) -> Answer:
    def answer(site, message):
        content = signed(site, message)
        content[ENVELOPE] = ConfigRecord({**content[ENVELOPE], **changes})
        return content

    return answer


def evaluated(num_examples: int) -> Answer:
    """A reply that claims validation examples, all of class 0 and predicted so."""
    claimed = EvaluationSums.zeros(3)
    claimed.confusion[0, 0] = num_examples
    claimed.scores[0, 1, 0] = claimed.scores[1, 0, 0] = claimed.scores[2, 0, 0] = num_examples
    claimed.calibration[0, 0] = claimed.calibration[2, 0] = num_examples
    metrics = replace(claimed, num_examples=num_examples).to_metrics("val")
    return with_metrics(**metrics)


BAD: dict[str, tuple[Answer, str]] = {
    "nan": (poke(np.nan), "array 'stem.weight' holds values that are not finite"),
    "infinity": (poke(-np.inf), "array 'stem.weight' holds values that are not finite"),
    "shape": (
        changed_update(lambda u: {**u, "head.bias": u["head.bias"][:1]}),
        "array 'head.bias' has shape=(1,); expected (2,)",
    ),
    "broadcastable": (
        changed_update(lambda u: {**u, "stem.weight": u["stem.weight"][:1]}),
        "array 'stem.weight' has shape=(1, 3); expected (2, 3)",
    ),
    "missing-array": (
        changed_update(lambda u: {"head.bias": u["head.bias"]}),
        "arrays stem.weight are missing or unknown (1)",
    ),
    "unknown-array": (
        changed_update(lambda u: {**u, "tail": u["head.bias"]}),
        "arrays tail are missing or unknown (1)",
    ),
    "no-arrays": (
        changed_update(lambda u: {}),
        "arrays head.bias, stem.weight are missing or unknown (2)",
    ),
    "float64": (
        with_arrays({"stem.weight": np.ones((2, 3))}),
        "array 'stem.weight' has dtype=float64; expected float32",
    ),
    "integer-buffer": (
        with_arrays({"num.batches.tracked": np.array([3])}),
        "array 'num.batches.tracked' has dtype=int64; expected float32",
    ),
    "garbage": (
        with_arrays(b"\x80\x04garbage"),
        "record 'arrays' is not readable",
    ),
    "no-examples": (
        lambda s, m: signed(s, m, num_examples=0),
        f"num-examples=0: expected 1 to {CAP}",
    ),
    "negative-examples": (
        lambda s, m: signed(s, m, num_examples=-5),
        f"num-examples=-5: expected 1 to {CAP}",
    ),
    "too-many-examples": (
        lambda s, m: signed(s, m, num_examples=CAP + 1),
        f"num-examples={CAP + 1}: expected 1 to {CAP}",
    ),
    "true-examples": (with_envelope(**{"num-examples": True}), "num-examples=True: expected int"),
    "other-round": (
        lambda s, m: signed(s, m, server_round=2),
        "server_round=2: expected 1",
    ),
    "other-run": (
        lambda s, m: signed(s, m, run_uuid="ffff"),
        "run_uuid='ffff': expected 'a1b2'",
    ),
    "other-federation": (
        lambda s, m: signed(s, m, federation="heart"),
        "federation='heart': expected 'lung'",
    ),
    "other-message": (
        lambda s, m: signed(s, m, message_id="another"),
        "the signature covers another instruction",
    ),
    "evaluation": (
        lambda s, m: signed(s, m, task="val", update={}, metrics=sums(s).to_metrics("val")),
        "task='val': expected 'train'",
    ),
    "metric": (
        with_metrics(patient_age=61),
        "metrics patient-age are missing or not declared",
    ),
    "totals": (
        with_metrics(val_num_examples=6),
        "val-confusion counts 5 examples; expected val-num-examples=6",
    ),
    "val-examples": (evaluated(CAP + 1), f"val-num-examples={CAP + 1}"),
    "empty": (lambda s, m: RecordDict(), "record 'envelope' is missing"),
    "no-metrics": (with_record(METRICS, None), "record 'metrics' is missing"),
    "no-arrays-record": (with_record(ARRAYS, None), "record 'arrays' is missing"),
    "foreign-envelope": (
        with_record(ENVELOPE, ConfigRecord({"schema-version": 1, "x": [1, 2]})),
        "are missing or unknown",
    ),
    "old-version": (with_envelope(**{"schema-version": 0}), "schema-version=0; expected 1"),
    "tampered": (with_envelope(**{"num-examples": 999}), "signature does not match"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("bad", ["A", "B"])
def test_a_bad_reply_is_dropped_with_its_reason_and_the_round_goes_on(case, bad, caplog):
    answer, reason = BAD[case]
    found, outcomes = strategy().train(Sites({bad: answer}), list(NODES), 1, weights())
    others = [site for site in SITES if site != bad]
    assert_same_bits(found, mean_by_hand(others))
    dropped = [o for o in outcomes if o.status == "dropped"]
    assert len(dropped) == 1
    assert reason in dropped[0].reason
    assert "\n" not in dropped[0].reason
    assert (dropped[0].reply, dropped[0].sums) == (None, None)
    assert [o.site for o in outcomes if o.status == "ok"] == others
    # Before a site has proved its name, a bad answer is its node's.
    assert dropped[0].site in (bad, f"node {11 + SITES.index(bad)}")
    assert f"round=1 task=train site={dropped[0].site} status=dropped reason=" in caplog.text


def test_a_forged_signature_is_dropped_and_the_real_site_counts():
    def as_c(site, message):
        return good("C", message).to_content(PRIVATE["A"])

    found, outcomes = strategy().train(Sites({"A": as_c}), list(NODES), 1, weights())
    assert_same_bits(found, mean_by_hand("BC"))
    outcomes = by_site(outcomes)
    assert outcomes["node 11"].status == "dropped"
    assert outcomes["node 11"].reason == "signature does not match the signed content"
    assert outcomes["C"].status == "ok"
    assert (outcomes["A"].status, outcomes["A"].reason) == ("missing", "not connected")


def test_a_reply_signed_by_a_key_that_nobody_admitted_is_dropped():
    grid = Sites(nodes={11: "A", 12: "B", 13: "C"})
    found, outcomes = strategy(sites="AB").train(grid, list(NODES), 1, weights())
    assert_same_bits(found, mean_by_hand("AB"))
    assert by_site(outcomes)["node 13"].reason == "site='C' is not admitted to this federation"


@pytest.mark.parametrize("thief", ["A", "C"])
def test_a_replayed_reply_is_dropped_and_harms_nobody(thief):
    kept = {}

    def keeps(site, message):
        kept[site] = good("B", message).to_content(PRIVATE["B"])
        return signed(site, message)

    rounds = strategy()
    rounds.train(Sites({"B": keeps}), list(NODES), 1, weights())
    replays = Sites({thief: lambda site, message: kept["B"]})
    found, outcomes = rounds.train(replays, list(NODES), 2, weights())
    others = [site for site in SITES if site != thief]
    assert [o.site for o in outcomes if o.status == "ok"] == others
    assert_same_bits(found, mean_by_hand(others))
    assert [o.reason for o in outcomes if o.status == "dropped"] == [
        "the signature covers another instruction"
    ]


def test_a_replayed_reply_of_a_site_not_seen_before_harms_nobody():
    def from_earlier(site, message):
        return good("B", message, message_id="of an earlier run").to_content(PRIVATE["B"])

    found, outcomes = strategy().train(Sites({"A": from_earlier}), list(NODES), 1, weights())
    assert [o.site for o in outcomes if o.status == "ok"] == ["B", "C"]
    assert_same_bits(found, mean_by_hand("BC"))


def test_a_site_counts_once_a_round():
    grid = Sites(nodes={11: "A", 12: "B", 13: "A"})
    found, outcomes = strategy(sites="AB").train(grid, [11, 12, 13], 1, weights())
    assert_same_bits(found, mean_by_hand("AB"))
    second = by_site(outcomes)["node 13"]
    assert second.status == "dropped"
    assert second.reason == "a second reply for site A in this round"
    assert second.reply is None


def test_as_many_validation_examples_as_allowed_are_no_reason_to_drop_a_reply():
    _, outcomes = strategy().train(Sites({"B": evaluated(CAP)}), list(NODES), 1, weights())
    assert [o.status for o in outcomes] == ["ok", "ok", "ok"]


@pytest.mark.parametrize("new", [10, 14])
@pytest.mark.parametrize("silence", ["nothing", "error"])
def test_a_site_that_came_back_as_another_node_counts(new, silence):
    rounds = strategy(round_timeout_seconds=0.1)
    rounds.train(Sites(), list(NODES), 1, weights())
    # A was restarted: its old node 11 is still listed and will never answer again.
    nodes = {11: "gone", 12: "B", 13: "C", new: "A"}

    def unavailable(site, message):
        return Message(Error(3, "Node Unavailable"), reply_to=message)

    grid = Sites({"gone": unavailable if silence == "error" else silent}, nodes)
    found, outcomes = rounds.train(grid, sorted(nodes), 2, weights())
    assert [o.site for o in outcomes if o.status == "ok"] == list(SITES)
    assert_same_bits(found, mean_by_hand(SITES))


@pytest.mark.parametrize("gone", [{"B"}, {"B", "C"}])
def test_a_node_that_left_before_the_instruction_was_sent_is_missing(gone, monkeypatch):
    # Flower's grid has an empty id for a message whose node is not registered any more.
    rounds = strategy(min_sites=1)
    rounds.train(Sites(), list(NODES), 1, weights())
    grid = Sites({site: silent for site in gone})
    push = grid.push_messages

    def push_some(messages):
        return [
            "" if site in gone else key
            for key, site in zip(push(messages), NODES.values(), strict=True)
        ]

    monkeypatch.setattr(grid, "push_messages", push_some)
    found, outcomes = rounds.train(grid, list(NODES), 2, weights())
    assert_same_bits(found, mean_by_hand(set(SITES) - gone))
    assert {o.site for o in outcomes if o.status == "missing"} == gone


def test_a_dropped_reply_keeps_its_reason_when_an_old_node_is_silent():
    rounds = strategy(round_timeout_seconds=0.1)
    rounds.train(Sites(), list(NODES), 1, weights())
    grid = Sites({"gone": silent, "A": poke(np.nan)}, {10: "A", 11: "gone", 12: "B", 13: "C"})
    _, outcomes = rounds.train(grid, [10, 11, 12, 13], 2, weights())
    outcome = by_site(outcomes)["A"]
    assert (outcome.status, "not finite" in outcome.reason) == ("dropped", True)


def test_a_flower_error_is_a_missing_reply_with_its_reason():
    def lost(site, message):
        return Message(Error(3, "Node Unavailable"), reply_to=message)

    rounds = strategy()
    rounds.train(Sites(), list(NODES), 1, weights())
    found, outcomes = rounds.train(Sites({"B": lost}), list(NODES), 2, weights())
    assert_same_bits(found, mean_by_hand("AC"))
    outcome = by_site(outcomes)["B"]
    assert (outcome.status, outcome.reason) == ("missing", "Flower error 3: Node Unavailable")


def test_an_exception_in_a_site_is_a_missing_reply():
    def fails(site, message):
        raise FederationError("site=B cannot answer: KeyError")

    found, outcomes = strategy().train(Sites({"B": fails}), list(NODES), 1, weights())
    assert_same_bits(found, mean_by_hand("AC"))
    assert by_site(outcomes)["node 12"].reason.endswith("site=B cannot answer: KeyError")


def test_a_refusal_is_told_apart_from_a_failure():
    def refuses(site, message):
        reply = good(site, message, status="refused", reason="too-much-work: limit 3")
        return replace(reply, num_examples=0, update={}, metrics={}).to_content(PRIVATE[site])

    found, outcomes = strategy().train(Sites({"C": refuses}), list(NODES), 1, weights())
    assert_same_bits(found, mean_by_hand("AB"))
    refused = by_site(outcomes)["C"]
    assert (refused.status, refused.reason) == ("refused", "too-much-work: limit 3")
    assert (refused.reply, refused.sums) == (None, None)


@pytest.mark.parametrize("late", [0.5, None], ids=["late", "never"])
def test_the_deadline_ends_a_round_without_the_late(late):
    grid = Sites({"B": silent}) if late is None else Sites(delays={"B": late})
    rounds = strategy(round_timeout_seconds=0.15)
    began = time.monotonic()
    found, outcomes = rounds.train(grid, list(NODES), 1, weights())
    assert 0.15 <= time.monotonic() - began < 0.45
    assert_same_bits(found, mean_by_hand("AC"))
    outcome = by_site(outcomes)["node 12"]
    assert (outcome.status, outcome.reason) == ("missing", "no reply within 0.15 s")


def test_a_round_ends_when_all_have_answered():
    began = time.monotonic()
    strategy(round_timeout_seconds=30.0).train(Sites(delays={"A": 0.05}), list(NODES), 1, weights())
    assert time.monotonic() - began < 5


def test_a_site_without_a_node_is_missing():
    _, outcomes = strategy().train(Sites(), [11, 12], 1, weights())
    assert (outcomes[2].site, outcomes[2].status, outcomes[2].reason) == (
        "C",
        "missing",
        "not connected",
    )


def test_too_few_valid_updates_end_the_run_and_name_the_sites():
    rounds = strategy()
    rounds.train(Sites(), list(NODES), 1, weights())
    before = weights()
    grid = Sites({"A": poke(np.nan), "C": lambda s, m: signed(s, m, num_examples=0)})
    with pytest.raises(QuorumError) as caught:
        rounds.train(grid, list(NODES), 2, before)
    assert str(caught.value) == (
        "round=2 valid updates=1; strategy.min-sites=2 (A: array 'stem.weight' holds values that "
        f"are not finite; C: num-examples=0: expected 1 to {CAP})"
    )
    assert caught.value.hint == "mend the sites named here, then continue with --resume"
    assert_same_bits(before, weights())


def test_the_quorum_is_exact():
    bad = {"A": poke(np.nan)}
    strategy(min_sites=2).train(Sites(bad), list(NODES), 1, weights())
    with pytest.raises(QuorumError, match=r"valid updates=2; strategy\.min-sites=3"):
        strategy(min_sites=3).train(Sites(bad), list(NODES), 1, weights())


def test_a_quorum_that_can_never_be_met_is_refused_at_the_start():
    with pytest.raises(QuorumError) as caught:
        strategy(sites="AB", min_sites=3)
    assert str(caught.value) == "strategy.min-sites=3 but only 2 sites are admitted"
    assert caught.value.hint == "admit more sites or lower strategy.min-sites"


def test_instructions_that_cannot_be_sent_end_the_run_in_one_line(monkeypatch):
    # What Flower's grid does with messages that its hub finds too large.
    grid = Sites()
    monkeypatch.setattr(grid, "push_messages", lambda messages: [])
    with pytest.raises(FederationError):
        strategy().train(grid, list(NODES), 1, weights())


@pytest.mark.parametrize("split", ["val", "test"])
def test_evaluation_brings_each_sites_sums(split):
    grid = Sites()
    outcomes = strategy().evaluate(grid, list(NODES), 0, weights(), split)
    assert [(o.site, o.status, o.sums == sums(o.site)) for o in outcomes] == [
        (site, "ok", True) for site in SITES
    ]
    assert [m.metadata.message_type for m in grid.instructions] == ["evaluate"] * 3
    assert Instruction.from_content(grid.instructions[0].content).task == split


def test_an_evaluation_of_no_examples_is_no_failure():
    def nothing(site, message):
        metrics = EvaluationSums.zeros(3).to_metrics("val")
        return signed(site, message, num_examples=0, metrics=metrics)

    outcomes = strategy().evaluate(Sites({"B": nothing}), list(NODES), 0, weights(), "val")
    assert [(o.status, o.sums.num_examples) for o in outcomes] == [("ok", 5), ("ok", 0), ("ok", 5)]


def test_an_evaluation_that_contradicts_itself_is_dropped():
    grid = Sites({"B": lambda s, m: signed(s, m, num_examples=4)})
    outcomes = by_site(strategy().evaluate(grid, list(NODES), 0, weights(), "val"))
    assert outcomes["B"].reason == "num-examples=4 but 5 were evaluated"
    assert outcomes["B"].status == "dropped"


def test_an_evaluation_of_the_other_split_is_dropped():
    def reads_test(site, message):
        return signed(site, message, task="test", metrics=sums(site).to_metrics("test"))

    outcomes = strategy().evaluate(Sites({"B": reads_test}), list(NODES), 0, weights(), "val")
    assert by_site(outcomes)["B"].reason == "task='test': expected 'val'"


def test_an_evaluation_needs_no_quorum():
    grid = Sites({site: lambda s, m: RecordDict() for site in SITES})
    outcomes = strategy().evaluate(grid, list(NODES), 0, weights(), "val")
    assert {o.status for o in outcomes} == {"dropped", "missing"}


def test_the_cohort_is_awaited_until_it_is_there(monkeypatch):
    grid = Sites()
    states = iter([[], [11], [11], [13, 11]])
    monkeypatch.setattr(grid, "get_node_ids", lambda: next(states))
    assert strategy(wait_seconds=30.0).wait_for_cohort(grid, target=2) == [11, 13]


def test_a_cohort_that_meets_the_quorum_starts_at_the_deadline(monkeypatch, caplog):
    grid = Sites()
    monkeypatch.setattr(grid, "get_node_ids", lambda: [12, 11])
    began = time.monotonic()
    assert strategy(wait_seconds=0.1).wait_for_cohort(grid, target=3) == [11, 12]
    assert 0.1 <= time.monotonic() - began < 1
    assert "continuing with connected=2 expected=3" in caplog.text


def test_a_cohort_below_the_quorum_is_refused_at_the_deadline(monkeypatch):
    grid = Sites()
    monkeypatch.setattr(grid, "get_node_ids", lambda: [11])
    with pytest.raises(QuorumError) as caught:
        strategy(wait_seconds=0.05).wait_for_cohort(grid, target=3)
    assert str(caught.value) == "connected sites=1 after 0.05 s; strategy.min-sites=2"
    assert "python -m client --site NAME" in caught.value.hint


def test_integer_buffers_never_travel():
    model = MedMamba.from_name("nano", 3, norm="batch")
    travels = to_arrays(model)
    assert {value.dtype for value in travels.values()} == {np.dtype(np.float32)}
    assert any(name.endswith("running_mean") for name in travels)
    assert any(name.endswith("num_batches_tracked") for name in model.state_dict())
    assert not any(name.endswith("num_batches_tracked") for name in travels)
    # All that is left at the site is the integer buffers.
    stays = model.state_dict().keys() - travels.keys()
    assert {name.rpartition(".")[2] for name in stays} == {"num_batches_tracked"}
