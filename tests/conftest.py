"""What all tests share: where things are, quiet libraries, one thread, and no network.

Invariant: a test that reaches for another machine fails and says which, whatever the code under
test catches. Loopback stays open: the end-to-end tests talk over it.
"""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports Flower, torch or a data library; child processes inherit it.
os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of public data and fixtures beside the checkout."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("the folder shared/ with data and fixtures is not beside this checkout")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _no_network() -> Iterator[None]:
    """Refuse every connection and name look-up that would leave this machine.

    ``pytest.fail`` raises no ``Exception``, so that a retry or fallback cannot swallow it.
    """
    open_functions = {
        name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")
    }
    look_up = socket.getaddrinfo

    def checked(name):
        def call(self, *arguments):
            address = arguments[-1]  # sendto's flags come before it
            if self.family in (socket.AF_INET, socket.AF_INET6):
                _require_loopback(address[0])
            return open_functions[name](self, *arguments)

        return call

    def checked_look_up(host, *arguments, **options):
        _require_loopback(host)
        return look_up(host, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        for name in open_functions:
            patch.setattr(socket.socket, name, checked(name))
        patch.setattr(socket, "getaddrinfo", checked_look_up)
        yield


def _require_loopback(host: str | bytes | None) -> None:
    name = host.decode() if isinstance(host, bytes) else host
    if name in (None, "", "localhost"):
        return
    try:
        address = ipaddress.ip_address(name)
        inside = address.is_loopback or address.is_unspecified
    except ValueError:
        inside = False
    if not inside:
        pytest.fail(f"host={name}: tests do not use the network; use loopback or a fake")
