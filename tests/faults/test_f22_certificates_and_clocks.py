"""F22: certificates that have ended or are another's, a revoked site, clocks that are off."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import ActivateNodeRequest, PullMessagesRequest
from flwr.proto.node_pb2 import Node

from fakes.federations import Federation, wait_until
from fakes.hostile_site import fleet_client, status_of
from server import certificates
from server.certificates import SERVER_LIFE, issue_server_certificate
from server.federation import Federation as Coordinator

pytestmark = pytest.mark.timeout(600)

NEW = SERVER_LIFE - certificates.BACKDATED
COMPILER = shutil.which("cc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler is installed")


@pytest.fixture(scope="module")
def enrolled(tmp_path_factory: pytest.TempPathFactory) -> Federation:
    """Three sites and a coordinator whose authority is older than a server certificate lives."""
    federation = Federation(tmp_path_factory.mktemp("certificates"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(certificates, "BACKDATED", SERVER_LIFE + timedelta(days=100))
        Coordinator.create(
            federation.server_state,
            name="lung",
            address=f"127.0.0.1:{federation.port}",
            port=federation.port,
        )
    for site in federation.sites:
        federation.enrol_site(site)
    return federation


@pytest.fixture
def federation(enrolled: Federation, request: pytest.FixtureRequest) -> Iterator[Federation]:
    """Nothing running, every file as it was when the sites had just been enrolled."""
    pristine = enrolled.folder.with_name(f"{enrolled.folder.name}.pristine")
    if not pristine.exists():
        shutil.copytree(enrolled.folder, pristine)
    enrolled.run = f"runs/{request.node.name}"
    issue(enrolled, valid=NEW)
    yield enrolled
    enrolled.stop()
    enrolled.processes.clear()
    shutil.rmtree(enrolled.folder)
    shutil.copytree(pristine, enrolled.folder)


def issue(federation: Federation, valid: timedelta) -> None:
    """Issue a server certificate that is good for so long from now; negative: that has ended."""
    coordinator = federation.coordinator()
    now = datetime.now(UTC) + valid - NEW
    issue_server_certificate(coordinator.state_dir, coordinator.id, coordinator.identity.hosts, now)


@pytest.fixture(scope="module")
def wrong_clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a process preloads to have a clock that is off."""
    library = tmp_path_factory.mktemp("clock") / "clock.so"
    source = Path(__file__).with_name("clock.c")
    subprocess.run(
        [str(COMPILER), "-shared", "-fPIC", "-O2", "-o", str(library), str(source)], check=True
    )
    return library


@contextmanager
def clock(federation: Federation, library: Path, minutes: int) -> Iterator[None]:
    """Start processes whose clock is off."""
    before = federation.environment
    federation.environment = {
        **before,
        "LD_PRELOAD": str(library),
        "CLOCK_OFFSET": str(60 * minutes),
    }
    try:
        yield
    finally:
        federation.environment = before


def start_by_hand(federation: Federation, command: str) -> None:
    """Start the superlink by a command line of ``superlink --print``."""
    with (federation.folder / "superlink.log").open("ab") as log:
        federation.processes["superlink"] = subprocess.Popen(
            ["bash", "-c", f"exec {command}"],
            cwd=federation.folder,
            env=federation.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    wait_until(federation.superlink_answers, "the superlink answers", federation.logs)


def lines(text: str, start: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith(start)]


@pytest.mark.fault(
    "F22",
    fault="An expired, unknown or revoked certificate or key, or a clock that is minutes off",
    injection="a server certificate that has ended, or ends in 20 days, or is another authority's; "
    "a site that is revoked while a run goes on; sites whose clocks are 2 and 10 minutes "
    "off",
    promise="the coordinator's commands and the sites refuse with the plain reason and what to do, "
    "and none hangs; 30 days before the end they warn; nothing of a revoked site counts from then "
    "on and its node says so; 2 minutes do not matter, 10 are named",
)
def test_who_has_an_expired_certificate_is_told_and_refused(federation: Federation) -> None:
    command = federation.call("server", "superlink", "--print").stdout
    issue(federation, valid=-timedelta(days=2))
    for words in (["server", "superlink"], federation.run_words()):
        said = federation.call(*words, code=2).stderr
        [error] = lines(said, "error: ")
        assert re.fullmatch(r"error: server\.pem expired on \S+ \S+ UTC: sites refuse it", error)
        [hint] = lines(said, "hint: ")
        assert "python -m server init --renew" in hint
    assert not federation.run_dir.exists()

    # One that was started before, and does not notice.
    start_by_hand(federation, command)
    said = federation.call("client", "--site", "A", code=1, timeout=90).stderr
    [error] = lines(said, "error: ")
    assert error.endswith(": its certificate is refused: certificate has expired")
    assert lines(said, "hint: ") == [
        "hint: the coordinator renews it: python -m server init --renew"
    ]
    said = federation.call("client", "check", "--site", "A", code=1).stdout
    [found] = lines(said, "FAIL     certificate")
    assert "expired; the coordinator renews it" in found

    federation.kill("superlink")
    federation.call("server", "init", "--renew")
    federation.start_superlink()
    federation.start_sites("A")
    federation.wait_for("A", "connected")


@pytest.mark.fault("F22")
def test_before_the_end_both_sides_are_warned(federation: Federation) -> None:
    issue(federation, valid=timedelta(days=20, hours=1))
    [warning] = lines(federation.call("server", "status").stderr, "warning: ")
    assert "server.pem expires on " in warning
    assert ", in 20 days; python -m server init --renew" in warning
    federation.start_superlink()
    assert "server.pem expires on " in federation.log("superlink")
    said = federation.call("client", "check", "--site", "A").stdout
    [warning] = lines(said, "warning  certificate")
    assert ", 20 days; the coordinator renews it: python -m server init --renew" in warning


@pytest.mark.fault("F22")
def test_another_authority_is_refused(federation: Federation) -> None:
    address, port = f"127.0.0.1:{federation.port}", str(federation.port)
    federation.call("server", "init", "--state-dir", "other", "--address", address, "--port", port)
    federation.start("superlink", "server", "superlink", "--state-dir", "other")
    wait_until(federation.superlink_answers, "the other superlink answers", federation.logs)

    said = federation.call("client", "--site", "A", code=2, timeout=90).stderr
    [error] = lines(said, "error: ")
    assert error.startswith(f"error: superlink={address}: its certificate is refused: ")
    [hint] = lines(said, "hint: ")
    assert "of another authority than the one joined" in hint
    said = federation.call("client", "check", "--site", "A", code=1).stdout
    [found] = lines(said, "FAIL     certificate")
    assert "of another authority than that of the federation joined" in found
    said = federation.call(*federation.run_words(), code=1).stderr
    [error] = lines(said, "error: ")
    assert error.startswith(f"error: {address} has no certificate of this federation")
    assert not federation.run_dir.exists()


@pytest.mark.fault("F22")
@needs_compiler
def test_a_revoked_site_is_out_and_told_so(federation: Federation, wrong_clock: Path) -> None:
    federation.start_superlink()
    federation.start_sites("A")
    with clock(federation, wrong_clock, -2):
        said = federation.call("client", "check", "--site", "B").stdout
        federation.start_sites("B")
    federation.start_sites("C")
    [warning] = lines(said, "warning  clock")
    assert re.search(r"1\d\d s behind the superlink's", warning)
    for site in federation.sites:
        federation.wait_for(site, "connected")
    node = Node(node_id=federation.nodes()["A"].node_id)
    key = federation.coordinator().sites()["A"].node_key
    federation.start_run(num_server_rounds=500)
    wait_until(lambda: (2, "C") in federation.outcomes(), "two rounds are over", federation.logs)
    assert [federation.outcomes()[2, site] for site in federation.sites] == ["ok"] * 3

    assert "unregistered node A" in federation.call("server", "revoke", "A").stdout
    asked = max(server_round for server_round, _ in federation.outcomes()) + 1
    with fleet_client(federation, "A") as fleet:
        pulled = status_of(lambda: fleet.PullMessages(PullMessagesRequest(node=node)))
        activated = status_of(
            lambda: fleet.ActivateNode(ActivateNodeRequest(public_key=key, heartbeat_interval=30))
        )
    assert pulled == 401
    assert activated >= 400
    wait_until(
        lambda: (asked + 2, "C") in federation.outcomes(), "the others go on", federation.logs
    )
    later = {key: status for key, status in federation.outcomes().items() if key[0] > asked}
    assert {site for _, site in later} == {"B", "C"}, "nobody asks A again"
    assert set(later.values()) == {"ok"}
    federation.wait_for(
        "A", "turned away (HTTP 401): revoked, unknown there, or this machine's clock"
    )
    federation.wait_for("A", "not admitted, revoked, or running elsewhere")
    assert "round=" not in federation.log("A").rpartition("turned away")[2]
    federation.terminate("run", 130)
    federation.call("server", "audit", "--verify")
    federation.call("client", "audit", "--site", "A", "--verify")


@pytest.mark.fault("F22")
@needs_compiler
@pytest.mark.parametrize(("minutes", "direction"), [(-10, "behind"), (10, "ahead of")])
def test_a_clock_that_is_off_is_named(
    federation: Federation, wrong_clock: Path, minutes: int, direction: str
) -> None:
    federation.start_superlink()
    with clock(federation, wrong_clock, minutes):
        said = federation.call("client", "check", "--site", "B", code=1).stdout
        federation.start_sites("B")
    [found] = lines(said, "FAIL     clock")
    assert re.search(rf"(59|60)\d s {direction} the superlink's; it refuses more than 300 s", found)
    assert "set the clock (NTP)" in found
    federation.wait_for("B", "this machine's clock is wrong")
    assert "connected" not in federation.log("B")
    assert not federation.nodes()["B"].online
    federation.processes["B"].terminate()
    federation.processes["B"].wait(30)
