"""``python -m server init``, ``admit`` and ``revoke``: from what a person types to what they read.

Invariant: a site is admitted in the register first, and the files decide. flower-superlink is told
at once when it runs, and when it starts otherwise.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.federation import Federation
from server.federation_file import ADDRESS_HINT, FEDERATION, read_identity
from server.nodes import synchronise
from strategies.enrolment import EnrolmentRequest, FederationPolicy, JoinDocument
from strategies.errors import ConfigError, FederationError, SignatureError
from strategies.files import write_atomic
from strategies.identity import same_fingerprint

REQUEST_SUFFIX, JOIN_SUFFIX = ".enroll.json", ".join.json"
DEFAULT_NAME, DEFAULT_PORT = "federation", 8000
CONNECT_SECONDS = 1.0
# A request has a little over 1 kB; what is much longer is another file.
MAX_REQUEST_BYTES = 65_536


@dataclass(frozen=True)
class InitOptions:
    """What ``server init`` was told; None: left out.

    Attributes:
        sans: Names and addresses for the superlink's certificate.
        renew: Issue that certificate anew.
    """

    name: str | None = None
    address: str | None = None
    port: int | None = None
    min_cohort: int | None = None
    sans: Sequence[str] = ()
    renew: bool = False


def initialise(state_dir: Path, options: InitOptions) -> str:
    """Make a federation, or show the one there is, or renew its certificate.

    Returns:
        What to tell the person.

    Raises:
        ConfigError: An option is missing, not usable, or contradicts the federation there is.
    """
    exists = (state_dir / FEDERATION).exists()
    if options.renew and not exists:
        read_identity(state_dir)  # says that there is none
    if not exists and options.address is None:
        raise ConfigError(
            "--address is missing: expected host:port, where sites will connect", hint=ADDRESS_HINT
        )
    federation = Federation.create(state_dir, **_wanted(state_dir, options, exists=exists))
    if options.renew:
        federation.renew(options.sans)
    return "\n".join([*_described(federation), *_next(federation, renewed=options.renew)])


def _wanted(state_dir: Path, options: InitOptions, *, exists: bool) -> dict[str, Any]:
    """Fill in what was left out: from the federation there is, else with defaults."""
    found = read_identity(state_dir) if exists else None
    values: dict[str, Any] = {
        "name": found.name if found else DEFAULT_NAME,
        "address": found.address if found else None,
        "port": found.port if found else DEFAULT_PORT,
    }
    values |= {name: value for name in values if (value := getattr(options, name)) is not None}
    held = set(found.hosts) if found else set()
    new = bool(set(options.sans) - held) and not options.renew
    values["sans"] = options.sans if new or not found else found.sans
    policy = found.policy if found else FederationPolicy()
    if options.min_cohort is not None:
        if options.min_cohort < 1:
            raise ConfigError(f"--min-cohort {options.min_cohort}: expected at least 1")
        policy = policy.model_copy(update={"min_cohort": options.min_cohort})
    return {**values, "policy": policy}


def _described(federation: Federation) -> list[str]:
    certificates = federation.certificates()
    return [
        f"federation    {federation.id}",
        f"state folder  {federation.state_dir}",
        f"address       {federation.address}  (sites connect there)",
        f"superlink     {federation.superlink_address}  (on this machine)",
        f"min-cohort    {federation.policy.min_cohort}",
        f"fingerprint   {federation.fingerprint}  (read it out to each site by telephone)",
        *(f"certificate   {line}" for line in certificates.expiries()),
        f"              for {' '.join(certificates.hosts)}",
    ]


def _next(federation: Federation, *, renewed: bool) -> list[str]:
    if renewed:
        return [
            "Renewed. Start `python -m server superlink` again, and reload nginx where it runs: "
            "both still serve with the certificate before.",
        ]
    return [
        "Keep a backup of the state folder: the keys in it cannot be made again.",
        "Next: python -m server superlink; and for each site's request: "
        f"python -m server admit FILE{REQUEST_SUFFIX}",
    ]


def admit(
    federation: Federation, file: Path, expected: str | None = None, output: Path | None = None
) -> str:
    """Check a site's request, admit the site, write its join document.

    Args:
        federation: The coordinator's.
        file: What the site sent.
        expected: The site's fingerprint as told by telephone; None: compared afterwards.
        output: The join document; ``NAME.join.json`` beside the request by default.

    Returns:
        What to tell the person.

    Raises:
        ConfigError: The request is unreadable, altered, not what was told by telephone, or its
            name or keys are taken; ``output`` is another file.
    """
    request = read_request(file)
    if expected is not None and not same_fingerprint(expected, request.fingerprint):
        raise ConfigError(
            f"fingerprint={expected}: the request of site={request.site} has {request.fingerprint}",
            hint="read it out by telephone once more; if it still differs, do not admit this file",
        )
    output = output or file.with_name(f"{request.site}{JOIN_SUFFIX}")
    written = _existing(output)
    before = request.site in federation.admitted()
    document = federation.admit(request)
    try:
        if written is None or not _same(written, document):
            write_atomic(output, document.to_json())
    except OSError as error:
        raise ConfigError(
            f"site={request.site} is admitted, but {output} cannot be written ({error.strerror})",
            hint="run the same command again with --output FILE",
        ) from error
    told = "compare it with the site by telephone" if expected is None else "it is the one you gave"
    return "\n".join(
        [
            f"site          {request.site} {'was admitted before' if before else 'admitted'}",
            f"fingerprint   {request.fingerprint}  {told}",
            f"join file     {output}  (send it to the site; nothing in it is secret)",
            f"coordinator   {document.fingerprint}  read this fingerprint out to the site",
        ]
    )


def read_request(file: Path) -> EnrolmentRequest:
    """Read a site's request; all its signatures are checked.

    Raises:
        ConfigError: It is not readable, not a request, or altered.
    """
    hint = "expected the NAME.enroll.json that `python -m client init` wrote, unchanged"
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_REQUEST_BYTES + 1)
        if len(content) > MAX_REQUEST_BYTES:
            raise ConfigError(f"longer than {MAX_REQUEST_BYTES} bytes")
        return EnrolmentRequest.parse(content.decode())
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})", hint=hint) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not text", hint=hint) from error
    except (ConfigError, SignatureError) as error:
        raise ConfigError(f"{file}: {error}", hint=hint) from error


def revoke(federation: Federation, site: str) -> str:
    """Take a site out of the federation.

    Returns:
        What to tell the person.

    Raises:
        ConfigError: No such site was ever admitted.
    """
    if not federation.revoke(site):
        return f"site          {site} was revoked before"
    return f"site          {site} revoked: nothing that it sends from now on counts"


def tell_superlink(federation: Federation) -> str:
    """Bring flower-superlink's nodes in line with the register, if it runs.

    Returns:
        What to tell the person.

    Raises:
        FederationError: It runs and refuses, or another program has its port.
    """
    try:
        with socket.create_connection(("127.0.0.1", federation.port), timeout=CONNECT_SECONDS):
            pass
    except OSError:
        return "superlink     does not run; it learns of this when it starts"
    changes = synchronise(federation) or ["knows this already"]
    return "\n".join(f"superlink     {change}" for change in changes)


def _existing(output: Path) -> JoinDocument | None:
    """Return the join document that is there; refuse to replace any other file."""
    if not output.parent.is_dir():
        raise ConfigError(f"output={output}: {output.parent} is not a folder")
    if not output.exists():
        return None
    try:
        return JoinDocument.parse(output.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, FederationError) as error:
        raise ConfigError(
            f"output={output} exists and is no join document: not replaced",
            hint="name another file with --output",
        ) from error


def _same(one: JoinDocument, other: JoinDocument) -> bool:
    """Say whether two documents differ in their time alone."""
    time = {"created", "signature"}
    return one.model_dump(exclude=time) == other.model_dump(exclude=time)
