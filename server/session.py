"""One sitting of a run: what a federation gives the ServerApp when a run begins or goes on.

A run has as many sittings as it is resumed, submitted anew, or moved between ``server run`` and
Flower's executor. Each has a new order of the same run: its cohort is the sites that are admitted
then, so a site that was revoked is out and one that was admitted meanwhile takes part.

Invariant: what could never run is refused before anything is written or sent.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from server.federation import Federation
from server.hosting import issue_order, record_run
from server.nodes import synchronise
from server.rounds import RoundResult, Settings, check
from server.run_directory import RunDirectory, provenance
from strategies.cli import one_line
from strategies.errors import ConfigError, FederationError, StoppedError
from strategies.identity import fingerprint
from strategies.records import REASON_LENGTH
from strategies.run_config import RunConfig

log = logging.getLogger(__name__)


def check_federation(federation: Federation, run: RunConfig) -> None:
    """Refuse a run that this federation's sites would refuse, or that its quorum cannot meet.

    Raises:
        ConfigError: With what to change.
        ModelError: Settings of the model that do not fit together.
    """
    federation.certificates().require_valid()
    num_sites, policy = len(federation.admitted()), federation.policy
    if num_sites < policy.min_cohort:
        raise ConfigError(
            f"admitted sites={num_sites}: every site was promised min-cohort={policy.min_cohort}",
            hint="`python -m server admit` more sites",
        )
    if run.strategy.min_sites < policy.min_cohort:
        raise ConfigError(
            f"strategy.min-sites={run.strategy.min_sites}: every site was promised "
            f"min-cohort={policy.min_cohort}",
            hint=f"--set strategy.min-sites={policy.min_cohort}",
        )
    if run.strategy.max_num_examples > policy.max_num_examples:
        raise ConfigError(
            f"strategy.max-num-examples={run.strategy.max_num_examples}: every site was promised "
            f"at most {policy.max_num_examples}",
            hint=f"--set strategy.max-num-examples={policy.max_num_examples}",
        )
    check(run, num_sites)


def create_directory(
    federation: Federation, run_uuid: str, run: RunConfig, path: Path
) -> RunDirectory:
    """Make a new run's directory.

    Raises:
        ConfigError: It exists, or cannot be made.
    """
    document = {
        "run_uuid": run_uuid,
        "federation": federation.id,
        "run_config": run.model_dump(by_alias=True),
        "seed": run.seed,
        "sites": _fingerprints(federation),
        **provenance(),
        "provenance": {"scan_backend": run.model.scan_backend, "simulated": False},
    }
    return RunDirectory.create(path, document)


def begin(
    federation: Federation,
    directory: RunDirectory,
    run_uuid: str,
    run: RunConfig,
    on_round: Callable[[RoundResult], None],
) -> Settings:
    """Issue an order and return what the ServerApp needs to follow it.

    Args:
        federation: Whose run it is; this process hosts it.
        directory: The run's.
        run_uuid: The run's.
        run: Its settings.
        on_round: Called with each finished round.

    Raises:
        ConfigError: The directory belongs to another federation, or no order can be issued.
    """
    before: dict[str, Any] = directory.stored("sites", dict)
    if directory.stored("federation", str) != federation.id:
        raise ConfigError(
            f"{directory.path} is of federation={directory.stored('federation', str)}; this is "
            f"{federation.id}",
            hint="name the state folder that the run was started with: --state-dir",
        )
    cohort = _fingerprints(federation)
    for site in sorted(before.keys() | cohort.keys()):
        if before.get(site) != cohort.get(site):
            kind = "left" if site not in cohort else "joined" if site not in before else "new keys"
            log.info("site=%s %s since the run was first started", site, kind)
    _check_nodes(federation)
    record_run(federation, run_uuid, directory.path)
    return Settings(
        directory=directory,
        order=issue_order(federation, run_uuid, run, list(cohort)),
        order_key=federation.order_key,
        sites=federation.admitted,
        audit=federation.audit,
        on_round=on_round,
    )


def _check_nodes(federation: Federation) -> None:
    """Remove nodes that somebody else has registered, before they get weights under a site's name.

    Anybody who reaches flower-superlink's control port can register one.
    """
    try:
        for change in synchronise(federation):
            log.warning("%s: its list had changed", change)
    except FederationError as error:
        log.warning("nodes not checked: %s", error)


@contextmanager
def noted(federation: Federation, run_uuid: str) -> Generator[None]:
    """Note in the audit log how the run in the body ended."""
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, StoppedError | KeyboardInterrupt | SystemExit)
        told = isinstance(error, FederationError)
        reason = one_line(str(error), REASON_LENGTH) if told else type(error).__name__
        event = "run-stopped" if stopped else "run-failed"
        try:
            federation.audit.append(event, run_uuid=run_uuid, reason=reason)
        except (OSError, FederationError) as second:  # what ended the run counts more
            log.error("audit entry %s not written: %s", event, second)
        raise
    federation.audit.append("run-complete", run_uuid=run_uuid)


def _fingerprints(federation: Federation) -> dict[str, str]:
    return {site: fingerprint(key) for site, key in federation.admitted().items()}
