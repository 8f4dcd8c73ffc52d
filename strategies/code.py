"""Which code runs here: a hash of what is installed, for orders, replies and allow-lists.

Invariant: two installations of the same sources have the same hash, wherever they lie and however
they were installed; a changed source file changes it. Built libraries and site files are not in it.
"""

from __future__ import annotations

import hashlib
from functools import cache
from importlib.metadata import version as package_version
from pathlib import Path

DISTRIBUTION = "medmamba-federation"
# What takes part in a federation. The simulation drives these and decides nothing in a hospital.
PACKAGES = ("client", "medmamba", "server", "strategies")
SUFFIXES = (".py", ".c", ".h", ".toml")
SITE_FILES = ("client", "sites")


def version() -> str:
    """Return the installed version of this project."""
    return package_version(DISTRIBUTION)


@cache
def code_sha256() -> str:
    """Return the SHA-256 over names and contents of the installed sources."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            name = path.relative_to(root)
            if path.suffix in SUFFIXES and name.parts[:2] != SITE_FILES and path.is_file():
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                digest.update(f"{name.as_posix()} {content}\n".encode())
    return digest.hexdigest()
