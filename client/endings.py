"""Why a supernode ended, read from its exit code and log, and whether waiting mends it.

Flower's process exits with 1 for every error; its own numbers (305 for a connection, 302 for a key)
and those of the coordinator's answer (2004) are in the log alone (flwr 1.41).
"""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass
from typing import Literal

from client.site_config import NODE_KEY
from strategies.cli import one_line

CERTIFICATE = re.compile(r"certificate verify failed: (?P<reason>.*?)\.? \(_ssl")
ANSWER = re.compile(r"(?:Client|Server) error '(.*?)' for url '\S*/([\w-]+)'")
# What to do, and whether a person at this site can; by OpenSSL's words.
CERTIFICATE_HINTS = {
    "has expired": ("the coordinator renews it: python -m server init --renew", False),
    "not yet valid": ("is this machine's clock right?", False),
    "not valid for": (
        "the coordinator adds this name: python -m server init --san; or correct superlink in the "
        "site's file",
        True,
    ),
    "": (
        "it is of another authority than the one joined: ask the coordinator for a new join "
        "document, unless somebody is in between",
        True,
    ),
}


@dataclass(frozen=True)
class Ending:
    """Why a supernode ended.

    Attributes:
        kind: ``hopeless``: waiting does not mend it. ``refused``: the coordinator turned the node
            away, which passes if an earlier process of the site still counts as active. ``other``.
        reason: One line without paths.
        hint: What a person can do; empty where nobody need do anything.
        fixable: It is a person at this site who can.
    """

    kind: Literal["hopeless", "refused", "other"]
    reason: str
    hint: str = ""
    fixable: bool = False


def judge(exit_code: int | None, text: str) -> Ending:
    """Tell why a supernode ended, from its exit code and the end of its log.

    Flower's process exits with 1 for every error; its own numbers (305 for a connection, 302 for a
    key) and those of the coordinator's answer (2004) are in the log alone.
    """
    if refused := CERTIFICATE.search(text):
        reason = refused["reason"]
        known = next((name for name in CERTIFICATE_HINTS if name in reason), "")
        hint, fixable = CERTIFICATE_HINTS[known]
        return Ending("hopeless", f"its certificate is refused: {one_line(reason)}", hint, fixable)
    if "WRONG_VERSION_NUMBER" in text:
        return Ending(
            "hopeless",
            "it does not speak TLS",
            "is it the coordinator's address and port, and no proxy's?",
            fixable=True,
        )
    if "Exit Code: 302" in text:
        return Ending(
            "hopeless",
            f"{NODE_KEY} is not a key that a node can use",
            "restore it from a backup, or enrol anew",
            fixable=True,
        )
    if "[code: 2004]" in text:
        return Ending(
            "refused",
            "not admitted, revoked, or running elsewhere",
            "end the other process of this site, or ask the coordinator: "
            "python -m server status shows the sites",
        )
    status, call = (ANSWER.findall(text) or [("", "")])[-1]
    if exit_code == 0 or status.startswith("401"):
        # A node that nobody told to leave does so when its requests are answered with HTTP 401.
        return Ending(
            "refused",
            "turned away (HTTP 401): revoked, unknown there, or this machine's clock is wrong",
            "python -m client check compares the clocks; ask the coordinator whether it knows "
            "this site",
        )
    if status:
        return Ending("other", f"the coordinator answered {one_line(status, 80)} to {call}")
    if exit_code is not None and exit_code < 0:
        return Ending("other", f"ended by {signal.Signals(-exit_code).name}")
    return Ending("other", f"exit code {exit_code}: {_last_words(text)}")


def _last_words(text: str) -> str:
    """Return the line that says most about a failure, without paths."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    opening = "Failed to initialize the connection to the SuperLink."
    if opening in lines[:-1]:
        words = lines[lines.index(opening) + 1]
    else:
        # uvicorn says goodbye in lines of "INFO:".
        words = next((line for line in reversed(lines) if not line.startswith("INFO")), "no output")
    return one_line(re.sub(r"'?\S*/\S*", "…", words.removeprefix("ERROR :")), 200)
