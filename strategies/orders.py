"""What a coordinator orders: a run's manifest, signed by the key that sites pinned at joining.

Flower's control port authenticates nobody, so whoever reaches it could start a run or send weights.
Every instruction therefore carries the order it belongs to, and a site follows no other.

Invariant: :meth:`Order.verify` returns only orders of this federation, signed by its key, that are
within their time. Which of several is the newest is for the site to remember.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from typing import Annotated, Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from strategies.enrolment import SiteName
from strategies.errors import ConfigError, RefusalError
from strategies.identity import canonical, sign, verify_bytes
from strategies.run_config import RunConfig, Scalar, explain

# Flower's node authentication accepts clocks that differ by as much.
CLOCK_TOLERANCE_SECONDS = 300

LONGEST_SECONDS = 366 * 86_400

Milliseconds = Annotated[int, Field(ge=0, lt=2**53)]  # exact in any reader of JSON


class RunManifest(BaseModel):
    """Everything that sites agree to when they follow an order.

    Attributes:
        federation: The federation's id.
        run_uuid: Made once per run; survives resuming.
        run_config: Flattened RunConfig.
        cohort: The sites of the run.
        code_sha256: Of the coordinator's installed code.
        issued_ms: When, in milliseconds since 1970; a later order of a federation replaces it.
        expires_ms: From when on no site follows it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    version: Literal[1] = 1
    federation: Annotated[str, Field(min_length=1, max_length=100)]
    run_uuid: Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")]
    run_config: dict[str, Scalar]
    cohort: Annotated[tuple[SiteName, ...], Field(min_length=1, max_length=1000)]
    code_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    issued_ms: Milliseconds
    expires_ms: Milliseconds


@dataclass(frozen=True)
class Order:
    """A signed manifest, with the settings that it holds.

    Attributes:
        text: The manifest's canonical JSON: the bytes that were signed.
        signature: The order key's.
    """

    manifest: RunManifest
    run: RunConfig
    text: str
    signature: bytes

    @property
    def sha256(self) -> str:
        """Hash of the manifest: names the order in instructions and audit logs."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @classmethod
    def issue(cls, key: Ed25519PrivateKey, manifest: RunManifest) -> Order:
        """Sign a manifest."""
        document = manifest.model_dump(mode="json")
        run = RunConfig.parse(manifest.run_config)
        return cls(manifest, run, canonical(document).decode(), sign(key, document))

    @classmethod
    def verify(
        cls,
        text: str,
        signature: bytes,
        key: Ed25519PublicKey,
        *,
        federation: str,
        now: float | None = None,
    ) -> Order:
        """Read an order that a site may follow.

        Args:
            text: The manifest.
            signature: Over its bytes.
            key: The order key that the site pinned when it joined.
            federation: The federation that the site joined.
            now: Seconds since 1970; the clock's by default.

        Raises:
            SignatureError: The order key did not sign these bytes.
            RefusalError: Another federation or version, expired, from the future, for longer than
                a year, or with settings that are not valid here.
        """
        verify_bytes(key, text.encode(), signature)
        try:
            manifest = RunManifest.model_validate_json(text)
        except ValidationError as error:
            raise RefusalError("bad-order", f"manifest {explain(error)}") from None
        if manifest.federation != federation:
            raise RefusalError(
                "other-federation", f"federation={manifest.federation!r} is not this site's"
            )
        if manifest.expires_ms - manifest.issued_ms > LONGEST_SECONDS * 1000:
            raise RefusalError("bad-order", "the order is for longer than a year")
        now = time.time() if now is None else now
        if manifest.expires_ms <= now * 1000:
            hours = (now - manifest.expires_ms / 1000) / 3600
            raise RefusalError("order-expired", f"the order expired {hours:.1f} h ago")
        ahead = manifest.issued_ms / 1000 - now
        if ahead > CLOCK_TOLERANCE_SECONDS:
            raise RefusalError(
                "order-from-the-future",
                f"the order was issued {ahead:.0f} s from now by this site's clock; "
                f"tolerance {CLOCK_TOLERANCE_SECONDS} s",
            )
        try:
            run = RunConfig.parse(manifest.run_config)
        except ConfigError as error:
            raise RefusalError("bad-order", str(error)) from None
        return cls(manifest, run, text, signature)
