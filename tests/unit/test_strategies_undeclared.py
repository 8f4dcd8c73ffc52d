"""What a signed reply brings beside what it declares is refused."""

from __future__ import annotations

import pytest

from fakes.sites import NODE_OF, Sites, by_site, signed, strategy, weights

pytestmark = pytest.mark.usefixtures("poll_often")

NOTHING = {"num_examples": 0, "update": {}, "metrics": {}}


@pytest.mark.parametrize(
    ("task", "changes", "reason"),
    [
        ("train", {"key_epoch": 7}, "key-epoch=7: expected 0"),
        ("train", {"reason": "no: x"}, "reason: expected none"),
        ("val", {"update": weights()}, "expected none, this is an evaluation"),
        ("train", {**NOTHING, "status": "refused", "num_examples": 3}, "its reason alone"),
        ("train", {**NOTHING, "status": "refused", "update": weights()}, "its reason alone"),
    ],
)
def test_undeclared_content_is_dropped_by_name(task, changes, reason):
    grid = Sites({"B": lambda site, message: signed(site, message, **changes)})
    rounds = strategy()
    if task == "train":
        _, outcomes = rounds.train(grid, NODE_OF, 1, weights())
    else:
        outcomes = rounds.evaluate(grid, NODE_OF, 1, weights(), task)
    outcome = by_site(outcomes)["B"]
    assert outcome.status == "dropped"
    assert reason in outcome.reason
