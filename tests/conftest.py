"""What all tests share: quiet libraries, one thread, no network, and a list of allowed skips.

Invariant: a test that reaches for another machine fails and says which, whatever the code under
test catches. Loopback stays open: the end-to-end tests talk over it.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports Flower, torch or a data library; child processes inherit it.
os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
}

# No test asserts a time, and on a busy machine any example may take long.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Asserts in shared helpers explain themselves as those in tests do.
pytest.register_assert_rewrite("fakes", "faults.real_processes")

# Under nohup, or in the background of a script, these are ignored, here and in all child processes.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)

REPOSITORY = Path(__file__).resolve().parent.parent
# Reasons for which a test may be skipped, one a line.
LISTED_SKIPS = Path(__file__).with_name("skips.txt")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fail-on-unlisted-skips",
        action="store_true",
        help=f"fail when a test is skipped for a reason that {LISTED_SKIPS.name} does not have",
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport]:
    report = yield
    if item.config.getoption("--fail-on-unlisted-skips") and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason not in LISTED_SKIPS.read_text(encoding="utf-8").splitlines():
            report.outcome = "failed"
            report.longrepr = (
                f"skipped for a reason that {LISTED_SKIPS.name} does not have: {reason}"
            )
    return report


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root."""
    return REPOSITORY


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
