"""The federation that a site has joined: pinned once by a person, checked at every start.

Invariant: a :class:`Membership` that exists is of this site and of its signing key, and the
certificate file beside it is the one that the coordinator signed. A site belongs to one coordinator
until a person removes ``join.json``: no document of another replaces it.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from client.site_config import AUDIT_LOG, SIGNING_KEY, SiteConfig, check_address
from strategies.audit import AuditLog
from strategies.cli import one_line
from strategies.enrolment import FederationPolicy, JoinDocument
from strategies.errors import ConfigError, SignatureError
from strategies.files import write_atomic
from strategies.identity import fingerprint, load_signing_key, same_fingerprint

JOIN_FILE, CA_FILE = "join.json", "ca.pem"


@dataclass(frozen=True)
class Membership:
    """A site's place in a federation.

    Attributes:
        document: The coordinator's document, verified.
        address: Where this site connects, ``host:port``.
        ca_path: The only authority whose server certificates it accepts.
    """

    document: JoinDocument
    address: str
    ca_path: Path

    @property
    def federation(self) -> str:
        """The federation's id."""
        return self.document.federation

    @property
    def name(self) -> str:
        """The federation's name for people."""
        return self.document.name

    @property
    def order_key(self) -> Ed25519PublicKey:
        """The key that verifies every order."""
        return self.document.order_key

    @property
    def policy(self) -> FederationPolicy:
        """What the coordinator promised."""
        return self.document.policy


def read_membership(config: SiteConfig) -> Membership:
    """Read and check what ``python -m client join`` wrote.

    Raises:
        ConfigError: The site has joined nothing, a file was altered or is unreadable, or it is of
            another site or another signing key.
    """
    path = config.state_dir / JOIN_FILE
    again = f"python -m client join FILE --site {config.site}, with the coordinator's file"
    if not path.exists():
        raise ConfigError(
            f"site={config.site} has joined no federation: {JOIN_FILE} is missing", hint=again
        )
    document = _read(path, hint=f"restore it from a backup, or remove it and: {again}")
    _check_is_for(config, document, JOIN_FILE)
    ca_path = config.state_dir / CA_FILE
    try:
        same = ca_path.read_bytes() == document.ca_certificate.encode()
    except OSError as error:
        raise ConfigError(f"{CA_FILE} cannot be read ({error.strerror})", hint=again) from error
    if not same:
        raise ConfigError(f"{CA_FILE} is not the certificate that {JOIN_FILE} names", hint=again)
    return Membership(document, config.superlink or document.address, ca_path)


def join(config: SiteConfig, file: Path, expected: str | None = None) -> str:
    """Take the coordinator's document: check it, pin it, record it.

    The same document again changes nothing; a newer one of the same coordinator replaces it.

    Args:
        config: The site's file; its keys exist.
        file: The coordinator's ``NAME.join.json``.
        expected: The coordinator's fingerprint as told by telephone; None: compared afterwards.

    Returns:
        What to tell the person.

    Raises:
        ConfigError: The document is unreadable, altered, of another site or key, of another
            coordinator than before, older than the one in use, or not what was told by telephone.
        FederationError: The audit log cannot record it; then nothing has changed.
    """
    document = _read(file, hint="check its path, or ask the coordinator to send it again")
    _check_is_for(config, document, file.name)
    _check_fingerprint(document, expected)
    expiry = _check_usable(document, file.name)
    path = config.state_dir / JOIN_FILE
    if path.exists():
        _check_replaces(config, _read(path, hint=_leave(config)), document, file.name)
    text = document.to_json()
    ca_path = config.state_dir / CA_FILE
    if not (_holds(path, text) and _holds(ca_path, document.ca_certificate)):
        AuditLog(config.state_dir / AUDIT_LOG).append(
            "joined",
            federation=document.federation,
            coordinator=document.fingerprint,
            address=document.address,
            created=document.created,
        )
        # In this order a crash leaves a pair that read_membership refuses and join completes.
        write_atomic(ca_path, document.ca_certificate)
        write_atomic(path, text)
    told = (
        "it is the one that you gave"
        if expected is not None
        else "compare it with them by telephone"
    )
    return "\n".join(
        [
            f"federation   {one_line(f'{document.name} ({document.federation})', 80)}",
            f"superlink    {config.superlink or document.address}",
            f"coordinator  {document.fingerprint}  {told}",
            f"certificate  the federation's own authority is valid until {expiry:%Y-%m-%d}",
            f"Next: python -m client check --site {config.site}",
        ]
    )


def _read(path: Path, hint: str) -> JoinDocument:
    try:
        return JoinDocument.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read ({error.strerror})", hint=hint) from error
    except (ConfigError, SignatureError, UnicodeDecodeError) as error:
        reason = "not text" if isinstance(error, UnicodeDecodeError) else error
        raise ConfigError(f"{path.name}: {reason}", hint=hint) from None


def _holds(path: Path, text: str) -> bool:
    return path.is_file() and path.read_bytes() == text.encode()


def _leave(config: SiteConfig) -> str:
    return f"to leave the federation joined before, remove {config.state_dir / JOIN_FILE} yourself"


def _check_is_for(config: SiteConfig, document: JoinDocument, name: str) -> None:
    if document.site != config.site:
        raise ConfigError(
            f"{name} is for site={document.site}; expected site={config.site}",
            hint="each site has a join document of its own: ask the coordinator for yours",
        )
    own = fingerprint(load_signing_key(config.state_dir / SIGNING_KEY).public_key())
    if document.site_fingerprint != own:
        raise ConfigError(
            f"{name} is for signing key {document.site_fingerprint}; this site's is {own}",
            hint=f"send {config.site}.enroll.json to the coordinator and ask to be admitted anew",
        )


def _check_fingerprint(document: JoinDocument, expected: str | None) -> None:
    if expected is not None and not same_fingerprint(expected, document.fingerprint):
        raise ConfigError(
            f"coordinator's fingerprint={document.fingerprint}; expected {expected}",
            hint="read it out by telephone once more; if it still differs, do not use this file",
        )


def _check_usable(document: JoinDocument, name: str) -> datetime:
    """Refuse what could never connect; returns when the authority expires."""
    try:
        check_address(document.address)
    except ValueError as error:
        raise ConfigError(f"{name}: address={document.address}: {error}") from None
    certificate = x509.load_pem_x509_certificate(document.ca_certificate.encode())
    expiry = certificate.not_valid_after_utc
    if expiry <= datetime.now(UTC):
        raise ConfigError(
            f"{name}: ca_certificate expired on {expiry:%Y-%m-%d}",
            hint="check this machine's clock; else ask the coordinator for a new file",
        )
    return expiry


def _check_replaces(config: SiteConfig, old: JoinDocument, new: JoinDocument, name: str) -> None:
    """Refuse another coordinator, and an older document of the same."""
    if (old.order_public_key, old.federation) != (new.order_public_key, new.federation):
        raise ConfigError(
            f"{name} is of federation {new.name} (coordinator {new.fingerprint}); this site has "
            f"joined {old.name} (coordinator {old.fingerprint})",
            hint=_leave(config),
        )
    if new != old and _moment(new, name) <= _moment(old, JOIN_FILE):
        raise ConfigError(
            f"{name} was created {new.created}; expected later than {old.created}, as joined",
            hint="ask the coordinator for a new file; the one in use stays",
        )


def _moment(document: JoinDocument, name: str) -> datetime:
    try:
        moment = datetime.fromisoformat(document.created)
    except ValueError:
        raise ConfigError(f"{name}: created={document.created}: expected a time") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
