"""What insiders can do: a hostile site that is admitted, somebody on the coordinator's machine.

Everything is tried against a running federation over TLS. Who has only the authority's certificate
is in test_gateway.py.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.common.serde import fab_to_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.proto.runtime_pb2 import AcquireTaskRequest, GetNodesRequest, PushAppMessagesRequest
from flwr.serverapp import Grid
from flwr.supercore.constant import TaskType
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_object_id
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.runtime import RuntimeHttpClient

from fakes.federations import Federation, wait_until
from fakes.hostile_site import Asked, HostileSite, Misdeed, fleet_client, honest, status_of
from fakes.orders import unverified
from server.flower_control import Control
from server.flower_runtime import build_fab, host_run
from strategies.audit import AuditLog
from strategies.base import grace_seconds
from strategies.identity import canonical, sign
from strategies.orders import Order
from strategies.records import Instruction, Reply
from strategies.run_config import RunConfig

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

HOSTILE = ("A", "D")
SITES = ("A", "B", "C", "D")
MEGABYTE = 1_000_000
UNAUTHORIZED = 401

Signed = Callable[[int], RecordDict]  # given Flower's id of the run


# --- what a hostile site does with an instruction to train


def replays(site: HostileSite, asked: Asked) -> None:
    """Its true answer to round 1, as it was signed then."""
    site.send(asked, site.kept[1])


def signs_again(site: HostileSite, asked: Asked) -> None:
    """The same round, signed anew for this message."""
    site.send(asked, site.content(asked, server_round=1))


def signs_for(other: str) -> Misdeed:
    """In another site's name, with its own key."""
    return lambda site, asked: _sent(site.send(asked, site.content(asked, site=other)))


def slows(other: str, first: Misdeed) -> Misdeed:
    """Do something once another site has answered, which then sleeps as the next round begins."""

    def misdeed(site: HostileSite, asked: Asked) -> None:
        wait_until(lambda: site.has_answered(other, asked), f"{other} has answered")
        site.federation.freeze(other)
        first(site, asked)

    return misdeed


def forges(other: str, **changes: str) -> Misdeed:
    """Answer another site's instruction before that does, as its node."""

    def misdeed(site: HostileSite, asked: Asked) -> None:
        try:
            message_id = site.message_to(other, asked)
            node_id = site.federation.nodes()[other].node_id
            content = site.content(asked, message_id=message_id, **changes)
            _sent(site.send(asked, content, as_node=node_id, answers=message_id))
        finally:
            site.federation.thaw(other)
        honest(site, asked)

    return misdeed


def update(change: Callable[[dict[str, Any]], object]) -> Misdeed:
    """An update with something else in it."""

    def misdeed(site: HostileSite, asked: Asked) -> None:
        arrays = dict(site.reply(asked).update)
        change(arrays)
        site.send(asked, site.content(asked, update=arrays))

    return misdeed


def poke(value: float) -> Misdeed:
    def change(arrays: dict[str, Any]) -> None:
        name = min(arrays)
        arrays[name] = np.full_like(arrays[name], value)

    return update(change)


def metrics(**changed: Any) -> Misdeed:
    """Metrics with something else in them, signed where our own code signs that."""
    named = {name.replace("_", "-"): value for name, value in changed.items()}

    def misdeed(site: HostileSite, asked: Asked) -> None:
        found = {**site.reply(asked).metrics, **named}
        finite = all(np.isfinite(value).all() for value in found.values())
        content = site.content(asked, **({"metrics": found} if finite else {}))
        content["metrics"] = MetricRecord(found)
        site.send(asked, content)

    return misdeed


def claims(num_examples: int) -> Misdeed:
    return lambda site, asked: _sent(
        site.send(asked, site.content(asked, num_examples=num_examples))
    )


def other_schema(site: HostileSite, asked: Asked) -> None:
    content = site.content(asked)
    content["envelope"] = ConfigRecord({**content.config_records["envelope"], "schema-version": 99})
    site.send(asked, content)


def long_reason(length: int) -> Misdeed:
    def misdeed(site: HostileSite, asked: Asked) -> None:
        text = "x" * length
        content = site.content(asked, status="refused", reason=text, update={}, metrics={})
        _sent(site.send(asked, content))

    return misdeed


def long_error(length: int) -> Misdeed:
    return lambda site, asked: _sent(
        site.push(Message(Error(1, "x" * length), reply_to=asked.message))
    )


def no_message(site: HostileSite, asked: Asked) -> None:
    """An object that is no message where Flower expects one."""
    record = ArrayRecord({})
    object_id, content = record.object_id, record.deflate()
    message = Message(RecordDict(), reply_to=asked.message)
    message.metadata.__dict__["_message_id"] = object_id
    _sent(site.announce(message, ObjectTree(object_id=object_id), {object_id: content}))


def garbage(site: HostileSite, asked: Asked) -> None:
    """A message whose body is none."""
    body = b"\xff\xfe" * 50
    content = b"Message  %d\x00" % len(body) + body
    object_id = get_object_id(content)
    message = Message(RecordDict(), reply_to=asked.message)
    message.metadata.__dict__["_message_id"] = object_id
    _sent(site.announce(message, ObjectTree(object_id=object_id), {object_id: content}))


def announces(site: HostileSite, asked: Asked) -> None:
    """A whole reply, of which one piece alone ever comes.

    Its weights are like no other's: flower-superlink asks for no piece that it has already.
    """
    arrays = {name: value * 1.5 for name, value in site.reply(asked).update.items()}
    pieces = iter(range(1))
    message = Message(site.content(asked, update=arrays), reply_to=asked.message)
    site.push(message, upload=lambda _, content: None if next(pieces, None) is None else content)


def answers_twice(site: HostileSite, asked: Asked) -> None:
    """First as it should be, then with another update of more examples."""
    honest(site, asked)
    arrays = {name: value * 1000 for name, value in site.reply(asked).update.items()}
    again = site.send(asked, site.content(asked, update=arrays, num_examples=77))
    assert not again, "flower-superlink took a second answer"


def instructs(other: str, content: Callable[[Asked], RecordDict]) -> Misdeed:
    """Tell another site what to do, as if it were the coordinator."""

    def misdeed(site: HostileSite, asked: Asked) -> None:
        _sent(site.instruct(site.federation.nodes()[other].node_id, content(asked), asked))
        honest(site, asked)

    return misdeed


def addresses_the_superlink(upload: bool) -> Misdeed:
    """Send a message to flower-superlink itself, which hands it out with somebody's reply."""

    def misdeed(site: HostileSite, asked: Asked) -> None:
        message = site.to_superlink(RecordDict({"x": ConfigRecord({"y": 1})}), asked)
        pieces = (lambda _, content: b"garbage" + content) if upload else (lambda *_: None)
        site.push(message, upload=pieces)
        honest(site, asked)

    return misdeed


def with_other_weights(asked: Asked) -> RecordDict:
    content = asked.message.content
    weights = {name: value + 1 for name, value in asked.instruction.weights.items()}
    changed = replace(asked.instruction, weights=weights)
    forged = changed.to_content(Ed25519PrivateKey.generate())
    forged["envelope"] = ConfigRecord(dict(content.config_records["envelope"]))
    return forged


def _sent(taken: bool) -> None:
    assert taken, "flower-superlink took no note of it"


@dataclass(frozen=True)
class Case:
    """One misdeed: the site whose answer is refused for it, and what the history says."""

    misdeed: Misdeed
    site: str
    status: str
    reason: str


# By round and hostile site. B and C are honest throughout.
CASES = {
    (2, "A"): Case(replays, "A", "dropped", "the signature covers another instruction"),
    (2, "D"): Case(poke(np.nan), "D", "dropped", "holds values that are not finite"),
    (3, "A"): Case(signs_again, "A", "dropped", "server_round=1: expected 3"),
    (3, "D"): Case(poke(1e30), "D", "dropped", "update norm="),
    (4, "A"): Case(signs_for("B"), "A", "dropped", "signature does not match"),
    (4, "D"): Case(
        update(lambda arrays: arrays.update(extra=np.ones(3, np.float32))),
        "D",
        "dropped",
        "arrays extra are missing or unknown",
    ),
    (5, "A"): Case(
        metrics(patient_age=71), "A", "dropped", "metrics patient-age are missing or not"
    ),
    (5, "D"): Case(metrics(train_loss=float("nan")), "D", "dropped", "'train-loss' is not finite"),
    (6, "A"): Case(other_schema, "A", "dropped", "schema-version=99; expected "),
    (6, "D"): Case(long_reason(MEGABYTE), "D", "dropped", "reason has 1000000 characters"),
    (7, "A"): Case(slows("B", no_message), "A", "dropped", "its reply is not readable"),
    (7, "D"): Case(garbage, "D", "dropped", "its reply is not readable"),
    (8, "A"): Case(forges("B"), "B", "dropped", "its node answered in the name of site=A"),
    (8, "D"): Case(claims(10**9), "D", "dropped", "num-examples=1000000000: expected 1 to 1000000"),
    (9, "A"): Case(slows("B", answers_twice), "A", "ok", ""),
    (9, "D"): Case(long_error(MEGABYTE), "D", "missing", "Flower error 1: xxx"),
    (10, "A"): Case(forges("B", site="B"), "B", "dropped", "signature does not match"),
    (10, "D"): Case(long_error(100 * MEGABYTE), "D", "dropped", "its reply is too large"),
    (11, "A"): Case(announces, "A", "missing", "no reply within 45 s"),
    (11, "D"): Case(instructs("B", lambda asked: asked.message.content), "D", "ok", ""),
    (12, "A"): Case(long_reason(100 * MEGABYTE), "A", "dropped", "its reply is too large"),
    (12, "D"): Case(instructs("B", with_other_weights), "D", "ok", ""),
    (13, "A"): Case(addresses_the_superlink(upload=True), "A", "ok", ""),
    (13, "D"): Case(addresses_the_superlink(upload=False), "D", "ok", ""),
}
LAST = max(server_round for server_round, _ in CASES)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    federation = Federation(tmp_path_factory.mktemp("federation"), SITES)
    try:
        federation.enrol()
        federation.edit(
            "B", "[limits]\n", "[limits]\nmax-round-seconds = 10\nmax-local-epochs = 100000\n"
        )
        federation.start_superlink()
        federation.start_sites("B", "C")
        yield federation
    finally:
        federation.stop()


def submit(federation: Federation) -> None:
    """Start a run as ``flwr run`` does: flower-superlink's control interface asks nobody."""
    coordinator, fab = federation.coordinator(), build_fab()
    with Control(coordinator.superlink_address, coordinator.ca_file) as control:
        bundle = Fab(hashlib.sha256(fab).hexdigest(), fab, {})
        assert control.client.StartRun(StartRunRequest(fab=fab_to_proto(bundle))).run_id


@dataclass(frozen=True)
class Attacked:
    """A complete run through which A and D did all of CASES.

    Attributes:
        sites: The hostile ones.
        audit_of_b: What B had written into its log by the end of the run.
    """

    sites: Mapping[str, HostileSite]
    audit_of_b: list[dict[str, Any]]


@pytest.fixture(scope="module")
def attacked(federation: Federation) -> Iterator[Attacked]:
    sites = {name: HostileSite(federation, name) for name in HOSTILE}
    try:
        for name, site in sites.items():
            site.plan = {
                server_round: case.misdeed
                for (server_round, who), case in CASES.items()
                if who == name
            }
            federation.wait_for("superlink", "admitted=")
            site.start()
        submit(federation)
        federation.start_run(num_server_rounds=LAST, strategy__round_timeout_seconds=45)
        federation.end("run", timeout=400)
        yield Attacked(sites, federation.audit(federation.state("B")))
    finally:
        for site in sites.values():
            if not site.stopped:
                site.stop()


@pytest.mark.parametrize("where", CASES, ids=lambda where: f"{where[0]}{where[1]}")
def test_an_admitted_site_s_misdeed_is_refused_by_name(
    federation: Federation, attacked: Attacked, where: tuple[int, str]
) -> None:
    case = CASES[where]
    server_round = where[0]
    assert attacked.sites[where[1]].failures == []
    status = federation.outcomes()[server_round, case.site]
    reason = federation.reasons()[server_round, case.site]
    assert (status, case.reason in reason) == (case.status, True), reason
    assert len(reason) <= 200
    assert reason.isprintable()


def test_the_run_completes_with_the_honest_sites(
    federation: Federation, attacked: Attacked
) -> None:
    outcomes = federation.outcomes()
    forged = {server_round for (server_round, _), case in CASES.items() if case.site == "B"}
    for server_round in range(1, LAST + 1):
        assert outcomes[server_round, "C"] == "ok"
        assert outcomes[server_round, "B"] == ("dropped" if server_round in forged else "ok")
    summary = json.loads((federation.run_dir / "summary.json").read_text())
    assert set(summary["sites"]) == set(SITES)
    assert (federation.run_dir / "history.jsonl").stat().st_size < 100_000
    assert (federation.run_dir / "log.txt").stat().st_size < 100_000
    federation.call("server", "audit", "--verify")


def test_of_two_answers_the_first_counts_alone(federation: Federation, attacked: Attacked) -> None:
    lines = [line for line in federation.history() if line["type"] == "site"]
    [counted] = [
        line["num_examples"] for line in lines if (line["server_round"], line["site"]) == (9, "A")
    ]
    assert counted == 50


def trained_rounds(federation: Federation, site: str) -> list[str]:
    """Each time that a site trained, by its own log."""
    return re.findall(rf"^round=(\d+) site={site} loss=", federation.log(site), re.MULTILINE)


def test_a_site_follows_no_other_site(federation: Federation, attacked: Attacked) -> None:
    trained = trained_rounds(federation, "B")
    assert len(set(trained)) == len(trained), "no round twice"
    refused = [
        entry["fields"]["reason"]
        for entry in attacked.audit_of_b
        if entry["event"] == "answered" and entry["fields"]["status"] == "refused"
    ]
    assert refused == ["bad-instruction: signature does not match the signed content"]
    assert "site=B task=train answered again, not worked out again" in federation.log("B")


def test_a_node_key_opens_its_own_node_alone(federation: Federation, attacked: Attacked) -> None:
    own, other = attacked.sites["A"].node.node_id, federation.nodes()["B"]
    node = Node(node_id=other.node_id)
    new = public_key_to_bytes(ec.generate_private_key(ec.SECP384R1()).public_key())
    with fleet_client(federation, "A") as fleet:
        calls = {
            "pull its messages": lambda: fleet.PullMessages(PullMessagesRequest(node=node)),
            "take its place": lambda: fleet.ActivateNode(
                ActivateNodeRequest(public_key=other.public_key, heartbeat_interval=30)
            ),
            "end it": lambda: fleet.DeactivateNode(DeactivateNodeRequest(node_id=other.node_id)),
            "keep it online": lambda: fleet.SendNodeHeartbeat(
                SendNodeHeartbeatRequest(node=node, heartbeat_interval=30)
            ),
            "ask as it": lambda: fleet.GetRun(GetRunRequest(node=node, run_id=1)),
            "bring another": lambda: fleet.RegisterNode(RegisterNodeFleetRequest(public_key=new)),
            "remove it": lambda: fleet.UnregisterNode(
                UnregisterNodeFleetRequest(node_id=other.node_id)
            ),
        }
        found = {name: status_of(call) for name, call in calls.items()}
        assert found == dict.fromkeys(calls, UNAUTHORIZED)
        removed = status_of(lambda: fleet.UnregisterNode(UnregisterNodeFleetRequest(node_id=own)))
        assert removed >= 400, "not even itself: that is the coordinator's to say"
    assert federation.nodes()["B"].online
    assert set(federation.nodes()) == set(SITES)


# --- somebody on the coordinator's machine


def test_without_the_secret_nobody_hosts_a_run(federation: Federation, attacked: Attacked) -> None:
    coordinator = federation.coordinator()
    runtime = RuntimeHttpClient.from_server_address(
        coordinator.superlink_address,
        insecure=False,
        root_certificates=coordinator.ca_file.read_bytes(),
        interceptors=[],
    )
    with runtime:
        claim = AcquireTaskRequest(supported_task_types=[TaskType.SERVER_APP])
        assert status_of(lambda: runtime.AcquireTask(claim)) == UNAUTHORIZED
        assert status_of(lambda: runtime.GetNodes(GetNodesRequest())) == UNAUTHORIZED
        assert status_of(lambda: runtime.PushMessages(PushAppMessagesRequest())) == UNAUTHORIZED
    # What somebody had submitted before the honest run only stood in its way.
    assert federation.log("run").count("nobody hosts it; stopped") == 1


def serve_as_app(
    federation: Federation, contents: Mapping[str, tuple[str, RecordDict | Signed]]
) -> dict[str, Reply]:
    """Be a ServerApp of one's own: send contents in order; returns the signed answers.

    With the superlink's secret, so that nothing but the order key is left to protect the sites.

    Args:
        federation: Whose superlink it is.
        contents: By case, the site and what it is sent as an instruction to train; what has to be
            signed for the Flower run is made with its id.
    """
    coordinator = federation.coordinator()
    keys = coordinator.admitted()
    found: dict[str, Reply] = {}

    def main(grid: Grid, context: object) -> None:
        nodes = {node.name: node.node_id for node in grid.get_nodes()}
        messages = [
            Message(
                content if isinstance(content, RecordDict) else content(grid.run.run_id),
                nodes[site],
                "train",
                ttl=240.0 + grace_seconds(len(contents)),
                group_id="1",
            )
            for site, content in contents.values()
        ]
        waiting = dict(zip(grid.push_messages(messages), contents, strict=True))
        deadline = time.monotonic() + 200
        while waiting:
            assert time.monotonic() < deadline, f"no answer to {waiting}\n{federation.logs()}"
            for message in grid.pull_messages(list(waiting)):
                sent = message.metadata.reply_to_message_id
                case = waiting.pop(sent)
                assert not message.has_error(), f"{case}: {message.error}"
                found[case] = Reply.from_content(message.content, keys)
                assert (found[case].site, found[case].message_id) == (contents[case][0], sent)
            time.sleep(0.2)

    host_run(
        address=coordinator.superlink_address,
        ca_file=coordinator.ca_file,
        secret_file=coordinator.secret_file,
        run=RunConfig(),
        main=main,
    )
    return found


class Orders:
    """Orders like the honest run's, each issued after the one before.

    Args:
        recorded: An instruction of the honest run.
        key: Signs orders and instructions.
    """

    def __init__(self, recorded: Instruction, key: Ed25519PrivateKey) -> None:
        self.recorded, self.key = recorded, key
        self.issued_ms = time.time_ns() // 1_000_000

    def content(self, settings: Mapping[str, Any] | None = None, **changes: Any) -> Signed:
        """An instruction to train round 1 of an order with other settings or other fields."""
        self.issued_ms += 1
        before = self.recorded.order.manifest
        manifest = before.model_copy(
            update={
                "run_uuid": uuid.uuid4().hex,
                "run_config": {**before.run_config, **(settings or {})},
                "issued_ms": self.issued_ms,
                "expires_ms": self.issued_ms + 3_600_000,
                **changes,
            }
        )
        # Not by Order.issue, which refuses settings that this version does not know.
        document = manifest.model_dump(mode="json")
        text, signature = canonical(document).decode(), sign(self.key, document)
        order = Order(manifest, self.recorded.order.run, text, signature)
        return signed_for_the_run(replace(self.recorded, order=order), self.key)


def signed_for_the_run(instruction: Instruction, key: Ed25519PrivateKey) -> Signed:
    """An instruction as the coordinator would sign it for a Flower run."""
    return lambda run_id: replace(instruction, flower_run=run_id).to_content(key)


def recorded_with(content: RecordDict, **changes: Any) -> RecordDict:
    """A recorded instruction with other values in its envelope or other arrays."""
    arrays = changes.pop("arrays", content.array_records["arrays"])
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    envelope = ConfigRecord({**content.config_records["envelope"], **named})
    return RecordDict({"arrays": arrays, "envelope": envelope})


FORGED = "bad-instruction: signature does not match the signed content"
RECORDED = "other-run: the instruction was recorded in another Flower run"
# By case, what the site answers. B is a hospital like any other, with max-round-seconds = 10; D
# requires differential privacy.
STRANGER = {
    "unsigned": "bad-instruction: record 'envelope' is missing",
    "signed by its own key": FORGED,
    "a genuine order, other weights": FORGED,
    "a genuine order, another round": FORGED,
    "a genuine order, its own instruction": FORGED,
    "the newest instruction, recorded": RECORDED,
    "an old instruction, recorded": RECORDED,
}
COORDINATOR = {
    "a path to read": "bad-order: unknown key data.file=/etc/shadow",
    "a path as data set": "other-dataset: dataset='/etc/shadow' is not what this site holds",
    "no privacy": "privacy-required: privacy.mode=off; this site requires differential privacy",
    "privacy as it likes": "bad-order: privacy.mode=",
    "more steps than allowed": "too-much-work: training.local-steps=1000000; limit 10000",
    "more time than allowed": "too-long: the work took longer than 10 s, this site's limit",
    "a cohort of one": "cohort-too-small: cohort=1; limit 2",
    "a cohort without the site": "not-in-cohort: the order does not name this site",
    "an order that has ended": "order-expired: ",
    "an order of tomorrow": "order-from-the-future: ",
    "another federation's": "other-federation: ",
    "an order of years": "bad-order: the order is for longer than a year",
}
# The first is asked before any of the orders above is followed, the second after.
OLD_ROUND = {"a round that is over": f"round-passed: round=1: the run is at {LAST} here"}
OLD_ORDER = {
    "an order that another has replaced": "order-superseded: this site follows a newer order"
}
ALL = {**STRANGER, **OLD_ROUND, **COORDINATOR, **OLD_ORDER}


@pytest.fixture(scope="module")
def answers(federation: Federation, attacked: Attacked) -> dict[str, Reply]:
    """What the sites answer to all of ALL."""
    attacked.sites["D"].stop()
    federation.edit("D", "require-privacy = false", "require-privacy = true")
    federation.start_sites("D")
    federation.wait_for("D", "connected")
    heard = attacked.sites["A"].heard
    stranger, recorded = Ed25519PrivateKey.generate(), unverified(heard[LAST])
    order_key = federation.coordinator().order_key
    own = Orders(recorded, stranger).content()
    theirs = own(0).config_records["envelope"]["signature"]
    contents: dict[str, RecordDict | Signed] = {
        "unsigned": RecordDict({"arrays": heard[LAST].array_records["arrays"]}),
        "signed by its own key": own,
        "a genuine order, other weights": recorded_with(
            heard[LAST], arrays=heard[1].array_records["arrays"]
        ),
        "a genuine order, another round": recorded_with(heard[LAST], server_round=1),
        "a genuine order, its own instruction": recorded_with(heard[LAST], signature=theirs),
        "the newest instruction, recorded": heard[LAST],
        "an old instruction, recorded": heard[1],
        "a round that is over": signed_for_the_run(unverified(heard[1]), order_key),
    }
    orders, day = Orders(recorded, order_key), 86_400_000
    contents |= {
        "a path to read": orders.content({"data.file": "/etc/shadow"}),
        "a path as data set": orders.content({"dataset": "/etc/shadow"}),
        "no privacy": orders.content({"privacy.mode": "off"}),
        "privacy as it likes": orders.content({"privacy.mode": "weak"}),
        "more steps than allowed": orders.content({"training.local-steps": 1_000_000}),
        "more time than allowed": orders.content({"training.local-steps": 10_000}),
        "a cohort of one": orders.content(cohort=("B",)),
        "a cohort without the site": orders.content(cohort=("A", "C", "D")),
        "an order that has ended": orders.content(expires_ms=orders.issued_ms),
        "an order of tomorrow": orders.content(
            issued_ms=orders.issued_ms + day, expires_ms=orders.issued_ms + 2 * day
        ),
        "another federation's": orders.content(federation="other-0000"),
        "an order of years": orders.content(expires_ms=orders.issued_ms + 400 * day),
        "an order that another has replaced": signed_for_the_run(recorded, order_key),
    }
    return serve_as_app(
        federation,
        {case: ("D" if case == "no privacy" else "B", sent) for case, sent in contents.items()},
    )


@pytest.mark.parametrize("case", ALL)
def test_without_the_order_key_or_beyond_a_site_s_limits_nothing_is_done(
    federation: Federation, answers: dict[str, Reply], case: str
) -> None:
    reply = answers[case]
    assert (reply.status, reply.update, dict(reply.metrics)) == ("refused", {}, {})
    assert reply.reason.startswith(ALL[case]), reply.reason
    audited = [
        entry["fields"]["reason"]
        for entry in federation.audit(federation.state(reply.site))
        if entry["event"] == "answered" and entry["fields"]["status"] == "refused"
    ]
    assert reply.reason in audited


def test_nobody_trained_for_them(federation: Federation, answers: dict[str, Reply]) -> None:
    assert len(answers) == len(ALL)
    trained = trained_rounds(federation, "B")
    assert len(set(trained)) == len(trained) <= LAST
    assert trained_rounds(federation, "D") == []
    for site in ("B", "D"):
        AuditLog(federation.state(site) / "audit.jsonl").verify()
        assert federation.processes[site].poll() is None
