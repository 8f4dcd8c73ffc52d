"""``python -m client check``: everything a site needs, tried before anybody relies on it.

Invariant: each check stands alone and none raises; what one finds never hides another. Nothing is
changed, and nothing but one request without content leaves the site. Lines hold class counts:
they are for the hospital's own screen.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

from cryptography import x509

from client.membership import read_membership
from client.probe import WARN_DAYS, Answer, ask
from client.site_config import AUDIT_LOG, RESULTS, SiteConfig
from strategies.cli import one_line
from strategies.errors import ConfigError, FederationError

if TYPE_CHECKING:
    from client.data.manifest import ImageDataset, Manifest

# Flower refuses a node whose signed time is more than 300 s off.
WARN_SKEW, MAX_SKEW = timedelta(seconds=60), timedelta(seconds=300)
MIB = 2**20
WARN_FREE, MIN_FREE = 2048 * MIB, 200 * MIB
# The run decides; this is what most published models take.
CACHE_IMAGE_SIZE = 224

Level = Literal["ok", "warning", "FAIL"]


class Finding(NamedTuple):
    """One line of the report."""

    level: Level
    name: str
    detail: str

    def __str__(self) -> str:
        return f"{self.level:<7}  {self.name:<11}  {one_line(self.detail)}"


def findings(config: SiteConfig) -> Iterator[Finding]:
    """Check a site, one finding after the other as they come."""
    for name, check in CHECKS.items():
        try:
            yield from check(config)
        except FederationError as error:
            yield Finding("FAIL", name, f"{error}; {error.hint}" if error.hint else str(error))
        except Exception as error:
            # medmamba stands alone: its errors have a hint and are no FederationError.
            hint = getattr(error, "hint", "")
            text = f"{type(error).__name__}: {error}"
            yield Finding("FAIL", name, f"{text}; {hint}" if hint else text)


def _code(config: SiteConfig) -> Iterator[Finding]:
    from strategies.code import code_sha256, version

    yield Finding("ok", "code", f"version={version()} sha256={code_sha256()}")


def _data(config: SiteConfig) -> Iterator[Finding]:
    import numpy as np

    from client.data.registry import load

    with _warnings_of("client.data") as told, tempfile.TemporaryDirectory() as nowhere:
        # Without a state folder, which is another line's failure, nothing of the images stays.
        kept = config.state_dir if config.state_dir.is_dir() else Path(nowhere)
        dataset = load(config.data, [config.site], kept)
    manifest = dataset.manifest
    counts = manifest.class_counts("train")
    text = f"{config.run_dataset}: {counts.sum()} training images ({_by_class(manifest, 'train')})"
    absent = int((counts == 0).sum())
    if absent == len(counts):
        yield Finding("FAIL", "data", f"{text}; there is nothing to train on")
    elif absent:
        yield Finding("warning", "data", f"{text}; {absent} of the classes have none here")
    else:
        yield Finding("ok", "data", text)
    # Skipped, flagged and identical images, as the readers tell them; patients have a line below.
    for text in told:
        if "images_without_patient" not in text:
            yield Finding("warning", "images", text)
    yield _splits(manifest)
    yield _patients(manifest)
    yield from _classes(config, dataset)
    if not isinstance(dataset.images, np.ndarray):
        size = dataset.images.cache_bytes(CACHE_IMAGE_SIZE)
        text = f"about {size / MIB:.0f} MiB for a run with model.image-size={CACHE_IMAGE_SIZE}"
        folder = next(
            path for path in (config.state_dir, *config.state_dir.parents) if path.exists()
        )
        free = shutil.disk_usage(folder).free
        if size > free - MIN_FREE:
            yield Finding("warning", "cache", f"{text}; {free / MIB:.0f} MiB are free")
        else:
            yield Finding("ok", "cache", text)


def _by_class(manifest: Manifest, split: str) -> str:
    counts = manifest.class_counts(split)
    return ", ".join(f"{name}={n}" for name, n in zip(manifest.classes, counts, strict=True))


def _splits(manifest: Manifest) -> Finding:
    from client.data.manifest import SPLITS

    sizes = {split: len(manifest.rows(split=split)) for split in SPLITS}
    # Those of train stand in the line above.
    shown = " ".join(
        f"{split}={size}" + (f" ({_by_class(manifest, split)})" if split != "train" else "")
        for split, size in sizes.items()
    )
    empty = [split for split in SPLITS if not sizes[split]]
    if not empty:
        return Finding("ok", "splits", shown)
    text = f"{shown}; without {' and '.join(empty)} images this site's figures are incomplete"
    return Finding("warning", "splits", text)


def _patients(manifest: Manifest) -> Finding:
    unknown = sum(example.patient == example.example_id for example in manifest.examples)
    if not unknown:
        return Finding("ok", "patients", f"{len(manifest.patients)} in {len(manifest)} images")
    text = (
        f"{unknown} of {len(manifest)} images name no patient and count as one each: several "
        "images of a person may then lie in training and test"
    )
    return Finding("warning", "patients", text)


def _classes(config: SiteConfig, dataset: ImageDataset) -> Iterator[Finding]:
    """Compare the site's class names with those that it expects of a run."""
    from client.data.labels import describe_match, mapped_names, match, unmapped_error

    names, label_map = config.task_classes, config.data.label_map
    if not names and not label_map:
        return
    expected = names or mapped_names(dataset.manifest.classes, label_map)
    found = match(dataset, expected, label_map)
    if found.unmapped:
        error = unmapped_error(found.unmapped, expected)
        yield Finding("FAIL", "classes", f"{error}; {error.hint}")
    elif found.absent or found.unknown:
        yield Finding("warning", "classes", describe_match(found))
    else:
        yield Finding("ok", "classes", describe_match(found))


@contextmanager
def _warnings_of(name: str) -> Iterator[list[str]]:
    """Collect a logger's warnings instead of printing them."""
    logger, told = logging.getLogger(name), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield told
    finally:
        logger.propagate = propagate
        logger.removeHandler(handler)


def _device(config: SiteConfig) -> Iterator[Finding]:
    import torch

    from client.site import choose_device
    from medmamba.scan import active_backend

    device = choose_device(config.device)
    torch.ones(1, device=device).sum().item()  # a device that is lost or full says so here
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    threads = config.num_threads or torch.get_num_threads()
    yield Finding("ok", "device", f"{device.type} ({name}) threads={threads}")
    backend = active_backend(device)
    if backend == "reference":
        text = "reference: training is many times slower; docs/install.md, The scan kernel"
        yield Finding("warning", "scan", text)
    else:
        yield Finding("ok", "scan", backend)


def _keys(config: SiteConfig) -> Iterator[Finding]:
    from client.enrol import read_request

    request = read_request(config)
    mode = config.state_dir.stat().st_mode & 0o777
    text = f"enrolled as site={request.site} fingerprint={request.fingerprint}"
    if mode & 0o077:
        text = f"{text}; the state folder has mode {mode:04o}: chmod 700 {config.state_dir}"
        yield Finding("warning", "keys", text)
    else:
        yield Finding("ok", "keys", text)


def _membership(config: SiteConfig) -> Iterator[Finding]:
    member = read_membership(config)
    text = f"federation={member.name} superlink={member.address}"
    yield Finding("ok", "membership", f"{text} coordinator={member.document.fingerprint}")
    certificate = x509.load_pem_x509_certificate(member.document.ca_certificate.encode())
    yield _validity("authority", certificate.not_valid_after_utc, "ask for a new join document")


def _superlink(config: SiteConfig) -> Iterator[Finding]:
    try:
        member = read_membership(config)
    except ConfigError:
        yield Finding("FAIL", "superlink", "not tried without a valid membership")
        return
    answer = ask(member.address, member.ca_path)
    if answer.problem:
        yield Finding("FAIL", "superlink", f"{member.address} {answer.problem}")
    elif answer.status >= 500:
        text = (
            f"{member.address} answers {answer.status}: the gateway is there, the superlink is not"
        )
        yield Finding("FAIL", "superlink", text)
    else:
        # 404 is a gateway that shows this request nothing: reached all the same.
        text = f"{member.address} reached over TLS, status={answer.status}"
        yield Finding("ok", "superlink", text)
    if answer.refused:
        yield Finding("FAIL", "certificate", answer.refused)
    elif answer.expiry:
        renewal = "the coordinator renews it: python -m server init --renew"
        yield _validity("certificate", answer.expiry, renewal)
    else:
        yield Finding("warning", "certificate", "not seen")
    yield _clock(answer)


def _clock(answer: Answer) -> Finding:
    if answer.skew is None:
        return Finding("warning", "clock", "not compared: the superlink told no time")
    seconds = answer.skew.total_seconds()
    size = abs(answer.skew)
    text = f"{abs(seconds):.0f} s {'ahead of' if seconds > 0 else 'behind'} the superlink's"
    if size > MAX_SKEW:
        return Finding("FAIL", "clock", f"{text}; it refuses more than 300 s: set the clock (NTP)")
    return (
        Finding("warning", "clock", f"{text}; NTP?")
        if size > WARN_SKEW
        else Finding("ok", "clock", text)
    )


def _validity(name: str, expiry: datetime, remedy: str) -> Finding:
    days = (expiry - datetime.now(UTC)).days
    if days < 0:
        return Finding("FAIL", name, f"expired on {expiry:%Y-%m-%d}; {remedy}")
    text = f"valid until {expiry:%Y-%m-%d}, {days} days"
    if days < WARN_DAYS:
        return Finding("warning", name, f"{text}; {remedy}")
    return Finding("ok", name, text)


def _policy(config: SiteConfig) -> Iterator[Finding]:
    """Name limits under which no run that this version can ask for is accepted."""
    from strategies.code import code_sha256
    from strategies.run_config import EncryptionSection, PrivacySection

    limits = config.limits
    problems = []
    for required, name, section in (
        (limits.require_privacy, "privacy", PrivacySection),
        (limits.require_encryption, "encryption", EncryptionSection),
    ):
        modes = get_args(section.model_fields["mode"].annotation)
        if required and modes == ("off",):
            problems.append(f"require-{name}: this version has none, so every run is refused")
    if not limits.allowed_strategies:
        problems.append("allowed-strategies is empty: every run is refused")
    if not limits.allowed_sizes:
        problems.append("allowed-sizes is empty: every run is refused")
    if limits.allowed_code and code_sha256() not in limits.allowed_code:
        problems.append(
            "allowed-code lacks the code installed here: a coordinator with the same "
            "version is refused"
        )
    for problem in problems:
        yield Finding("warning", "policy", problem)
    if not problems:
        rounds = f"max-round-seconds={limits.max_round_seconds}"
        yield Finding("ok", "policy", f"min-cohort={limits.min_cohort} {rounds}")


def _audit(config: SiteConfig) -> Iterator[Finding]:
    from strategies.audit import AuditLog

    entries, head = AuditLog(config.state_dir / AUDIT_LOG).verify()
    yield Finding("ok", "audit", f"intact entries={entries} head={head}")


def _disk(config: SiteConfig) -> Iterator[Finding]:
    free = shutil.disk_usage(config.state_dir).free
    text = f"{free / 2**30:.1f} GiB free for the state folder"
    level: Level = "FAIL" if free < MIN_FREE else "warning" if free < WARN_FREE else "ok"
    yield Finding(level, "disk", text if level == "ok" else f"{text}; answers and logs need room")


def _writable(config: SiteConfig) -> Iterator[Finding]:
    results = config.state_dir / RESULTS
    for folder in (config.state_dir, *([results] if results.exists() else [])):
        _try_to_write(folder)
    yield Finding("ok", "state", f"{config.state_dir} can be written")


def _try_to_write(folder: Path) -> None:
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written ({error.strerror})") from error


CHECKS: dict[str, Callable[[SiteConfig], Iterator[Finding]]] = {
    "code": _code,
    "data": _data,
    "device": _device,
    "keys": _keys,
    "membership": _membership,
    "superlink": _superlink,
    "policy": _policy,
    "audit": _audit,
    "disk": _disk,
    "state": _writable,
}
