"""A coordinator as a site sees it: an authority, join documents, an HTTPS server on loopback."""

from __future__ import annotations

import http.server
import ipaddress
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from strategies.enrolment import EnrolmentRequest, FederationPolicy, JoinDocument

DAY = timedelta(days=1)


class Coordinator:
    """Its keys are made when it is; ``admit`` and ``server`` vary what a test names."""

    def __init__(self, *, days: float = 3650, federation: str = "f1") -> None:
        self.order_key = Ed25519PrivateKey.generate()
        self.federation = federation
        self._key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{federation} CA")])
        self._ca = self._certificate(name, name, self._key, days, None)
        self.ca_pem = self._ca.public_bytes(Encoding.PEM).decode()

    def admit(self, request: EnrolmentRequest, **changes) -> JoinDocument:
        """Answer a request."""
        values = {
            "federation": self.federation,
            "name": "lungs",
            "address": "127.0.0.1:1",
            "ca_certificate": self.ca_pem,
            "policy": FederationPolicy(),
            **changes,
        }
        return JoinDocument.create(request, self.order_key, **values)

    @contextmanager
    def server(
        self,
        folder: Path,
        *,
        days: float = 397,
        begin: timedelta = -DAY,
        host: str = "127.0.0.1",
        status: int = 200,
        ahead: timedelta | None = timedelta(0),
        issuer: Coordinator | None = None,
        self_signed: bool = False,
    ) -> Iterator[str]:
        """Serve HTTPS on loopback and yield the address.

        Args:
            folder: Where the certificate is written.
            days: Life of the server's certificate from now; negative: it has expired.
            begin: When its life begins, from now.
            host: What the certificate is for.
            status: What every request gets.
            ahead: The server's clock, from ours; None: it tells no time.
            issuer: Whose authority signs the certificate.
            self_signed: It is nobody's authority.
        """
        signer = issuer or self
        key = signer._key if self_signed else ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "server")])
        authority = name if self_signed else signer._ca.subject
        certificate = signer._certificate(name, authority, key, days, host, begin)
        path = folder / "server-for-test.pem"
        private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        path.write_bytes(private + certificate.public_bytes(Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        with serving(status, ahead, context) as address:
            yield address

    def _certificate(
        self,
        subject: x509.Name,
        issuer: x509.Name,
        key: ec.EllipticCurvePrivateKey,
        days: float,
        host: str | None,
        begin: timedelta = -DAY,
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        end = now + days * DAY
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(min(now + begin, end - DAY))
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
        )
        if host is not None:
            names = [x509.IPAddress(ipaddress.ip_address(host))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(self._key, hashes.SHA256())


@contextmanager
def serving(
    status: int = 200, ahead: timedelta | None = timedelta(0), tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """Answer every GET on loopback with ``status`` and a Date; yield ``host:port``."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(status if self.path == "/health" else 418)
            if ahead is not None:
                moment = datetime.now(UTC) + ahead
                self.send_header("Date", format_datetime(moment, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, *arguments) -> None:
            pass  # a client that refuses the certificate hangs up

    server = Server(("127.0.0.1", 0), Handler)
    if tls is not None:
        server.socket = tls.wrap_socket(
            server.socket, server_side=True, do_handshake_on_connect=False
        )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
