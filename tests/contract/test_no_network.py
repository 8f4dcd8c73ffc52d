"""The guard of tests/conftest.py: no test leaves this machine, loopback stays open."""

from __future__ import annotations

import socket
import urllib.request

import pytest


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1"])
def test_a_connection_to_another_machine_fails_the_test(address):
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with (
        socket.socket(family) as probe,
        pytest.raises(pytest.fail.Exception, match=f"host={address}: tests do not use"),
    ):
        probe.connect((address, 80))


def test_a_datagram_to_another_machine_fails_the_test():
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe,
        pytest.raises(pytest.fail.Exception, match=r"host=192\.0\.2\.1"),
    ):
        probe.sendto(b"x", ("192.0.2.1", 53))


def test_code_that_catches_every_error_cannot_hide_a_download():
    def with_a_fallback():
        try:
            urllib.request.urlopen("https://example.com/data.npz")
        except Exception:
            return "fallback"

    with pytest.raises(pytest.fail.Exception, match=r"host=example\.com"):
        with_a_fallback()


def test_loopback_is_open():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for host in ("127.0.0.1", "localhost"):
            socket.create_connection((host, port), timeout=5).close()
