"""The coordinator's state folder: who the federation is, its keys, and the sites it admits.

``federation.json`` names it; beside it lie the authority and certificates (certificates.py), the
key that signs orders and join documents, the secret that guards flower-superlink's tasks, the
register of sites (admissions.py) and the audit log.

Invariant: every file is written whole or not at all. The folder and each secret in it are open to
their owner alone, or nothing works. What sites rely on is made once: a lost key is never replaced
by another. Sites are read from their files at each question, so a revocation counts at once.
"""

from __future__ import annotations

import fcntl
import secrets
import stat
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from server.admissions import Admissions, AdmittedSite
from server.certificates import (
    CA_CERTIFICATE,
    CA_KEY,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    Certificates,
    create_authority,
    issue_server_certificate,
    read_certificates,
)
from server.federation_file import (
    FEDERATION,
    Identity,
    parse_identity,
    read_identity,
    require_equal,
    write_identity,
)
from strategies.audit import AuditLog
from strategies.enrolment import EnrolmentRequest, FederationPolicy, JoinDocument
from strategies.errors import ConfigError
from strategies.files import make_folder, write_atomic
from strategies.identity import create_signing_key, fingerprint, load_signing_key, read_secret

SITES, AUDIT_LOG, LOCK = "sites", "audit.jsonl", ".lock"
ORDER_KEY, SECRET = "order.key", "superlink.secret"
DATABASE, FLOWER_HOME = "superlink.sqlite", "flower"
SECRETS = (CA_KEY, SERVER_KEY, ORDER_KEY, SECRET)
SECRET_BYTES = 32


class Federation:
    """One federation, as its coordinator keeps it."""

    def __init__(self, state_dir: Path, identity: Identity) -> None:
        self.state_dir = state_dir
        self.identity = identity
        self.audit = AuditLog(state_dir / AUDIT_LOG)
        self._admissions = Admissions(state_dir / SITES, self.audit)

    @classmethod
    def create(
        cls,
        state_dir: Path,
        *,
        name: str,
        address: str,
        port: int = 8000,
        sans: Sequence[str] = (),
        policy: FederationPolicy | None = None,
    ) -> Federation:
        """Make a federation, finish one whose making was interrupted, or open an equal one.

        Raises:
            ConfigError: A value is not usable; the folder has a federation of other values, or
                files of one whose ``federation.json`` is lost.
        """
        wanted = parse_identity(
            {
                "id": f"{name}-{secrets.token_hex(8)}",
                "name": name,
                "address": address,
                "port": port,
                "sans": tuple(sans),
                "policy": policy or FederationPolicy(),
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
            }
        )
        make_folder(state_dir, secret=True)
        with locked(state_dir):
            if (state_dir / FEDERATION).exists():
                identity = read_identity(state_dir)
                require_equal(identity, wanted)
            else:
                identity = wanted
                _require_empty(state_dir)
                state_dir.chmod(0o700)
                write_identity(state_dir, identity)
            if not identity.complete:
                _complete(state_dir, identity)
        return cls.open(state_dir)

    @classmethod
    def open(cls, state_dir: Path) -> Federation:
        """Open a federation.

        Raises:
            ConfigError: There is none, its making was interrupted, ``federation.json`` is
                damaged, or others may enter the folder or read a secret in it.
        """
        identity = read_identity(state_dir)
        if not identity.complete:
            raise ConfigError(
                f"the making of the federation in {state_dir} was interrupted",
                hint="run the same `python -m server init` again",
            )
        mode = stat.S_IMODE(state_dir.stat().st_mode)
        if mode & 0o077:
            raise ConfigError(
                f"state-dir={state_dir} has mode {mode:04o}: others may enter; expected 0700",
                hint=f"chmod 700 {state_dir}",
            )
        for name in SECRETS:
            # The authority's key may be kept elsewhere: only renewing needs it.
            if (state_dir / name).exists():
                read_secret(state_dir / name)
        return cls(state_dir, identity)

    @property
    def id(self) -> str:
        """The federation's id, in every signature."""
        return self.identity.id

    @property
    def name(self) -> str:
        """Its name for people."""
        return self.identity.name

    @property
    def address(self) -> str:
        """Where sites connect, ``host:port``."""
        return self.identity.address

    @property
    def port(self) -> int:
        """Of flower-superlink on this machine's loopback."""
        return self.identity.port

    @property
    def superlink_address(self) -> str:
        """Where this machine reaches flower-superlink, ``host:port``."""
        return f"127.0.0.1:{self.port}"

    @property
    def policy(self) -> FederationPolicy:
        """What every join document promises."""
        return self.identity.policy

    @property
    def order_key(self) -> Ed25519PrivateKey:
        """Signs orders and join documents."""
        return load_signing_key(self.state_dir / ORDER_KEY)

    @property
    def fingerprint(self) -> str:
        """Of the order key: what sites compare by telephone."""
        return fingerprint(self.order_key.public_key())

    @property
    def ca_file(self) -> Path:
        """The authority's certificate."""
        return self.state_dir / CA_CERTIFICATE

    @property
    def server_certificate_file(self) -> Path:
        """The superlink's certificate."""
        return self.state_dir / SERVER_CERTIFICATE

    @property
    def server_key_file(self) -> Path:
        """The superlink's private key."""
        return self.state_dir / SERVER_KEY

    @property
    def secret_file(self) -> Path:
        """The secret that guards flower-superlink's tasks."""
        return self.state_dir / SECRET

    @property
    def database_file(self) -> Path:
        """What flower-superlink remembers."""
        return self.state_dir / DATABASE

    @property
    def flower_home(self) -> Path:
        """Flower's own folder, FLWR_HOME."""
        return self.state_dir / FLOWER_HOME

    def certificates(self) -> Certificates:
        """Read the certificates; whether they belong together is checked, the date is not."""
        return read_certificates(self.state_dir)

    def renew(self, sans: Sequence[str] = (), now: datetime | None = None) -> None:
        """Issue a new certificate for the superlink.

        Args:
            sans: Names and addresses to add to those it has.
            now: The clock's time by default.

        Raises:
            ConfigError: The authority's key is not there, or the authority has expired.
        """
        with locked(self.state_dir):
            before = read_identity(self.state_dir)
            names = tuple(dict.fromkeys((*before.sans, *sans)))
            identity = parse_identity({**before.model_dump(), "sans": names})
            issue_server_certificate(self.state_dir, identity.id, identity.hosts, now)
            write_identity(self.state_dir, identity)
            self.audit.append("certificate-renewed", hosts=" ".join(identity.hosts))
            self.identity = identity

    def sites(self) -> dict[str, AdmittedSite]:
        """Read every site ever admitted, revoked ones too, by name."""
        return self._admissions.sites()

    def admitted(self) -> dict[str, Ed25519PublicKey]:
        """Return the signing keys that count now, by site."""
        return {
            name: site.signing_key for name, site in self.sites().items() if not site.revoked_at
        }

    def admit(self, request: EnrolmentRequest) -> JoinDocument:
        """Pin a site's keys and return what it joins with; again for the same keys: the same.

        Raises:
            ConfigError: The name or a key is taken; the order key or the certificates are not
                usable. Nothing has changed then.
        """
        document = JoinDocument.create(
            request,
            self.order_key,
            federation=self.id,
            name=self.name,
            address=self.address,
            ca_certificate=self.certificates().authority_pem,
            policy=self.policy,
        )
        with locked(self.state_dir):
            self._admissions.admit(request)
        return document

    def revoke(self, site: str) -> bool:
        """Take a site out: nothing that it sends from now on counts.

        Returns:
            Whether it was in until now.

        Raises:
            ConfigError: No such site was ever admitted.
        """
        with locked(self.state_dir):
            return self._admissions.revoke(site)


def _complete(folder: Path, identity: Identity) -> None:
    """Make what is missing and mark the federation as complete."""
    create_authority(folder, identity.id)
    issue_server_certificate(folder, identity.id, identity.hosts)
    order_key = create_signing_key(folder / ORDER_KEY)
    write_atomic(folder / SECRET, secrets.token_bytes(SECRET_BYTES), mode=0o600)
    for name in (SITES, FLOWER_HOME):
        make_folder(folder / name, secret=True)
    audit = AuditLog(folder / AUDIT_LOG)
    audit.create()
    audit.append(
        "federation-created", federation=identity.id, order_key=fingerprint(order_key.public_key())
    )
    write_identity(folder, identity.model_copy(update={"complete": True}))


def _require_empty(folder: Path) -> None:
    """Refuse a folder with files of a federation, or of something else."""
    found = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if found:
        raise ConfigError(
            f"state-dir={folder} has no {FEDERATION} but has {', '.join(found[:5])}",
            hint=f"restore {FEDERATION} from a backup, or name an empty folder",
        )


@contextmanager
def locked(folder: Path, lock: str = LOCK) -> Generator[None]:
    """Let one process at a time change what belongs together; the others wait."""
    try:
        file = (folder / lock).open("w")
    except OSError as error:
        raise ConfigError(f"state-dir={folder} cannot be written ({error.strerror})") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
