"""Tamper-evident log: JSON lines, each holding the hash of the line before.

Invariant: ``hash = SHA-256(canonical(entry without hash))`` and ``previous`` is the hash of the
entry before, so an edited, removed or reordered line breaks the chain at that line. A cut tail is
only visible to somebody who kept the last hash. Entries hold decisions, never patients or paths.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from strategies.errors import FederationError
from strategies.files import append_line
from strategies.identity import canonical

FIRST = "0" * 64
BLOCK_BYTES = 4096


class AuditLog:
    """An append-only log in one file; safe for several processes of one site."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, event: str, **fields: str | int | float | bool) -> str:
        """Append one entry and force it to disk.

        Args:
            event: What happened, a short kebab-case word.
            fields: What it was about; nothing that identifies a patient or a file.

        Returns:
            The new entry's hash: the head of the chain.

        Raises:
            FederationError: The log is missing or its last line damaged. Nothing is written then.
        """
        with self._locked():
            return self._write(*self._head(), event, fields)

    def create(self) -> None:
        """Begin the log with its first entry; one that has entries stays as it is."""
        with self._locked():
            if not self.path.exists() or not self.path.stat().st_size:
                self._write(0, FIRST, "created", {})

    def verify(self) -> tuple[int, str]:
        """Check the whole chain.

        Returns:
            The number of entries and the last one's hash, which whoever keeps it elsewhere can
            compare: a cut end is not visible otherwise.

        Raises:
            FederationError: The log is missing, or the first line that was edited, removed or
                reordered.
        """
        previous = FIRST
        count = 0
        for number, line in enumerate(self._lines(), start=1):
            entry = _parse(line, number, self.path.name)
            if entry["index"] != count or entry["previous"] != previous:
                raise FederationError(
                    f"audit log {self.path.name} line {number}: a line before it is missing or "
                    "moved",
                    hint="restore the log from a backup and find out who changed it",
                )
            previous = str(entry["hash"])
            count += 1
        if not count:
            raise self._missing()
        return count, previous

    def mentions(self, event: str, **fields: str) -> bool:
        """Say whether an entry of this event has these fields."""
        return any(
            entry["event"] == event and fields.items() <= entry["fields"].items()
            for entry in map(json.loads, self._lines())
        )

    def _write(
        self, index: int, previous: str, event: str, fields: Mapping[str, str | int | float | bool]
    ) -> str:
        entry: dict[str, object] = {
            "index": index,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "event": event,
            "fields": fields,
            "previous": previous,
        }
        entry["hash"] = hashlib.sha256(canonical(entry)).hexdigest()
        append_line(self.path, _line(entry).decode().rstrip())
        return str(entry["hash"])

    def _missing(self) -> FederationError:
        return FederationError(
            f"audit log {self.path.name} is missing or empty",
            hint="restore it from a backup; only `init` of a new site or federation begins one",
        )

    def _head(self) -> tuple[int, str]:
        """Return the next index and the hash it must point to, from the last line alone."""
        last = self._last_line()
        if not last:
            raise self._missing()
        try:
            entry = _parse(last, 0, self.path.name)
        except FederationError:  # once more for its number, which only the whole log tells
            entry = _parse(last, sum(1 for _ in self._lines()), self.path.name)
        return int(str(entry["index"])) + 1, str(entry["hash"])

    def _last_line(self) -> bytes:
        """Return what follows the last newline but a final one; nothing without a log."""
        if not self.path.exists():
            return b""
        tail = b""
        with self.path.open("rb") as file:
            start = file.seek(0, os.SEEK_END)
            while start and b"\n" not in tail[:-1]:
                end, start = start, max(0, start - BLOCK_BYTES)
                file.seek(start)
                tail = file.read(end - start) + tail
        return tail[tail[:-1].rfind(b"\n") + 1 :]

    def _lines(self) -> Iterator[bytes]:
        if self.path.exists():
            with self.path.open("rb") as file:
                yield from file

    @contextmanager
    def _locked(self) -> Generator[None]:
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _line(entry: Mapping[str, object]) -> bytes:
    """Return the one way an entry is written."""
    return canonical(entry) + b"\n"


def _parse(line: bytes, number: int, name: str) -> dict[str, object]:
    """Return the entry of a line that is written as :func:`_line` does and whose hash agrees."""
    try:
        entry = json.loads(line)
        claimed = entry.pop("hash")
        digest = hashlib.sha256(canonical(entry)).hexdigest()
        intact = claimed == digest and line == _line({**entry, "hash": digest})
        complete = {"index", "previous", "event", "fields", "time"} <= entry.keys()
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact, complete, entry, claimed = False, False, {}, ""
    if not line.endswith(b"\n"):
        raise FederationError(
            f"audit log {name} line {number}: incomplete, as after a power failure",
            hint="keep a copy, remove that line, and check with `audit --verify`",
        )
    if not (intact and complete):
        raise FederationError(
            f"audit log {name} line {number}: content and hash do not agree",
            hint="restore the log from a backup and find out who changed it",
        )
    return {**entry, "hash": claimed}
