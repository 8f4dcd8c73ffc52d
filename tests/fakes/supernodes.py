"""What ``flower-supernode`` 1.41 wrote in each of its ends, and a program that plays it.

The texts were recorded from real processes over TLS; Python 3.11, OpenSSL 3.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

START = """\
\x1b[92mINFO \x1b[0m:      Starting Flower SuperNode
\x1b[93mWARNING \x1b[0m:   EXPERIMENTAL: SuperExec authentication is experimental and may change.
INFO:     Started server process [9590]
INFO:     Uvicorn running on http://127.0.0.1:18500 (Press CTRL+C to quit)
"""
ONLINE = "\x1b[92mINFO \x1b[0m:      SuperNode ID: 15395058933861323568\n"
OFFLINE = "\x1b[93mWARNING \x1b[0m:   Connection attempt failed, retrying in 0.49 seconds\n"
AGAIN = "\x1b[92mINFO \x1b[0m:      Connection successful after 28.91 seconds and 8 tries.\n"
GRACEFUL = "\x1b[92mINFO \x1b[0m:      SuperNode terminated gracefully.\n"
GOODBYE = """\
INFO:     Shutting down
INFO:     Waiting for application shutdown.
\x1b[92mINFO \x1b[0m:      FastAPI lifespan: shutdown
INFO:     Finished server process [9590]
"""


def refused_at_start(words: str) -> str:
    return (
        f"{START}\x1b[91mERROR \x1b[0m:     Exit Code: 305\n"
        f"Failed to initialize the connection to the SuperLink.\n{words}\n"
        "The SuperNode could not establish a connection to the SuperLink.\n\n"
        "For more information, visit: "
        "<https://flower.ai/docs/framework/1.41/en/ref-exit-codes/305.html>\n"
        f"{GOODBYE}"
    )


def certificate(words: str) -> str:
    return "[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed: " + words + " (_ssl.c:1006)"


def lost(words: str) -> str:
    """The end of a node that was connected."""
    return (
        f"{START}{ONLINE}{OFFLINE}\x1b[93mWARNING \x1b[0m:   Giving up reconnection after 4.62 "
        f"seconds and 4 tries.\n\x1b[91mERROR \x1b[0m:     {words}\n"
    )


# Exit code and text of each end.
NOT_ADMITTED = (1, refused_at_start("[code: 2004] Failed to activate SuperNode."))
OTHER_AUTHORITY = (1, refused_at_start(certificate("unable to get local issuer certificate")))
EXPIRED = (1, refused_at_start(certificate("certificate has expired")))
NOT_YET_VALID = (1, refused_at_start(certificate("certificate is not yet valid")))
OTHER_NAME = (
    1,
    refused_at_start(certificate("IP address mismatch, certificate is not valid for '127.0.0.1'.")),
)
NO_TLS = (1, refused_at_start("[SSL: WRONG_VERSION_NUMBER] wrong version number (_ssl.c:1006)"))
NOT_FOUND = (
    1,
    refused_at_start(
        "Client error '404 Not Found' for url 'https://127.0.0.1:18403/v1/fleet/activate-node'\n"
        "For more information check: https://developer.mozilla.org/en-US/docs/Web/HTTP/Status/404"
    ),
)
BAD_KEY = (
    1,
    "\x1b[92mINFO \x1b[0m:      Starting Flower SuperNode\n"
    "\x1b[91mERROR \x1b[0m:     Exit Code: 302\nUnable to parse the private key file.\n",
)
NO_CA_FILE = (
    1,
    "\x1b[92mINFO \x1b[0m:      Starting Flower SuperNode\n"
    "\x1b[91mERROR \x1b[0m:     Path argument `--root-certificates` does not point to a file.\n",
)
BAD_CA_FILE = (
    1,
    f"{START}Traceback (most recent call last):\n"
    '  File "/home/site/.venv/bin/flower-supernode", line 6, in <module>\n'
    "    verify.load_verify_locations(cadata=root_certificates)\n"
    "ssl.SSLError: no start line: cadata does not contain a certificate (_ssl.c:4020)\n",
)
TURNED_AWAY = (0, START + ONLINE + GRACEFUL + GOODBYE)
LOST_AUTHORITY = (1, lost(certificate("unable to get local issuer certificate")))
LOST_CALL = (
    1,
    lost(
        "Server error '500 Internal Server Error' for url "
        "'https://127.0.0.1:18420/v1/fleet/pull-messages'\n"
        "For more information check: https://developer.mozilla.org/en-US/docs/Web/HTTP/Status/500"
    ),
)
LOST_HEARTBEAT = (
    1,
    f"{START}{ONLINE}Exception in thread Thread-4 (_run):\nTraceback (most recent call last):\n"
    '  File "/home/site/.venv/lib/python3.11/site-packages/httpx/_models.py", line 829\n'
    "httpx.HTTPStatusError: Server error '500 Internal Server Error' for url "
    "'https://127.0.0.1:18420/v1/fleet/send-node-heartbeat'\n"
    "For more information check: https://developer.mozilla.org/en-US/docs/Web/HTTP/Status/500\n"
    f"{GRACEFUL}{GOODBYE}",
)
LOST_ADMISSION = (
    1,
    LOST_HEARTBEAT[1].replace(
        "Server error '500 Internal Server Error", "Client error '401 Unauthorized"
    ),
)

SCRIPT = """\
import json, os, signal, sys, time
folder = os.path.dirname(__file__)
with open(f"{folder}/starts.jsonl", "a") as starts:
    names = [n for n in os.environ if n.startswith("FLWR_")]
    record = {"words": sys.argv[1:], "environment": {n: os.environ[n] for n in names}}
    starts.write(json.dumps(record) + "\\n")
number = len(open(f"{folder}/starts.jsonl").readlines())
plan = json.load(open(f"{folder}/plan.json"))
code, text = plan[min(number, len(plan)) - 1]
if code == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(text, end="", flush=True)
if not isinstance(code, int):
    time.sleep(600)
sys.exit(code)
"""


class FakeProgram:
    """A program on disk that plays ends in turn, the last one for ever.

    An end is an exit code and a text; in place of the code, ``stays`` keeps the process until it is
    told to leave, and ``stubborn`` also then.
    """

    def __init__(self, folder: Path, *plan: tuple[int | str, str]) -> None:
        folder.mkdir()
        self._folder = folder
        (folder / "plan.json").write_text(json.dumps(plan))
        (folder / "program.py").write_text(SCRIPT)
        self.command = (sys.executable, str(folder / "program.py"))

    def starts(self) -> list[dict[str, Any]]:
        """Return each start's words and Flower's part of its environment."""
        path = self._folder / "starts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
