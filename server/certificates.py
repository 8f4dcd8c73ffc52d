"""The federation's own certificate authority and the superlink's certificate, by RFC 5280.

Sites trust this authority and no other, so nothing is bought or published. The superlink's
certificate lives 397 days and is issued anew over the same key: one file changes, sites notice
nothing. The authority lives ten years; after that the federation is made anew.

Invariant: :func:`read_certificates` returns only a certificate that this authority issued, to the
key that lies beside it. Private keys are readable for their owner alone.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from strategies.errors import ConfigError
from strategies.files import write_atomic
from strategies.identity import read_secret

CA_KEY, CA_CERTIFICATE = "ca.key", "ca.pem"
SERVER_KEY, SERVER_CERTIFICATE = "server.key", "server.pem"
LOOPBACK = ("localhost", "127.0.0.1", "::1")

AUTHORITY_LIFE = timedelta(days=3652)
SERVER_LIFE = timedelta(days=397)
WARNING = timedelta(days=30)
# Clocks of sites may be behind; Flower's node authentication tolerates 5 minutes.
BACKDATED = timedelta(hours=1)

RENEW_HINT = "python -m server init --renew, then start the superlink again"
ANEW_HINT = "the authority cannot be renewed: make a new federation and enrol the sites anew"
DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"


@dataclass(frozen=True)
class Certificates:
    """The authority's certificate and the superlink's, which it issued."""

    authority: x509.Certificate
    server: x509.Certificate

    def expiries(self) -> list[str]:
        """Return one line a certificate: until when it serves."""
        return [f"{name} until {_date(end)}" for name, end, _ in self._ends()]

    def warnings(self, now: datetime | None = None) -> list[str]:
        """Return a line for each certificate that expires within 30 days, or has expired."""
        now = now or datetime.now(UTC)
        lines = []
        for name, end, hint in self._ends():
            if end <= now:
                lines.append(f"{name} expired on {_date(end)}; {hint}")
            elif end - now < WARNING:
                lines.append(f"{name} expires on {_date(end)}, in {(end - now).days} days; {hint}")
        return lines

    def require_valid(self, now: datetime | None = None) -> None:
        """Refuse certificates that no site would accept.

        Raises:
            ConfigError: One has expired or is not valid yet.
        """
        now = now or datetime.now(UTC)
        for name, end, hint in self._ends():
            if end <= now:
                raise ConfigError(f"{name} expired on {_date(end)}: sites refuse it", hint=hint)
        begin = max(self.authority.not_valid_before_utc, self.server.not_valid_before_utc)
        if begin > now:
            raise ConfigError(
                f"the certificates are valid from {_date(begin)}, and this machine's clock says "
                f"{_date(now)}",
                hint="set the clock",
            )

    @property
    def authority_pem(self) -> str:
        """The authority's certificate as join documents carry it."""
        return self.authority.public_bytes(Encoding.PEM).decode("ascii")

    @property
    def hosts(self) -> list[str]:
        """Return the names and addresses that the superlink's certificate is for."""
        names = self.server.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return [str(name.value) for name in names]

    def _ends(self) -> list[tuple[str, datetime, str]]:
        return [
            (CA_CERTIFICATE, self.authority.not_valid_after_utc, ANEW_HINT),
            (SERVER_CERTIFICATE, self.server.not_valid_after_utc, RENEW_HINT),
        ]


def create_authority(folder: Path, federation: str, now: datetime | None = None) -> None:
    """Make the authority's key and certificate where they are missing."""
    key = _create_key(folder / CA_KEY)
    if (folder / CA_CERTIFICATE).exists():
        return
    begin = (now or datetime.now(UTC)) - BACKDATED
    subject = _name(f"{federation} CA")
    certificate = (
        _builder(subject, subject, key.public_key(), begin, begin + AUTHORITY_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .sign(key, hashes.SHA384())
    )
    write_atomic(folder / CA_CERTIFICATE, certificate.public_bytes(Encoding.PEM))


def issue_server_certificate(
    folder: Path, federation: str, hosts: Sequence[str], now: datetime | None = None
) -> None:
    """Issue the superlink's certificate, replacing the one before; its key is kept.

    Args:
        folder: The coordinator's state folder, which has the authority.
        federation: The federation's id, shown in the certificate.
        hosts: DNS names and IP addresses beside those of loopback.
        now: The clock's time by default.

    Raises:
        ConfigError: The authority is missing, does not fit its key, or has expired; a host is
            neither a DNS name nor an address.
    """
    now = now or datetime.now(UTC)
    authority, authority_key = _certificate(folder / CA_CERTIFICATE), _key(folder / CA_KEY)
    if authority.public_key() != authority_key.public_key():
        raise ConfigError(f"{CA_KEY} is not the key of {CA_CERTIFICATE}", hint=_BACKUP)
    end = authority.not_valid_after_utc
    if end <= now:
        raise ConfigError(f"{CA_CERTIFICATE} expired on {_date(end)}", hint=ANEW_HINT)
    names = [general_name(host) for host in dict.fromkeys((*hosts, *LOOPBACK))]
    key = _create_key(folder / SERVER_KEY)
    identifier = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    begin = now - BACKDATED
    certificate = (
        _builder(
            _name(f"{federation} superlink"),
            authority.subject,
            key.public_key(),
            max(begin, authority.not_valid_before_utc),
            min(begin + SERVER_LIFE, end),
        )
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(digital_signature=True), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier),
            critical=False,
        )
        .sign(authority_key, hashes.SHA384())
    )
    write_atomic(folder / SERVER_CERTIFICATE, certificate.public_bytes(Encoding.PEM))


def read_certificates(folder: Path) -> Certificates:
    """Read the certificates that the superlink serves with, whatever the date.

    Raises:
        ConfigError: A file is missing or damaged, others may read the key, or the three do not
            belong together.
    """
    authority = _certificate(folder / CA_CERTIFICATE)
    server = _certificate(folder / SERVER_CERTIFICATE)
    try:
        server.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError) as error:
        raise ConfigError(
            f"{SERVER_CERTIFICATE} was not issued by {CA_CERTIFICATE}", hint=RENEW_HINT
        ) from error
    if server.public_key() != _key(folder / SERVER_KEY).public_key():
        raise ConfigError(f"{SERVER_KEY} is not the key of {SERVER_CERTIFICATE}", hint=RENEW_HINT)
    return Certificates(authority, server)


def general_name(host: str) -> x509.GeneralName:
    """Return a host as certificates name it.

    Raises:
        ConfigError: It is neither a DNS name nor an IP address.
    """
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.lower().split(".")
    if (
        len(host) > 253
        or labels[-1].isdecimal()
        or not all(re.fullmatch(DNS_LABEL, label) for label in labels)
    ):
        raise ConfigError(f"host {host!r}: expected a DNS name or an IP address")
    return x509.DNSName(host.lower())


_BACKUP = "restore both from a backup"


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    begin: datetime,
    end: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(
    *, digital_signature: bool = False, key_cert_sign: bool = False, crl_sign: bool = False
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _create_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Make an EC P-384 key at ``path`` (mode 0600), unless there is one, and return it."""
    if not path.exists():
        pem = ec.generate_private_key(ec.SECP384R1()).private_bytes(
            Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        )
        write_atomic(path, pem, mode=0o600)
    return _key(path)


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    content = read_secret(path)
    try:
        key = load_pem_private_key(content, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"private key {path.name} is not a readable PEM key") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"private key {path.name} is {type(key).__name__}; expected an EC key")
    return key


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read ({error.strerror})", hint=_hint(path)) from (
            error
        )
    except ValueError as error:
        raise ConfigError(f"{path.name} is not a PEM certificate", hint=_hint(path)) from error


def _hint(path: Path) -> str:
    return "restore it from a backup" if path.name == CA_CERTIFICATE else RENEW_HINT


def _date(moment: datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M} UTC"
