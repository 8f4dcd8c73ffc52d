"""The supernode's life: started, watched by its log and exit code, started anew where that helps.

Invariant: every end that nobody asked for is a failure. One that waiting may mend (a network, a
lease that has not run out) is tried again with exponential back-off and full jitter for as long as
the site's file says; one that it cannot mend raises at once. The log says once that the coordinator
cannot be reached and once that it can again.
"""

from __future__ import annotations

import logging
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from client.endings import judge
from client.membership import Membership
from client.probe import ask, ending_soon
from client.site_config import NODE_KEY, SiteConfig
from strategies.cli import one_line
from strategies.errors import ConfigError, FederationError

log = logging.getLogger(__name__)

PROGRAM = (sys.executable, "-m", "client.supernode")
LOG_FILE = "supernode.log"
GRACE_SECONDS = 10  # a node that is told to leave takes up to 5 s
PATIENCE_SECONDS = 10  # before a silent coordinator is worth a line
# A node that vanished counts as active for 60 s, and its key cannot be active twice.
LEASE_SECONDS = 90
LOOK_SECONDS = 86_400.0
BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 2.0, 30.0
TAIL_BYTES = 64 * 1024

# What flower-supernode writes (flwr 1.41).
ONLINE = re.compile(r"SuperNode ID: |Connection successful after ")
OFFLINE = re.compile(r"Connection attempt failed, retrying in ")


class Supernode:
    """A running ``flower-supernode`` and what it has said.

    Attributes:
        port: Of its local API, which hands out tasks.
    """

    def __init__(self, process: subprocess.Popen[bytes], port: int, path: Path) -> None:
        self._process, self._path = process, path
        self._output = path.open(errors="replace")
        self.port = port

    @property
    def exit_code(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.poll()

    def news(self) -> list[str]:
        """Return the lines written since the last call."""
        return self._output.readlines()

    def tail(self) -> str:
        """Return the end of all it wrote, without colours."""
        with self._path.open("rb") as file:
            file.seek(max(0, self._path.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
        return re.sub(r"\x1b\[[0-9;]*m", "", text)

    def stop(self) -> None:
        """Ask it to leave, and end it if it does not."""
        self._process.terminate()
        try:
            self._process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            self._output.close()


@contextmanager
def supernode(
    config: SiteConfig, membership: Membership, port: int, secret_file: Path
) -> Generator[Supernode]:
    """Run the site's supernode as a child that never outlives this process.

    Call it from the main thread: Linux takes the end of the thread that starts a child for the end
    of its parent.

    Args:
        config: The site's file.
        membership: The federation that it joined.
        port: For the local API; loopback only.
        secret_file: What an executor of tasks must know.
    """
    command = [
        *PROGRAM,
        str(os.getpid()),
        *("--superlink", membership.address),
        *("--root-certificates", str(membership.ca_path)),
        *("--auth-supernode-private-key", str(config.state_dir / NODE_KEY)),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(secret_file)),
        *("--host", "127.0.0.1"),
        *("--port", str(port)),
        *("--node-config", f'site="{config.site}"'),
    ]
    home = config.state_dir / "flower"
    home.mkdir(exist_ok=True)
    path = config.state_dir / LOG_FILE
    with path.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={
                **os.environ,
                "FLWR_HOME": str(home),
                "FLWR_TELEMETRY_ENABLED": "0",
                "FLWR_DISABLE_UPDATE_CHECK": "1",
            },
        )
    node = Supernode(process, port, path)
    try:
        yield node
    finally:
        node.stop()


class Supervisor:
    """Decides what follows when a supernode ends, and tells a person at the site what to know."""

    def __init__(self, config: SiteConfig, membership: Membership) -> None:
        self._site, self._limit = config.site, config.reconnect_seconds
        self._address, self._ca_path = membership.address, membership.ca_path
        # Since when the coordinator answers, does not, and turns this site away.
        self._online_since: float | None = None
        self._offline_since = time.monotonic()
        self._refused_since: float | None = None
        self._was_online = self._told = False
        self._attempt, self._last_reason = 0, ""
        self._next_look = time.monotonic()

    def listen(self, node: Supernode) -> None:
        """Learn from the node's log whether it is connected.

        Raises:
            FederationError: The coordinator is out of reach for longer than the file allows.
        """
        for line in node.news():
            if ONLINE.search(line):
                self.online()
            elif OFFLINE.search(line):
                self.offline()
        self._check_limit()
        self.tell()
        self._look_at_certificates()

    def online(self) -> None:
        """Note that the coordinator has answered."""
        if self._online_since is not None:
            return
        self._online_since = time.monotonic()
        seconds = self._online_since - self._offline_since
        if not self._was_online:
            log.info("site=%s connected", self._site)
        elif self._told:
            log.info("site=%s connected again after_seconds=%.0f", self._site, seconds)
        self._was_online, self._told = True, False
        self._refused_since, self._last_reason = None, ""

    def offline(self) -> None:
        """Note that it has not."""
        if self._online_since is not None:
            self._online_since, self._offline_since = None, time.monotonic()

    def tell(self) -> None:
        """Say, once each time, that the coordinator has been out of reach for a while, and why."""
        seconds = time.monotonic() - self._offline_since
        if self._online_since is not None or self._told or seconds < PATIENCE_SECONDS:
            return
        self._told = True
        answer = ask(self._address, self._ca_path)
        reason = ": ".join(filter(None, [answer.problem, answer.refused]))
        log.warning(
            "site=%s superlink=%s unreachable reason=%s; still trying",
            self._site,
            self._address,
            one_line(reason or f"answers other requests (HTTP {answer.status})", 200),
        )

    def _look_at_certificates(self) -> None:
        """Say once a day, while connected, which certificate ends soon."""
        if self._online_since is None or time.monotonic() < self._next_look:
            return
        self._next_look = time.monotonic() + LOOK_SECONDS
        for line in ending_soon(self._address, self._ca_path):
            log.warning("site=%s %s", self._site, line)

    def ended(self, node: Supernode) -> float:
        """Judge an end that nobody asked for.

        Returns:
            After how many seconds to start the next one.

        Raises:
            ConfigError: A person at the site has to correct something.
            FederationError: Waiting does not mend it, or was long enough.
        """
        now = time.monotonic()
        if self._online_since is not None and now - self._online_since > LONGEST_BACKOFF_SECONDS:
            self._attempt = 0
        self.offline()
        ending = judge(node.exit_code, node.tail())
        if ending.kind == "hopeless":
            # What has worked before is not this site's configuration.
            kind = ConfigError if ending.fixable and not self._was_online else FederationError
            raise kind(f"superlink={self._address}: {ending.reason}", hint=ending.hint)
        if ending.kind == "refused":
            self._refused_since = self._refused_since or now
            if now - self._refused_since > LEASE_SECONDS:
                raise FederationError(
                    f"superlink={self._address} refuses this site: {ending.reason}",
                    hint=ending.hint,
                )
        self._check_limit()
        longest = min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2.0 ** min(self._attempt, 9))
        self._attempt += 1
        log.log(
            logging.DEBUG if ending.reason == self._last_reason else logging.WARNING,
            "site=%s supernode=ended reason=%s; trying again",
            self._site,
            ending.reason,
        )
        self._last_reason, self._told = ending.reason, True
        return random.uniform(0, longest)

    def _check_limit(self) -> None:
        seconds = 0.0 if self._online_since else time.monotonic() - self._offline_since
        if self._limit and seconds > self._limit:
            raise FederationError(
                f"superlink={self._address} out of reach for {seconds:.0f} s; "
                f"reconnect-seconds={self._limit}",
                hint=f"python -m client check --site {self._site} looks for the reason",
            )
