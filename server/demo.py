"""``python -m server init --demo``: a whole federation on this machine, by the usual commands.

Invariant: nothing is done that a person could not type. Each command is printed, then run in a
process of its own; what is there already stays, so a second run changes nothing.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

from server.federation_file import FEDERATION
from server.provisioning import DEFAULT_PORT, JOIN_SUFFIX
from strategies.errors import FederationError

SITES = ("A", "B", "C")
NAME = "demo"


def demonstrate(state_dir: Path, port: int | None, state_words: list[str]) -> str:
    """Make a federation of three sites; prints each step.

    Args:
        state_dir: The coordinator's folder.
        port: flower-superlink's; sites on this machine connect to it without a gateway.
        state_words: ``--state-dir DIR``, if a person typed it.

    Returns:
        The commands to type next.

    Raises:
        FederationError: A command did not succeed; its own message stands above this one's.
    """
    address: list[str] = []
    if port is not None or not (state_dir / FEDERATION).exists():
        number = str(DEFAULT_PORT if port is None else port)
        address = ["--address", f"127.0.0.1:{number}", "--port", number]
    _run("server", "init", "--name", NAME, *address, *state_words)
    for site in SITES:
        made = ["--allow-unprotected"] if not _site_file(site).exists() else []
        asked = _run("client", "init", "--site", site, *made)
        request = Path(_field(asked, "request"))
        known = _field(asked, "fingerprint")
        answered = _run(
            "server", "admit", str(request), "--fingerprint", known.split()[0], *state_words
        )
        join = request.with_name(f"{site}{JOIN_SUFFIX}")
        known = _field(answered, "coordinator")
        _run("client", "join", str(join), "--site", site, "--fingerprint", known.split()[0])
    words = shlex.join(state_words)
    lines = [
        f"python -m server superlink {words}",
        *(f"python -m client --site {site}" for site in SITES),
        "python -m server run --output runs/demo --set num-server-rounds=2 --set model.size=nano "
        f"{words}",
    ]
    return "\n".join(
        ["Next, each in a terminal of its own:", *(f"  {line.rstrip()}" for line in lines)]
    )


def _run(package: str, *words: str) -> str:
    """Print and run one command line; returns what it said, which is printed too."""
    print(f"$ python -m {shlex.join([package, *words])}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", package, *words], stdout=subprocess.PIPE, text=True, check=False
    )
    print(done.stdout, flush=True)
    if done.returncode:
        error = FederationError(
            f"`python -m {package} {words[0]}` ended with exit code {done.returncode}",
            hint="its message is above",
        )
        error.exit_code = done.returncode
        raise error
    return done.stdout


def _field(said: str, name: str) -> str:
    """Return what a command said on the line that begins with ``name``."""
    for line in said.splitlines():
        first, _, rest = line.partition(" ")
        if first == name:
            return rest.strip()
    raise FederationError(f"the command above did not say its {name}")


def _site_file(site: str) -> Path:
    """Return where ``python -m client`` looks for a site's file."""
    beside = Path(__file__).resolve().parent.parent / "client" / "sites"
    return Path(os.environ.get("FEDERATION_SITES") or beside) / f"{site}.toml"
