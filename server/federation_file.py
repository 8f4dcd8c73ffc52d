"""``federation.json``: what was decided when a federation was made.

Invariant: sites joined with these values, so only the certificate's further names ever change.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from server.certificates import general_name
from strategies.enrolment import FederationPolicy, SiteName
from strategies.errors import ConfigError
from strategies.files import write_atomic
from strategies.run_config import Section, explain

FEDERATION = "federation.json"
ADDRESS_HINT = "--address hub.example.org:443"


class Identity(Section):
    """``federation.json``: what was decided when the federation was made.

    Attributes:
        id: The name and random digits; every signature covers it.
        address: Where sites connect, ``host:port``: nginx, or flower-superlink on this machine.
        port: Of flower-superlink on this machine's loopback.
        sans: Further names and addresses in the superlink's certificate.
        complete: Whether every other file is made; until then nobody relies on any.
    """

    id: Annotated[str, Field(min_length=1)]
    name: SiteName
    address: str
    port: Annotated[int, Field(gt=0, lt=65536)] = 8000
    sans: tuple[str, ...] = Field(default=(), strict=False)
    policy: FederationPolicy = FederationPolicy()
    created: str
    complete: bool = False

    @field_validator("address")
    @classmethod
    def _address(cls, value: str) -> str:
        host_of(value)
        return value

    @field_validator("sans")
    @classmethod
    def _sans(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            general_name(host)
        return value

    @model_validator(mode="after")
    def _two_ports(self) -> Self:
        """The gateway and flower-superlink are on one machine."""
        if self.address.endswith(f":{self.port}") and not is_loopback(host_of(self.address)):
            raise ValueError(
                f"address={self.address} has flower-superlink's own port={self.port}; expected "
                "another, for the gateway"
            )
        return self

    @property
    def hosts(self) -> tuple[str, ...]:
        """What the superlink's certificate is for, beside loopback."""
        return (host_of(self.address), *self.sans)


def parse_identity(values: dict[str, Any]) -> Identity:
    """Return the values as what they are.

    Raises:
        ConfigError: One is missing or not usable.
    """
    try:
        return Identity.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def read_identity(folder: Path) -> Identity:
    """Read ``federation.json``, finished or not.

    Raises:
        ConfigError: There is none, or it is damaged.
    """
    path = folder / FEDERATION
    try:
        return Identity.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"state-dir={folder} has no federation",
            hint=f"python -m server init {ADDRESS_HINT}, or name another with --state-dir",
        ) from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})") from error
    except ValidationError as error:
        raise ConfigError(
            f"{path} is damaged: {explain(error)}", hint="restore it from a backup"
        ) from None


def write_identity(folder: Path, identity: Identity) -> None:
    """Write ``federation.json``."""
    text = identity.model_dump_json(by_alias=True, indent=2) + "\n"
    write_atomic(folder / FEDERATION, text, mode=0o600)


def require_equal(found: Identity, wanted: Identity) -> None:
    """Refuse to change what sites rely on.

    Raises:
        ConfigError: A value differs; both are shown.
    """
    for name in ("name", "address", "port", "policy", "sans"):
        has, asked = getattr(found, name), getattr(wanted, name)
        if has != asked:
            raise ConfigError(
                f"{name}={_shown(asked)}: this federation has {name}={_shown(has)}, and sites "
                "joined with it",
                hint="--renew --san NAME adds a name to the certificate"
                if name in ("address", "sans")
                else "leave it out, or make another federation in another --state-dir",
            )


def _shown(value: object) -> str:
    if isinstance(value, FederationPolicy):
        return value.model_dump_json(by_alias=True)
    return ",".join(value) if isinstance(value, tuple) else str(value)


def host_of(text: str) -> str:
    """Return the host of ``host:port``, without an IPv6 address's brackets.

    >>> host_of("[::1]:8000")
    '::1'

    Raises:
        ValueError: It is not an address that sites could connect to.
    """
    host, separator, port = text.rpartition(":")
    if not (separator and port.isdecimal() and port.isascii() and 0 < int(port) < 65536):
        raise ValueError("expected host:port, such as hub.example.org:443")
    if host.startswith("[") and host.endswith("]") and ":" in host:
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("expected brackets around an IPv6 address, such as [2001:db8::1]:443")
    try:
        general_name(host)
    except ConfigError as error:
        raise ValueError(str(error)) from error
    address = _ip_address(host)
    if address is not None and address.is_unspecified:
        raise ValueError("expected the address that sites connect to, not one to listen on")
    return host


def is_loopback(host: str) -> bool:
    """Say whether a host, by name or address, is this machine alone."""
    address = _ip_address(host)
    return host == "localhost" if address is None else address.is_loopback


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None
