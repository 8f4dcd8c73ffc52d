"""The site's say: order and run are checked against the hospital's limits before anything trains.

Invariant: every rule either passes or raises :class:`RefusalError`; none changes the run. Reasons
name the limit and the run's value, never data, because they leave the site.
"""

from __future__ import annotations

import math

from client.site_config import SiteConfig
from strategies.enrolment import FederationPolicy
from strategies.errors import RefusalError
from strategies.orders import Order
from strategies.run_config import RunConfig


def check_order(site: SiteConfig, policy: FederationPolicy, order: Order) -> None:
    """Refuse an order that this hospital, or the federation's own policy, does not allow.

    Raises:
        RefusalError: With the first rule that the order breaks.
    """
    limits, manifest = site.limits, order.manifest
    if site.site not in manifest.cohort:
        _refuse("not-in-cohort", "the order does not name this site")
    smallest = max(limits.min_cohort, policy.min_cohort)
    if len(set(manifest.cohort)) < smallest:
        _refuse("cohort-too-small", f"cohort={len(set(manifest.cohort))}; limit {smallest}")
    # Names alone are the coordinator's claim: a sum of fewer is refused as well.
    if order.run.strategy.min_sites < smallest:
        _refuse(
            "cohort-too-small",
            f"strategy.min-sites={order.run.strategy.min_sites}; limit {smallest}",
        )
    if limits.allowed_code and manifest.code_sha256 not in limits.allowed_code:
        _refuse("code-not-allowed", f"code-sha256={manifest.code_sha256} is not allowed here")
    claim = order.run.strategy.max_num_examples
    if claim > policy.max_num_examples:
        _refuse(
            "cap-too-large",
            f"strategy.max-num-examples={claim}; the federation promised {policy.max_num_examples}",
        )


def check_run(site: SiteConfig, run: RunConfig) -> None:
    """Refuse what this hospital does not allow.

    Raises:
        RefusalError: With the first rule that the run breaks.
    """
    limits = site.limits
    if run.dataset != site.run_dataset:
        _refuse("other-dataset", f"dataset={run.dataset!r} is not what this site holds")
    if site.task_classes and run.class_names != site.task_classes:
        _refuse("other-classes", f"classes={run.classes!r} are not the classes this site expects")
    if limits.require_privacy and run.privacy.mode == "off":
        _refuse("privacy-required", "privacy.mode=off; this site requires differential privacy")
    if limits.require_encryption and run.encryption.mode == "off":
        _refuse("encryption-required", "encryption.mode=off; this site requires encryption")
    if run.strategy.name not in limits.allowed_strategies:
        _refuse("strategy-not-allowed", f"strategy.name={run.strategy.name} is not allowed here")
    size = "custom" if run.model.depths else run.model.size
    if size not in limits.allowed_sizes:
        _refuse("size-not-allowed", f"model.size={size} is not allowed here")
    if run.model.image_size > limits.max_image_size:
        _refuse(
            "image-too-large",
            f"model.image-size={run.model.image_size}; limit {limits.max_image_size}",
        )
    positions = (run.model.image_size // run.model.patch_size) ** 2
    if positions > limits.max_positions:
        _refuse(
            "too-much-work",
            f"model.image-size={run.model.image_size} with model.patch-size={run.model.patch_size} "
            f"has {positions} positions; limit {limits.max_positions}",
        )
    if run.training.batch_size > limits.max_batch_size:
        _refuse(
            "too-much-work",
            f"training.batch-size={run.training.batch_size}; limit {limits.max_batch_size}",
        )
    if run.training.local_epochs > limits.max_local_epochs:
        _refuse(
            "too-much-work",
            f"training.local-epochs={run.training.local_epochs}; limit {limits.max_local_epochs}",
        )
    if run.training.local_steps > limits.max_local_steps:
        _refuse(
            "too-much-work",
            f"training.local-steps={run.training.local_steps}; limit {limits.max_local_steps}",
        )


def check_steps(site: SiteConfig, run: RunConfig, num_examples: int) -> None:
    """Refuse a run that takes more steps, or more passes over this site's data, than it allows.

    Raises:
        RefusalError: With the settings and the limit; not with the number of examples.
    """
    settings, limit = run.training, site.limits.max_local_steps
    steps_per_epoch = math.ceil(num_examples / settings.batch_size)
    if settings.local_steps > site.limits.max_local_epochs * max(steps_per_epoch, 1):
        _refuse(
            "too-much-work",
            f"training.local-steps={settings.local_steps} with "
            f"training.batch-size={settings.batch_size} makes too many passes here; limit "
            f"{site.limits.max_local_epochs}",
        )
    steps = settings.local_epochs * steps_per_epoch
    if settings.local_steps == 0 and steps > limit:
        _refuse(
            "too-much-work",
            f"training.local-epochs={settings.local_epochs} with "
            f"training.batch-size={settings.batch_size} takes too many steps here; limit {limit}",
        )


def _refuse(code: str, message: str) -> None:
    raise RefusalError(code, message)
