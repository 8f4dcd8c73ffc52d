"""F11: a site that needs longer than a round may last."""

from __future__ import annotations

import pytest

from fakes.experiments import make_scenario, model_bytes, site_line, start, statuses
from fakes.orders import unverified
from faults.in_process import GRID, Straggler, audited

DEADLINE = 10.0  # far more than the work takes, so that only the wait can miss it


@pytest.mark.fault(
    "F11",
    fault="A site is far slower than the others",
    injection="one site answers round 1 only when round 2 has begun",
    promise="the round ends at its deadline without that site; its late result counts nowhere, the "
    "missed round is in the history, and the next round has it again",
)
def test_a_straggler_costs_a_round_only_its_own_update(tmp_path, monkeypatch):
    def lost(site, message):
        asked = unverified(message.content)
        return "lose" if (site, asked.server_round, asked.task) == ("B", 1, "train") else "deliver"

    without = tmp_path / "without"
    start(without, make_scenario(), fault=lost)
    grids: list[Straggler] = []
    monkeypatch.setattr(GRID, lambda *a, **o: grids.append(Straggler(*a, **o)) or grids[0])
    path = tmp_path / "run"
    start(path, make_scenario(run__strategy__round_timeout_seconds=DEADLINE))

    assert statuses(path, "B") == ["missing", "ok"]
    assert site_line(path, 1, "B")["reason"] == f"no reply within {DEADLINE:g} s"
    assert statuses(path, "A") == statuses(path, "C") == ["ok", "ok"]
    # B worked on both rounds; its answer to the first is still where it arrived, and counts not.
    answers = audited(path / "sites" / "B" / "audit.jsonl", "answered")
    assert [a["server_round"] for a in answers if a["task"] == "train"] == [1, 2]
    assert len(grids[0].late) == 1
    assert model_bytes(path) == model_bytes(without)
