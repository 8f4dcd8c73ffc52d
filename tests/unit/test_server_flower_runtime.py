"""A run is hosted to its end, whatever flower-superlink does, and a person can always end it."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time

import httpx
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, RecordDict
from flwr.common.constant import Status, SubStatus
from flwr.proto import message_pb2, runtime_pb2

from fakes.superlinks import Superlink
from server import flower_grid, flower_runs, flower_runtime
from server.flower_runtime import host_run
from strategies.errors import (
    ConfigError,
    FederationError,
    ProtocolError,
    QuorumError,
    StoppedError,
)
from strategies.run_config import RunConfig

RUN = RunConfig.parse({"num-server-rounds": 2, "strategy.wait-seconds": 5.0})


@pytest.fixture
def superlink(monkeypatch) -> Superlink:
    superlink = Superlink()
    superlink.install(monkeypatch)
    monkeypatch.setattr(flower_runtime, "build_fab", lambda: b"fab")
    for module, name in (
        (flower_runtime, "POLL_SECONDS"),
        (flower_runtime, "PAUSE_SECONDS"),
        (flower_grid, "RETRY_SECONDS"),
        (flower_grid, "MARGIN_SECONDS"),
        (flower_runs, "POLL_SECONDS"),
    ):
        monkeypatch.setattr(module, name, 0.001)
    return superlink


@pytest.fixture
def hosted(superlink, tmp_path):
    """Hosts a run whose ServerApp is the function given."""
    for name in ("ca.pem", "superlink.secret"):
        (tmp_path / name).write_bytes(b"x" * 32)

    def host(main) -> None:
        host_run(
            address="127.0.0.1:1",
            ca_file=tmp_path / "ca.pem",
            secret_file=tmp_path / "superlink.secret",
            run=RUN,
            main=main,
        )

    return host


def ask(grid) -> None:
    assert list(grid.get_node_ids()) == []


def test_a_run_is_submitted_executed_and_ended(superlink, hosted):
    configurations = []

    def main(grid, context):
        ask(grid)
        configurations.append(context.run_config)

    hosted(main)
    assert configurations == [RUN.flatten()]
    assert superlink.last.sub_status == SubStatus.COMPLETED
    wanted = ["start-run", "acquire-task", "pull-task-input", "get-nodes", "push-task-output"]
    assert [name for name in superlink.calls if name in wanted] == wanted
    assert "send-task-heartbeat" in superlink.calls


def test_a_reply_that_never_comes_whole_is_waited_for_as_long_as_a_reply(superlink, hosted):
    """Its site has announced it and sends nothing more."""
    asked = []

    def announced(content, run):
        metadata = message_pb2.Metadata(
            run_id=run.run_id, message_id="0" * 64, reply_to_message_id="1" * 64
        )
        return runtime_pb2.PullAppMessagesResponse(
            messages_list=[message_pb2.Message(metadata=metadata)],
            message_object_trees=[message_pb2.ObjectTree(object_id="0" * 64)],
        )

    def not_yet(content, run):
        asked.append(content)
        return message_pb2.PullObjectResponse(object_found=True, object_available=False)

    superlink.push_messages = lambda content, run: runtime_pb2.PushAppMessagesResponse(
        message_ids=["1" * 64]
    )
    superlink.pull_messages, superlink.pull_object = announced, not_yet
    received = []

    def main(grid) -> None:
        ttl = 0.5 + flower_grid.grace_seconds(1)
        grid.push_messages([Message(RecordDict(), 7, "train", ttl=ttl)])
        received.extend(grid.pull_messages(["1" * 64]))

    hosted(lambda grid, context: main(grid))
    assert received == [], "as if it had not been announced"
    assert len(asked) > 1, "until then it may come"


def test_a_reply_far_larger_than_its_instruction_is_not_fetched_whole(
    superlink, hosted, monkeypatch
):
    """A site may announce as much as it likes; this process must not hold it all."""
    monkeypatch.setattr(flower_grid, "REPLY_SPARE_BYTES", 100)
    array, most = Array(np.zeros(250, np.float32)), 40
    fetched = []

    def announced(content, run):
        metadata = message_pb2.Metadata(
            run_id=run.run_id, message_id="f" * 64, reply_to_message_id="1" * 64
        )
        pieces = [message_pb2.ObjectTree(object_id=f"{i:064d}") for i in range(most)]
        return runtime_pb2.PullAppMessagesResponse(
            messages_list=[message_pb2.Message(metadata=metadata)],
            message_object_trees=[message_pb2.ObjectTree(object_id="f" * 64, children=pieces)],
        )

    def piece(content, run):
        fetched.append(content)
        return message_pb2.PullObjectResponse(
            object_found=True, object_available=True, object_content=b"x" * len(array.data)
        )

    superlink.push_messages = lambda content, run: runtime_pb2.PushAppMessagesResponse(
        message_ids=["1" * 64]
    )
    superlink.pull_messages, superlink.pull_object = announced, piece
    counts = []

    def main(grid, context) -> None:
        instruction = RecordDict({"weights": ArrayRecord({"a": array})})
        grid.push_messages([Message(instruction, 7, "train", ttl=3600)])
        for _ in range(2):  # what one reply was too large by is not held against the next
            fetched.clear()
            with pytest.raises(ProtocolError, match=r"too large: expected at most \d+ bytes"):
                grid.pull_messages(["1" * 64])
            counts.append(len(fetched))

    hosted(main)
    assert all(2 < count < most for count in counts), counts


def reply_objects(count: int, named: int) -> message_pb2.ObjectTree:
    """A reply of so many objects, named so often in all."""
    names = [f"{place % count:064d}" for place in range(named)]
    return message_pb2.ObjectTree(
        object_id="f" * 64, children=[message_pb2.ObjectTree(object_id=name) for name in names]
    )


def test_a_reply_that_names_its_pieces_again_and_again_is_not_fetched_to_the_end(superlink, hosted):
    """A few kilobytes can name a million objects, and each takes a call."""
    fetched = []

    def announced(content, run):
        metadata = message_pb2.Metadata(
            run_id=run.run_id, message_id="f" * 64, reply_to_message_id="1" * 64
        )
        return runtime_pb2.PullAppMessagesResponse(
            messages_list=[message_pb2.Message(metadata=metadata)],
            message_object_trees=[reply_objects(count=2, named=5000)],
        )

    def piece(content, run):
        fetched.append(content)
        return message_pb2.PullObjectResponse(
            object_found=True, object_available=True, object_content=b"x"
        )

    superlink.pull_messages, superlink.pull_object = announced, piece

    def main(grid, context) -> None:
        with pytest.raises(ProtocolError, match="too large"):
            grid.pull_messages(["1" * 64])

    hosted(main)
    assert len(fetched) < 200


def test_what_a_site_sends_to_the_superlink_itself_is_not_taken_for_a_reply(superlink, hosted):
    """Flower hands it out with the next site's reply, which it would spoil."""
    asked = []

    def with_another(content, run):
        messages = [
            message_pb2.Message(
                metadata=message_pb2.Metadata(
                    run_id=run.run_id, message_id=name * 64, reply_to_message_id=replied
                )
            )
            for name, replied in (("a", ""), ("b", "2" * 64))
        ]
        return runtime_pb2.PullAppMessagesResponse(
            messages_list=messages, message_object_trees=[reply_objects(1, 1)] * 2
        )

    superlink.pull_messages = with_another
    superlink.pull_object = lambda content, run: asked.append(content)
    received = []
    hosted(lambda grid, context: received.extend(grid.pull_messages(["1" * 64])))
    assert (received, asked) == ([], [])


def test_a_superlink_that_was_never_there(superlink, hosted):
    superlink.down = -1
    with pytest.raises(FederationError, match=r"127\.0\.0\.1:1 does not answer") as caught:
        hosted(lambda grid, context: pytest.fail("executed"))
    assert caught.value.hint == "start it with `python -m server superlink`"


def test_a_short_outage_is_sat_out(superlink, hosted, caplog):
    caplog.set_level(logging.INFO)

    def main(grid, context):
        superlink.down = 3
        ask(grid)

    hosted(main)
    assert list(superlink.runs) == [1]
    assert caplog.text.count("flower-superlink does not answer (ConnectError)") >= 1
    assert "flower-superlink answers again after" in caplog.text


@pytest.mark.parametrize("renewed", [False, True])
def test_a_run_that_was_given_up_is_submitted_again(superlink, hosted, caplog, renewed):
    begun = []

    def main(grid, context):
        begun.append(context.run_id)
        if len(begun) == 1:
            superlink.last.finish(SubStatus.FAILED, "No heartbeat received from the task")
            if renewed:  # its database is gone, and with it the run
                superlink.runs.clear()
        ask(grid)

    hosted(main)
    assert begun == [1, 2]
    assert superlink.runs[2].sub_status == SubStatus.COMPLETED
    reason = "does not know it" if renewed else "No heartbeat received from the task"
    assert reason in caplog.text
    assert "flower_run_id=1 is lost" in caplog.text


def test_a_run_that_is_lost_again_and_again_is_not_submitted_for_ever(
    superlink, hosted, monkeypatch
):
    begun, pauses = [], []
    monkeypatch.setattr(flower_runtime, "PAUSE_SECONDS", 1000.0)
    sleep = time.sleep
    monkeypatch.setattr(
        time, "sleep", lambda s: pauses.append(s) if s >= 1000 else sleep(min(s, 0.001))
    )

    def main(grid, context):
        begun.append(context.run_id)
        superlink.last.finish(SubStatus.FAILED, "disk full")
        ask(grid)

    with pytest.raises(FederationError, match=r"lost the run 3 times .*disk full") as caught:
        hosted(main)
    assert begun == [1, 2, 3]
    assert pauses == [2000, 4000]
    assert "superlink` says why" in caught.value.hint  # how to resume, server/command.py adds


def test_a_superlink_that_stays_away_for_long_is_waited_for(superlink, hosted, caplog, monkeypatch):
    monkeypatch.setattr(flower_grid, "LEASE_SECONDS", 0.01)
    begun = []

    def main(grid, context):
        begun.append(context.run_id)
        if len(begun) == 1:
            superlink.runs[1].finish(SubStatus.FAILED)
            superlink.down = 200
        ask(grid)

    hosted(main)
    assert begun == [1, 2]
    assert "waiting up to 5 s for flower-superlink" in caplog.text
    # Asked for, a run that has ended loses its messages: no site begins what is left of it.
    second = superlink.calls.index("start-run", 1)
    assert superlink.calls[second - 1] == "list-runs"


def test_a_lease_is_waited_for_once_and_not_by_every_call(monkeypatch):
    monkeypatch.setattr(flower_grid, "LEASE_SECONDS", 0.05)
    monkeypatch.setattr(flower_grid, "RETRY_SECONDS", 0.001)
    retries, tries = flower_grid.run_retries(), []

    def call():
        tries.append(1)
        raise httpx.ConnectError("refused")

    for _ in range(2):
        with pytest.raises(httpx.ConnectError):
            retries.invoke(call)
        tries.append(0)
    assert tries[-3:] == [0, 1, 0]
    assert len(tries) > 4  # the first call did not give up at once


def test_the_wait_for_it_ends(superlink, hosted, monkeypatch):
    monkeypatch.setattr(flower_grid, "LEASE_SECONDS", 0.01)
    monkeypatch.setattr(flower_runs.time, "monotonic", ticking(flower_runs.time.monotonic))

    def main(grid, context):
        superlink.down = -1
        ask(grid)

    with pytest.raises(FederationError, match="does not answer"):
        hosted(main)


def ticking(monotonic):
    """A clock on which every look takes a second."""
    looks = iter(range(10**6))
    return lambda: monotonic() + next(looks)


def test_a_run_that_somebody_stopped_is_not_submitted_again(superlink, hosted):
    def main(grid, context):
        superlink.last.finish(SubStatus.STOPPED)
        ask(grid)

    with pytest.raises(StoppedError, match="stopped through flower-superlink") as caught:
        hosted(main)
    assert caught.value.exit_code == 130
    assert list(superlink.runs) == [1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_person_ends_the_run_and_flower_is_told(superlink, hosted, number, capfd):
    before = signal.getsignal(number)

    def main(grid, context):
        os.kill(os.getpid(), number)
        pytest.fail("went on")

    with pytest.raises(StoppedError, match="interrupted"):
        hosted(main)
    assert superlink.last.sub_status == SubStatus.STOPPED
    assert signal.getsignal(number) is before
    assert "once more leaves at once" in capfd.readouterr().err


def test_a_run_that_a_shell_started_in_the_background_can_be_interrupted(superlink, hosted):
    """It has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(StoppedError, match="interrupted"):
            hosted(lambda grid, context: os.kill(os.getpid(), signal.SIGINT))
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert superlink.last.sub_status == SubStatus.STOPPED


def test_under_nohup_a_run_outlives_its_terminal(superlink, hosted, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hosted(lambda grid, context: os.kill(os.getpid(), signal.SIGHUP))
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert superlink.last.sub_status == SubStatus.COMPLETED


def test_a_second_signal_leaves_at_once(superlink, hosted, monkeypatch):
    class LeftError(BaseException):
        """In place of the end of this process."""

    def leave(code):
        raise LeftError(code)

    monkeypatch.setattr(flower_runtime.os, "_exit", leave)

    def main(grid, context):
        try:
            os.kill(os.getpid(), signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(LeftError, match="130"):
        hosted(main)


def test_a_person_ends_the_wait_for_a_superlink(superlink, hosted, monkeypatch):
    def interrupt(name):
        if name == "list-runs" and superlink.down:
            os.kill(os.getpid(), signal.SIGINT)

    superlink.on_call = interrupt
    monkeypatch.setattr(flower_grid, "LEASE_SECONDS", 0.01)

    def main(grid, context):
        superlink.down = -1
        ask(grid)

    with pytest.raises(StoppedError, match="interrupted"):
        hosted(main)


def test_a_superlink_that_cannot_be_told_of_the_end_is_not_waited_for(superlink, hosted, caplog):
    def main(grid, context):
        superlink.down = -1
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(StoppedError):
        hosted(main)
    assert "flower-superlink was not told of its end (ConnectError)" in caplog.text


def test_a_failure_of_the_run_ends_it_at_flower_too(superlink, hosted):
    def main(grid, context):
        raise QuorumError("too few")

    with pytest.raises(QuorumError, match="too few"):
        hosted(main)
    assert superlink.last.status == Status.FINISHED


def test_the_end_of_a_complete_run_needs_no_superlink(superlink, hosted, monkeypatch, caplog):
    monkeypatch.setattr(flower_runtime, "GOODBYE_SECONDS", 0.01)

    def main(grid, context):
        superlink.down = -1

    hosted(main)
    assert "did not take note of the end" in caplog.text


def test_nothing_here_sends_a_signal(superlink, hosted, monkeypatch):
    """Flower's own retries answer a refused token with SIGINT, its heartbeat too."""
    monkeypatch.setattr(os, "kill", lambda *words: pytest.fail("signal"))
    monkeypatch.setattr(signal, "raise_signal", lambda *words: pytest.fail("signal"))
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)

    def main(grid, context):
        superlink.last.finish(SubStatus.STOPPED)
        ask(grid)

    with pytest.raises(StoppedError):
        hosted(main)
    assert failed == []


def test_a_run_that_nobody_hosts_does_not_stand_before_ours(superlink, hosted, caplog):
    superlink.add()
    hosted(lambda grid, context: ask(grid))
    assert [run.sub_status for run in superlink.runs.values()] == ["stopped", "completed"]
    assert "flower_run_id=1: nobody hosts it" in caplog.text


def test_an_executor_that_takes_the_run_is_named(superlink, hosted):
    superlink.executor_takes = True
    with pytest.raises(FederationError, match="another executor took the run") as caught:
        hosted(lambda grid, context: pytest.fail("executed"))
    assert "flwr run" in caught.value.hint
    assert superlink.last.sub_status == SubStatus.STOPPED


def test_a_superlink_that_hands_out_nothing(superlink, hosted, monkeypatch):
    monkeypatch.setattr(flower_runtime, "CLAIM_SECONDS", 0.0)
    with pytest.raises(FederationError, match="did not hand out the run within 0 s"):
        hosted(lambda grid, context: pytest.fail("executed"))
    assert superlink.last.sub_status == SubStatus.STOPPED


def test_a_superlink_that_refuses_the_run(superlink, hosted):
    superlink.refused = {"start-run"}
    with pytest.raises(FederationError, match="answered HTTP 500") as caught:
        hosted(lambda grid, context: pytest.fail("executed"))
    assert "--state-dir" in caught.value.hint


def test_another_authoritys_certificate(superlink, hosted):
    def refuse(name):
        raise httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")

    superlink.on_call = refuse
    with pytest.raises(FederationError, match="has no certificate of this federation"):
        hosted(lambda grid, context: pytest.fail("executed"))


@pytest.mark.parametrize("name", ["ca.pem", "superlink.secret"])
def test_a_state_folder_without_its_files(hosted, tmp_path, name):
    (tmp_path / name).unlink()
    with pytest.raises(ConfigError, match=rf"{name} cannot be read"):
        hosted(lambda grid, context: pytest.fail("executed"))
