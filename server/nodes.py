"""Keeping flower-superlink's list of nodes equal to the register of sites.

Invariant: after :func:`synchronise`, exactly the admitted sites' nodes may connect, each under its
site's name. The register decides; what flower-superlink's list says besides is removed.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

from server.federation import locked
from strategies.cli import one_line
from strategies.errors import FederationError

if TYPE_CHECKING:
    from server.federation import Federation

log = logging.getLogger(__name__)

# Not the register's lock: that is never held while another program answers.
LOCK = ".nodes.lock"
POLL_SECONDS = 0.5
MAX_PAUSE_SECONDS = 30.0  # between attempts that fail


def synchronise(federation: Federation) -> list[str]:
    """Register admitted sites that are missing and unregister all others.

    Returns:
        One line a change, in the order they were made.

    Raises:
        SuperlinkDownError: flower-superlink does not run.
        FederationError: It refuses, or a site can only be enrolled anew.
    """
    from server.flower_control import Control

    done: list[str] = []
    with (
        locked(federation.state_dir, LOCK),
        Control(federation.superlink_address, federation.ca_file) as control,
    ):
        nodes = control.nodes()
        names = {
            site.node_key: name
            for name, site in federation.sites().items()
            if site.revoked_at is None
        }
        for node in nodes:
            if not node.unregistered and names.get(node.public_key) != node.name:
                control.unregister(node.node_id)
                shown = one_line(node.name, 40) or "without a name"
                federation.audit.append("node-unregistered", name=shown)
                done.append(f"unregistered node {shown}")
        known = {node.public_key: node for node in nodes}
        lost = []
        for key, name in names.items():
            node = known.get(key)
            if node is None and control.register(name, key):
                federation.audit.append("node-registered", name=name)
                done.append(f"registered node {name}")
            elif node is None or node.unregistered or node.name != name:
                lost.append(name)
    if lost:
        raise FederationError(
            f"site={','.join(lost)}: admitted, but somebody unregistered its node at "
            "flower-superlink, which takes no key twice",
            hint="`python -m server revoke` it; the site makes new keys and enrols again",
        )
    return done


def synchronise_when_up(federation: Federation, stop: threading.Event) -> None:
    """Wait for flower-superlink to answer, then :func:`synchronise`; log what was done.

    Whatever fails is tried again, since until it succeeds a revoked site may still connect. Each
    reason is logged when it is not that of the attempt before.

    Args:
        federation: Whose superlink is starting.
        stop: Ends the attempts.
    """
    from server.flower_control import SuperlinkDownError

    told, pause = "", POLL_SECONDS
    while not stop.is_set():
        try:
            changes = synchronise(federation)
            admitted = federation.admitted()
        except SuperlinkDownError:  # it is starting; its supervisor says so if it ends
            stop.wait(POLL_SECONDS)
            continue
        except Exception as error:  # nobody else would make up for a thread that ends here
            reason = _reason(error)
            if reason != told:
                log.error("nodes not synchronised, trying again: %s", reason)
            told = reason
            stop.wait(pause)
            pause = min(2 * pause, MAX_PAUSE_SECONDS)
            continue
        for change in changes:
            log.info("%s", change)
        log.info("admitted=%s", ",".join(admitted) or "none")
        return


def _reason(error: Exception) -> str:
    if isinstance(error, FederationError):
        return f"{error}; {error.hint}"
    return f"{type(error).__name__}: {one_line(str(error), 200)}"
