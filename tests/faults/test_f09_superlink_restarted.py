"""F9: flower-superlink is gone for a moment, or for longer than Flower keeps a run."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from flwr.proto.fleet_pb2 import RegisterNodeFleetRequest
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fakes.federations import Federation, wait_until
from faults.real_processes import (
    SETTINGS,
    SLOW_LINE,
    answered,
    fetched,
    repeated,
    require_equal,
    require_intact_logs,
    trained,
    wait_until_asked,
)
from strategies.identity import create_node_key

pytestmark = pytest.mark.timeout(600)


@pytest.mark.fault(
    "F9",
    fault="flower-superlink is restarted in the middle of a run",
    injection="SIGKILL while the sites train; started again at once, and in another run after more "
    "than the minute for which Flower keeps a run",
    promise="the sites connect again by themselves, over TLS and with their keys, nobody trains "
    "twice, and the run completes by itself in the bytes of one that nothing happened to",
)
def test_a_superlink_that_is_back_soon_goes_on_with_the_run(
    federation: Federation, whole: Path
) -> None:
    before = {site: federation.children(site) for site in federation.sites}
    federation.start_run(**SETTINGS)
    wait_until_asked(federation, "A", 2)
    federation.kill("superlink")
    federation.wait_for("run", "flower-superlink does not answer")
    federation.start_superlink()

    said = federation.end("run")
    assert "flower-superlink answers again" in said
    assert said.count("submitted flower_run_id=") == 1
    require_equal(federation, whole)
    assert {site: federation.children(site) for site in federation.sites} == before
    require_tls_and_keys(federation)
    require_intact_logs(federation)


@pytest.mark.fault("F9")
def test_a_superlink_that_was_away_for_long_gets_the_run_anew(
    federation: Federation, whole: Path
) -> None:
    federation.start_run(**SETTINGS)
    wait_until_asked(federation, "A", 2)
    federation.kill("superlink")
    federation.wait_for("run", "is lost", seconds=240)
    federation.start_superlink()

    said = federation.end("run")
    assert said.count("submitted flower_run_id=") == 2
    assert "resumed after round=1" in said
    require_equal(federation, whole)
    assert repeated(federation, "A", 2) == 1, "it was asked before"
    assert [trained(federation, site, 2) for site in "ABC"] == [1, 1, 1]
    require_tls_and_keys(federation)
    require_intact_logs(federation)


@pytest.mark.fault("F9")
def test_a_site_that_fetched_its_instruction_meanwhile_is_not_left_behind(
    federation: Federation, whole: Path
) -> None:
    """Flower's node would answer every later instruction one too late."""
    federation.start_run(**SETTINGS)
    wait_until(lambda: bool(answered(federation, "C", 1)), "C has done round 1", federation.logs)
    messages = fetched(federation, "C")
    federation.links["C"].bytes_per_second = SLOW_LINE
    wait_until(lambda: fetched(federation, "C") > messages, "C fetches round 2", federation.logs)
    federation.kill("superlink")
    federation.wait_for("run", "is lost", seconds=240)
    federation.links["C"].heal()
    federation.start_superlink()

    said = federation.end("run")
    assert said.count("submitted flower_run_id=") == 2
    require_equal(federation, whole)
    assert [trained(federation, site, 2) for site in "ABC"] == [1, 1, 1]


def require_tls_and_keys(federation: Federation) -> None:
    """Require that the superlink speaks TLS alone, and does not take a stranger's node."""
    key = create_node_key(federation.folder / "strangers.key")
    request = RegisterNodeFleetRequest(public_key=public_key_to_bytes(key.public_key()))
    certificates = (federation.server_state / "ca.pem").read_bytes()
    for is_clear, error in ((False, httpx.HTTPStatusError), (True, httpx.TransportError)):
        client = FleetHttpClient.from_server_address(
            f"127.0.0.1:{federation.port}",
            insecure=is_clear,
            root_certificates=None if is_clear else certificates,
            interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
        )
        with client, pytest.raises(error) as refused:
            client.RegisterNode(request)
        if isinstance(refused.value, httpx.HTTPStatusError):
            assert refused.value.response.json()["code"] == (
                ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED
            )
