"""``python -m client init``: a site's first files, made at the site.

Invariant: nothing that exists is overwritten, and the private key never leaves the state folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from client.site import AUDIT_LOG, SIGNING_KEY
from client.site_config import NAME_PATTERN, read_site_config
from strategies.audit import AuditLog
from strategies.errors import ConfigError
from strategies.files import make_folder, write_atomic
from strategies.identity import (
    PUBLIC_KEY_SUFFIX,
    create_signing_key,
    fingerprint,
    write_public_key,
)

TEMPLATE = Path(__file__).parent / "sites" / "example.toml"


def initialise(site: str, path: Path, *, unprotected: bool = False) -> str:
    """Write the site's file (from the template) and its keys, where they are missing.

    Args:
        site: The site's name.
        path: The site's file.
        unprotected: Write a file whose limits admit runs without differential privacy and
            encryption.

    Returns:
        What to tell the person: which files, the fingerprint, and what to do next.

    Raises:
        ConfigError: The name is not usable, the existing file belongs to another site, or the
            private key of an existing public key is gone.
    """
    if not re.fullmatch(NAME_PATTERN, site):
        raise ConfigError(
            f"--site {site!r}: expected letters, digits and hyphens, at most 32 of them"
        )
    if not path.exists():
        text = TEMPLATE.read_text(encoding="utf-8").replace("example", site)
        if unprotected:
            text = re.sub(r"^(require-\w+) = true", r"\1 = false", text, flags=re.MULTILINE)
        make_folder(path.parent)
        write_atomic(path, text)
    elif unprotected:
        raise ConfigError(
            f"--allow-unprotected: {path} exists and is not changed",
            hint="set require-privacy and require-encryption in it",
        )
    config = read_site_config(path)
    if config.site != site:
        raise ConfigError(f"--site {site} but {path.name} says site={config.site}")
    make_folder(config.state_dir, secret=True)
    private_path = config.state_dir / SIGNING_KEY
    public_path = config.state_dir / f"{site}{PUBLIC_KEY_SUFFIX}"
    if public_path.exists() and not private_path.exists():
        raise ConfigError(
            f"{public_path} exists but {SIGNING_KEY} beside it is gone",
            hint=f"restore it from a backup, or remove {public_path.name} and enrol anew",
        )
    if not private_path.exists():
        # Only with a new key: a log that has gone since is for a person to explain.
        AuditLog(config.state_dir / AUDIT_LOG).create()
    public = create_signing_key(private_path).public_key()
    write_public_key(public_path, public)
    return "\n".join(
        [
            f"site file    {path}",
            f"public key   {public_path}",
            f"fingerprint  {fingerprint(public)}",
            "Edit the site file, send the public key to the coordinator, and compare the "
            "fingerprint by telephone.",
        ]
    )
