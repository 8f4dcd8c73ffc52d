"""flower-superlink's control interface: which nodes may connect, and under which name.

Flower lets everybody who reaches this interface do everything, so flower-superlink listens on
loopback alone and the gateway passes none of it on.

Invariant: the other end is the holder of the federation's server key, or nothing is said to it.

Private Flower names are those of flwr 1.41.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import httpx
from flwr.common.constant import HEARTBEAT_PATIENCE
from flwr.proto.control_pb2 import (
    ListNodesRequest,
    RegisterNodeRequest,
    UnregisterNodeRequest,
)
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.error import ApiErrorCode
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor

from strategies.cli import one_line
from strategies.errors import FederationError

T = TypeVar("T")


class SuperlinkDownError(FederationError):
    """Nothing listens at flower-superlink's address."""


class SuperlinkRefusalError(FederationError):
    """flower-superlink refused a call.

    Attributes:
        code: Flower's number for the reason; None when it gave none.
    """

    def __init__(self, address: str, response: httpx.Response) -> None:
        super().__init__(
            f"flower-superlink at {address} answered HTTP {response.status_code}: "
            f"{one_line(response.text, 200)}",
            hint="was it started by `python -m server superlink` with the same --state-dir?",
        )
        try:
            document = response.json()
        except ValueError:
            document = None
        self.code = document.get("code") if isinstance(document, dict) else None


@dataclass(frozen=True)
class Node:
    """One registered node, or one that was.

    Attributes:
        node_id: Flower's.
        name: Under which it was registered: the site's.
        public_key: PEM.
        status: ``registered`` (never seen), ``online``, ``offline`` or ``unregistered``.
        last_seen: Its last sign of life, within a minute; None before the first.
    """

    node_id: int
    name: str
    public_key: bytes
    status: str
    last_seen: datetime | None

    @property
    def online(self) -> bool:
        """Whether it gave a sign of life lately."""
        return self.status == NodeStatus.ONLINE

    @property
    def unregistered(self) -> bool:
        """Whether it may connect no more; its key is refused for ever."""
        return self.status == NodeStatus.UNREGISTERED


class Control:
    """A connection to the control interface; close it, or use it as a context manager."""

    def __init__(self, address: str, ca_certificate: Path) -> None:
        self.address = address
        self.client = ControlHttpClient.from_server_address(
            server_address=address,
            insecure=False,
            root_certificates=ca_certificate.read_bytes(),
            interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
        )

    def __enter__(self) -> Control:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self.client.close()

    def nodes(self) -> list[Node]:
        """List every node that was ever registered."""
        found = self._call(self.client.ListNodes, ListNodesRequest())
        return [
            Node(info.node_id, info.name, info.public_key, info.status, _last_seen(info))
            for info in found.nodes_info
        ]

    def register(self, name: str, public_key: bytes) -> bool:
        """Let the node with a key connect, under a name.

        Returns:
            False when the key is, or was once, registered: Flower takes none twice.
        """
        request = RegisterNodeRequest(public_key=public_key, name=name)
        try:
            return self._call(self.client.RegisterNode, request).node_id != 0
        except SuperlinkRefusalError as error:
            if error.code == ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
                return False
            raise

    def unregister(self, node_id: int) -> bool:
        """Refuse a node from now on; False when it was refused already."""
        try:
            self._call(self.client.UnregisterNode, UnregisterNodeRequest(node_id=node_id))
        except SuperlinkRefusalError as error:
            if error.code == ApiErrorCode.NODE_NOT_FOUND:
                return False
            raise
        return True

    def _call(self, method: Callable[[Any], T], request: Any) -> T:
        """Make a call.

        Raises:
            SuperlinkDownError: Nothing listens there.
            SuperlinkRefusalError: It refuses the call.
            FederationError: Another program listens there, or it failed.
        """
        try:
            return method(request)
        except httpx.ConnectError as error:
            if _is_tls_failure(error):
                raise FederationError(
                    f"{self.address} is not this federation's flower-superlink "
                    f"({one_line(str(error), 200)})",
                    hint="after `init --renew` start `python -m server superlink` again; "
                    "otherwise another program has its port",
                ) from error
            raise SuperlinkDownError(
                f"flower-superlink at {self.address} does not answer",
                hint="start it with `python -m server superlink`",
            ) from error
        except httpx.HTTPStatusError as error:
            raise SuperlinkRefusalError(self.address, error.response) from error
        except (httpx.HTTPError, ValueError) as error:
            raise FederationError(
                f"flower-superlink at {self.address}: {type(error).__name__}",
                hint="see its log, and start it again",
            ) from error


def _is_tls_failure(error: BaseException | None) -> bool:
    """Say whether TLS is what failed, below the layers of the HTTP client."""
    while error is not None and not isinstance(error, ssl.SSLError):
        error = error.__cause__ or error.__context__
    return error is not None


def _last_seen(info: Any) -> datetime | None:
    """Return when a node's last sign of life came; up to a minute late for one that is gone."""
    if not info.online_until:
        return None
    # Flower stores until when a heartbeat counts, and of a node that is gone when it went.
    ahead = HEARTBEAT_PATIENCE * info.heartbeat_interval if info.status == NodeStatus.ONLINE else 0
    return datetime.fromtimestamp(info.online_until - ahead, UTC)
