"""flower-superlink without sockets: what our side of a run asks of it, and how it fails.

It answers below Flower's own clients, so their retries, tokens and errors are the real ones.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from flwr.common.constant import Status, SubStatus
from flwr.proto import control_pb2, run_pb2, runtime_pb2, task_pb2
from flwr.proto.message_pb2 import Context
from flwr.supercore.constant import TASK_TOKEN_HEADER

CA_PEM = "ca.pem"


@dataclass
class FlowerRun:
    """One run, as flower-superlink keeps it; a run has one task, of the same number."""

    run_id: int
    status: str = Status.PENDING
    sub_status: str = ""
    details: str = ""

    @property
    def token(self) -> str:
        return f"token-{self.run_id}"

    def finish(self, sub_status: str, details: str = "") -> None:
        self.status, self.sub_status, self.details = Status.FINISHED, sub_status, details


@dataclass
class Superlink:
    """Answers the calls of a coordinator.

    Attributes:
        down: How many calls find nobody; -1: all.
        calls: Names of the calls that were answered, in order.
        executor_takes: Whether another executor is faster.
        on_call: Called with the name of each call before it is answered.
    """

    runs: dict[int, FlowerRun] = field(default_factory=dict)
    down: int = 0
    calls: list[str] = field(default_factory=list)
    executor_takes: bool = False
    refused: set[str] = field(default_factory=set)
    on_call: Callable[[str], None] = lambda name: None
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def add(self) -> FlowerRun:
        run = FlowerRun(next(self.numbers))
        self.runs[run.run_id] = run
        return run

    @property
    def last(self) -> FlowerRun:
        return self.runs[max(self.runs)]

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have every client of Flower in this process talk to this object."""
        client = httpx.Client

        def without_sockets(*, verify, timeout, follow_redirects):
            return client(transport=httpx.MockTransport(self.answer), timeout=timeout)

        monkeypatch.setattr("flwr.supercore.protobuf.client.httpx.Client", without_sockets)
        monkeypatch.setattr("ssl.SSLContext.load_verify_locations", lambda *a, **k: None)

    def answer(self, request: httpx.Request) -> httpx.Response:
        name = request.url.path.rpartition("/")[2]
        self.on_call(name)
        if self.down:
            self.down -= 1
            raise httpx.ConnectError("refused", request=request)
        if name in self.refused:
            return httpx.Response(500)
        token = request.headers.get(TASK_TOKEN_HEADER)
        run = next((run for run in self.runs.values() if run.token == token), None)
        if token is not None and (run is None or run.status == Status.FINISHED):
            return httpx.Response(401)
        self.calls.append(name)
        message = getattr(self, name.replace("-", "_"))(request.content, run)
        if message is None:
            return httpx.Response(404)
        return httpx.Response(200, content=message.SerializeToString())

    def start_run(self, content, run):
        return control_pb2.StartRunResponse(run_id=self.add().run_id)

    def stop_run(self, content, run):
        asked = control_pb2.StopRunRequest.FromString(content)
        self.runs[asked.run_id].finish(SubStatus.STOPPED)
        return control_pb2.StopRunResponse(success=True)

    def list_runs(self, content, run):
        found = self.runs.get(control_pb2.ListRunsRequest.FromString(content).run_id)
        if found is None:
            return None
        status = run_pb2.RunStatus(
            status=found.status, sub_status=found.sub_status, details=found.details
        )
        shown = run_pb2.Run(run_id=found.run_id, status=status)
        return control_pb2.ListRunsResponse(run_dict={found.run_id: shown})

    def acquire_task(self, content, run):
        for found in self.runs.values():
            if found.status == Status.PENDING:
                found.status = Status.STARTING
                if not self.executor_takes:
                    task = task_pb2.Task(task_id=found.run_id, run_id=found.run_id)
                    return runtime_pb2.AcquireTaskResponse(task=task, token=found.token)
        return runtime_pb2.AcquireTaskResponse()

    def pull_task_input(self, content, run):
        run.status = Status.RUNNING
        shown = run_pb2.Run(run_id=run.run_id)
        return runtime_pb2.PullTaskInputResponse(
            task_id=run.run_id, run=shown, context=Context(run_id=run.run_id, node_id=1)
        )

    def push_task_output(self, content, run):
        run.finish(runtime_pb2.PushTaskOutputRequest.FromString(content).sub_status)
        return runtime_pb2.PushTaskOutputResponse()

    def send_task_heartbeat(self, content, run):
        return runtime_pb2.SendTaskHeartbeatResponse(success=True)

    def get_nodes(self, content, run):
        return runtime_pb2.GetNodesResponse()
