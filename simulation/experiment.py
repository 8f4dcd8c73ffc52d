"""One experiment: partition, federate, compare with pooled training, report.

Invariant: the ServerApp, strategies and ClientApp are the deployed ones; only Grid, keys and data
source are the simulation's. The same scenario and seed give the same ``model.safetensors`` to the
byte, interrupted or not.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from flwr.app import Context, RecordDict

from client.app import app as client_app
from client.data.labels import mapped_names, match, unmapped_error
from client.data.manifest import ImageDataset
from client.data.registry import load
from client.data.transforms import require_fit
from client.membership import Membership
from client.orders import forget
from client.site import ORDERS, Site, choose_device, register
from client.site_config import AUDIT_LOG, SIGNING_KEY, Limits, SiteConfig
from client.train import batches
from medmamba.config import ModelError
from medmamba.scan import active_backend, backend_details
from server.app import run_app
from server.rounds import Settings, check
from server.run_directory import SUMMARY, RunDirectory, provenance, read_json, to_json
from simulation.grid import RUN_ID, SERVER_NODE_ID, Fault, LocalGrid, no_fault
from simulation.partition import describe, partition, site_names
from simulation.scenario import Scenario
from strategies.audit import AuditLog
from strategies.code import code_sha256
from strategies.enrolment import EnrolmentRequest, FederationPolicy, JoinDocument
from strategies.errors import CheckpointError, ConfigError
from strategies.files import make_folder, write_atomic
from strategies.identity import create_signing_key
from strategies.orders import Order, RunManifest
from strategies.run_config import RunConfig, join_names

log = logging.getLogger(__name__)

FEDERATION = "simulation"
POOLED_SITE = "pooled"
PARTITION = "partition.json"
SIMULATED_DEVICE = "auto"
UNLIMITED = 2**63
ORDER_MS = 365 * 86_400_000

OnReply = Callable[[str], None]


@dataclass(frozen=True)
class Data:
    """A scenario's images: all of them, and dealt out to sites."""

    dataset: ImageDataset
    parts: dict[str, ImageDataset]


def prepare(scenario: Scenario) -> Data:
    """Read the scenario's data and deal it out to sites.

    Raises:
        ConfigError: The data cannot be had, does not fit the run, or cannot be dealt out; or the
            scan backend that the run forces is missing.
    """
    run, federation = scenario.run, scenario.federation
    _scan_backend(run)
    dataset = _with_run_classes(load(scenario.data, site_names(federation.num_sites)), scenario)
    classes = len(dataset.manifest.classes)
    if classes != run.model.num_classes:
        raise ConfigError(
            f"model.num-classes={run.model.num_classes}: dataset={scenario.data.dataset} has "
            f"{classes} classes",
            hint=f"--set model.num-classes={classes}",
        )
    check(run, federation.num_sites)
    model = run.model
    require_fit(dataset.images, model.image_size, model.in_channels, model.small_images)
    return Data(dataset, partition(dataset, federation, run.seed))


def _with_run_classes(dataset: ImageDataset, scenario: Scenario) -> ImageDataset:
    """Return the images with the labels of the run's classes, or of their own names, mapped.

    Raises:
        ConfigError: Images are of a class that matches none of the run's.
    """
    own, label_map = dataset.manifest.classes, scenario.data.label_map
    names = scenario.run.class_names or mapped_names(own, label_map)
    if names == own and not label_map:
        return dataset
    found = match(dataset, names, label_map)
    if found.unmapped:
        raise unmapped_error(found.unmapped, names)
    return found.dataset


def declared(run: RunConfig, data: Data) -> RunConfig:
    """Return the run with its class names: the dataset's, where the scenario names none.

    Raises:
        ConfigError: A name of the dataset cannot be one of a run.
    """
    if run.classes:
        return run
    return RunConfig.parse({**run.flatten(), "classes": join_names(data.dataset.manifest.classes)})


def num_messages(scenario: Scenario) -> int:
    """Return how many instructions a whole experiment sends, for a progress bar."""
    each = scenario.run.num_server_rounds + 2
    return each * (scenario.federation.num_sites + len(scenario.federation.baselines))


def create(path: Path, scenario: Scenario, data: Data, run_uuid: str) -> RunDirectory:
    """Make the run directory of a new experiment."""
    directory = RunDirectory.create(
        path,
        {
            "run_uuid": run_uuid,
            "data": _identity(data),
            "federation": FEDERATION,
            "scenario": scenario.model_dump(mode="json", by_alias=True, exclude={"run"}),
            "run_config": declared(scenario.run, data).model_dump(by_alias=True),
            "seed": scenario.run.seed,
            **provenance(),
            "provenance": {**_computes_with(scenario.run), "simulated": True},
        },
    )
    write_atomic(path / PARTITION, to_json(describe(data.parts, scenario.federation)))
    return directory


def _computes_with(run: RunConfig) -> dict[str, Any]:
    """Return what decides a run's bytes beside its settings and data."""
    return {
        **backend_details(_scan_backend(run)),
        "device": _device().type,
        "num_threads": torch.get_num_threads(),
    }


def _scan_backend(run: RunConfig) -> str:
    """Return what runs the scans of all simulated sites."""
    try:
        return active_backend(_device(), run.model.forced_scan_backend)
    except ModelError as error:
        setting = f"model.scan-backend={run.model.scan_backend}"
        raise ConfigError(f"{setting}: {error}", error.hint) from None


@lru_cache
def _device() -> torch.device:
    """Choose the device of all simulated sites."""
    return choose_device(SIMULATED_DEVICE)


def _identity(data: Data) -> dict[str, Any]:
    """Return what says whether images, labels and splits are the same, and from which file."""
    return {"manifest_sha256": data.dataset.manifest.fingerprint(), **data.dataset.provenance}


def execute(
    directory: RunDirectory,
    scenario: Scenario,
    data: Data,
    *,
    fault: Fault = no_fault,
    on_reply: OnReply = lambda site: None,
) -> dict[str, Any]:
    """Run or continue an experiment and write its results.

    Args:
        directory: From :func:`create`, or one that was interrupted.
        scenario: The scenario the directory was made from.
        data: From :func:`prepare` of the same scenario.
        fault: What the links do to messages; for tests.
        on_reply: Called after each reply.

    Returns:
        The content of ``summary.json``.

    Raises:
        CheckpointError: The data are not those the experiment began with.
    """
    run_uuid, began_with = directory.stored("run_uuid", str), directory.stored("data", dict)
    identity = _identity(data)
    if identity != began_with:
        raise CheckpointError(
            f"dataset={scenario.data.dataset}: not the data that this run began with",
            hint="restore them, or start a new run",
        )
    log.info("data %s", " ".join(f"{name}={value}" for name, value in identity.items()))
    computes_with, before = _computes_with(scenario.run), directory.stored("provenance", dict)
    log.info("%s", " ".join(f"{name}={value}" for name, value in computes_with.items()))
    for name, value in computes_with.items():
        if before.get(name, value) != value:
            log.warning(
                "%s=%s but the run began with %s: its bytes are not those of one run",
                name,
                value,
                before[name],
            )
    run = declared(scenario.run, data)
    summary = _federate(directory, run, data.parts, run_uuid, fault=fault, on_reply=on_reply)
    if "pooled" in scenario.federation.baselines:
        summary["baselines"] = {
            "pooled": _pooled_training(directory, scenario, data, run_uuid, on_reply)
        }
    directory.write_summary(summary)
    return summary


def _federate(
    directory: RunDirectory,
    run: RunConfig,
    parts: dict[str, ImageDataset],
    run_uuid: str,
    *,
    fault: Fault,
    on_reply: OnReply,
) -> dict[str, Any]:
    order_key = Ed25519PrivateKey.generate()
    sites = {
        name: _site(name, part, directory.path, run.dataset, order_key)
        for name, part in parts.items()
    }
    for site in sites.values():
        register(site)
    keys = {name: site.signing_key.public_key() for name, site in sites.items()}
    audit = AuditLog(directory.path / AUDIT_LOG)
    audit.create()
    run_config = dict(run.flatten())
    grid = LocalGrid(
        client_app,
        dict(enumerate(sites, start=SERVER_NODE_ID + 1)),
        run_config,
        fault=fault,
        on_reply=on_reply,
    )
    context = Context(
        run_id=RUN_ID,
        node_id=SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=run_config,
        series_id=RUN_ID,
    )
    settings = Settings(
        directory=directory,
        order=_order(order_key, run, run_uuid, list(sites)),
        order_key=order_key,
        sites=lambda: keys,
        audit=audit,
        classes=next(iter(parts.values())).manifest.classes,
        simulated=True,
    )
    return run_app(grid, context, settings)


def _order(key: Ed25519PrivateKey, run: RunConfig, run_uuid: str, sites: Sequence[str]) -> Order:
    """Issue the order of one session, as ``python -m server run`` does."""
    now = time.time_ns() // 1_000_000
    manifest = RunManifest(
        federation=FEDERATION,
        run_uuid=run_uuid,
        run_config=run.flatten(),
        cohort=tuple(sites),
        code_sha256=code_sha256(),
        issued_ms=now,
        expires_ms=now + ORDER_MS,
    )
    return Order.issue(key, manifest)


def _site(
    name: str, part: ImageDataset, run_dir: Path, task: str, order_key: Ed25519PrivateKey
) -> Site:
    """Make a site that admits all that a scenario may ask: a researcher owns both ends."""
    limits = Limits(
        require_privacy=False,
        require_encryption=False,
        allowed_sizes=("nano", "tiny", "small", "base", "custom"),
        max_local_epochs=UNLIMITED,
        max_local_steps=UNLIMITED,
        max_batch_size=UNLIMITED,
        max_image_size=UNLIMITED,
        max_positions=UNLIMITED,
        max_round_seconds=UNLIMITED,
        min_cohort=1,
    )  # pyright: ignore[reportCallIssue]
    config = SiteConfig(
        site=name,
        state_dir=run_dir / "sites" / name,
        device=SIMULATED_DEVICE,
        task=task,
        data={"dataset": "phantom"},  # pyright: ignore[reportArgumentType]
        limits=limits,
    )  # pyright: ignore[reportCallIssue]
    make_folder(config.state_dir, secret=True)
    # The order key is new in each session, so what a site followed before is no order of it.
    forget(config.state_dir / ORDERS)
    signing_key = create_signing_key(config.state_dir / SIGNING_KEY)
    request = EnrolmentRequest.create(
        name,
        signing_key=signing_key,
        node_key=ec.generate_private_key(ec.SECP384R1()),
        wrap_key=X25519PrivateKey.generate(),
    )
    document = JoinDocument.create(
        request,
        order_key,
        federation=FEDERATION,
        name=FEDERATION,
        address="",
        ca_certificate="",
        policy=FederationPolicy(min_cohort=1, max_num_examples=UNLIMITED),
    )
    membership = Membership(document, address="", ca_path=Path())
    # Replies cannot get lost here, and a kept update a round and site would fill the disk.
    site = Site(config, lambda: part, membership, keep_results=False)
    site.audit.create()
    return site


def _pooled_training(
    directory: RunDirectory,
    scenario: Scenario,
    data: Data,
    run_uuid: str,
    on_reply: OnReply,
) -> dict[str, Any]:
    """Train one model on all data: one site, as many optimiser steps as all sites together took."""
    path = directory.path / "baselines" / POOLED_SITE
    if (path / SUMMARY).exists():
        return read_json(path / SUMMARY)["pooled"]
    run = declared(scenario.run, data)
    steps = sum(num_steps(run, part) for part in data.parts.values())
    pooled_run = RunConfig.parse(
        {
            **run.flatten(),
            "training.local-steps": steps,
            "strategy.name": "fedavg",
            "strategy.proximal-mu": 0.0,
            "strategy.min-sites": 1,
        }
    )
    if path.exists():
        pooled = RunDirectory(path)
    else:
        pooled = RunDirectory.create(
            path,
            {
                "run_uuid": f"{run_uuid}-pooled",
                "federation": FEDERATION,
                "run_config": pooled_run.model_dump(by_alias=True),
            },
        )
    log.info("baseline=pooled steps_per_round=%d", steps)
    summary = _federate(
        pooled,
        pooled_run,
        {POOLED_SITE: data.dataset},
        f"{run_uuid}-pooled",
        fault=no_fault,
        on_reply=on_reply,
    )
    pooled.write_summary(summary)
    return summary["pooled"]


def num_steps(run: RunConfig, part: ImageDataset) -> int:
    """Return the optimiser steps a site takes in one round."""
    num_examples = len(part.manifest.rows(split="train"))
    return sum(1 for _ in batches(num_examples, run.training, seed=0)) if num_examples else 0
