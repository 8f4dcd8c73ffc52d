"""A hospital with its private keys, honest or not."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from strategies.enrolment import EnrolmentRequest


class Hospital:
    """The three private keys of one site."""

    def __init__(self, site: str = "A") -> None:
        self.site = site
        self.signing = Ed25519PrivateKey.generate()
        self.node = ec.generate_private_key(ec.SECP384R1())
        self.wrap = X25519PrivateKey.generate()

    def request(self, **changes: object) -> EnrolmentRequest:
        """Its request; changed, and signed by it all the same, when the site is hostile."""
        made = EnrolmentRequest.create(
            self.site, signing_key=self.signing, node_key=self.node, wrap_key=self.wrap
        )
        return made.model_copy(update=changes)._signed_by(self.signing) if changes else made


def openssh(key) -> str:
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()
