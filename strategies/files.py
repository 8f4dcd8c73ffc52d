"""Files that survive a crash: written whole or not at all, appended and synced line by line.

Invariant: a reader sees the old content or the new, never a part of it (POSIX rename).
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from strategies.errors import ConfigError


def write_atomic(path: Path, content: bytes | str, *, mode: int = 0o644) -> None:
    """Write ``content`` to ``path``: a temporary file beside it, fsync, rename, fsync the folder.

    Args:
        path: The file to create or replace; its folder exists.
        content: Bytes, or text that is stored as UTF-8.
        mode: File permissions; secrets use ``0o600``.
    """
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def make_folder(path: Path, *, secret: bool = False) -> None:
    """Make a folder and those above it where they are missing.

    Args:
        path: The folder.
        secret: Make it readable for its owner alone.

    Raises:
        ConfigError: It cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700 if secret else 0o777)
    except OSError as error:
        raise ConfigError(f"folder {path} cannot be made ({error.strerror})") from error


@contextmanager
def held(lock: Path, refusal: ConfigError) -> Generator[None]:
    """Hold a lock file while the body runs; the system lets go of it when a process dies.

    Args:
        lock: The file; made where it is missing.
        refusal: Raised when another process holds it.

    Raises:
        ConfigError: The file cannot be made or opened.
    """
    try:
        file = lock.open("w")
    except OSError as error:
        raise ConfigError(
            f"file {lock} cannot be opened ({error.strerror})",
            hint="does it belong to another user, as after `sudo`? Give it back to this one",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise refusal from None
        yield


def append_line(path: Path, line: str) -> None:
    """Append one line and force it to disk before returning; on a full disk nothing of it stays."""
    is_new = not path.exists()
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        if is_new:
            sync_folder(path.parent)
        length = os.fstat(handle).st_size
        try:
            data = f"{line}\n".encode()
            while data:
                data = data[os.write(handle, data) :]
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, length)
            raise
    finally:
        os.close(handle)


def sync_folder(folder: Path) -> None:
    """Force the entries of a folder (a rename, a new file) to disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
