"""The ClientApp on the in-process Grid: work is signed, a failure leaves only its class name."""

from pathlib import Path
from typing import Any, NoReturn, cast

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict

from client import app as app_module
from client import site as site_module
from client.app import app
from client.data.manifest import SPLITS, Example, ImageDataset, Manifest
from client.site import SIGNING_KEY, Site, register
from client.site_config import SiteConfig
from medmamba.model import MedMamba
from medmamba.scan import active_backend
from medmamba.weights import to_arrays
from simulation.grid import LocalGrid
from strategies.arrays import Arrays
from strategies.errors import ProtocolError
from strategies.evaluation import EvaluationSums
from strategies.identity import create_signing_key
from strategies.records import ENVELOPE, Instruction, Reply
from strategies.run_config import RunConfig

SECRET = "/srv/hospital/patient-4711.dcm"
NODE = 7

RUN = RunConfig.parse(
    {
        "dataset": "made",
        "num-server-rounds": 3,
        "model.depths": "1,1",
        "model.dims": "8,16",
        "model.image-size": 16,
        "model.in-channels": 1,
        "training.batch-size": 4,
        "training.local-steps": 1,
    }
)


def dataset() -> ImageDataset:
    examples = tuple(
        Example(f"{split}-{i}", "made", i, i % 3, f"{split}-{i}", "A", split)
        for split, count in zip(SPLITS, (6, 3, 4), strict=True)
        for i in range(count)
    )
    images = np.random.default_rng(0).integers(0, 256, (13, 16, 16), dtype=np.uint8)
    return ImageDataset(Manifest("made", ("a", "b", "c"), examples), images)


class Bench:
    """One site behind a Grid, and what the server's end sees of it."""

    def __init__(self, state_dir: Path, **limits: Any) -> None:
        config = {
            "site": "A",
            "federation": "test",
            "state-dir": str(state_dir),
            "task": "made",
            "device": "cpu",
            "data": {},
            "limits": {
                "require-privacy": False,
                "require-encryption": False,
                "allowed-sizes": ["custom"],
                **limits,
            },
        }
        self.site = Site(SiteConfig.model_validate(config), dataset)
        self.keys = {"A": create_signing_key(state_dir / SIGNING_KEY).public_key()}
        self.site.audit.create()
        register(self.site)

    def send(
        self,
        content: Instruction | RecordDict,
        kind: str | None = None,
        run_config: dict[str, Any] | None = None,
        site: str = "A",
    ) -> Message:
        """Deliver one message and return what comes back."""
        grid = LocalGrid(app, {NODE: site}, RUN.flatten() if run_config is None else run_config)
        if isinstance(content, Instruction):
            kind = kind or ("train" if content.task == "train" else "evaluate")
            content = content.to_content()
        message = Message(content, NODE, cast(str, kind), ttl=60.0, group_id="1")
        message_ids = list(grid.push_messages([message]))
        (reply,) = grid.pull_messages(message_ids)
        assert reply.metadata.reply_to_message_id == message_ids[0]
        return reply

    def ask(self, content: Instruction, **options: Any) -> Reply:
        """Deliver one instruction and return the verified reply."""
        return Reply.from_content(self.send(content, **options).content, self.keys)

    def audited(self) -> list[str]:
        """The log's lines after the one that begins it."""
        self.site.audit.verify()
        return (self.site.config.state_dir / "audit.jsonl").read_text().splitlines()[1:]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(site_module, "_SITES", {})
    return Bench(tmp_path / "A")


@pytest.fixture(scope="module")
def weights() -> Arrays:
    torch.manual_seed(1)
    return to_arrays(MedMamba.from_name(RUN.model.size, **RUN.model.architecture))


def instruction(weights: Arrays, task="train", server_round: int = 1, **values) -> Instruction:
    return Instruction(
        **{
            "federation": "test",
            "run_uuid": "run-1",
            "server_round": server_round,
            "task": task,
            "weights": weights,
            **values,
        }
    )


def everything_sent(message: Message) -> str:
    """All that leaves the site, as text."""
    if message.has_error():
        return str(message.error.reason)
    return repr({name: record for name, record in message.content.items()})


def fail_with_a_path(*_: object) -> NoReturn:
    raise RuntimeError(f"cannot read {SECRET}")


# --- work


def test_training_answers_with_a_signed_update_and_validation_sums(bench, weights):
    reply = bench.ask(instruction(weights))
    assert (reply.status, reply.reason, reply.site) == ("ok", "", "A")
    assert reply.num_examples == 6
    assert reply.update.keys() == weights.keys()
    assert any(value.any() for value in reply.update.values())
    assert reply.number("num-steps") == 1
    assert reply.scan_backend == active_backend("cpu")
    sums = EvaluationSums.from_metrics("val", reply.metrics, 3)
    assert sums.num_examples == 3


@pytest.mark.parametrize(("task", "num_examples"), [("val", 3), ("test", 4)])
def test_evaluation_answers_with_sums_and_no_update(bench, weights, task, num_examples):
    reply = bench.ask(instruction(weights, task))
    assert reply.status == "ok"
    assert reply.update == {}
    assert reply.num_examples == num_examples
    assert EvaluationSums.from_metrics(task, reply.metrics, 3).num_examples == num_examples


def test_every_answer_is_audited_before_and_after(bench, weights):
    bench.ask(instruction(weights))
    received, answered = bench.audited()
    assert '"event":"received"' in received
    assert '"event":"answered"' in answered
    assert '"status":"ok"' in answered
    assert '"run_uuid":"run-1"' in received


def test_the_test_split_is_read_for_one_model_of_a_run(bench, weights):
    other = {name: value + 1 for name, value in weights.items()}
    first = bench.ask(instruction(weights, "test"))
    assert bench.ask(instruction(weights, "test")).metrics == first.metrics
    refused = bench.ask(instruction(other, "test"))
    assert refused.status == "refused"
    assert refused.reason.startswith("test-read-twice: ")
    assert bench.ask(instruction(other, "val")).status == "ok"


# --- refusals


def test_a_refusal_is_signed_and_carries_code_and_reason_alone(bench, weights):
    reply = bench.ask(instruction(weights, federation="another"))
    assert reply.status == "refused"
    assert reply.reason == "other-federation: federation='another' is not this site's"
    assert reply.update == {}
    assert reply.metrics == {}
    assert reply.num_examples == 0
    assert '"reason":"other-federation' in bench.audited()[-1]


def test_a_refused_run_is_not_trained(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(site_module, "_SITES", {})
    strict = Bench(tmp_path / "A", **{"require-privacy": True})
    monkeypatch.setattr(app_module, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(app_module, "evaluate", lambda *_: pytest.fail("evaluated"))
    for task in ("train", "val", "test"):
        reply = strict.ask(instruction(weights, task))
        assert reply.reason.startswith("privacy-required: ")


def test_a_run_whose_scan_backend_is_missing_is_refused(bench, weights, monkeypatch):
    """Here another's kernels are missing because this site's environment asks for none there is."""
    monkeypatch.setenv("MEDMAMBA_SCAN_BACKEND", "no-such-kernel")
    monkeypatch.setattr(app_module, "train", lambda *_: pytest.fail("trained"))
    reply = bench.ask(instruction(weights))
    assert reply.status == "refused"
    assert reply.reason == "scan-backend-missing: model.scan-backend=auto cannot run at this site"


def test_a_run_with_other_classes_is_refused(bench, weights):
    reply = bench.ask(
        instruction(weights), run_config=dict(RUN.flatten(), **{"model.num-classes": 2})
    )
    assert reply.reason == "other-classes: model.num-classes=2; this site's data has 3"


@pytest.mark.parametrize(("task", "kind"), [("train", "evaluate"), ("val", "train")])
def test_a_task_in_the_wrong_kind_of_message_is_not_done(bench, weights, task, kind):
    reply = bench.ask(instruction(weights, task), kind=kind)
    assert reply.status == "refused"
    assert reply.reason == "failed: ProtocolError, see the site's log"


# --- failures


@pytest.mark.parametrize("place", ["train", "evaluate", "check_run"])
def test_an_exception_leaves_only_its_class_name(bench, weights, monkeypatch, caplog, place):
    monkeypatch.setattr(app_module, place, fail_with_a_path)
    message = bench.send(instruction(weights))
    assert "4711" not in everything_sent(message)
    assert "srv" not in everything_sent(message)
    reply = Reply.from_content(message.content, bench.keys)
    assert reply.status == "refused"
    assert reply.reason == "failed: RuntimeError, see the site's log"
    assert SECRET in caplog.text  # the site's own log has it all
    assert "4711" not in "".join(bench.audited())


def test_data_that_cannot_be_read_leave_no_path(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(site_module, "_SITES", {})
    bench = Bench(tmp_path / "A")
    bench.site.load = fail_with_a_path
    message = bench.send(instruction(weights))
    assert "4711" not in everything_sent(message)
    assert Reply.from_content(message.content, bench.keys).status == "refused"


def test_a_run_configuration_that_is_wrong_is_refused(bench, weights):
    wrong = dict(RUN.flatten(), **{"model.sice": "tiny"})
    reply = bench.ask(instruction(weights), run_config=wrong)
    assert reply.reason == "failed: ConfigError, see the site's log"


def test_a_site_that_cannot_write_its_log_does_not_train(bench, weights, monkeypatch):
    monkeypatch.setattr(app_module, "train", lambda *_: pytest.fail("trained"))
    monkeypatch.setattr(app_module, "evaluate", lambda *_: pytest.fail("evaluated"))
    path = bench.site.config.state_dir / "audit.jsonl"
    path.unlink()
    path.mkdir()
    message = bench.send(instruction(weights))
    assert message.has_error()
    assert message.error.reason == "site=A cannot answer: IsADirectoryError"


def test_a_site_whose_log_is_gone_does_not_train(bench, weights, monkeypatch):
    monkeypatch.setattr(app_module, "train", lambda *_: pytest.fail("trained"))
    (bench.site.config.state_dir / "audit.jsonl").unlink()
    message = bench.send(instruction(weights))
    assert message.error.reason == "site=A cannot answer: FederationError"


def test_a_site_whose_log_was_tampered_with_does_not_train(bench, weights, monkeypatch):
    bench.ask(instruction(weights, "val"))
    path = bench.site.config.state_dir / "audit.jsonl"
    path.write_text(path.read_text().replace('"status":"ok"', '"status":"no"'))
    monkeypatch.setattr(app_module, "train", lambda *_: pytest.fail("trained"))
    message = bench.send(instruction(weights))
    assert message.error.reason == "site=A cannot answer: FederationError"


def test_no_answer_leaves_when_it_cannot_be_audited(bench, weights, monkeypatch):
    """Trained, then the disk is full: the update stays at the site."""

    def full(*_: object, **fields: object) -> str:
        if "status" in fields:
            raise OSError(28, "No space left on device", SECRET)
        return ""

    monkeypatch.setattr(bench.site.audit, "append", full)
    message = bench.send(instruction(weights))
    assert message.error.reason == "site=A cannot answer: OSError"


def test_an_instruction_that_is_not_ours_is_answered_by_an_error_alone(bench, weights):
    content = instruction(weights).to_content()
    content.config_records[ENVELOPE]["schema-version"] = 99
    message = bench.send(content, kind="train")
    assert message.error.reason == "site=A cannot answer: ProtocolError"
    assert bench.audited() == []


@pytest.mark.parametrize("name", ["B", ""])
def test_a_node_that_names_no_site_of_this_process_does_nothing(bench, weights, name, monkeypatch):
    monkeypatch.setattr(app_module, "train", lambda *_: pytest.fail("trained"))
    message = bench.send(instruction(weights), site=name)
    assert message.error.reason == f"site={name} is not configured in this process"


def test_another_key_does_not_pass_for_the_sites(bench, weights, tmp_path):
    stranger = create_signing_key(tmp_path / "other.key").public_key()
    message = bench.send(instruction(weights, federation="another"))
    with pytest.raises(Exception, match="signature does not match"):
        Reply.from_content(message.content, {"A": stranger})
    with pytest.raises(ProtocolError, match="not admitted"):
        Reply.from_content(message.content, {"B": bench.keys["A"]})
