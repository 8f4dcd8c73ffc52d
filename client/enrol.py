"""``python -m client init``: a site's first files, made at the site.

Invariant: nothing that exists is overwritten, and the private key never leaves the state folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from client.site import SIGNING_KEY
from client.site_config import NAME_PATTERN, read_site_config
from strategies.errors import ConfigError
from strategies.files import write_atomic
from strategies.identity import (
    PUBLIC_KEY_SUFFIX,
    create_signing_key,
    fingerprint,
    write_public_key,
)

TEMPLATE = Path(__file__).parent / "sites" / "example.toml"


def initialise(site: str, path: Path) -> str:
    """Write the site's file (from the template) and its keys, where they are missing.

    Args:
        site: The site's name.
        path: The site's file.

    Returns:
        What to tell the person: which files, the fingerprint, and what to do next.

    Raises:
        ConfigError: The name is not usable, or the existing file belongs to another site.
    """
    if not re.fullmatch(NAME_PATTERN, site):
        raise ConfigError(
            f"--site {site!r}: expected letters, digits and hyphens, at most 32 of them"
        )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, TEMPLATE.read_text(encoding="utf-8").replace("example", site))
    config = read_site_config(path)
    if config.site != site:
        raise ConfigError(f"--site {site} but {path.name} says site={config.site}")
    config.state_dir.mkdir(parents=True, exist_ok=True)
    public = create_signing_key(config.state_dir / SIGNING_KEY).public_key()
    public_path = config.state_dir / f"{site}{PUBLIC_KEY_SUFFIX}"
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
