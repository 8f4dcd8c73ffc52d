"""The run directory: one folder that says what was run, what happened and what came out.

Invariant: ``config.json`` is written before anything is trained and holds all that reproduces the
run; ``history.jsonl`` only grows, except that resuming cuts what came after the checkpoint. The
only paths in it are those a person typed, in ``config.json``; the report shows none.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from strategies.errors import CheckpointError, ConfigError
from strategies.files import append_line, held, sync_folder, write_atomic

CONFIG, HISTORY, SUMMARY, LOG = "config.json", "history.jsonl", "summary.json", "log.txt"
MODEL, REPORT, CHECKPOINTS = "model.safetensors", "report.html", "checkpoints"
LOCK = ".lock"
T = TypeVar("T")
log = logging.getLogger(__name__)
PACKAGES = ("medmamba-federation", "flwr", "torch", "monai", "numpy", "safetensors")


class RunDirectory:
    """One run's files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, config: Mapping[str, Any]) -> RunDirectory:
        """Make a new run directory with its ``config.json``.

        Raises:
            ConfigError: The directory exists; nothing in it is touched.
        """
        require_new(path)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Figures of single sites lie here: for nobody else on this machine.
            unfinished.mkdir(mode=0o700)
            (unfinished / CHECKPOINTS).mkdir()
            write_atomic(unfinished / CONFIG, to_json(config))
            unfinished.rename(path)
            sync_folder(path.parent)
        except OSError as error:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise ConfigError(f"output={path} cannot be made ({error.strerror})") from error
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunDirectory:
        """Open an unfinished run for resuming.

        Raises:
            CheckpointError: It is not a run directory, or its run is complete.
        """
        directory = cls(path)
        directory.config()
        if (path / SUMMARY).exists() and (path / REPORT).exists():
            raise CheckpointError(f"resume={path} is complete", hint=f"its {REPORT} has all")
        return directory

    def summary(self) -> dict[str, Any] | None:
        """Return the final figures; None while the run is not finished."""
        return read_json(self.path / SUMMARY) if (self.path / SUMMARY).exists() else None

    def config(self) -> dict[str, Any]:
        """Read ``config.json``.

        Raises:
            CheckpointError: It is missing or damaged.
        """
        return read_json(self.path / CONFIG)

    def stored(self, name: str, kind: type[T]) -> T:
        """Return one value of ``config.json``.

        Raises:
            CheckpointError: It is not there, or is not a ``kind``.
        """
        value = self.config().get(name)
        if not isinstance(value, kind):
            raise CheckpointError(
                f"{self.path / CONFIG} has no {name}: {kind.__name__} expected",
                hint="resume a directory with the command that made it",
            )
        return value

    def append(self, entry: Mapping[str, Any]) -> None:
        """Add one line to the history."""
        append_line(self.path / HISTORY, json.dumps(entry, allow_nan=False))

    def history_bytes(self) -> int:
        """Return the length of the history, which a checkpoint remembers."""
        path = self.path / HISTORY
        return path.stat().st_size if path.exists() else 0

    def cut_history(self, length: int) -> None:
        """Drop what was written after the checkpoint that is resumed.

        Raises:
            CheckpointError: The history is shorter than it was at the checkpoint.
        """
        if self.history_bytes() < length:
            raise CheckpointError(
                f"{self.path / HISTORY} is cut short or missing",
                hint="restore it, or start a new run",
            )
        if self.history_bytes() > length:
            os.truncate(self.path / HISTORY, length)

    def restart_history(self) -> None:
        """Drop the history of a run that has no checkpoint.

        Raises:
            CheckpointError: It has a second round, before which a checkpoint was written.
        """
        path = self.path / HISTORY
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        rounds = sum(line.startswith('{"type": "round"') for line in lines)
        if rounds > 1:
            raise CheckpointError(
                f"{self.path / CHECKPOINTS} is empty, but {rounds} rounds are in {HISTORY}",
                hint="restore the checkpoints, or start a new run",
            )
        self.cut_history(0)

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write the final figures."""
        write_atomic(self.path / SUMMARY, to_json(summary))

    @contextmanager
    def session(self) -> Generator[None]:
        """Hold the directory for this process alone, and write log lines into its ``log.txt`` too.

        Raises:
            CheckpointError: Its folder of checkpoints is gone.
            ConfigError: Another process is at work in it.
        """
        if not (self.path / CHECKPOINTS).is_dir():
            raise CheckpointError(
                f"{self.path / CHECKPOINTS} is missing", hint="restore it, or start a new run"
            )
        refusal = ConfigError(
            f"output={self.path} is in use by another process",
            hint="wait for it or stop it first",
        )
        with held(self.path / LOCK, refusal), self._logging():
            yield

    @contextmanager
    def _logging(self) -> Generator[None]:
        handler = _RunLog(self.path / LOG, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root = logging.getLogger()
        root.addHandler(handler)
        try:
            yield
        finally:
            root.removeHandler(handler)
            with suppress(OSError):  # of a full disk, which has been told
                handler.close()


class _RunLog(logging.FileHandler):
    """A log file that a full disk ends with one line on the console; the run has its own error."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (logging's name)
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        logging.getLogger().removeHandler(self)
        log.error("%s is not written any more (%s)", LOG, error.strerror)


def require_new(path: Path) -> None:
    """Refuse an existing output directory, before anything else is done.

    Raises:
        ConfigError: It exists, or cannot be made.
    """
    if path.exists():
        raise ConfigError(
            f"output={path} exists; a run never writes into an existing directory",
            hint="name another with --output, or continue that run with --resume",
        )
    above = next(parent for parent in path.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise ConfigError(f"output={path} cannot be made: {above} is not a folder to write in")


def read_json(path: Path) -> dict[str, Any]:
    """Read one of a run directory's JSON files.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not readable", hint="name a directory that a run made"
        ) from error
    return document


def to_json(document: Mapping[str, Any]) -> str:
    """Return readable JSON with a final newline; NaN and infinity are refused."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def provenance() -> dict[str, Any]:
    """Return what produced the run: commit (``+changes`` when files differ) and versions."""
    return {"git_commit": _git_commit(), "versions": {name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _git_commit() -> str:
    root = Path(__file__).resolve().parent.parent
    try:
        commit, changes = (
            subprocess.run(
                ["git", *words], cwd=root, capture_output=True, text=True, check=True
            ).stdout.strip()
            for words in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}+changes" if changes else commit
