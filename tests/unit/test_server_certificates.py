"""The federation's authority and the superlink's certificate: what a client of them accepts."""

from __future__ import annotations

import ipaddress
import socket
import ssl
import stat
import threading
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from server.certificates import (
    create_authority,
    general_name,
    issue_server_certificate,
    read_certificates,
)
from strategies.errors import ConfigError

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
HOSTS = ("hub.example.org", "192.0.2.7", "2001:db8::7")


@pytest.fixture
def folder(tmp_path):
    create_authority(tmp_path, "lungs-01", NOW)
    issue_server_certificate(tmp_path, "lungs-01", HOSTS, NOW)
    return tmp_path


def certificate(path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


def handshake(folder, host: str, ca_file=None) -> str:
    """Connect to a TLS server on loopback as a strict client does; returns the error or ''."""
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(folder / "server.pem", folder / "server.key")
    client = ssl.create_default_context(cafile=ca_file or folder / "ca.pem")
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            try:
                serving.wrap_socket(connection, server_side=True).close()
            except OSError:
                connection.close()  # the client hung up

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            with socket.create_connection(listener.getsockname(), timeout=10) as plain:
                client.wrap_socket(plain, server_hostname=host).close()
        except ssl.SSLCertVerificationError as error:
            return error.verify_message
        finally:
            thread.join()
    return ""


def test_private_keys_are_for_their_owner_and_certificates_for_all(folder):
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"ca.key": 0o600, "ca.pem": 0o644, "server.key": 0o600, "server.pem": 0o644}
    for name in ("ca.pem", "server.pem"):
        key = certificate(folder / name).public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey)
        assert isinstance(key.curve, ec.SECP384R1)


def test_the_authority_may_sign_certificates_and_nothing_below_it(folder):
    extensions = certificate(folder / "ca.pem").extensions
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca, basic.value.path_length) == (True, True, 0)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value.key_cert_sign) == (True, True)
    assert not usage.value.digital_signature


def test_the_superlinks_certificate_serves_and_does_nothing_else(folder):
    authority, server = certificate(folder / "ca.pem"), certificate(folder / "server.pem")
    extensions = server.extensions
    basic = extensions.get_extension_for_class(x509.BasicConstraints)
    assert (basic.critical, basic.value.ca) == (True, False)
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert (usage.critical, usage.value.digital_signature) == (True, True)
    assert not usage.value.key_cert_sign
    purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(purposes) == [ExtendedKeyUsageOID.SERVER_AUTH]
    own = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
    points_to = extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value
    assert points_to.key_identifier == own
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["hub.example.org", "localhost"]
    assert names.get_values_for_type(x509.IPAddress) == [
        ipaddress.ip_address(text) for text in ("192.0.2.7", "2001:db8::7", "127.0.0.1", "::1")
    ]


def test_lives_are_ten_years_and_397_days(folder):
    lives = [
        certificate(folder / name).not_valid_after_utc - NOW for name in ("ca.pem", "server.pem")
    ]
    assert [life.days for life in lives] == [3651, 396]
    for name in ("ca.pem", "server.pem"):
        assert certificate(folder / name).not_valid_before_utc < NOW - timedelta(minutes=30)


@pytest.mark.parametrize("host", [*HOSTS, "localhost", "127.0.0.1", "::1"])
def test_a_strict_client_that_trusts_the_authority_connects(folder, host):
    assert handshake(folder, host) == ""


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("hub.example.com", "Hostname mismatch, certificate is not valid for 'hub.example.com'."),
        ("192.0.2.8", "IP address mismatch, certificate is not valid for '192.0.2.8'."),
    ],
)
def test_another_host_is_refused(folder, host, reason):
    assert handshake(folder, host) == reason


def test_a_client_of_another_authority_refuses(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    create_authority(other, "lungs-01")
    # Of the same name: only the key tells them apart.
    assert handshake(folder, "localhost", other / "ca.pem") != ""


def test_an_expired_certificate_is_refused_and_a_renewed_one_accepted(folder):
    issue_server_certificate(folder, "lungs-01", HOSTS, NOW)
    key, authority = (folder / "server.key").read_bytes(), (folder / "ca.pem").read_bytes()
    create_authority(folder, "lungs-01", NOW - 500 * DAY)
    assert (folder / "ca.pem").read_bytes() == authority  # one that is there stays

    (folder / "ca.pem").unlink()
    create_authority(folder, "lungs-01", NOW - 500 * DAY)
    issue_server_certificate(folder, "lungs-01", HOSTS, NOW - 400 * DAY)
    assert handshake(folder, "localhost") == "certificate has expired"
    old = certificate(folder / "server.pem").serial_number

    issue_server_certificate(folder, "lungs-01", HOSTS, NOW)
    assert handshake(folder, "localhost") == ""
    assert certificate(folder / "server.pem").serial_number != old
    assert (folder / "server.key").read_bytes() == key


def test_no_certificate_outlives_its_authority(tmp_path):
    create_authority(tmp_path, "lungs-01", NOW - 3600 * DAY)
    issue_server_certificate(tmp_path, "lungs-01", HOSTS, NOW)
    ends = {certificate(tmp_path / name).not_valid_after_utc for name in ("ca.pem", "server.pem")}
    assert len(ends) == 1
    with pytest.raises(ConfigError, match=r"^ca\.pem expired on ") as caught:
        issue_server_certificate(tmp_path, "lungs-01", HOSTS, NOW + 60 * DAY)
    assert "enrol the sites anew" in caught.value.hint


@pytest.mark.parametrize(("days", "expected"), [(366, 0), (368, 1), (396, 1), (398, 1), (3700, 2)])
def test_warnings_begin_30_days_before_the_end(folder, days, expected):
    lines = read_certificates(folder).warnings(NOW + days * DAY)
    assert len(lines) == expected
    for line in lines[-1:]:
        assert line.startswith("server.pem expire")
        assert "python -m server init --renew" in line
    if days == 368:
        assert ", in 28 days; " in lines[0]
    if days == 398:
        assert "server.pem expired on " in lines[0]


def test_the_authoritys_end_is_warned_of_without_the_hint_to_renew(folder):
    [line] = [
        line
        for line in read_certificates(folder).warnings(NOW + 3640 * DAY)
        if line.startswith("ca.pem")
    ]
    assert "expires on " in line
    assert "--renew" not in line


def test_the_date_is_checked_where_a_certificate_is_used(folder):
    certificates = read_certificates(folder)
    certificates.require_valid()
    certificates.require_valid(NOW + 395 * DAY)
    with pytest.raises(ConfigError, match=r"^server\.pem expired on .*: sites refuse it$") as error:
        certificates.require_valid(NOW + 397 * DAY)
    assert error.value.hint.startswith("python -m server init --renew")
    with pytest.raises(ConfigError, match=r"valid from .* this machine's clock says") as error:
        certificates.require_valid(NOW - DAY)
    assert error.value.hint == "set the clock"


def test_the_certificate_says_what_it_is_for(folder):
    certificates = read_certificates(folder)
    assert certificates.hosts == [*HOSTS, "localhost", "127.0.0.1", "::1"]
    ca, server = certificates.expiries()
    assert ca.startswith("ca.pem until 20")
    assert server.startswith("server.pem until 20")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ca.pem", "ca.pem cannot be read (No such file or directory)"),
        ("server.pem", "server.pem cannot be read (No such file or directory)"),
        ("server.key", "secret file server.key cannot be read (No such file or directory)"),
    ],
)
def test_a_missing_file_is_named(folder, name, reason):
    (folder / name).unlink()
    with pytest.raises(ConfigError) as caught:
        read_certificates(folder)
    assert str(caught.value) == reason


@pytest.mark.parametrize("name", ["ca.pem", "server.pem", "server.key"])
@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_damaged_file_is_named(folder, name, content):
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=rf"(^|private key ){name} is not a "):
        read_certificates(folder)


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_may_read_is_not_used(folder, mode):
    (folder / "server.key").chmod(mode)
    with pytest.raises(ConfigError, match=rf"server\.key has mode {mode:04o}"):
        read_certificates(folder)
    (folder / "server.key").chmod(0o600)
    (folder / "ca.key").chmod(mode)
    with pytest.raises(ConfigError, match=rf"ca\.key has mode {mode:04o}"):
        issue_server_certificate(folder, "lungs-01", HOSTS)


def test_files_that_do_not_belong_together_are_refused(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    create_authority(other, "lungs-01")
    issue_server_certificate(other, "lungs-01", HOSTS)

    own = (folder / "server.key").read_bytes()
    (folder / "server.key").write_bytes((other / "server.key").read_bytes())
    with pytest.raises(ConfigError, match=r"^server\.key is not the key of server\.pem$"):
        read_certificates(folder)
    (folder / "server.key").write_bytes(own)

    (folder / "server.pem").write_bytes((other / "server.pem").read_bytes())
    with pytest.raises(ConfigError, match=r"^server\.pem was not issued by ca\.pem$"):
        read_certificates(folder)

    (folder / "ca.key").write_bytes((other / "ca.key").read_bytes())
    with pytest.raises(ConfigError, match=r"^ca\.key is not the key of ca\.pem$"):
        issue_server_certificate(folder, "lungs-01", HOSTS)


def test_a_key_of_another_kind_is_refused(folder):
    pem = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    )
    (folder / "server.key").write_bytes(pem)
    with pytest.raises(ConfigError, match=r"server\.key is Ed25519PrivateKey; expected an EC key"):
        read_certificates(folder)


@pytest.mark.parametrize(
    "host",
    ["", " ", "a b", "hub_1", "-hub", "hub-", "*.example.org", "300.1.1.1", "1.2", "hub.", "ü.de"],
)
def test_what_is_no_host_is_refused(host):
    with pytest.raises(ConfigError, match=r"expected a DNS name or an IP address"):
        general_name(host)


@pytest.mark.parametrize("host", ["a" * 64, ".".join(["a" * 60] * 5)])
def test_what_is_too_long_for_a_host_is_refused(host):
    with pytest.raises(ConfigError, match=r"expected a DNS name or an IP address"):
        general_name(host)


def test_names_are_lower_case_and_addresses_are_addresses():
    assert general_name("Hub.Example.ORG") == x509.DNSName("hub.example.org")
    assert general_name("::1") == x509.IPAddress(ipaddress.ip_address("::1"))
