"""Fetching a published file that is known by its MD5, or a zip archive by its checksums.

Invariant: a file appears under its name only after its MD5 matched; until then it is a `.part` file
beside it, of one process at a time, kept after an interruption and continued by the next attempt.
The MD5 guards against
altered and broken copies, not against an attacker: nothing stronger is published for these files.
Where not even an MD5 is published, the checksums inside the archive show that it arrived whole.
"""

from __future__ import annotations

import hashlib
import os
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import requests
import rich.progress
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from strategies.errors import ConfigError, DataError
from strategies.files import held, make_folder, sync_folder

HASH_CHUNK_BYTES = 1 << 20
# A lost connection loses at most this much of what had arrived.
RECEIVE_CHUNK_BYTES = 1 << 16
CONNECT_SECONDS = 10
READ_SECONDS = 30
# Hashing less than this takes well under two seconds and shows no progress bar.
SLOW_HASH_BYTES = 512 << 20


def md5_of(path: Path) -> str:
    """MD5 of a file, in hexadecimal."""
    console = Console(stderr=True)
    hidden = not console.is_terminal or path.stat().st_size < SLOW_HASH_BYTES
    with rich.progress.open(
        path, "rb", description=f"checking {path.name}", console=console, disable=hidden
    ) as file:
        digest = hashlib.md5(usedforsecurity=False)
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def download(url: str, target: Path, md5: str | None) -> Path:
    """Downloads a file, continuing an earlier attempt, and puts it in place once it is proven.

    Args:
        url: Where it is published.
        target: Where it goes; `target` + ".part" holds an unfinished download.
        md5: Its published MD5 in hexadecimal; None where none is published: the file is then a
            zip archive whose own checksums are compared.

    Returns:
        The target.

    Raises:
        DataError: No connection, a refusal by the server, a lost connection, a full disk, or a file
            that is not the published one.
        ConfigError: Another process is at it, or the folder cannot be made.
    """
    make_folder(target.parent)
    busy = ConfigError(
        f"download={url} is under way in another process", "wait for it, then run this again"
    )
    with held(target.with_name(f".{target.name}.lock"), busy):
        if not target.exists():  # that other process may have been quicker
            _fetch(url, target, md5)
    return target


def _fetch(url: str, target: Path, md5: str | None) -> None:
    part = target.with_name(target.name + ".part")
    try:
        _transfer(url, part)
        actual = md5_of(part) if md5 is not None else None
        damage = None if md5 is not None else _damage(part)
    except OSError as error:  # requests' exceptions are OSErrors too
        kept = part.stat().st_size if part.exists() else 0
        raise DataError(
            f"download={url} failed after {kept} bytes: {_reason(error)}",
            "check the network and run it again, it continues where it stopped; "
            f"or copy {target.name} from another machine into {target.parent}",
        ) from error
    if actual != md5:
        part.unlink()
        raise DataError(
            f"download={url} md5={actual} expected={md5}; removed",
            "run it again; if it fails again, something on the way changes the file",
        )
    if damage is not None:
        part.unlink()
        raise DataError(
            f"download={url} is no whole zip archive: {damage}; removed",
            "run it again; if it fails again, something on the way changes the file",
        )
    os.replace(part, target)
    sync_folder(target.parent)


def _damage(archive: Path) -> str | None:
    """Reads a zip archive to its end; what is wrong with it, in a few words, or None."""
    console = Console(stderr=True)
    hidden = not console.is_terminal or archive.stat().st_size < SLOW_HASH_BYTES
    try:
        with zipfile.ZipFile(archive) as opened:
            for info in rich.progress.track(
                opened.infolist(),
                f"checking {archive.name.removesuffix('.part')}",
                console=console,
                disable=hidden,
            ):
                with opened.open(info) as member:
                    while member.read(HASH_CHUNK_BYTES):
                        pass
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError) as error:
        return (str(error).splitlines() or [type(error).__name__])[0]
    return None


def _transfer(url: str, part: Path) -> None:
    done = part.stat().st_size if part.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if done:
        headers["Range"] = f"bytes={done}-"
    timeout = (CONNECT_SECONDS, READ_SECONDS)
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if done and response.status_code == requests.codes.requested_range_not_satisfiable:
            return  # nothing is left to fetch; the MD5 decides whether the part is the file
        response.raise_for_status()
        content_range = response.headers.get("Content-Range", "")
        continued = content_range.startswith(f"bytes {done}-")
        if not continued:
            done = 0  # the server sends the whole file
        with part.open("ab" if continued else "wb") as file:
            _receive(response, file, done, part.name.removesuffix(".part"))
            file.flush()
            os.fsync(file.fileno())


def _receive(response: requests.Response, file: BinaryIO, done: int, name: str) -> None:
    length = response.headers.get("Content-Length", "")
    console = Console(stderr=True)
    with Progress(
        "{task.description}",
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as progress:
        total = done + int(length) if length.isdigit() else None
        task = progress.add_task(name, total=total, completed=done)
        for chunk in response.iter_content(RECEIVE_CHUNK_BYTES):
            file.write(chunk)
            progress.advance(task, len(chunk))


def _reason(error: OSError) -> str:
    """One short line; requests' own texts run over several and repeat the address."""
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered HTTP {error.response.status_code}"
    if isinstance(error, requests.Timeout):
        return f"no answer within {READ_SECONDS} seconds"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was lost"
    if isinstance(error, requests.ConnectionError):
        return "no connection to the server"
    return error.strerror or str(error)
