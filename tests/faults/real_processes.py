"""Faults of real processes: one enrolled federation for all of them, and what their tests ask.

The tests injure it one after another; each begins with everything up, and after one that failed
with a new federation. What they compare with is one run of the same settings that nothing happened
to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from fakes.experiments import model_bytes, untimed
from fakes.federations import Federation, federation_in, wait_until
from strategies.audit import AuditLog

# Long enough for a kill to hit the training of a round; the same weights on every run.
SETTINGS: dict[str, Any] = {
    "num_server_rounds": 2,
    "training__local_steps": 150,
    "training__batch_size": 4,
    "strategy__min_sites": 3,
}

PASSED = pytest.StashKey[bool]()  # whether a test's own part has passed

SLOW_LINE = 5_000  # bytes a second: an instruction takes ten seconds and more


class Hospitals:
    """The federation that the tests share, made when the first one asks, and anew after a failure.

    A test that failed may have left anything, in a site's files too; the next one begins without.
    """

    def __init__(self, make: Callable[[], AbstractContextManager[Federation]]) -> None:
        self._make = make
        self._open = ExitStack()
        self._federation: Federation | None = None
        self._whole: Path | None = None

    def get(self) -> Federation:
        if self._federation is None:
            self._federation = self._open.enter_context(self._make())
        return self._federation

    def whole(self) -> Path:
        """Return the directory of a run with ``SETTINGS`` that nothing happened to; made once."""
        if self._whole is None:
            federation = self.get()
            federation.begin("runs/whole")
            federation.start_run(**SETTINGS)
            federation.end("run")
            self._whole = federation.run_dir
        return self._whole

    def give_up(self) -> None:
        """End it, and leave its files to be looked at."""
        self._federation = None
        self._open.close()


@pytest.fixture(scope="session")
def hospitals(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hospitals]:
    """A coordinator and the sites A, B and C; C has the most images, and a line of its own."""

    @contextmanager
    def make() -> Iterator[Federation]:
        with federation_in(tmp_path_factory.mktemp("federation")) as federation:
            federation.edit("C", "patients-per-site = 8", "patients-per-site = 60")
            federation.link("C")
            for site in federation.sites:
                federation.edit(site, "[limits]\n", "[limits]\nmax-local-epochs = 10000\n")
            yield federation

    hospitals = Hospitals(make)
    yield hospitals
    hospitals.give_up()


@pytest.fixture
def whole(hospitals: Hospitals) -> Path:
    """The directory of a run with ``SETTINGS`` that nothing happened to."""
    return hospitals.whole()


@pytest.fixture
def federation(hospitals: Hospitals, request: pytest.FixtureRequest) -> Iterator[Federation]:
    """The federation with everything up and a new run's name."""
    try:
        if "whole" in request.fixturenames:
            hospitals.whole()
        federation = hospitals.get()
        federation.begin(f"runs/{request.node.name}")
        yield federation
    finally:
        if not request.node.stash.get(PASSED, False):
            hospitals.give_up()


def wait_until_asked(federation: Federation, site: str, server_round: int, times: int = 1) -> None:
    """Wait until a site has been asked so often to train in a round of this run."""
    wait_until(
        lambda: len(asked(federation, site, server_round)) >= times,
        f"site={site} is asked to train in round={server_round}",
        federation.logs,
    )


def asked(federation: Federation, site: str, server_round: int) -> list[dict[str, Any]]:
    """Instructions to train that a site has received in this run; written before it works."""
    state = federation.state(site)
    return federation.decisions(state, "received", task="train", server_round=server_round)


def answered(federation: Federation, site: str, server_round: int) -> list[dict[str, Any]]:
    """What a site has answered to them; written before it sends."""
    state = federation.state(site)
    return federation.decisions(state, "answered", task="train", server_round=server_round)


def wait_until_arrived(federation: Federation, site: str, server_round: int) -> None:
    """Wait until the coordinator has taken a site's update of a round."""
    wait_until(
        lambda: bool(
            federation.decisions(
                federation.server_state, "outcome", task="train", site=site,
                server_round=server_round, status="ok",
            )
        ),
        f"the update of site={site} in round={server_round} arrives",
        federation.logs,
    )  # fmt: skip


def wait_until_back(
    federation: Federation, site: str, server_round: int, seconds: float = 120
) -> None:
    """Wait until a site has contributed to a round, from this one on."""
    wait_until(
        lambda: any(
            who == site and n >= server_round and status == "ok"
            for (n, who), status in federation.outcomes().items()
        ),
        f"site={site} contributes again",
        federation.logs,
        seconds,
    )


def fetched(federation: Federation, site: str) -> int:
    """How many instructions to train a site's node has begun to fetch."""
    return (federation.state(site) / "supernode.log").read_text().count("Receiving: train")


def trained(federation: Federation, site: str, server_round: int) -> int:
    """How often a site has trained to the end in a round of this test."""
    return federation.log(site).count(f"round={server_round} site={site} loss=")


def repeated(federation: Federation, site: str, server_round: int) -> int:
    """How often a site has sent what it had kept of a round in this test."""
    said = f"round={server_round} site={site} task=train answered again, not worked out again"
    return federation.log(site).count(said)


def require_equal(federation: Federation, whole: Path) -> None:
    """Require that a run came to the same as the one that nothing happened to."""
    assert model_bytes(federation.run_dir) == model_bytes(whole)
    expected = _without_code(federation.history(whole))
    assert _without_code(federation.history()) == expected
    for site in federation.sites:
        for server_round in range(1, SETTINGS["num_server_rounds"] + 1):
            assert trained(federation, site, server_round) == 1, f"{site} in round {server_round}"


def require_intact_logs(federation: Federation) -> None:
    """Require that every audit log verifies."""
    for state in (federation.server_state, *map(federation.state, federation.sites)):
        AuditLog(state / "audit.jsonl").verify()


def _without_code(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out times, and which code answered: a developer may save a file between two runs."""
    return [{**entry, "code_sha256": ""} for entry in untimed(entries)]
