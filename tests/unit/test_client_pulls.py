"""An instruction that never comes whole holds the site only while its run lasts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError

from client import flower_runtime

REQUEST = PullObjectRequest(node=Node(node_id=7), run_id=3, object_id="weights")
MISSING = PullObjectResponse(object_found=True, object_available=False)
WHOLE = PullObjectResponse(object_found=True, object_available=True, object_content=b"w")


class Watch:
    """Knows whether the run is over, and what it was asked."""

    def __init__(self, reason: str = "") -> None:
        self.reason, self.asked = reason, []

    def over(self, request) -> str:
        self.asked.append((request.node.node_id, request.run_id))
        return self.reason


def pulling(response: PullObjectResponse, watch: Watch):
    client = SimpleNamespace(PullObject=lambda request: response)
    flower_runtime._give_up_with_the_run(client, watch)
    return client.PullObject


@pytest.fixture
def at_once(monkeypatch):
    monkeypatch.setattr(flower_runtime, "WATCH_SECONDS", 0)


def test_a_run_that_is_over_ends_the_wait_for_its_pieces(at_once):
    watch = Watch("the coordinator ended the run")
    with pytest.raises(ObjectPullError, match="the coordinator ended the run"):
        pulling(MISSING, watch)(REQUEST)
    assert watch.asked == [(7, 3)]


def test_a_run_that_goes_on_is_waited_for(at_once):
    watch = Watch()
    assert pulling(MISSING, watch)(REQUEST) == MISSING
    assert watch.asked == [(7, 3)]


def test_nobody_is_asked_about_pieces_that_are_there_or_late_by_seconds(at_once, monkeypatch):
    watch = Watch("over")
    assert pulling(WHOLE, watch)(REQUEST) == WHOLE
    monkeypatch.setattr(flower_runtime, "WATCH_SECONDS", 60)
    assert pulling(MISSING, watch)(REQUEST) == MISSING
    assert watch.asked == []
