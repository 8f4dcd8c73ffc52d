"""F25: many sites and a big model in the coordinator's memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("aggregating_server.py")
FEW, MANY = 2, 16
# Kept answers would be one model each, or more.
ALLOWANCE = 5


@pytest.fixture
def server_with(environment):
    """Have one round in a process of its own; returns what it printed."""

    def _server(num_sites: int) -> dict[str, int]:
        ended = subprocess.run(
            [sys.executable, SCRIPT, str(num_sites)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        return json.loads(ended.stdout)

    return _server


@pytest.mark.timeout(600)
@pytest.mark.fault(
    "F25",
    fault="Many sites and a big model at one server",
    injection=f"{MANY} sites answer with updates of the tiny model, 58 MB each, in a process whose "
    "memory is measured",
    promise="updates are checked and added one at a time: the highest memory does not grow with "
    "the number of sites",
)
def test_the_servers_memory_does_not_grow_with_the_sites(server_with):
    few, many = server_with(FEW), server_with(MANY)
    assert few["model"] == many["model"] > 50e6
    growth = (many["peak"] - few["peak"]) / many["model"]
    assert growth < ALLOWANCE < MANY - FEW
    # Not because the few took as much as the many would: weights, sums, one answer in three forms.
    assert (few["peak"] - few["before"]) / few["model"] < 14
