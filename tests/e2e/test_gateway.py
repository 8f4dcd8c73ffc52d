"""An attacker's view through real nginx: who has only the CA file reaches nothing of Flower's.

One coordinator with flower-superlink and its executor, nginx in front of it. What the superlink
says in its access log is the proof: a request that it never saw is in no line of it.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    ListRunsRequest,
    RegisterNodeRequest,
    StartRunRequest,
    StopRunRequest,
)
from flwr.proto.fleet_pb2 import (
    PullMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullAppMessagesRequest
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fakes.federations import SETTINGS, Federation, free_port, wait_until
from fakes.hostile_site import fleet_client, status_of
from server import federation as coordinator
from server.gateway import FLEET_CALLS, write_nginx_configuration
from strategies.identity import load_node_key

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
pytestmark = [
    pytest.mark.e2e,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed"),
]

PROTOBUF = "application/protobuf"
# Answers that come from nginx itself: unknown, malformed, not allowed, of no known version.
REFUSED = {400, 404, 405, 505}
# A request as uvicorn logs it; the executor's own are no attacker's.
ACCESS = re.compile(r'127\.0\.0\.1:\d+ - "(?!POST /v1/runtime/acquire-task )(.*)" (\d+)')


class Hub(Federation):
    """A coordinator behind nginx, whose sites connect to the gateway."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, sites=("A", "B"))
        self.gateway = free_port()

    def enrol(self) -> None:
        self.call(
            "server", "init", "--name", "lung",
            "--address", f"localhost:{self.gateway}", "--port", str(self.port),
        )  # fmt: skip
        for site in self.sites:
            self.enrol_site(site)

    def start_hub(self) -> None:
        self.start("superlink", "server", "superlink", "--executor")
        self.start_nginx("nginx", self.server_state / "nginx.conf")
        wait_until(lambda: self.health() == 200, "the gateway passes /health on", self.logs)
        self.wait_for("superlink", "admitted=A,B")
        self.interface = json.loads(self.ask("GET", "/openapi.json", port=self.port)[1])

    def start_nginx(self, name: str, configuration: Path) -> subprocess.Popen[bytes]:
        wait_until(configuration.exists, "there is a configuration", self.logs)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(NGINX), "-e", "stderr", "-c", str(configuration)],
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    @property
    def ca_file(self) -> Path:
        return self.server_state / "ca.pem"

    def connect(self, port: int | None = None) -> http.client.HTTPSConnection:
        """What anybody does who has the CA file."""
        return http.client.HTTPSConnection(
            "localhost",
            port or self.gateway,
            timeout=30,
            context=ssl.create_default_context(cafile=self.ca_file),
        )

    def health(self, port: int | None = None) -> int:
        try:
            return self.ask("GET", "/health", port=port)[0]
        except OSError:
            return 0

    def ask(
        self, method: str, path: str, *, body: bytes = b"", port: int | None = None, **headers: str
    ) -> tuple[int, bytes]:
        connection = self.connect(port)
        try:
            named = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, path, body, {"Content-Type": PROTOBUF, **named})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def send(self, text: str) -> list[int]:
        """Send bytes as they are; returns the status of each answer."""
        context = ssl.create_default_context(cafile=self.ca_file)
        with (
            socket.create_connection(("localhost", self.gateway), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            tls.sendall(text.encode("latin-1"))
            answered = b""
            while piece := tls.recv(65536):
                answered += piece
        return [int(code) for code in re.findall(rb"^HTTP/1\.[01] (\d+)", answered, re.M)]

    def seen(self) -> list[str]:
        """The request lines that reached flower-superlink and that it logs."""
        return [f"{line} {status}" for line, status in ACCESS.findall(self.log("superlink"))]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    hub = Hub(tmp_path_factory.mktemp("hub"))
    try:
        hub.enrol()
        hub.start_hub()
        yield hub
    finally:
        hub.stop()


@pytest.fixture
def unseen(hub: Hub) -> Iterator[None]:
    """Nothing that the test does reaches flower-superlink."""
    before = len(hub.seen())
    yield
    # A line of our own, directly to it, after which all earlier ones are written.
    marker = f"/marker-{before}"
    hub.ask("GET", marker, port=hub.port)
    wait_until(lambda: marker in hub.log("superlink"), "the marker is logged", hub.logs)
    assert hub.seen()[before:] == [f"GET {marker} HTTP/1.1 404"]


@pytest.mark.usefixtures("unseen")
def test_of_all_that_flower_offers_only_the_fleet_calls_are_known_outside(hub: Hub) -> None:
    offered = {*hub.interface["paths"], "/docs", "/docs/oauth2-redirect", "/openapi.json"}
    allowed = {f"/v1/fleet/{call}" for call in FLEET_CALLS} | {"/health"}
    assert allowed < offered
    assert {"/v1/control/start-run", "/v1/runtime/acquire-task"} < offered - allowed
    assert len(offered - allowed) > 60
    for path in sorted(offered - allowed):
        for method in ("GET", "POST"):
            assert hub.ask(method, path)[0] == 404, f"{method} {path}"


VARIANTS = [
    # Out of a path that is let through, by every spelling of "up" and of "/".
    "POST /v1/fleet/%2e%2e/control/list-runs HTTP/1.1",
    "POST /v1/fleet/../control/list-runs HTTP/1.1",
    "POST /v1/fleet/pull-messages/../../control/list-runs HTTP/1.1",
    "POST /v1/fleet/pull-messages/%2e%2e/%2e%2e/control/list-runs HTTP/1.1",
    "POST /v1/fleet/..%2fcontrol%2flist-runs HTTP/1.1",
    "POST /v1/fleet%2f..%2fcontrol/list-runs HTTP/1.1",
    "POST /v1/fleet/%252e%252e/control/list-runs HTTP/1.1",
    "POST /v1/fleet/..;/control/list-runs HTTP/1.1",
    r"POST /v1/fleet/..\control\list-runs HTTP/1.1",
    "POST /health/../v1/control/list-runs HTTP/1.1",
    "POST /v1/fleet/pull-messages%0d%0aGET%20/v1/control/list-runs HTTP/1.1",
    # Other spellings of a path that is not.
    "POST /v1/control/list-runs HTTP/1.1",
    "POST //v1/control/list-runs HTTP/1.1",
    "POST /v1//control/list-runs HTTP/1.1",
    "POST /v1/./control/list-runs HTTP/1.1",
    "POST /%76%31/control/list-runs HTTP/1.1",
    "POST /V1/CONTROL/LIST-RUNS HTTP/1.1",
    "POST /v1/control/list-runs/ HTTP/1.1",
    "POST /v1/control/list-runs?x=/v1/fleet/pull-messages HTTP/1.1",
    "POST /v1/control/list-runs#/v1/fleet/pull-messages HTTP/1.1",
    "POST https://localhost/v1/control/list-runs HTTP/1.1",
    "POST https://127.0.0.1:{port}/v1/control/list-runs HTTP/1.1",
    "POST http://localhost/v1/control/list-runs HTTP/1.1",
    "POST /v1/control/list-runs HTTP/1.0",
    "GET / HTTP/1.1",
    # Other spellings of paths that are let through: none of them is.
    "GET /v1/fleet/pull-messages HTTP/1.1",
    "PUT /v1/fleet/pull-messages HTTP/1.1",
    "HEAD /health HTTP/1.1",
    "POST /health HTTP/1.1",
    "GET /health?x=1 HTTP/1.1",
    "POST /v1/fleet/pull-messages/ HTTP/1.1",
    "POST //v1/fleet/pull-messages HTTP/1.1",
    "POST /v1/fleet/pull%2dmessages HTTP/1.1",
    "POST /v1/Fleet/pull-messages HTTP/1.1",
    "POST /v1/fleet/pull-messages?x=1 HTTP/1.1",
    "POST /v1/control/../fleet/pull-messages HTTP/1.1",
    "POST https://localhost/v1/fleet/pull-messages HTTP/1.1",
    "POST /v1/fleet/pull-messages HTTP/1.0",
    "POST  /v1/fleet/pull-messages HTTP/1.1",
]
# The same for what executors of a run are offered.
VARIANTS += [
    line.replace("control", "runtime")
    .replace("list-runs", "acquire-task")
    .replace("CONTROL/LIST-RUNS", "RUNTIME/ACQUIRE-TASK")
    for line in VARIANTS
    if "control" in line.lower()
]
# Lines that are no HTTP, which nginx says itself.
MALFORMED = [
    "OPTIONS * HTTP/1.1",
    "POST * HTTP/1.1",
    "POST /v1/fleet/.%00./control/list-runs HTTP/1.1",
    "POST v1/control/list-runs HTTP/1.1",
    "POST /v1/control/list-runs HTTP/9.1",
    "POST /v1/control/list-runs\t HTTP/1.1",
    "POST /v1/fleet/pull-messages /v1/control/list-runs HTTP/1.1",
    "POST /v1/fleet/%zz/control/list-runs HTTP/1.1",
    "POST ../v1/control/list-runs HTTP/1.1",
    "POST /../v1/control/list-runs HTTP/1.1",
    "POST /v1/fleet/../../../v1/control/list-runs HTTP/1.1",
    "CONNECT 127.0.0.1:{port} HTTP/1.1",
    "TRACE /v1/fleet/pull-messages HTTP/1.1",
    "POST /v1/control/list-runs",
    "\x16\x03\x01\x02",
]
HEAD = "Host: localhost\r\nContent-Type: application/protobuf\r\n"


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("line", VARIANTS)
def test_no_other_spelling_gets_through(hub: Hub, line: str) -> None:
    sent = f"{line.format(port=hub.port)}\r\n{HEAD}Content-Length: 0\r\nConnection: close\r\n\r\n"
    assert hub.send(sent) == [404]


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("line", MALFORMED)
def test_no_malformed_request_gets_through(hub: Hub, line: str) -> None:
    sent = f"{line.format(port=hub.port)}\r\n{HEAD}Content-Length: 0\r\nConnection: close\r\n\r\n"
    assert set(hub.send(sent)) <= REFUSED


@pytest.mark.usefixtures("unseen")
def test_a_request_behind_another_on_one_connection_is_judged_by_itself(hub: Hub) -> None:
    first = f"GET /other HTTP/1.1\r\n{HEAD}\r\n"
    second = (
        f"POST /v1/control/list-runs HTTP/1.1\r\n{HEAD}Content-Length: 0\r\nConnection: close\r\n"
    )
    assert hub.send(f"{first}{second}\r\n") == [404, 404]


CONTROL = f"POST /v1/control/list-runs HTTP/1.1\r\n{HEAD}Content-Length: 0\r\n\r\n"
SMUGGLED = {
    "in a body": f"Content-Length: {len(CONTROL)}\r\n\r\n{CONTROL}",
    "behind a chunked body": f"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{CONTROL}",
    "two lengths": f"Content-Length: 0\r\nContent-Length: {len(CONTROL)}\r\n\r\n{CONTROL}",
    "length and chunks": f"Content-Length: {len(CONTROL) + 5}\r\nTransfer-Encoding: chunked\r\n\r\n"
    f"0\r\n\r\n{CONTROL}",
    "folded": f"Transfer-Encoding:\r\n chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n{CONTROL}",
    "odd coding": f"Transfer-Encoding: xchunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n{CONTROL}",
    "length with a sign": f"Content-Length: +0\r\n\r\n{CONTROL}",
    "a header with a line break": f"flwr-signature: x\nContent-Length: 0\r\n\r\n{CONTROL}",
}


@pytest.mark.parametrize("how", SMUGGLED)
def test_no_request_hides_in_another(hub: Hub, how: str) -> None:
    before = len(hub.seen())
    line = "POST /v1/fleet/get-run HTTP/1.1\r\n"
    answers = hub.send(f"{line}{HEAD}{SMUGGLED[how]}GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert answers
    assert set(answers) <= REFUSED | {401, 500, 501}
    hub.ask("GET", f"/end-of-{how.replace(' ', '-')}", port=hub.port)
    wait_until(
        lambda: any("/end-of-" in line for line in hub.seen()[before:]),
        "the marker is logged",
        hub.logs,
    )
    assert not [line for line in hub.seen()[before:] if "control" in line]


@pytest.mark.parametrize("call", FLEET_CALLS)
def test_flower_itself_refuses_whoever_has_no_node_key(hub: Hub, call: str) -> None:
    status, answer = hub.ask("POST", f"/v1/fleet/{call}")
    assert status == 401
    assert json.loads(answer) == {"detail": "Invalid SuperNode authentication"}


@pytest.mark.usefixtures("unseen")
def test_an_admitted_site_s_key_opens_nothing_more(hub: Hub) -> None:
    key = load_node_key(hub.state("A") / "node.key")
    with ExitStack() as stack:
        fleet, control, runtime = (
            stack.enter_context(
                kind.from_server_address(
                    f"localhost:{hub.gateway}",
                    insecure=False,
                    root_certificates=hub.ca_file.read_bytes(),
                    interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
                )
            )
            for kind in (FleetHttpClient, ControlHttpClient, RuntimeHttpClient)
        )
        calls = {
            "list runs": lambda: control.ListRuns(ListRunsRequest()),
            "start a run": lambda: control.StartRun(StartRunRequest()),
            "stop a run": lambda: control.StopRun(StopRunRequest(run_id=1)),
            "list nodes": lambda: control.ListNodes(ListNodesRequest()),
            "admit a node": lambda: control.RegisterNode(RegisterNodeRequest(name="Z")),
            "claim a task": lambda: runtime.AcquireTask(AcquireTaskRequest()),
            "read replies": lambda: runtime.PullMessages(PullAppMessagesRequest()),
            "register": lambda: fleet.RegisterNode(RegisterNodeFleetRequest()),
            "unregister": lambda: fleet.UnregisterNode(UnregisterNodeFleetRequest(node_id=1)),
        }
        assert {name: status_of(call) for name, call in calls.items()} == dict.fromkeys(calls, 404)


def test_that_key_opens_its_own_node(hub: Hub) -> None:
    own, other = (Node(node_id=hub.nodes()[site].node_id) for site in hub.sites)
    with fleet_client(hub, "A", f"localhost:{hub.gateway}") as fleet:
        assert status_of(lambda: fleet.PullMessages(PullMessagesRequest(node=own))) == 200
        assert status_of(lambda: fleet.PullMessages(PullMessagesRequest(node=other))) == 401


def test_health_says_that_the_superlink_is_up_and_nothing_more(hub: Hub) -> None:
    connection = hub.connect()
    try:
        connection.request("GET", "/health")
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, b"")
        assert answer.headers["Server"] == "nginx", "without its version, and not uvicorn"
    finally:
        connection.close()


def test_headers_of_the_outside_stay_outside(hub: Hub) -> None:
    # Flower believes a forwarded address that a proxy on its own machine tells.
    hub.ask("POST", "/v1/fleet/get-run", X_Forwarded_For="203.0.113.77", Forwarded="for=evil")
    wait_until(lambda: "POST /v1/fleet/get-run HTTP/1.1 401" in hub.seen(), "logged", hub.logs)
    assert "203.0.113.77" not in hub.log("superlink")


@pytest.mark.usefixtures("unseen")
def test_a_body_larger_than_any_piece_of_a_model_is_refused_unread(hub: Hub) -> None:
    assert hub.ask("POST", "/v1/fleet/push-object", Content_Length="9000000")[0] == 413
    # Elsewhere a list of pieces is the longest, at which Flower works for long.
    assert hub.ask("POST", "/v1/fleet/push-messages", Content_Length="70000")[0] == 413
    assert hub.ask("POST", "/v1/control/start-run", Content_Length="9000000")[0] == 404
    assert "start-run" not in hub.log("nginx")


def test_the_largest_piece_of_a_model_gets_through(hub: Hub) -> None:
    piece = PushObjectRequest(object_content=bytes(FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE + 100_000))
    assert hub.ask("POST", "/v1/fleet/push-object", body=piece.SerializeToString())[0] == 401


@pytest.mark.usefixtures("unseen")
def test_in_the_clear_nothing_is_said(hub: Hub) -> None:
    with socket.create_connection(("localhost", hub.gateway), timeout=30) as plain:
        plain.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert plain.recv(65536).startswith(b"HTTP/1.1 400 ")


def test_another_superlink_on_the_same_port_gets_no_site_s_requests(
    hub: Hub, tmp_path: Path
) -> None:
    """Its certificate is of another authority: as if a program had taken the superlink's port."""
    public = free_port()
    other = coordinator.Federation.create(
        tmp_path / 'of "another" hub; #2',
        name="other",
        address=f"localhost:{public}",
        port=hub.port,
    )
    before = len(hub.seen())
    process = hub.start_nginx("other", write_nginx_configuration(other))
    connection = http.client.HTTPSConnection(
        "localhost", public, timeout=30, context=ssl.create_default_context(cafile=other.ca_file)
    )
    try:
        wait_until(lambda: listens(public), "nginx listens", hub.logs)
        for method, path in (("GET", "/health"), ("POST", "/v1/fleet/activate-node")):
            connection.request(method, path, b"", {"Content-Type": PROTOBUF})
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 502
    finally:
        connection.close()
        process.send_signal(signal.SIGTERM)
        process.wait(20)
    assert "upstream SSL certificate verify error" in hub.log("other")
    assert hub.seen()[before:] == []


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def connected(hub: Hub) -> Iterator[None]:
    """All sites are connected; afterwards none of them asks for anything."""
    hub.start_sites()
    try:
        for site in hub.sites:
            hub.wait_for(site, "connected")
        yield
    finally:
        for site in hub.sites:
            hub.crash(site)


@pytest.mark.usefixtures("connected")
def test_sites_train_through_the_gateway_what_flower_s_own_command_submits(
    hub: Hub, repository: Path
) -> None:
    flower = {**hub.environment, "FLWR_HOME": str(hub.server_state / "flower")}
    settings = " ".join(
        f"{key}={json.dumps(value)}" for key, value in {**SETTINGS, "num-server-rounds": 1}.items()
    )
    program = Path(sys.executable).with_name("flwr")
    done = subprocess.run(
        [str(program), "run", str(repository), "hospitals", "--run-config", settings, "--stream"],
        env=flower,
        cwd=hub.folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )

    said = f"{done.stdout}\n{done.stderr}\n{hub.logs()}"
    assert done.returncode == 0, said
    summaries = list((hub.server_state / "runs").glob("*/summary.json"))
    assert len(summaries) == 1, said
    run = summaries[0].parent
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    outcomes = {line["site"]: line["status"] for line in history if line["type"] == "site"}
    assert outcomes == {"A": "ok", "B": "ok"}
    assert all(hub.processes[site].poll() is None for site in hub.sites), "they stay online"
    for site in hub.sites:
        hub.processes[site].send_signal(signal.SIGTERM)
        assert hub.processes[site].wait(30) == 0
    for call in ("activate-node", "deactivate-node"):
        assert hub.seen().count(f"POST /v1/fleet/{call} HTTP/1.1 200") == len(hub.sites)


def test_a_node_whose_key_nobody_admitted_is_turned_away(hub: Hub, tmp_path: Path) -> None:
    key = tmp_path / "node.key"
    key.write_bytes(
        ec.generate_private_key(ec.SECP384R1()).private_bytes(
            Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
        )
    )
    secret = tmp_path / "secret"
    secret.write_bytes(os.urandom(32))
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("flower-supernode")),
            *("--superlink", f"localhost:{hub.gateway}"),
            *("--root-certificates", str(hub.ca_file)),
            *("--auth-supernode-private-key", str(key)),
            *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
            *("--host", "127.0.0.1", "--port", str(free_port())),
        ],
        env={**hub.environment, "FLWR_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    assert "[code: 2004]" in done.stdout + done.stderr
