"""F15: a large model on a slow line: heartbeats have to get through beside its pieces."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from typing import Any

import pytest
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL

from fakes.federations import Federation, wait_until
from faults.real_processes import SETTINGS, answered, asked, require_intact_logs, trained
from server.flower_control import Node

pytestmark = pytest.mark.timeout(600)

# 16 MB, of which one array alone is longer than a piece.
MODEL = {"model__depths": "1", "model__dims": "768"}
PIECE = 5 * 2**20
BYTES_PER_SECOND = 500_000


@pytest.mark.fault(
    "F15",
    fault="A large model on a slow line",
    injection="a proxy on one site's line lets 4 Mbit/s through, so that the weights take longer "
    "than the 30 s between two heartbeats, there and back longer than the node's lease (60 s)",
    promise="weights go in pieces of 5 MiB and heartbeats get through beside them: the site stays "
    "connected, its update counts, and nothing is sent or trained twice",
)
def test_a_transfer_that_takes_longer_than_a_lease_is_completed(federation: Federation) -> None:
    link, seen, pieces = federation.links["C"], list[Node](), set[int]()
    before, link.bytes_per_second = link.carried, BYTES_PER_SECOND
    settings: dict[str, Any] = {**SETTINGS, **MODEL, "num_server_rounds": 1}
    settings |= {"training__local_steps": 1, "strategy__round_timeout_seconds": 300}
    federation.start_run(**settings)

    def arrived() -> bool:
        seen.append(federation.nodes()["C"])
        pieces.add(longest_piece(federation))
        return (1, "C") in federation.outcomes()

    wait_until(arrived, "the update of C arrives", federation.logs, seconds=300)
    carried = link.carried - before
    link.heal()
    assert federation.outcomes() == {(1, site): "ok" for site in "ABC"}, federation.reasons()
    size = answered(federation, "C", 1)[0]["bytes"]
    assert size / BYTES_PER_SECOND > HEARTBEAT_DEFAULT_INTERVAL
    assert PIECE <= max(pieces) < 1.01 * PIECE
    assert all(node.online for node in seen), "its heartbeats get through"
    assert len({node.last_seen for node in seen}) > 2
    # There and back once; what is said around it is less than a tenth.
    assert 2 * size < carried < 2.2 * size
    assert len(asked(federation, "C", 1)) == trained(federation, "C", 1) == 1
    assert federation.end("run").count("submitted flower_run_id=") == 1
    assert "unreachable" not in federation.log("C")
    require_intact_logs(federation)


@pytest.mark.fault("F15")
def test_a_line_that_breaks_in_a_transfer_goes_on_with_what_is_missing(
    federation: Federation,
) -> None:
    link = federation.links["C"]
    # Slow enough to be met in the middle: two pieces travel at a time, then the third is alone.
    before, link.bytes_per_second = link.carried, 4 * BYTES_PER_SECOND
    settings: dict[str, Any] = {**SETTINGS, **MODEL, "num_server_rounds": 1}
    settings |= {"training__local_steps": 1, "strategy__round_timeout_seconds": 300}
    federation.start_run(**settings)
    wait_until(lambda: link.carried - before > 2.3 * PIECE, "the model travels", federation.logs)
    link.reset()
    wait_until(lambda: trained(federation, "C", 1) == 1, "C trains", federation.logs)
    middle = link.carried
    wait_until(lambda: link.carried - middle > 2.3 * PIECE, "the update travels", federation.logs)
    link.reset()
    wait_until(lambda: (1, "C") in federation.outcomes(), "the update arrives", federation.logs)
    carried = link.carried - before
    link.heal()

    assert federation.outcomes() == {(1, site): "ok" for site in "ABC"}, federation.reasons()
    size = answered(federation, "C", 1)[0]["bytes"]
    assert size > 3 * PIECE
    # Of each way at most the pieces that were under way are sent again, none that had arrived.
    assert 2 * size < carried < 2 * size + 3 * PIECE
    assert len(asked(federation, "C", 1)) == trained(federation, "C", 1) == 1
    assert federation.end("run").count("submitted flower_run_id=") == 1
    require_intact_logs(federation)


@pytest.mark.fault("F15")
def test_a_piece_of_which_the_receipt_is_lost_has_arrived(federation: Federation) -> None:
    """What the superlink has taken once it refuses; Flower's node then gives the reply up."""
    link = federation.links["C"]
    link.lost_receipts = 2
    federation.start_run(
        **{**SETTINGS, **MODEL, "num_server_rounds": 1, "training__local_steps": 1}
    )
    federation.end("run")
    assert link.lost_receipts == 0
    assert federation.outcomes() == {(1, site): "ok" for site in "ABC"}, federation.reasons()
    assert len(asked(federation, "C", 1)) == trained(federation, "C", 1) == 1
    require_intact_logs(federation)


def longest_piece(federation: Federation) -> int:
    """Return the length of the longest object that flower-superlink holds now."""
    path = federation.server_state / "superlink.sqlite"
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=30)) as database:
        (longest,) = database.execute("SELECT max(length(content)) FROM objects").fetchone()
    return longest or 0
