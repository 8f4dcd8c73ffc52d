"""One site at run time: its file, keys, audit log and prepared data.

Invariant: the ClientApp reaches data only through a :class:`Site` that this process registered; a
node without one refuses. Images are read and prepared once per run shape, not once per round.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from client.data.images import PreparedImages
from client.data.labels import describe_match, match, unmapped_error
from client.data.manifest import ImageDataset
from client.data.transforms import SmallImages, prepare, require_fit
from client.membership import Membership
from client.orders import begin_round, finish_round, follow
from client.policy import check_order
from client.results import Results
from client.site_config import AUDIT_LOG, RESULTS, SIGNING_KEY, SiteConfig
from strategies.audit import AuditLog
from strategies.errors import ConfigError, DataError, RefusalError
from strategies.files import make_folder, write_atomic
from strategies.identity import fingerprint, load_signing_key
from strategies.orders import Order
from strategies.run_config import ModelSection, RunConfig

log = logging.getLogger(__name__)

TEST_READS = "test-reads.json"
TEST_READS_FILE = TypeAdapter(dict[str, str])
ORDERS = "orders.json"


@dataclass(frozen=True)
class Split:
    """Images and labels of one split, ready for the network.

    Attributes:
        images: (n, c, s, s) float32 in [0, 1], before augmentation and normalisation; or what reads
            them from a cache, so that memory does not grow with their number.
        labels: (n,) int64.
    """

    images: Tensor | PreparedImages
    labels: Tensor

    def batch(self, rows: Tensor) -> Tensor:
        """Return some images, (b, c, s, s) float32 in [0, 1]; rows is (b,) int64."""
        if isinstance(self.images, PreparedImages):
            return self.images.batch(rows.numpy())
        return self.images[rows]


@dataclass
class Site:
    """A hospital's own objects.

    Attributes:
        config: Its file.
        load: Reads its images; called once, at first need.
        membership: The federation that it joined.
        keep_results: Whether answers are kept until they have surely arrived.
    """

    config: SiteConfig
    load: Callable[[], ImageDataset]
    membership: Membership
    keep_results: bool = True
    _shape: tuple[int, int, SmallImages] | None = field(default=None, repr=False)
    _splits: dict[str, Split] = field(default_factory=dict, repr=False)
    _classes: tuple[str, ...] = field(default=(), repr=False)
    _matched: ImageDataset | None = field(default=None, repr=False)
    _abort: str = field(default="", repr=False)
    _deadline: float = field(default=math.inf, repr=False)

    def __post_init__(self) -> None:
        make_folder(self.config.state_dir, secret=True)

    @property
    def name(self) -> str:
        """Site name."""
        return self.config.site

    @cached_property
    def signing_key(self) -> Ed25519PrivateKey:
        """The site's private key; ``python -m client init`` made it."""
        return load_signing_key(self.config.state_dir / SIGNING_KEY)

    @property
    def key_fingerprint(self) -> str:
        """What two people compare by telephone before the coordinator admits the key."""
        return fingerprint(self.signing_key.public_key())

    @cached_property
    def audit(self) -> AuditLog:
        """The site's tamper-evident log."""
        return AuditLog(self.config.state_dir / AUDIT_LOG)

    @cached_property
    def results(self) -> Results | None:
        """Answers that may be asked for again; None where they are not kept."""
        return Results(self.config.state_dir / RESULTS) if self.keep_results else None

    def follow(self, order: Order) -> None:
        """Accept an order within this site's limits and write it into the audit log.

        Raises:
            RefusalError: A limit forbids it, or the site follows a newer one.
        """
        check_order(self.config, self.membership.policy, order)
        self._require_memory(ORDERS, "order-followed")
        manifest = order.manifest

        def record() -> None:
            self.audit.append(
                "order-followed",
                run_uuid=manifest.run_uuid,
                order_sha256=order.sha256,
                code_sha256=manifest.code_sha256,
                cohort=",".join(manifest.cohort),
            )

        follow(self.config.state_dir / ORDERS, order, record)

    def _require_memory(self, name: str, event: str, **fields: str) -> None:
        """Refuse to go on without a file that the audit log says was there.

        Raises:
            RefusalError: It is gone: what it kept the site from would be allowed again.
        """
        if not (self.config.state_dir / name).exists() and self.audit.mentions(event, **fields):
            log.error("site=%s %s is missing: restore it from a backup", self.name, name)
            raise RefusalError("state-missing", "the site has lost what it remembers of its runs")

    def begin_round(self, run_uuid: str, server_round: int) -> None:
        """Note that this site trains a round now.

        Raises:
            RefusalError: The run has left that round behind.
        """
        begin_round(self.config.state_dir / ORDERS, run_uuid, server_round)

    def finish_round(self, run_uuid: str) -> None:
        """Note that an update has come of the round begun last."""
        finish_round(self.config.state_dir / ORDERS, run_uuid)

    def begin_work(self) -> None:
        """Start the clock of one instruction; what was aborted before is forgotten."""
        self._abort = ""
        self._deadline = time.monotonic() + self.config.limits.max_round_seconds

    def abort(self, reason: str) -> None:
        """Have the work in progress end at its next step; any thread may call this."""
        self._abort = reason

    def check_work(self) -> None:
        """Say whether the work in progress may go on; called between steps.

        Raises:
            RefusalError: It was aborted, or takes longer than this site allows.
        """
        if self._abort:
            raise RefusalError("stopped", self._abort)
        if time.monotonic() > self._deadline:
            limit = self.config.limits.max_round_seconds
            raise RefusalError(
                "too-long", f"the work took longer than {limit} s, this site's limit"
            )

    @cached_property
    def device(self) -> torch.device:
        """Where this site trains, said once in its log."""
        return choose_device(self.config.device)

    @cached_property
    def dataset(self) -> ImageDataset:
        """The site's images and labels, read once."""
        return self.load()

    def forget_data(self) -> None:
        """Have the images read again at the next need, after something was wrong with them."""
        self.__dict__.pop("dataset", None)
        self._splits.clear()
        self._classes, self._matched = (), None

    def check_classes(self, run: RunConfig) -> None:
        """Give this site's images the run's labels; refuse a run whose classes it has not.

        Raises:
            RefusalError: Leaves the site: how many classes, and none of this site's names.
        """
        names, own = run.class_names, len(self.dataset.manifest.classes)
        unmapped = self.match_classes(names)
        if unmapped:
            error = unmapped_error(unmapped, names)
            log.warning("site=%s %s; %s", self.name, error, error.hint)
            text = f"{len(unmapped)} of this site's {own} classes match none of the run's"
        elif self.config.data.label_map and not names:
            text = "classes=: this site maps class names and the run names none"
        elif not names and self.config.data.names_classes:
            text = "classes=: this site finds its classes by name and the run names none"
        elif not names and own != run.model.num_classes:
            text = f"model.num-classes={run.model.num_classes}; this site's data has {own}"
        else:
            return
        raise RefusalError("other-classes", text)

    def match_classes(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Give this site's images the labels of some classes; without names, their own.

        Returns:
            Own classes that have images and match none of the names; where there are any, the
            labels stay as they were.
        """
        if names == self._classes:
            return ()
        matched = None
        if names:
            found = match(self.dataset, names, self.config.data.label_map)
            if found.unmapped:
                return found.unmapped
            log.info("site=%s %s", self.name, describe_match(found))
            matched = found.dataset
        self._classes, self._matched = names, matched
        self._splits.clear()
        return ()

    @property
    def _labelled(self) -> ImageDataset:
        """The images with the run's labels; with their own where no run has named classes."""
        return self.dataset if self._matched is None else self._matched

    def check_images(self, model: ModelSection) -> None:
        """Refuse a run whose model cannot take this site's images."""
        try:
            require_fit(
                self.dataset.images, model.image_size, model.in_channels, model.small_images
            )
        except DataError as error:
            log.warning("site=%s %s; %s", self.name, error, error.hint)
            raise RefusalError(
                "other-images",
                f"model.image-size={model.image_size} model.in-channels={model.in_channels} "
                f"model.small-images={model.small_images} do not fit this site's images",
            ) from None

    def class_counts(self) -> NDArray[np.int64]:
        """Return (c,) training examples of each class. Private to the site."""
        return self._labelled.manifest.class_counts("train")

    def split(self, name: str, model: ModelSection) -> Split:
        """Return a split prepared for the run's input shape; kept until another shape is asked."""
        shape = (model.image_size, model.in_channels, model.small_images)
        if shape != self._shape:
            self._shape = shape
            self._splits.clear()
        if name not in self._splits:
            part = self._labelled.subset(self._labelled.manifest.rows(split=name))
            prepared = (
                prepare(part.images, *shape)
                if isinstance(part.images, np.ndarray)
                else part.images.prepared(*shape, check=self.check_work)
            )
            self._splits[name] = Split(prepared, torch.tensor(part.manifest.labels))
        return self._splits[name]

    def read_test_once(self, run_uuid: str, weights_hash: str) -> None:
        """Record that a run reads this site's test split, and refuse a second model's reading.

        The same weights may be evaluated again (a lost reply is asked for again); other weights of
        the same run may not, because a choice made on test figures is not a test any more.

        Raises:
            RefusalError: The run has already read the test split with other weights, or the file
                that says so cannot be read.
        """
        self._require_memory(TEST_READS, "answered", task="test", status="ok")
        path = self.config.state_dir / TEST_READS
        try:
            reads = TEST_READS_FILE.validate_json(path.read_bytes()) if path.exists() else {}
        except (OSError, ValidationError):
            log.error("site=%s %s is damaged: restore it from a backup", self.name, TEST_READS)
            raise RefusalError(
                "state-unreadable", "the site cannot read which tests it has answered"
            ) from None
        if reads.setdefault(run_uuid, weights_hash) != weights_hash:
            raise RefusalError("test-read-twice", "this run has already read the test split")
        write_atomic(path, json.dumps(reads, indent=1))


_SITES: dict[str, Site] = {}


def register(site: Site) -> None:
    """Make a site known to the ClientApp of this process."""
    _SITES[site.name] = site


def registered(name: object) -> Site:
    """Return a site that this process registered.

    Raises:
        ConfigError: There is none of that name.
    """
    site = _SITES.get(str(name))
    if site is None:
        raise ConfigError(
            f"site={name} is not configured in this process",
            hint="start the site with `python -m client --site NAME`",
        )
    return site


def choose_device(wanted: str) -> torch.device:
    """Return the device to train on and say which and why.

    Raises:
        ConfigError: ``cuda`` is asked for and there is none.
    """
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise ConfigError(
            "device=cuda but PyTorch sees no CUDA device",
            hint='set device = "cpu", or install a CUDA build of PyTorch and its driver',
        )
    if wanted == "cpu" or not available:
        reason = "asked for" if wanted == "cpu" else "no CUDA device"
        log.info("device=cpu reason=%s threads=%d", reason, torch.get_num_threads())
        return torch.device("cpu")
    log.info("device=cuda name=%s", torch.cuda.get_device_name())
    return torch.device("cuda")
