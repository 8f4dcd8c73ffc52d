"""The coordinator's register of sites: one file a site, with the keys that were pinned.

Invariant: a key belongs to one name, and for ever. A revoked name comes back only with new keys,
since nobody knows who holds the old ones (and flower-superlink takes no node key twice). The audit
log has a decision before the register does. Every reading checks the requests' signatures again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)
from pydantic import Field, ValidationError

from strategies.audit import AuditLog
from strategies.cli import nearest
from strategies.enrolment import EnrolmentRequest
from strategies.errors import ConfigError, FederationError
from strategies.files import write_atomic
from strategies.run_config import Section, explain


class _Admission(Section):
    """One request's way through the federation."""

    request: EnrolmentRequest
    admitted_at: str
    revoked_at: str | None = None


class _SiteFile(_Admission):
    """``NAME.json``: the admission that counts, and the revoked ones before it."""

    earlier: tuple[_Admission, ...] = Field(default=(), strict=False)


@dataclass(frozen=True)
class AdmittedSite:
    """A site and its pinned keys.

    Attributes:
        name: As its keys' request and flower-superlink have it.
        admitted_at: ISO 8601, UTC.
        revoked_at: Likewise; None while the site counts.
        earlier: Revoked requests of the same name.
    """

    name: str
    request: EnrolmentRequest
    admitted_at: str
    revoked_at: str | None
    earlier: tuple[EnrolmentRequest, ...] = ()

    @property
    def signing_key(self) -> Ed25519PublicKey:
        """Verifies this site's replies."""
        return self.request.signing_key

    @property
    def node_key(self) -> bytes:
        """The node's public key as flower-superlink keeps it, PEM."""
        return _node_key(self.request)


class Admissions:
    """The files of a federation's sites.

    Changing them is for one process at a time: :class:`server.federation.Federation` sees to that.
    """

    def __init__(self, folder: Path, audit: AuditLog) -> None:
        self.folder = folder
        self.audit = audit

    def sites(self) -> dict[str, AdmittedSite]:
        """Read every site ever admitted, by name.

        Raises:
            ConfigError: The folder is missing; a file is damaged, or of another site.
        """
        if not self.folder.is_dir():
            raise ConfigError(
                f"{self.folder} is missing: nobody can say who is admitted",
                hint="restore it from a backup",
            )
        return {path.stem: _site(path, _state(path)) for path in sorted(self.folder.glob("*.json"))}

    def admit(self, request: EnrolmentRequest) -> bool:
        """Pin a site's keys under its name.

        Returns:
            Whether it was not admitted yet.

        Raises:
            ConfigError: The name has other keys, or another name or a revoked site has one of
                these keys.
        """
        known = self.sites()
        found = known.get(request.site)
        if found and not found.revoked_at and _keys(found.request) == _keys(request):
            return False
        _require_new(request, known)
        self.audit.append("site-admitted", site=request.site, fingerprint=request.fingerprint)
        path = self._path(request.site)
        earlier: tuple[_Admission, ...] = ()
        if found:
            before = _read(path)
            last = _Admission(**{name: getattr(before, name) for name in _Admission.model_fields})
            earlier = (*before.earlier, last)
        _write(path, _SiteFile(request=request, admitted_at=_now(), earlier=earlier))
        return True

    def revoke(self, name: str) -> bool:
        """Mark a site as revoked.

        Returns:
            Whether it counted until now.

        Raises:
            ConfigError: No such site was ever admitted.
        """
        known = self.sites()
        if name not in known:
            raise ConfigError(
                f"site={name}: not in this federation",
                hint=nearest(name, known) if known else "no site is admitted yet",
            )
        if known[name].revoked_at:
            return False
        fingerprint = known[name].request.fingerprint
        self.audit.append("site-revoked", site=name, fingerprint=fingerprint)
        path = self._path(name)
        _write(path, _read(path).model_copy(update={"revoked_at": _now()}))
        return True

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def _require_new(request: EnrolmentRequest, known: Mapping[str, AdmittedSite]) -> None:
    """Refuse a name or key that is taken."""
    keys = _keys(request)
    for name, site in known.items():
        if name != request.site and name.lower() == request.site.lower():
            raise ConfigError(
                f"site={request.site}: differs from site {name} in upper and lower case only",
                hint="the site takes another name: people will mix the two up",
            )
        for old in (site.request, *site.earlier):
            if not keys & _keys(old):
                continue
            if name != request.site:
                raise ConfigError(
                    f"site={request.site}: its keys are those of site {name}",
                    hint=f"a site keeps its name; or `revoke {name}` and make new keys",
                )
            if site.revoked_at:
                raise ConfigError(
                    f"site={name}: was revoked, and the request has keys from then",
                    hint="the site makes new keys: `python -m client init` with an empty state-dir",
                )
    site = known.get(request.site)
    if site and not site.revoked_at:
        raise ConfigError(
            f"site={request.site}: admitted with other keys, fingerprint "
            f"{site.request.fingerprint}; the request has {request.fingerprint}",
            hint="if the site made new keys, ask it by telephone and `revoke` the old ones first",
        )


def _keys(request: EnrolmentRequest) -> set[bytes]:
    """Return a request's three public keys, each in one spelling."""
    raw = (Encoding.Raw, PublicFormat.Raw)
    return {
        _node_key(request),
        request.signing_key.public_bytes(*raw),
        request.wrap_key.public_bytes(*raw),
    }


def _node_key(request: EnrolmentRequest) -> bytes:
    key = load_ssh_public_key(request.node_public_key.encode())
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _state(path: Path) -> tuple[int, ...]:
    """Return what changes with a file: a register of many sites is read at every reply."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns, found.st_size


@lru_cache(maxsize=1024)
def _site(path: Path, state: tuple[int, ...]) -> AdmittedSite:
    """Read a site's file, once for each state of it."""
    file = _read(path)
    return AdmittedSite(
        name=path.stem,
        request=file.request,
        admitted_at=file.admitted_at,
        revoked_at=file.revoked_at,
        earlier=tuple(admission.request for admission in file.earlier),
    )


def _read(path: Path) -> _SiteFile:
    """Read a site's file and check the signatures of the requests in it."""
    hint = "restore it from a backup; its audit entry has the fingerprint"
    try:
        file = _SiteFile.model_validate_json(path.read_bytes())
        requests = [file.request, *(admission.request for admission in file.earlier)]
        for request in requests:
            EnrolmentRequest.parse(request.to_json())
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror})", hint=hint) from error
    except ValidationError as error:
        raise ConfigError(f"{path} is damaged: {explain(error)}", hint=hint) from None
    except FederationError as error:
        raise ConfigError(f"{path} is damaged: {error}", hint=hint) from error
    if {request.site for request in requests} != {path.stem}:
        raise ConfigError(f"{path} is of site {file.request.site}", hint=hint)
    return file


def _write(path: Path, file: _SiteFile) -> None:
    write_atomic(path, file.model_dump_json(by_alias=True, indent=2) + "\n", mode=0o600)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
