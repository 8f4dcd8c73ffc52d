"""Sites that ask a coordinator to be admitted, and coordinators to ask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from server.flower_control import Node, SuperlinkDownError
from strategies.enrolment import EnrolmentRequest


class Keys:
    """A site's three private keys; copies of single ones make a site that re-uses them."""

    def __init__(self, like: Keys | None = None, only: str = "") -> None:
        self.signing_key = Ed25519PrivateKey.generate()
        self.node_key = ec.generate_private_key(ec.SECP384R1())
        self.wrap_key = X25519PrivateKey.generate()
        if like is not None:
            setattr(self, only, getattr(like, only))

    def request(self, site: str) -> EnrolmentRequest:
        return EnrolmentRequest.create(
            site, signing_key=self.signing_key, node_key=self.node_key, wrap_key=self.wrap_key
        )


def request(site: str) -> EnrolmentRequest:
    """A request of new keys."""
    return Keys().request(site)


class Superlink:
    """flower-superlink's register of nodes: keys are unique, and for ever; names are not.

    Attributes:
        running: Whether it answers.
    """

    def __init__(self) -> None:
        self.running = True
        self.list: list[Node] = []

    @contextmanager
    def connect(self, address: str, ca_file: Path) -> Iterator[Superlink]:
        """What ``Control(address, ca_file)`` is replaced by."""
        if not self.running:
            raise SuperlinkDownError(f"{address} does not answer")
        yield self

    def nodes(self) -> list[Node]:
        return list(self.list)

    def register(self, name: str, public_key: bytes) -> bool:
        if any(node.public_key == public_key for node in self.list):
            return False
        self.list.append(Node(len(self.list) + 1, name, public_key, "registered", None))
        return True

    def unregister(self, node_id: int) -> bool:
        for index, node in enumerate(self.list):
            if node.node_id == node_id and not node.unregistered:
                gone = Node(node_id, node.name, node.public_key, "unregistered", None)
                self.list[index] = gone
                return True
        return False

    def connectable(self) -> list[str]:
        """Names of the nodes that may connect."""
        return sorted(node.name for node in self.list if not node.unregistered)
