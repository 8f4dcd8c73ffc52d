"""The site's node: Flower's SuperNode as a transport, our installed ClientApp as the only code.

Invariant: code shipped by a run is never unpacked or executed. The SuperNode runs with
``--isolation process``: it fetches messages and waits for an executor to claim them over a
loopback port protected by a secret; the executor is this process, and it calls ``client.app``.
Only a signal or the site's own configuration ends the site: a task that fails, is given up or is
stopped by the coordinator ends that task.

The private Flower names of this package are here and in ``client/supernode.py`` (flwr 1.41).
"""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

import httpx
from flwr.app import Context, Error, Message
from flwr.common.serde import context_to_proto
from flwr.proto.message_pb2 import PullObjectRequest, PullObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.inflatable.inflatable_utils import ObjectPullError
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.retry import RetryInvoker, exponential
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from client.app import app
from client.site import Site, register
from client.site_config import NODE_KEY
from client.supervisor import Supernode, Supervisor, supernode
from strategies.errors import ConfigError, FederationError
from strategies.files import held, write_atomic
from strategies.identity import load_node_key

log = logging.getLogger(__name__)

LOCAL = "127.0.0.1"
POLL_SECONDS = 0.2
RETRY_SECONDS = 10.0
RESTART_SECONDS = 30.0
GOODBYE_SECONDS = 2.0
WATCH_SECONDS = 10.0
ERROR_CODE_CLIENT_APP = 2  # Flower's own code for an exception in a ClientApp
# What it means for work in progress that the coordinator refuses to tell of its run.
OVER = {
    403: "the coordinator ended the run",
    401: "the coordinator turns this site away",
}


def run_node(site: Site) -> None:
    """Connect the site and answer instructions until the process is told to stop.

    Raises:
        ConfigError: The node key is not usable, the coordinator's certificate is not that of the
            authority joined, or the site is running already.
        FederationError: The coordinator refuses this site or cannot be reached, and waiting does
            not help or was long enough.
    """
    register(site)
    refusal = ConfigError(
        f"state-dir={site.config.state_dir} is in use: this site is running already",
        hint="stop the other `python -m client` first",
    )
    with held(site.config.state_dir / "node.lock", refusal), _leaving_on_sigterm():
        _supervise(site)


def _supervise(site: Site) -> None:
    """Keep a SuperNode running and answer what it brings."""
    # Flower's lines reach our log by propagation; its own handler would print them twice.
    logging.getLogger("flwr").handlers.clear()
    _use_no_proxy_for(LOCAL)
    secret_file = site.config.state_dir / "executor.secret"
    supervisor = Supervisor(site.config, site.membership)
    with _coordinator(site) as coordinator:
        watch = _RunWatch(site, coordinator)
        log.info("site=%s connecting superlink=%s", site.name, site.membership.address)
        while True:
            secret = secrets.token_bytes(32)
            try:
                write_atomic(secret_file, secret, mode=0o600)
                with supernode(site.config, site.membership, _free_port(), secret_file) as node:
                    _serve(site, node, secret, supervisor, watch)
                time.sleep(supervisor.ended(node))
            except OSError as error:  # a full disk and the like pass by themselves
                reason = error.strerror or type(error).__name__
                log.error("site=%s node not started reason=%s; trying again", site.name, reason)
                time.sleep(RESTART_SECONDS)


def _serve(
    site: Site, node: Supernode, secret: bytes, supervisor: Supervisor, watch: _RunWatch
) -> None:
    """Execute the node's tasks, one after another, until it ends."""
    client = RuntimeHttpClient.from_server_address(
        server_address=f"{LOCAL}:{node.port}",
        insecure=True,
        root_certificates=None,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(
                master_secret=secret,
                protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"}),
            ),
        ],
    )
    request = AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
    with client:
        while node.exit_code is None:
            supervisor.listen(node)
            try:
                token = client.AcquireTask(request).token
            except httpx.HTTPError:  # the SuperNode is still starting, busy, or just ended
                token = ""
            if token:
                _execute(site, node.port, token, watch)
            else:
                time.sleep(POLL_SECONDS)
        supervisor.listen(node)


def _execute(site: Site, port: int, token: str, watch: _RunWatch) -> None:
    """Answer one instruction with the installed ClientApp."""
    # Flower's own retries never end, and take a task that the node has given up for a reason to
    # interrupt this process. The SuperNode is a process of this machine: it answers or is gone.
    retries = RetryInvoker(
        lambda: exponential(max_delay=2),
        httpx.TransportError,
        max_tries=None,
        max_time=RETRY_SECONDS,
    )
    client = RuntimeHttpClient.from_server_address(
        server_address=f"{LOCAL}:{port}",
        insecure=True,
        root_certificates=None,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="flwr-clientapp"),
            RuntimeTokenHttpInterceptor(token),
        ],
        retry_invoker=retries,
    )
    heartbeat = HeartbeatSender(_heartbeat(client, site))
    heartbeat.start()
    context: Context | None = None
    status, details = "failed", "not executed"
    try:
        _give_up_with_the_run(client, watch)
        message, context, run, _ = pull_task_input(client)
        try:
            with watch.during(run.run_id, context.node_id):
                reply = app(message, context)
            status, details = "completed", ""
        except Exception as error:
            # The ClientApp's own errors say what may leave; of others the class alone does.
            own = isinstance(error, FederationError)
            details = str(error) if own else type(error).__name__
            reply = Message(Error(ERROR_CODE_CLIENT_APP, details), reply_to=message)
        push_message(client, reply, context)
    except Exception as error:
        # The task was given up or the SuperNode is gone: the next task is asked for as usual.
        code = error.response.status_code if isinstance(error, httpx.HTTPStatusError) else 0
        reason = f"HTTP {code}" if code else type(error).__name__
        log.warning("site=%s reply not delivered reason=%s", site.name, reason)
        log.debug("traceback", exc_info=True)
    finally:
        retries.max_time = GOODBYE_SECONDS
        state = context_to_proto(context) if context else None
        with suppress(httpx.HTTPError):
            client.PushTaskOutput(
                PushTaskOutputRequest(context=state, sub_status=status, details=details)
            )
        with suppress(RuntimeError):  # its thread has died
            heartbeat.stop()
        client.close()


def _give_up_with_the_run(client: RuntimeHttpClient, watch: _RunWatch) -> None:
    """Wait for the whole of an instruction no longer than its run lasts.

    A run may end while the SuperNode fetches an instruction; it hands the task out all the same,
    and Flower's own wait for the missing pieces is two hours, with all later tasks behind it.
    """
    pull, asked = client.PullObject, time.monotonic()

    def pull_object(request: PullObjectRequest) -> PullObjectResponse:
        nonlocal asked
        response = pull(request)
        is_missing = response.object_found and not response.object_available
        if is_missing and time.monotonic() - asked >= WATCH_SECONDS:
            asked = time.monotonic()
            if reason := watch.over(GetRunRequest(node=request.node, run_id=request.run_id)):
                raise ObjectPullError(request.object_id, reason)
        return response

    client.PullObject = pull_object


def _heartbeat(client: RuntimeHttpClient, site: Site) -> Callable[[], bool]:
    """Return what tells the SuperNode that a task is being worked on, and hears that it is not.

    Flower's own interrupts the process where the SuperNode has given the task up.
    """

    def beat() -> bool:
        try:
            wanted = client.SendTaskHeartbeat(SendTaskHeartbeatRequest()).success
        except httpx.HTTPStatusError as error:
            wanted = error.response.status_code != 401
        except httpx.HTTPError:
            return False
        if not wanted:
            site.abort("this site's node has given the task up")
        return True

    return beat


class _RunWatch:
    """Asks the coordinator about a run while the site works for it, and ends the work with the run.

    Flower's SuperNode does not look while a task is worked on. A coordinator out of reach is no
    reason to stop. One whose process died is: Flower ends its run after 60 s, and tells a node
    nothing of why a run ended.
    """

    def __init__(self, site: Site, coordinator: FleetHttpClient) -> None:
        self._site, self._coordinator = site, coordinator

    @contextmanager
    def during(self, run_id: int, node_id: int) -> Generator[None]:
        """Watch a run while the body works."""
        request = GetRunRequest(node=Node(node_id=node_id), run_id=run_id)
        done, lock = threading.Event(), threading.Lock()
        threading.Thread(
            target=self._watch, args=(request, done, lock), daemon=True, name="run-watch"
        ).start()
        try:
            yield
        finally:
            with lock:  # from here on nothing is aborted, though a request may still be under way
                done.set()

    def _watch(self, request: GetRunRequest, done: threading.Event, lock: threading.Lock) -> None:
        told = False
        while not done.wait(WATCH_SECONDS):
            reason = self.over(request)
            with lock:
                if not reason or done.is_set():
                    continue
                # Again each time: work that only begins forgets what was before.
                self._site.abort(reason)
                if not told:
                    log.warning("site=%s work=aborted reason=%s", self._site.name, reason)
                    told = True

    def over(self, request: GetRunRequest) -> str:
        """Return why nobody waits for the run's results any more; empty while somebody may."""
        try:
            self._coordinator.GetRun(request)
        except httpx.HTTPStatusError as error:
            return OVER.get(error.response.status_code, "")
        except (httpx.HTTPError, ValueError):  # ValueError: not what Flower answers
            return ""
        return ""


def _coordinator(site: Site) -> FleetHttpClient:
    """Return a client of the coordinator that identifies itself as the site's node does."""
    key = load_node_key(site.config.state_dir / NODE_KEY)
    return FleetHttpClient.from_server_address(
        site.membership.address,
        insecure=False,
        root_certificates=site.membership.ca_path.read_bytes(),
        # No version interceptor: Flower's ends the process when it does not like the answer.
        interceptors=[NodeAuthHttpInterceptor(key, key.public_key())],
    )


@contextmanager
def _leaving_on_sigterm() -> Generator[None]:
    """Have SIGTERM end the process as if it had finished, also in the middle of training."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _use_no_proxy_for(host: str) -> None:
    """Keep what stays on this machine away from a proxy that the environment names."""
    listed = os.environ.get("no_proxy") or os.environ.get("NO_PROXY")
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = f"{listed},{host}" if listed else host


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOCAL, 0))
        return probe.getsockname()[1]
