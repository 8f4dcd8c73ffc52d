"""The ClientApp: work is signed and audited, and an instruction is taken from its order alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from client import app as app_module
from client.data.manifest import ImageDataset
from fakes.benches import ORDER, changed, dataset, initial, instruction
from fakes.orders import order
from medmamba.model import MedMamba
from medmamba.scan import active_backend
from medmamba.weights import to_arrays
from strategies.arrays import Arrays, hash_arrays, num_bytes
from strategies.code import code_sha256, version
from strategies.errors import DataError, ProtocolError
from strategies.evaluation import EvaluationSums
from strategies.identity import create_signing_key
from strategies.records import Reply


@pytest.fixture(scope="module")
def weights() -> Arrays:
    return initial()


@pytest.fixture
def no_work(monkeypatch):
    """Whatever computes on the site's data fails the test."""
    for name in ("train", "evaluate"):
        monkeypatch.setattr(app_module, name, lambda *_, name=name: pytest.fail(f"{name}: worked"))


# --- work


def test_training_answers_with_a_signed_update_and_validation_sums(bench, weights):
    reply = bench.ask(instruction(weights))
    assert (reply.status, reply.reason, reply.site) == ("ok", "", "A")
    assert (reply.federation, reply.run_uuid) == ("lung-1a2b", "a1b2")
    assert reply.num_examples == 6
    assert reply.update.keys() == weights.keys()
    assert any(value.any() for value in reply.update.values())
    assert reply.number("num-steps") == 3
    assert reply.scan_backend == active_backend("cpu")
    assert (reply.code_sha256, reply.version) == (code_sha256(), version())
    sums = EvaluationSums.from_metrics("val", reply.metrics, 3)
    assert sums.num_examples == 3


@pytest.mark.parametrize(("task", "num_examples"), [("val", 3), ("test", 4)])
def test_evaluation_answers_with_sums_and_no_update(bench, weights, task, num_examples):
    reply = bench.ask(instruction(weights, task))
    assert reply.status == "ok"
    assert reply.update == {}
    assert reply.num_examples == num_examples
    assert EvaluationSums.from_metrics(task, reply.metrics, 3).num_examples == num_examples


def test_a_site_without_images_of_a_class_trains_with_finite_weights(bench):
    """The site's classes are a, b and c; the run has another order and one more."""
    run = changed(classes="c,more,b,a", model__num_classes=4)
    torch.manual_seed(1)
    start = to_arrays(MedMamba.from_name(run.model.size, **run.model.architecture))
    reply = bench.ask(instruction(start, order=order(run)))
    assert (reply.status, reply.num_examples) == ("ok", 6)
    assert all(np.isfinite(value).all() for value in reply.update.values())
    assert np.isfinite(reply.number("train-loss"))
    sums = EvaluationSums.from_metrics("val", reply.metrics, 4)
    assert sums.confusion.sum(axis=1).tolist() == [1, 0, 1, 1]


def test_names_of_classes_that_match_none_stay_at_the_site(bench, weights, caplog):
    run = changed(classes="a,c,zzz")
    reason = bench.refusal(instruction(weights, order=order(run)))
    assert reason == "other-classes: 1 of this site's 3 classes match none of the run's"
    assert "classes not mapped: b; the run has a, c, zzz" in caplog.text


def test_every_answer_is_audited_before_and_after(bench, weights):
    reply = bench.ask(instruction(weights))
    received, followed, answered = bench.audited()
    assert [e["event"] for e in (received, followed, answered)] == [
        "received",
        "order-followed",
        "answered",
    ]
    assert received["fields"] == {
        "run_uuid": "a1b2",
        "server_round": 1,
        "task": "train",
        "message_id": bench.message_ids[0],
        "order_sha256": ORDER.sha256,
        "weights_sha256": hash_arrays(weights),
    }
    assert answered["fields"] == {
        "run_uuid": "a1b2",
        "server_round": 1,
        "task": "train",
        "status": "ok",
        "reason": "",
        "num_examples": 6,
        "bytes": num_bytes(reply.update),
        "epsilon": "unbounded",
        "arrays_sha256": hash_arrays(reply.update),
        "code_sha256": code_sha256(),
    }


def test_an_instruction_is_for_the_flower_run_that_carries_it(bench, weights, no_work):
    """Who can host a run of his own gets no answer to what he has recorded in another."""
    elsewhere = replace(instruction(weights), flower_run=2**64 - 1)
    assert bench.refusal(elsewhere) == (
        "other-run: the instruction was recorded in another Flower run"
    )


def test_a_model_that_cannot_take_the_sites_images_is_refused(bench, weights, no_work):
    bench.site.load = lambda: ImageDataset(dataset().manifest, np.zeros((13, 20, 20), np.uint8))
    small = order(changed(model__small_images="pad"), run_uuid="small")
    reason = bench.refusal(instruction(weights, order=small))
    assert reason == (
        "other-images: model.image-size=16 model.in-channels=1 model.small-images=pad do not fit "
        "this site's images"
    )


def test_the_test_split_is_read_for_one_model_of_a_run(bench, weights):
    other = {name: value + 1 for name, value in weights.items()}
    first = bench.ask(instruction(weights, "test"))
    assert bench.ask(instruction(weights, "test")).metrics == first.metrics
    assert bench.refusal(instruction(other, "test")).startswith("test-read-twice: ")
    assert bench.ask(instruction(other, "val")).status == "ok"


def test_another_key_does_not_pass_for_the_sites(bench, weights, tmp_path):
    stranger = create_signing_key(tmp_path / "other.key").public_key()
    message = bench.send(instruction(weights, "val"))
    with pytest.raises(Exception, match="signature does not match"):
        Reply.from_content(message.content, {"A": stranger})
    with pytest.raises(ProtocolError, match="not admitted"):
        Reply.from_content(message.content, {"B": bench.keys["A"]})


# --- what the order says, and nothing else


@pytest.mark.parametrize(
    "run_config",
    [
        {},
        {"model.sice": "tiny"},
        {"model.num-classes": 2},
        changed(training__local_steps=1, training__batch_size=1, seed=9).flatten(),
        {**changed().flatten(), "training.local-steps": 10**9, "dataset": "other"},
    ],
    ids=["none", "unknown", "classes", "other", "endless"],
)
def test_the_run_config_that_flower_brings_changes_nothing(make_bench, weights, run_config):
    """Whoever reaches Flower's control port can write it."""
    bench = make_bench(max_local_steps=3)
    bench.site.keep_results = False
    expected = bench.ask(instruction(weights))
    found = bench.ask(instruction(weights), run_config=run_config)
    assert found.status == "ok"
    assert hash_arrays(found.update) == hash_arrays(expected.update)
    assert found.number("num-steps") == 3


def test_another_order_trains_by_its_own_settings(bench, weights):
    longer = order(changed(training__local_steps=5), run_uuid="other")
    assert bench.ask(instruction(weights, order=longer)).number("num-steps") == 5
    assert ORDER.run.training.local_steps == 3


# --- refusals


def test_a_refusal_is_signed_and_carries_code_and_reason_alone(make_bench, weights):
    bench = make_bench(max_local_steps=2)
    reply = bench.ask(instruction(weights))
    assert reply.status == "refused"
    assert reply.reason == "too-much-work: training.local-steps=3; limit 2"
    assert (reply.update, reply.metrics, reply.num_examples) == ({}, {}, 0)
    (answered,) = bench.audited("answered")
    assert answered["fields"]["status"] == "refused"
    assert answered["fields"]["reason"] == reply.reason
    assert (answered["fields"]["bytes"], answered["fields"]["epsilon"]) == (0, "none")


@pytest.mark.usefixtures("no_work")
def test_a_refused_run_is_not_worked_for(make_bench, weights):
    strict = make_bench(require_privacy=True)
    for task in ("train", "val", "test"):
        assert strict.refusal(instruction(weights, task)).startswith("privacy-required: ")


@pytest.mark.usefixtures("no_work")
def test_a_run_whose_scan_backend_is_missing_is_refused(bench, weights, monkeypatch):
    """Here another's kernels are missing because this site's environment asks for none there is."""
    monkeypatch.setenv("MEDMAMBA_SCAN_BACKEND", "no-such-kernel")
    assert bench.refusal(instruction(weights)) == (
        "scan-backend-missing: model.scan-backend=auto cannot run at this site"
    )


@pytest.mark.usefixtures("no_work")
def test_a_run_with_other_classes_is_refused(bench, weights):
    two = order(changed(model__num_classes=2))
    assert bench.refusal(instruction(weights, order=two)) == (
        "other-classes: model.num-classes=2; this site's data has 3"
    )


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(("task", "kind"), [("train", "evaluate"), ("val", "train")])
def test_a_task_in_the_wrong_kind_of_message_is_not_done(bench, weights, task, kind):
    assert bench.refusal(instruction(weights, task), kind=kind) == (
        f"bad-instruction: task={task} in a message of kind {kind}"
    )


def test_weights_of_another_architecture_are_refused_with_both_shapes(bench, weights):
    wrong = {**weights, "head.weight": np.zeros((3, 99), np.float32)}
    for task in ("train", "val"):
        reason = bench.refusal(instruction(wrong, task))
        assert reason.startswith("other-architecture: ")
        assert "99" in reason


def test_images_that_were_not_readable_are_read_again_in_the_next_round(bench, weights):
    """A share that was away, a file that was changed: nobody has to start the site anew."""
    whole = bench.site.load

    def away():
        raise DataError("folder=/srv/mueller expected an existing folder", "mount it")

    bench.site.load = away
    bench.site.forget_data()
    assert bench.refusal(instruction(weights)) == (
        "no-data: the site's data cannot be read; see its log"
    )
    bench.site.load = whole
    assert bench.ask(instruction(weights)).status == "ok"
    bench.site.load = away
    assert bench.ask(instruction(weights)).status == "ok", "kept"
    bench.site.forget_data()
    assert bench.refusal(instruction(weights, "val")).startswith("no-data")


def test_a_gpu_without_enough_memory_is_a_refusal(bench, weights, monkeypatch):
    """The real exception: this machine has no GPU to fill."""

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (/srv/x)")

    with monkeypatch.context() as patch:
        patch.setattr(app_module, "train", full)
        assert bench.refusal(instruction(weights)) == (
            "out-of-memory: the GPU has too little memory for this run"
        )
    assert bench.ask(instruction(weights)).status == "ok"
