"""How a site and a coordinator come to know each other: two signed documents, no private key.

A site writes an :class:`EnrolmentRequest` with its three public keys; the coordinator answers with
a :class:`JoinDocument`. Both are JSON files that people may carry by any means, because each proves
itself but for one thing: whose it is. That is what two people compare by telephone, 80 bits of the
signing key's hash; every other key is signed by that one.

Invariant: a document that parses has had all its signatures checked. A request also proves that
its maker holds the node key, so that nobody enrols another's.
"""

from __future__ import annotations

import base64
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Self, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from strategies.errors import ConfigError, SignatureError
from strategies.identity import canonical, fingerprint, sign, verify
from strategies.run_config import Section, explain

SITE_NAME = r"^[A-Za-z0-9][A-Za-z0-9-]{0,31}$"
SiteName = Annotated[str, Field(pattern=SITE_NAME)]

# What a signature is over, so that one made for one purpose never serves another.
WRAP_PURPOSE, NODE_PURPOSE = "wrap-key", "node-key"


class FederationPolicy(Section):
    """What the coordinator promises every site; a run that breaks it is refused by the sites."""

    min_cohort: Annotated[int, Field(ge=1)] = Field(
        default=2, description="fewest sites that a run may have"
    )
    max_num_examples: Annotated[int, Field(gt=0)] = Field(
        default=1_000_000, description="most examples that one site may claim"
    )


class _Document(BaseModel):
    """A JSON file whose ``signature`` covers every other field."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    created: str
    signature: str = ""

    def to_json(self) -> str:
        """Return the file's content."""
        return self.model_dump_json(indent=2) + "\n"

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a file's content and check all its signatures.

        Raises:
            ConfigError: It is not such a document, or of another version.
            SignatureError: A signature does not match.
        """
        try:
            document = cls.model_validate_json(text)
            document._verify()
        except ValidationError as error:
            if error.errors()[0]["type"] == "json_invalid":
                raise ConfigError(f"not a file of this kind: {cls.__name__} expected") from None
            raise ConfigError(f"{cls.__name__}: {explain(error)}") from None
        return document

    def _signed_part(self) -> dict[str, Any]:
        return {"kind": type(self).__name__, **self.model_dump(exclude={"signature"})}

    def _signed_by(self, key: Ed25519PrivateKey) -> Self:
        return self.model_copy(update={"signature": _text(sign(key, self._signed_part()))})

    def _verify(self) -> None:
        raise NotImplementedError


class EnrolmentRequest(_Document):
    """A site's public keys, by their names: what ``python -m client init`` writes.

    Attributes:
        site: The name it asks for.
        node_public_key: EC P-384, OpenSSH text; authenticates its node at the superlink.
        signing_public_key: Ed25519, base64; signs the rest, and later every reply.
        wrap_public_key: X25519, base64; will receive encryption keys.
        wrap_signature: The signing key's, over the wrap key: serves without this document.
        node_signature: The node key's, over the signing key: both are in one hand.
    """

    site: SiteName
    node_public_key: str
    signing_public_key: str
    wrap_public_key: str
    wrap_signature: str
    node_signature: str

    @classmethod
    def create(
        cls,
        site: str,
        *,
        signing_key: Ed25519PrivateKey,
        node_key: ec.EllipticCurvePrivateKey,
        wrap_key: X25519PrivateKey,
    ) -> EnrolmentRequest:
        """Make a site's request from its private keys, of which nothing is in it."""
        public, wrap = _raw(signing_key.public_key()), _raw(wrap_key.public_key())
        possession = canonical(_statement(NODE_PURPOSE, site, public))
        return cls(
            created=_now(),
            site=site,
            node_public_key=_openssh(node_key.public_key()),
            signing_public_key=public,
            wrap_public_key=wrap,
            wrap_signature=_text(sign(signing_key, _statement(WRAP_PURPOSE, site, wrap))),
            node_signature=_text(node_key.sign(possession, ec.ECDSA(hashes.SHA384()))),
        )._signed_by(signing_key)

    @property
    def signing_key(self) -> Ed25519PublicKey:
        """The key that verifies everything this site signs."""
        return _public(self.signing_public_key, Ed25519PublicKey, "signing_public_key")

    @property
    def wrap_key(self) -> X25519PublicKey:
        """The key that encryption keys are wrapped to."""
        return _public(self.wrap_public_key, X25519PublicKey, "wrap_public_key")

    @property
    def fingerprint(self) -> str:
        """What two people compare by telephone."""
        return fingerprint(self.signing_key)

    def _verify(self) -> None:
        verify(self.signing_key, self._signed_part(), _bytes(self.signature, "signature"))
        statement = _statement(WRAP_PURPOSE, self.site, _raw(self.wrap_key))
        verify(self.signing_key, statement, _bytes(self.wrap_signature, "wrap_signature"))
        possession = canonical(_statement(NODE_PURPOSE, self.site, self.signing_public_key))
        try:
            node = load_ssh_public_key(self.node_public_key.encode())
            if not (
                isinstance(node, ec.EllipticCurvePublicKey) and isinstance(node.curve, ec.SECP384R1)
            ):
                raise ConfigError("node_public_key is not an EC P-384 key")
            if _openssh(node) != self.node_public_key:  # its reader skips whatever follows the key
                raise ConfigError("node_public_key is not the key alone")
            node.verify(
                _bytes(self.node_signature, "node_signature"),
                possession,
                ec.ECDSA(hashes.SHA384()),
            )
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ConfigError("node_public_key is not a readable OpenSSH key") from error
        except InvalidSignature as error:
            raise SignatureError("node_signature was not made by node_public_key") from error


class JoinDocument(_Document):
    """What a site needs to take part, by ``python -m server admit``; the order key signs it.

    Attributes:
        federation: The federation's id, made once by ``python -m server init``.
        name: Its name for people.
        site: The admitted site.
        site_fingerprint: Of the site's signing key: the document serves no other.
        address: Where the site connects, ``host:port``.
        ca_certificate: PEM; the only authority whose server certificates the site accepts.
        order_public_key: Ed25519, base64; verifies this document and every order.
    """

    federation: Annotated[str, Field(min_length=1)]
    name: str
    site: SiteName
    site_fingerprint: str
    address: str
    ca_certificate: str
    order_public_key: str
    policy: FederationPolicy

    @classmethod
    def create(
        cls,
        request: EnrolmentRequest,
        order_key: Ed25519PrivateKey,
        *,
        federation: str,
        name: str,
        address: str,
        ca_certificate: str,
        policy: FederationPolicy,
    ) -> JoinDocument:
        """Admit a site whose request was checked."""
        return cls(
            created=_now(),
            federation=federation,
            name=name,
            site=request.site,
            site_fingerprint=request.fingerprint,
            address=address,
            ca_certificate=ca_certificate,
            order_public_key=_raw(order_key.public_key()),
            policy=policy,
        )._signed_by(order_key)

    @property
    def order_key(self) -> Ed25519PublicKey:
        """The key that verifies every order of this federation."""
        return _public(self.order_public_key, Ed25519PublicKey, "order_public_key")

    @property
    def fingerprint(self) -> str:
        """What two people compare by telephone."""
        return fingerprint(self.order_key)

    def _verify(self) -> None:
        verify(self.order_key, self._signed_part(), _bytes(self.signature, "signature"))
        try:
            x509.load_pem_x509_certificate(self.ca_certificate.encode())
        except ValueError as error:
            raise ConfigError("ca_certificate is not a readable PEM certificate") from error


PublicKey = TypeVar("PublicKey", Ed25519PublicKey, X25519PublicKey)


def _statement(purpose: str, site: str, key: str) -> dict[str, object]:
    return {"purpose": purpose, "site": site, "key": key}


def _raw(key: Ed25519PublicKey | X25519PublicKey) -> str:
    return _text(key.public_bytes(Encoding.Raw, PublicFormat.Raw))


def _openssh(key: ec.EllipticCurvePublicKey) -> str:
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def _public(text: str, kind: type[PublicKey], name: str) -> PublicKey:
    try:
        return kind.from_public_bytes(_bytes(text, name))
    except ValueError as error:
        raise ConfigError(f"{name} is not a {kind.__name__}") from error


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _bytes(text: str, name: str) -> bytes:
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError as error:
        raise ConfigError(f"{name} is not base64") from error
    if _text(data) != text:  # its last letter may have bits that no byte needs
        raise ConfigError(f"{name} is not base64 as it is written here")
    return data


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
