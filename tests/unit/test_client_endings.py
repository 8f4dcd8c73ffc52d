"""Each end that a real supernode had is told in one line, and whether waiting mends it."""

from __future__ import annotations

import re

import pytest

from client.endings import judge
from fakes import supernodes


@pytest.mark.parametrize(
    ("end", "kind", "fixable", "reason", "hint"),
    [
        (
            supernodes.NOT_ADMITTED,
            "refused",
            False,
            "not admitted, revoked, or running elsewhere",
            "end the other process of this site",
        ),
        (supernodes.TURNED_AWAY, "refused", False, "turned away (HTTP 401): revoked", "clocks"),
        (supernodes.LOST_ADMISSION, "refused", False, "turned away (HTTP 401): revoked", "clocks"),
        (
            supernodes.OTHER_AUTHORITY,
            "hopeless",
            True,
            "its certificate is refused: unable to get local issuer certificate",
            "ask the coordinator for a new join document",
        ),
        (supernodes.LOST_AUTHORITY, "hopeless", True, "unable to get local issuer", "new join"),
        (supernodes.EXPIRED, "hopeless", False, "certificate has expired", "init --renew"),
        (supernodes.NOT_YET_VALID, "hopeless", False, "is not yet valid", "clock right?"),
        (
            supernodes.OTHER_NAME,
            "hopeless",
            True,
            "IP address mismatch, certificate is not valid for '127.0.0.1'",
            "init --san",
        ),
        (supernodes.NO_TLS, "hopeless", True, "it does not speak TLS", "address and port"),
        (supernodes.BAD_KEY, "hopeless", True, "node.key is not a key", "restore it"),
        (supernodes.NOT_FOUND, "other", False, "answered 404 Not Found to activate-node", ""),
        (supernodes.LOST_CALL, "other", False, "500 Internal Server Error to pull-messages", ""),
        (supernodes.LOST_HEARTBEAT, "other", False, "Server Error to send-node-heartbeat", ""),
        (supernodes.NO_CA_FILE, "other", False, "exit code 1: Path argument", ""),
        (supernodes.BAD_CA_FILE, "other", False, "exit code 1: ssl.SSLError: no start line", ""),
        ((-9, supernodes.START), "other", False, "ended by SIGKILL", ""),
        ((1, ""), "other", False, "exit code 1: no output", ""),
    ],
)
def test_an_end_is_told_in_one_line(end, kind, fixable, reason, hint):
    code, text = end
    ending = judge(code, re.sub(r"\x1b\[\d+m", "", text))
    assert (ending.kind, ending.fixable) == (kind, fixable)
    assert reason in ending.reason
    assert hint in ending.hint
    assert bool(hint) == bool(ending.hint)
    assert "\n" not in ending.reason
    assert "/" not in ending.reason, "a path or an address"


def test_last_words_are_cut():
    assert len(judge(1, "word " * 100).reason) < 230
