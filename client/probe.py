"""One verified HTTPS request to the coordinator: what it tells of address, certificate and clock.

Invariant: nothing of the site is in the request, and nothing that an unverified server says is
believed.
"""

from __future__ import annotations

import socket
import ssl
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPSConnection
from pathlib import Path

from cryptography import x509

# An empty 200 of flower-superlink; a gateway may hide it.
HEALTH_PATH = "/health"
TIMEOUT_SECONDS = 10
WARN_DAYS = 30

# OpenSSL's X509_V_ERR_* codes, for a person at a hospital.
REFUSALS = {
    9: "not valid yet: is this machine's clock right?",
    10: "expired; the coordinator renews it: python -m server init --renew",
    **dict.fromkeys((7, 18, 19, 20), "of another authority than that of the federation joined"),
    **dict.fromkeys((62, 64), "for other names than this; the coordinator's init --san adds one"),
}


@dataclass(frozen=True)
class Answer:
    """What was learnt.

    Attributes:
        problem: Why no answer came; empty where one did.
        refused: What is wrong with the server's certificate; empty where it was accepted, or none
            was seen.
        status: HTTP status; 0 without an answer.
        expiry: When the server's certificate ends; None without a verified connection.
        skew: This machine's clock minus the server's; None where the server told no time.
    """

    problem: str = ""
    refused: str = ""
    status: int = 0
    expiry: datetime | None = None
    skew: timedelta | None = None


def ask(address: str, ca_path: Path, seconds: float = TIMEOUT_SECONDS) -> Answer:
    """Connect, verify, ask for the server's health.

    Args:
        address: ``host:port``.
        ca_path: The only authority that is trusted.
        seconds: Patience for each step.
    """
    host, _, port = address.rpartition(":")
    try:
        trusted = ssl.create_default_context(cafile=ca_path)
    except OSError as error:
        return Answer(problem=f"is not asked: {ca_path.name} is not readable ({error.strerror})")
    connection = HTTPSConnection(host.strip("[]"), int(port), timeout=seconds, context=trusted)
    expiry = None
    try:
        connection.connect()
        expiry = _expiry(connection.sock)
        before = time.time()
        connection.request("GET", HEALTH_PATH)
        response = connection.getresponse()
        now = datetime.fromtimestamp((before + time.time()) / 2, UTC)
        skew = _skew(response.getheader("Date"), now)
        return Answer(status=response.status, expiry=expiry, skew=skew)
    except ssl.SSLCertVerificationError as error:
        refused = REFUSALS.get(error.verify_code, error.verify_message)
        return Answer(problem="shows a certificate that is not accepted", refused=refused)
    except (OSError, HTTPException) as error:
        return Answer(problem=_explain(error, seconds), expiry=expiry)
    finally:
        connection.close()


def ending_soon(address: str, ca_path: Path) -> list[str]:
    """Return a line for each of the coordinator's certificates that ends within 30 days."""
    try:
        authority = x509.load_pem_x509_certificate(ca_path.read_bytes()).not_valid_after_utc
    except (OSError, ValueError):  # no connection is made with it: that is told
        return []
    found = {
        "the federation's authority": (authority, "every site has to join anew"),
        "the coordinator's server": (ask(address, ca_path).expiry, "ask them to renew it"),
    }
    return [
        f"the certificate of {whose} ends on {expiry:%Y-%m-%d}: {remedy}"
        for whose, (expiry, remedy) in found.items()
        if expiry is not None and expiry - datetime.now(UTC) < timedelta(days=WARN_DAYS)
    ]


def _expiry(tls: socket.socket) -> datetime:
    assert isinstance(tls, ssl.SSLSocket)
    certificate = tls.getpeercert()
    assert certificate  # not empty, because it was verified
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)


def _skew(date: str | None, now: datetime) -> timedelta | None:
    try:
        told = parsedate_to_datetime(date or "")
    except ValueError:
        return None
    return now - (told if told.tzinfo else told.replace(tzinfo=UTC))


def _explain(error: OSError | HTTPException, seconds: float) -> str:
    if isinstance(error, socket.gaierror):
        return "has a name that is not known here (DNS)"
    if isinstance(error, ConnectionRefusedError):
        return "refuses the connection: nothing listens there"
    if isinstance(error, TimeoutError):
        return f"does not answer within {seconds:g} s: is a firewall between?"
    if isinstance(error, ssl.SSLEOFError | ConnectionError):
        return "ends the connection: is the line, or what is behind a gateway, down?"
    if isinstance(error, ssl.SSLError):
        return f"does not speak TLS as expected ({error.reason})"
    return f"does not answer as an HTTPS server ({type(error).__name__})"
