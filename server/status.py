"""``python -m server status``: who is in the federation, who is there, how far the run is.

Invariant: it only looks, beside any run, and answers when flower-superlink is down, too: what only
that knows is then ``unknown``. The keys of the JSON form are part of the command's interface.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from server.federation import AdmittedSite, Federation
from server.flower_control import Control, Node
from server.hosting import CurrentRun, current_run, is_hosting
from server.progress import Progress, read_progress
from server.run_directory import RunDirectory
from strategies.errors import ConfigError, FederationError
from strategies.run_config import METRIC_NAMES, RunConfig

# A run's pace is that of its last rounds.
ETA_ROUNDS = 3


def status(federation: Federation, as_json: bool) -> int:
    """Print what is known, as aligned lines or as one JSON object."""
    found = describe(federation)
    print(json.dumps(found, indent=2) if as_json else "\n".join(lines(found)))
    return 0


def describe(federation: Federation) -> dict[str, Any]:
    """Return what is known as JSON values; see :func:`_run` and :func:`_site` for the parts."""
    try:
        with Control(federation.superlink_address, federation.ca_file) as control:
            nodes, reason = {node.public_key: node for node in control.nodes()}, ""
    except (FederationError, OSError) as error:
        nodes, reason = None, str(error)
    current = current_run(federation)
    run, progress = _run(current, hosted=is_hosting(federation)) if current else (None, Progress())
    return {
        "federation": {
            "id": federation.id,
            "name": federation.name,
            "address": federation.address,
        },
        "superlink": {
            "address": federation.superlink_address,
            "online": nodes is not None,
            "reason": reason,
        },
        "certificate": _certificate(federation),
        "run": run,
        "sites": [_site(site, nodes, progress) for site in federation.sites().values()],
    }


def _certificate(federation: Federation) -> dict[str, Any]:
    try:
        certificates = federation.certificates()
    except ConfigError as error:
        return {"expires": None, "warnings": [str(error)]}
    expires = certificates.server.not_valid_after_utc
    return {
        "expires": expires.isoformat(timespec="seconds"),
        "warnings": certificates.warnings(),
    }


def _run(current: CurrentRun, *, hosted: bool) -> tuple[dict[str, Any], Progress]:
    """Describe the run that was hosted last.

    Its ``state`` is ``running``, ``complete`` or ``stopped``; ``problem`` says why nothing more is
    known. Validation figures are those of the newest weights that were judged, and ``round`` in
    them says which round gave these; ``result`` are the test figures of a complete run.
    """
    found: dict[str, Any] = {
        "run_uuid": current.run_uuid,
        "directory": current.directory,
        "started": current.started,
        "state": "running" if hosted else "stopped",
        "problem": None,
        "round": 0,
        "num_server_rounds": None,
        "num_examples": None,
        "train_loss": None,
        "validation": None,
        "selection_metric": None,
        "result": None,
        "eta_seconds": None,
    }
    directory = RunDirectory(Path(current.directory))
    try:
        config = RunConfig.parse(directory.stored("run_config", dict))
        progress, summary = read_progress(directory), directory.summary()
    except ConfigError as error:
        return {**found, "problem": str(error)}, Progress()
    newest = progress.rounds.get(progress.last_round, {})
    found |= {
        "round": progress.last_round,
        "num_server_rounds": config.num_server_rounds,
        "num_examples": newest.get("num_examples"),
        "train_loss": newest.get("train_loss"),
        "selection_metric": config.strategy.selection_metric,
    }
    if progress.validation:
        judged = max(progress.validation)
        found["validation"] = {"round": judged, **_metrics(progress.validation[judged])}
    if summary is not None:
        return {**found, "state": "complete", "result": _metrics(summary["pooled"])}, progress
    if hosted:
        pace = [progress.rounds[where]["seconds"] for where in sorted(progress.rounds)]
        pace = pace[-ETA_ROUNDS:]
        if pace:
            left = config.num_server_rounds - progress.last_round
            found["eta_seconds"] = round(left * sum(pace) / len(pace))
    return found, progress


def _metrics(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: figures.get(name) for name in METRIC_NAMES}


def _site(
    site: AdmittedSite, nodes: dict[bytes, Node] | None, progress: Progress
) -> dict[str, Any]:
    """Describe a site: who it is, whether it is there, and what it did in the run.

    Its ``state`` is ``online``, ``offline``, ``revoked``, or ``unknown`` when flower-superlink does
    not answer; ``version`` and ``code_sha256`` are what it signed last in this run.
    """
    node = (nodes or {}).get(site.node_key)
    if site.revoked_at:
        state = "revoked"
    elif nodes is None:
        state = "unknown"
    else:
        state = "online" if node is not None and node.online else "offline"
    done = progress.sites.get(site.name, {})
    signed = [entry for _, entry in sorted(done.items()) if entry.code_sha256]
    last = done[max(done)] if done else None
    return {
        "name": site.name,
        "state": state,
        "last_seen": _iso(node.last_seen) if node is not None else None,
        "admitted_at": site.admitted_at,
        "revoked_at": site.revoked_at,
        "fingerprint": site.request.fingerprint,
        "rounds_contributed": sum(entry.status == "ok" for entry in done.values()),
        "rounds_asked": len(done),
        "last_round": max(done, default=None),
        "last_status": last.status if last else None,
        "last_reason": last.reason if last else None,
        "version": signed[-1].version if signed else None,
        "code_sha256": signed[-1].code_sha256 if signed else None,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return what :func:`describe` found as people read it."""
    federation, superlink, certificate = (
        found[name] for name in ("federation", "superlink", "certificate")
    )
    width = max([len("site"), *(len(site["name"]) for site in found["sites"])]) + 2
    answers = "answers" if superlink["online"] else f"is down: {superlink['reason']}"
    result = [
        f"federation   {federation['name']} ({federation['id']}), sites connect to "
        f"{federation['address']}",
        f"superlink    {superlink['address']} {answers}",
        f"certificate  valid until {certificate['expires'] or 'unknown'}",
        *(f"warning      {warning}" for warning in certificate["warnings"]),
        f"run          {_run_line(found['run'])}",
        "",
        f"{'site':<{width}}{'state':<9}{'last seen':<27}{'rounds':<9}{'version':<9}{'code':<14}"
        "last round",
    ]
    for site in found["sites"]:
        rounds = f"{site['rounds_contributed']}/{site['rounds_asked']}"
        seen = site["last_seen"] or ("-" if site["state"] == "unknown" else "never")
        last = f"{site['last_round']} {site['last_status']}" if site["last_status"] else "-"
        reason = f": {site['last_reason']}" if site["last_reason"] else ""
        result.append(
            f"{site['name']:<{width}}{site['state']:<9}{seen:<27}{rounds:<9}"
            f"{site['version'] or '-':<9}{(site['code_sha256'] or '-')[:12]:<14}{last}{reason}"
        )
    return result


def _run_line(run: dict[str, Any] | None) -> str:
    if run is None:
        return "none yet"
    head = f"{run['run_uuid']} in {run['directory']}: {run['state']}"
    if run["problem"]:
        return f"{head}, {run['problem']}"
    parts = [head, f"round {run['round']} of {run['num_server_rounds']}"]
    if run["train_loss"] is not None:
        parts.append(f"train loss {run['train_loss']:.4f}")
    metric, judged, result = run["selection_metric"], run["validation"], run["result"]
    if judged is not None and judged[metric] is not None:
        parts.append(f"val {metric} {judged[metric]:.4f} after round {judged['round']}")
    if result is not None and result[metric] is not None:
        parts.append(f"test {metric} {result[metric]:.4f}")
    if run["eta_seconds"] is not None:
        parts.append(f"about {timedelta(seconds=run['eta_seconds'])} left")
    return ", ".join(parts)


def _iso(moment: datetime | None) -> str | None:
    return moment.astimezone(UTC).isoformat(timespec="seconds") if moment else None
