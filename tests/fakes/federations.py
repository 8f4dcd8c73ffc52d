"""A whole federation of real processes on loopback, enrolled by the commands that people type."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fakes.links import Link
from server.federation import Federation as Coordinator
from server.flower_control import Control, Node

SITES = ("A", "B", "C")
RUN = "runs/first"
# Small enough that a round takes a second, and no site waits for another's figures.
SETTINGS = {
    "num-server-rounds": 2,
    "model.depths": "1,1",
    "model.dims": "8,16",
    "model.in-channels": 1,
    "model.image-size": 32,
    "strategy.min-sites": 2,
    "strategy.wait-seconds": 120,
    "strategy.round-timeout-seconds": 120,
}


class Federation:
    """One folder with a coordinator and its sites; every process it starts ends with it.

    Attributes:
        folder: Working directory of every command.
        environment: Of every command.
        links: The sites' own lines to the superlink, where :meth:`link` made one.
        run: The run's directory, as ``--output`` and ``--resume`` name it.
    """

    def __init__(self, folder: Path, sites: Sequence[str] = SITES) -> None:
        self.folder, self.sites, self.run = folder, tuple(sites), RUN
        self._log_starts: dict[str, int] = {}
        self.port = free_port()
        self.links: dict[str, Link] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.environment = {
            **os.environ,
            "FEDERATION_SITES": str(folder / "sites"),
            "OMP_NUM_THREADS": "1",
        }

    # --- preparing -------------------------------------------------------------------------------

    def enrol(self) -> None:
        """Make the coordinator and all sites, admit and join them."""
        address = f"127.0.0.1:{self.port}"
        self.call(
            "server", "init", "--name", "lung", "--address", address, "--port", str(self.port)
        )
        for site in self.sites:
            self.enrol_site(site)

    def enrol_site(self, site: str) -> None:
        self.call("client", "init", "--site", site, "--allow-unprotected")
        self.edit(site, "[data]\n", "[data]\npatients-per-site = 8\n")
        self.edit(site, "[limits]\n", '[limits]\nallowed-sizes = ["nano", "custom"]\n')
        self.call("server", "admit", str(self.state(site) / f"{site}.enroll.json"))
        self.call("client", "join", str(self.state(site) / f"{site}.join.json"), "--site", site)

    def edit(self, site: str, old: str, new: str) -> None:
        """Change a site's file."""
        path = self.folder / "sites" / f"{site}.toml"
        text = path.read_text()
        assert old in text, text
        path.write_text(text.replace(old, new, 1))

    def link(self, site: str) -> Link:
        """Give a site a line of its own to the superlink, before it is started."""
        link = self.links[site] = Link(self.port)
        self.edit(site, f'site = "{site}"\n', f'site = "{site}"\nsuperlink = "{link.address}"\n')
        return link

    def state(self, site: str) -> Path:
        """A site's state folder."""
        return self.folder / "sites" / "state" / site

    @property
    def server_state(self) -> Path:
        return self.folder / "state" / "server"

    @property
    def run_dir(self) -> Path:
        return self.folder / self.run

    def begin(self, run: str) -> None:
        """Have everybody up and connected for a new run, and forget what was logged before."""
        self.thaw(*self.processes)
        for link in self.links.values():
            link.heal()
        for name in list(self.processes):
            if name not in ("superlink", *self.sites):
                self.crash(name)
                del self.processes[name]
        if not self.is_up("superlink"):
            self.start_superlink()
        self._forget_logs()
        missing = [site for site in self.sites if not self.is_up(site)]
        for site in missing:
            self.start_sites(site)
        for site in missing:
            self.wait_for(site, f"site={site} connected", seconds=180)
        wait_until(
            lambda: all(map(self.is_online, self.sites)), "all sites are connected", self.logs
        )
        self.run = run
        self._forget_logs()

    def _forget_logs(self) -> None:
        for path in self.folder.glob("*.log"):
            self._log_starts[path.stem] = path.stat().st_size

    # --- processes -------------------------------------------------------------------------------

    def call(
        self, *words: str, code: int = 0, timeout: float = 240
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end and check its exit code."""
        done = subprocess.run(
            [sys.executable, "-m", *words],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        assert done.returncode == code, f"{words}: {done.stdout}\n{done.stderr}\n{self.logs()}"
        return done

    def start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """Start a command in its own session; its output is ``<name>.log``, appended to."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *words],
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def start_superlink(self) -> None:
        self.start("superlink", "server", "superlink")
        wait_until(self.superlink_answers, "the superlink answers", self.logs)

    def superlink_answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def start_sites(self, *sites: str) -> None:
        for site in sites or self.sites:
            self.start(site, "client", "--site", site)

    def start_run(self, name: str = "run", **settings: Any) -> subprocess.Popen[bytes]:
        """Start ``server run`` in the background; ``strategy__min_sites=3`` changes a setting."""
        return self.start(name, *self.run_words(**settings))

    def run_words(self, **changes: Any) -> list[str]:
        named = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
        words = ["server", "run", "--output", self.run]
        for key, value in {**SETTINGS, **named}.items():
            words += ["--set", f"{key}={value}"]
        return words

    def start_resumed(self, name: str = "resumed") -> subprocess.Popen[bytes]:
        return self.start(name, "server", "run", "--resume", self.run)

    def is_up(self, name: str) -> bool:
        return name in self.processes and self.processes[name].poll() is None

    def kill(self, name: str) -> None:
        """SIGKILL to one process, as a crash: no handler runs."""
        self.processes[name].kill()
        self.processes[name].wait()

    def crash(self, name: str) -> None:
        """SIGKILL to a process and all that it started, at once: as a machine without power."""
        with suppress(ProcessLookupError):
            os.killpg(self.processes[name].pid, signal.SIGKILL)
        self.processes[name].wait()

    def terminate(self, name: str, code: int = 0) -> None:
        """SIGTERM, as an operator's or systemd's."""
        self.processes[name].terminate()
        self.end(name, code, timeout=30)

    def freeze(self, name: str) -> None:
        """Have one process stand still."""
        self.processes[name].send_signal(signal.SIGSTOP)

    def thaw(self, *names: str) -> None:
        """Have processes, and what they started, go on."""
        for name in names:
            with suppress(ProcessLookupError):
                os.killpg(self.processes[name].pid, signal.SIGCONT)

    def children(self, name: str) -> list[int]:
        """Live processes of a process's group beside itself."""
        group = self.processes[name].pid
        return [pid for pid in _group(group) if pid != group]

    def end(self, name: str, code: int = 0, timeout: float = 180) -> str:
        """Wait for a process to end by itself; returns its log."""
        try:
            found = self.processes[name].wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} does not end\n{self.logs()}") from None
        assert found == code, f"{name} ended with {found}\n{self.logs()}"
        return self.log(name)

    def stop(self) -> None:
        """End everything."""
        self.thaw(*self.processes)
        for process in reversed(self.processes.values()):
            if process.poll() is None:
                process.terminate()
        for name, process in self.processes.items():
            with suppress(subprocess.TimeoutExpired):
                process.wait(15)
            self.crash(name)
        for link in self.links.values():
            link.close()

    # --- what happened ---------------------------------------------------------------------------

    def log(self, name: str) -> str:
        """What a process has said since :meth:`begin`."""
        path = self.folder / f"{name}.log"
        said = path.read_bytes() if path.exists() else b""
        return said[self._log_starts.get(name, 0) :].decode(errors="replace")

    def logs(self) -> str:
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}"
            for path in sorted(self.folder.rglob("*.log"))
        )

    def wait_for(self, name: str, text: str, *, count: int = 1, seconds: float = 120) -> None:
        """Wait until a process has said something so many times."""
        wait_until(
            lambda: self.log(name).count(text) >= count, f"{name} says {text!r}", self.logs, seconds
        )

    def history(self, run_dir: Path | None = None) -> list[dict[str, Any]]:
        path = (run_dir or self.run_dir) / "history.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def outcomes(self) -> dict[tuple[int, str], str]:
        """(round, site) to its status."""
        return {
            (line["server_round"], line["site"]): line["status"]
            for line in self.history()
            if line["type"] == "site"
        }

    def reasons(self) -> dict[tuple[int, str], str]:
        return {
            (line["server_round"], line["site"]): line["reason"]
            for line in self.history()
            if line["type"] == "site"
        }

    def coordinator(self) -> Coordinator:
        """The coordinator's state folder, as its commands see it."""
        return Coordinator.open(self.server_state)

    def nodes(self) -> dict[str, Node]:
        """What flower-superlink knows of the sites' nodes, by name."""
        coordinator = self.coordinator()
        with Control(coordinator.superlink_address, coordinator.ca_file) as control:
            return {node.name: node for node in control.nodes()}

    def is_online(self, site: str) -> bool:
        """Whether flower-superlink counts a site's node as connected."""
        node = self.nodes().get(site)
        return node is not None and node.online

    def audit(self, path: Path) -> list[dict[str, Any]]:
        """The entries of an audit log."""
        return [json.loads(line) for line in (path / "audit.jsonl").read_text().splitlines()]

    def decisions(self, state: Path, event: str, **fields: Any) -> list[dict[str, Any]]:
        """What an audit log says of this run: the fields of the entries that have these."""
        path = self.run_dir / "config.json"
        if not path.exists():
            return []
        fields["run_uuid"] = json.loads(path.read_text())["run_uuid"]
        return [
            entry["fields"]
            for entry in self.audit(state)
            if entry["event"] == event and fields.items() <= entry["fields"].items()
        ]


@contextmanager
def federation_in(folder: Path, sites: Sequence[str] = SITES) -> Iterator[Federation]:
    """An enrolled federation, nothing running yet."""
    federation = Federation(folder, sites)
    try:
        federation.enrol()
        yield federation
    finally:
        federation.stop()


def wait_until(
    condition: Callable[[], bool],
    what: str,
    explain: Callable[[], str] = lambda: "",
    seconds: float = 120,
) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"never: {what}\n{explain()}"
        time.sleep(0.1)


def _group(group: int) -> list[int]:
    """Live processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, _, pgrp, *_ = path.read_text().rpartition(")")[2].split()
            if int(pgrp) == group and state not in ("Z", "X"):
                found.append(int(path.parent.name))
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
