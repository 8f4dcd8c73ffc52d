"""A coordinator whose flower-superlink has gone ends with one line, in bounded time."""

from __future__ import annotations

from types import SimpleNamespace

import httpx
import pytest
from flwr.supercore.run import RunNotRunningException

from server import flower_runtime
from server.flower_runtime import GOODBYE_SECONDS, RECONNECT_SECONDS, _serve
from strategies.errors import FederationError
from strategies.run_config import RunConfig


@pytest.mark.parametrize("error", [httpx.ConnectError("refused"), RunNotRunningException()])
def test_a_superlink_that_has_gone_ends_the_run_in_a_line(monkeypatch, error):
    retries = SimpleNamespace(max_time=None)
    allowed = []

    def gone(request):
        allowed.append(retries.max_time)
        raise error

    client = SimpleNamespace(PullTaskInput=gone, PushTaskOutput=gone)
    grid = SimpleNamespace(_retry_invoker=retries, _runtime_client=client, close=lambda: None)
    idle = SimpleNamespace(start=lambda: None, stop=lambda: None)
    monkeypatch.setattr(flower_runtime, "HttpGrid", lambda *words, **options: grid)
    monkeypatch.setattr(flower_runtime, "HeartbeatSender", lambda function: idle)
    with pytest.raises(FederationError, match="stopped answering or ended the run") as caught:
        _serve("127.0.0.1:1", "token", RunConfig(), lambda grid, context: None)
    assert "--resume" in caught.value.hint
    assert allowed == [RECONNECT_SECONDS, GOODBYE_SECONDS]
