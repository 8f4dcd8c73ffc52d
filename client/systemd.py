"""A systemd unit for a site's node: ``python -m client --site A --print-systemd``.

Invariant: the service may write nothing but the site's state folder, and a configuration mistake
(exit code 2) is not tried again. Whatever else ends it is, for as long as the machine runs.
Source: systemd.service(5), systemd.exec(5).
"""

from __future__ import annotations

import os
import pwd
import sys
from pathlib import Path

from client.data.source import PATHS
from client.site_config import SiteConfig
from strategies.errors import ConfigError

UNIT = """\
# {folder}{service}: check with `systemd-analyze verify`, then
# `systemctl daemon-reload && systemctl enable --now {service}`.
[Unit]
Description=Federated learning node of site {site}
Wants=network-online.target
After=network-online.target
RequiresMountsFor={mounts}
StartLimitIntervalSec=0

[Service]
Type=exec
User={user}
WorkingDirectory={code}
{environment}ExecStart={command}
Restart=on-failure
RestartSec=30
RestartPreventExitStatus=2
KillMode=mixed
KillSignal=SIGTERM
TimeoutStopSec=30
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet=
ProtectSystem=strict
ReadWritePaths={state}
ProtectHome=read-only
PrivateTmp=yes
{devices}ProtectControlGroups=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6 AF_NETLINK
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
LockPersonality=yes
SystemCallArchitectures=native

[Install]
WantedBy=multi-user.target
"""
FOLDER = "/etc/systemd/system/"


def unit(config: SiteConfig, path: Path) -> str:
    """Return the unit's text.

    Args:
        config: The site's file as read. Its state folder's owner runs the service, because nobody
            else may read the keys.
        path: Where that file is.

    Raises:
        ConfigError: There is no state folder yet.
    """
    state = config.state_dir.resolve()
    words = [sys.executable, "-m", "client", "--site", config.site]
    words += ["--config", str(path.resolve())]
    environment: dict[str, str] = {}
    if "FEDERATION_DATA" in os.environ:
        environment["FEDERATION_DATA"] = str(Path(os.environ["FEDERATION_DATA"]).resolve())
    if config.device != "cpu":
        environment["TRITON_CACHE_DIR"] = str(state / "triton")  # the home folder is read-only
    return UNIT.format(
        folder=FOLDER,
        service=f"medmamba-federation-{config.site}.service",
        site=config.site,
        user=_owner(config),
        code=_literal(str(Path(__file__).resolve().parent.parent)),
        environment="".join(
            f"Environment={_quoted(f'{name}={value}')}\n" for name, value in environment.items()
        ),
        command=" ".join(_quoted(word).replace("$", "$$") for word in words),
        state=_quoted(str(state)),
        mounts=" ".join(_quoted(str(folder)) for folder in _folders(config)),
        # Only a GPU's driver knows the devices that it needs.
        devices="PrivateDevices=yes\n" if config.device == "cpu" else "",
    )


def _folders(config: SiteConfig) -> list[Path]:
    """Return what must be mounted before the site starts."""
    data = (getattr(config.data, name) for name in PATHS)
    return [path.resolve() for path in (config.state_dir, *data) if path is not None]


def _owner(config: SiteConfig) -> str:
    try:
        number = config.state_dir.stat().st_uid
    except OSError as error:
        raise ConfigError(
            f"state-dir={config.state_dir} cannot be read ({error.strerror})",
            hint=f"python -m client init --site {config.site}, as the user who will run the node",
        ) from error
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:  # a user of another machine or of a directory service that is down
        return str(number)


def _literal(text: str) -> str:
    """Keep systemd from reading specifiers such as %h."""
    return text.replace("%", "%%")


def _quoted(text: str) -> str:
    """Return one word as systemd.syntax(7) reads it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{_literal(escaped)}"' if set(escaped) & set(" \t\\'\";") else _literal(escaped)
