"""Which order a site follows: the newest it has seen of the federation it joined.

Invariant: a site that has followed an order follows no older one, whoever sends it, also after a
restart; and a run's settings never change under its name. What cannot be read is not followed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from strategies.errors import RefusalError
from strategies.files import write_atomic
from strategies.identity import canonical
from strategies.orders import Order


def follow(path: Path, order: Order) -> bool:
    """Remember an order as the newest.

    Args:
        path: Where the site keeps the newest order's name.
        order: Verified, and allowed by the site.

    Returns:
        Whether it is another than before.

    Raises:
        RefusalError: The site follows a newer order, or this run had other settings before, or the
            file cannot be read.
    """
    manifest = order.manifest
    settings = hashlib.sha256(canonical(manifest.run_config)).hexdigest()
    entry = {
        "order_sha256": order.sha256,
        "issued_ms": manifest.issued_ms,
        "run_uuid": manifest.run_uuid,
        "run_config_sha256": settings,
    }
    try:
        newest = json.loads(path.read_text()) if path.exists() else None
        if newest == entry:
            return False
        if newest is not None:
            if newest["issued_ms"] >= manifest.issued_ms:
                raise RefusalError("order-superseded", "this site follows a newer order")
            same_run = newest["run_uuid"] == manifest.run_uuid
            if same_run and newest["run_config_sha256"] != settings:
                raise RefusalError("run-changed", "this run began with other settings")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RefusalError(
            "state-unreadable", "the site cannot read which order it follows"
        ) from error
    write_atomic(path, json.dumps(entry, indent=1))
    return True
