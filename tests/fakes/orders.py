"""A coordinator's order key, its orders, and sites that have joined it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import RecordDict

from client.membership import Membership
from strategies.arrays import from_record, parse
from strategies.enrolment import EnrolmentRequest, FederationPolicy, JoinDocument
from strategies.orders import Order, RunManifest
from strategies.records import ENVELOPE, Instruction
from strategies.run_config import RunConfig

FEDERATION = "lung-1a2b"
ORDER_KEY = Ed25519PrivateKey.generate()
CODE = "c0de" * 16


def manifest(run: RunConfig | None = None, *, sites: Sequence[str] = ("A", "B", "C"), **changes):
    now = time.time_ns() // 1_000_000
    values = {
        "federation": FEDERATION,
        "run_uuid": "a1b2",
        "run_config": (run or RunConfig()).flatten(),
        "cohort": tuple(sites),
        "code_sha256": CODE,
        "issued_ms": now,
        "expires_ms": now + 3_600_000,
    }
    return RunManifest(**{**values, **changes})


def order(
    run: RunConfig | None = None,
    *,
    sites: Sequence[str] = ("A", "B", "C"),
    key: Ed25519PrivateKey = ORDER_KEY,
    **changes,
) -> Order:
    """An order as ``python -m server run`` issues it, with fields of its manifest changed."""
    return Order.issue(key, manifest(run, sites=sites, **changes))


def unverified(content: RecordDict) -> Instruction:
    """What an instruction says, whoever signed it: for links that do not know the order key."""
    envelope = dict(content.config_records[ENVELOPE])
    found = RunManifest.model_validate_json(envelope["order"])
    run = RunConfig.parse(found.run_config)
    return Instruction(
        Order(found, run, envelope["order"], envelope["order-signature"]),
        envelope["server-round"],
        envelope["task"],
        parse(from_record(content)),
    )


def membership(
    site: str = "A",
    signing_key: Ed25519PrivateKey | None = None,
    *,
    order_key: Ed25519PrivateKey = ORDER_KEY,
    address: str = "127.0.0.1:1",
    ca_path: Path = Path("ca.pem"),
    min_cohort: int = 1,
) -> Membership:
    """What a site has after ``python -m client join``."""
    request = EnrolmentRequest.create(
        site,
        signing_key=signing_key or Ed25519PrivateKey.generate(),
        node_key=ec.generate_private_key(ec.SECP384R1()),
        wrap_key=X25519PrivateKey.generate(),
    )
    document = JoinDocument.create(
        request,
        order_key,
        federation=FEDERATION,
        name="lung",
        address=address,
        ca_certificate="",
        policy=FederationPolicy(min_cohort=min_cohort),
    )
    return Membership(document, address, ca_path)
