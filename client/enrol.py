"""``python -m client init``: a site's file, its keys and its enrolment request, made at the site.

Invariant: nothing that exists is overwritten, and no private key leaves the state folder. Keys are
made together or not at all: one that is missing beside the others was lost, and a new one in its
place would be a stranger to the coordinator.
"""

from __future__ import annotations

import re
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from client.membership import JOIN_FILE
from client.site_config import (
    AUDIT_LOG,
    NODE_KEY,
    SIGNING_KEY,
    WRAP_KEY,
    SiteConfig,
    read_site_config,
)
from strategies.audit import AuditLog
from strategies.enrolment import SITE_NAME, EnrolmentRequest
from strategies.errors import ConfigError, SignatureError
from strategies.files import make_folder, write_atomic
from strategies.identity import (
    create_node_key,
    create_signing_key,
    create_wrap_key,
    fingerprint,
    load_node_key,
    load_signing_key,
    load_wrap_key,
)

TEMPLATE = Path(__file__).parent / "sites" / "example.toml"
REQUEST_SUFFIX = ".enroll.json"
KEYS = (NODE_KEY, SIGNING_KEY, WRAP_KEY)


def initialise(site: str, path: Path, *, unprotected: bool = False) -> str:
    """Write the site's file (from the template), its keys and its request, where they are missing.

    Args:
        site: The site's name.
        path: The site's file.
        unprotected: Write a file whose limits admit runs without differential privacy and
            encryption.

    Returns:
        What to tell the person: which files, the fingerprint, and what to do next.

    Raises:
        ConfigError: The name is not usable, the existing file belongs to another site, a private
            key is missing beside the others, or the request is not of these keys.
    """
    if not re.fullmatch(SITE_NAME, site):
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
    _make_keys(config)
    request_path = config.state_dir / f"{site}{REQUEST_SUFFIX}"
    if not request_path.exists():
        request = EnrolmentRequest.create(
            site,
            signing_key=load_signing_key(config.state_dir / SIGNING_KEY),
            node_key=load_node_key(config.state_dir / NODE_KEY),
            wrap_key=load_wrap_key(config.state_dir / WRAP_KEY),
        )
        write_atomic(request_path, request.to_json())
    return "\n".join(
        [
            f"site file    {path}",
            f"request      {request_path}",
            f"fingerprint  {read_request(config).fingerprint}",
            "Edit the site file, send the request to the coordinator, and compare the fingerprint "
            "by telephone.",
            f"With the file they send back: python -m client join FILE --site {site}",
        ]
    )


def read_request(config: SiteConfig) -> EnrolmentRequest:
    """Read the site's enrolment request and check it against the private keys beside it.

    Raises:
        ConfigError: The request or a key is missing or unreadable, or they do not belong together.
    """
    path = config.state_dir / f"{config.site}{REQUEST_SUFFIX}"
    hint = f"remove {path.name} and run `python -m client init --site {config.site}` again"
    try:
        request = EnrolmentRequest.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path.name} cannot be read ({error.strerror})", hint=hint) from error
    except (ConfigError, SignatureError, UnicodeDecodeError) as error:
        reason = "not text" if isinstance(error, UnicodeDecodeError) else error
        raise ConfigError(f"{path.name}: {reason}", hint=hint) from None
    if request.site != config.site:
        raise ConfigError(f"{path.name} is of site={request.site}; expected site={config.site}")
    own = {
        SIGNING_KEY: load_signing_key(config.state_dir / SIGNING_KEY).public_key(),
        WRAP_KEY: load_wrap_key(config.state_dir / WRAP_KEY).public_key(),
        NODE_KEY: load_node_key(config.state_dir / NODE_KEY).public_key(),
    }
    asked = {
        SIGNING_KEY: request.signing_key,
        WRAP_KEY: request.wrap_key,
        NODE_KEY: load_ssh_public_key(request.node_public_key.encode()),
    }
    for name in KEYS:
        if own[name] != asked[name]:
            raise ConfigError(f"{path.name} is not of the {name} beside it", hint=hint)
    return request


def _make_keys(config: SiteConfig) -> None:
    state_dir = config.state_dir
    make_folder(state_dir, secret=True)
    missing = [name for name in KEYS if not (state_dir / name).exists()]
    if not missing:
        return
    traces = [*KEYS, f"{config.site}{REQUEST_SUFFIX}", JOIN_FILE]
    found = [name for name in traces if (state_dir / name).exists()]
    if found:
        raise ConfigError(
            f"{', '.join(missing)} missing in {state_dir} beside {', '.join(found)}",
            hint=f"restore from a backup, or remove {', '.join(found)} and enrol anew with the "
            "coordinator",
        )
    log = AuditLog(state_dir / AUDIT_LOG)
    # Only with new keys: a log that has gone since is for a person to explain.
    log.create()
    create_node_key(state_dir / NODE_KEY)
    signing_key = create_signing_key(state_dir / SIGNING_KEY)
    create_wrap_key(state_dir / WRAP_KEY)
    log.append("keys-created", fingerprint=fingerprint(signing_key.public_key()))
