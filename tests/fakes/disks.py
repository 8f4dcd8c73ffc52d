"""A disk that is full: a small file system of its own, else a limit on a process's files."""

from __future__ import annotations

import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

FILLER = "filler"
PIECE = 1 << 16
PAGE = 1 << 12


class Disk(Protocol):
    """What a test does to the disk that a folder is on."""

    def fill(self, process: subprocess.Popen[bytes]) -> None:
        """Leave no room for what a process appends to its files."""
        ...

    def free(self, process: subprocess.Popen[bytes]) -> None:
        """Make room again."""
        ...


class SmallDisk:
    """A file system in memory, mounted over the folder."""

    def __init__(self, folder: Path) -> None:
        self._filler = folder / FILLER

    def fill(self, process: subprocess.Popen[bytes]) -> None:
        with self._filler.open("ab", buffering=0) as file:
            size = PIECE
            while size:
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 2

    def free(self, process: subprocess.Popen[bytes]) -> None:
        self._filler.unlink()


class FileLimit:
    """Where mounting is refused: none of a process's files may become longer than one of them is.

    The system's error is another (EFBIG, not ENOSPC), and nothing but the process has it.
    """

    def __init__(self, longest: Path) -> None:
        self._longest = longest

    def fill(self, process: subprocess.Popen[bytes]) -> None:
        _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
        size = self._longest.stat().st_size
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size, hard))

    def free(self, process: subprocess.Popen[bytes]) -> None:
        with suppress(ProcessLookupError):  # a limit ends with its process
            _, hard = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def small_disk(folder: Path, longest: Path, room: int = 1 << 22) -> Iterator[Disk]:
    """Put a folder, with what is in it, on a disk that a test can fill, and afterwards back.

    Args:
        folder: Used by no process yet.
        longest: The file whose length is the limit where mounting is refused.
        room: Bytes of the disk beside what the folder holds already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held = sum(path.stat().st_size + PAGE for path in folder.rglob("*"))
    with tempfile.TemporaryDirectory(dir=folder.parent) as aside:
        before, after = Path(aside, "before"), Path(aside, "after")
        shutil.copytree(folder, before)
        options = f"size={held + room},mode=0700"
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)],
            capture_output=True,
            check=False,
        )
        if mounted.returncode:
            yield FileLimit(longest)
            return
        try:
            shutil.copytree(before, folder, dirs_exist_ok=True)
            folder.chmod(0o700)
            try:
                yield SmallDisk(folder)
            finally:
                shutil.copytree(folder, after)
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
            if after.exists():
                shutil.copytree(after, folder, dirs_exist_ok=True)
