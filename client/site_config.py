"""SiteConfig: what a hospital decides for itself.

Invariant: nothing of it crosses the wire but the limit that a refused run broke. Limits are checks:
a run that breaks one is refused with a reason and an audit entry, never rewritten to fit. Safe
values are the defaults: a site that says nothing takes part in no run without differential privacy
and encryption.
"""

from __future__ import annotations

import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator

from client.data.source import PATHS, DataSource
from strategies.cli import nearest
from strategies.enrolment import SiteName
from strategies.errors import ConfigError
from strategies.run_config import Section, explain

SITES_VARIABLE = "FEDERATION_SITES"
# In the site's state folder.
SIGNING_KEY, NODE_KEY, WRAP_KEY = "signing.key", "node.key", "wrap.key"
AUDIT_LOG = "audit.jsonl"
RESULTS = "results"

# A name, an IPv4 or a bracketed IPv6 address; nothing that could be an option or end a line.
ADDRESS = r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9._-]*):([0-9]{1,5})"

CodeHash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Limits(Section):
    """What a run may ask of this hospital."""

    require_privacy: bool = Field(default=True, description="refuse runs with privacy.mode = off")
    require_encryption: bool = Field(
        default=True, description="refuse runs with encryption.mode = off"
    )
    allowed_strategies: tuple[Literal["fedavg", "fedprox"], ...] = Field(
        default=("fedavg", "fedprox"),
        strict=False,
        description="strategy.name must be one of these",
    )
    allowed_sizes: tuple[Literal["nano", "tiny", "small", "base", "custom"], ...] = Field(
        default=("nano", "tiny", "small", "base"),
        strict=False,
        description="model.size must be one of these; `custom` admits model.depths and dims",
    )
    max_local_epochs: Annotated[int, Field(gt=0)] = Field(
        default=10, description="most passes over the site's data a round"
    )
    max_local_steps: Annotated[int, Field(gt=0)] = Field(
        default=10_000, description="most optimiser steps a round"
    )
    max_batch_size: Annotated[int, Field(gt=0)] = Field(
        default=1024, description="most examples a step"
    )
    max_image_size: Annotated[int, Field(gt=0)] = Field(
        default=512, description="largest input, pixels"
    )
    max_positions: Annotated[int, Field(gt=0)] = Field(
        default=128 * 128,
        description="most positions of the first stage, (image-size / patch-size) squared",
    )
    max_round_seconds: Annotated[int, Field(gt=0)] = Field(
        default=21_600, description="longest a round may work here; training stops at its next step"
    )
    min_cohort: Annotated[int, Field(gt=0)] = Field(
        default=2, description="fewest sites a run may name; in a cohort of one, the sum is yours"
    )
    allowed_code: tuple[CodeHash, ...] = Field(
        default=(),
        strict=False,
        description="SHA-256 of the code that a run's coordinator may have; empty: any",
    )


class SiteConfig(Section):
    """One hospital's file."""

    site: SiteName = Field(description="name, as the coordinator knows it")
    superlink: str = Field(
        default="",
        description="coordinator's address, host:port, where it is another one from here; empty: "
        "the one in the coordinator's join document",
    )
    reconnect_seconds: Annotated[int, Field(ge=0)] = Field(
        default=0, description="how long to try to reconnect before giving up; 0: for ever"
    )
    state_dir: Path = Field(
        default=Path("state"), strict=False, description="keys, audit log; relative to this file"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA if present"
    )
    num_threads: Annotated[int, Field(ge=0, le=1024)] = Field(
        default=0, description="CPU threads; 0: PyTorch's"
    )
    task: str = Field(
        default="", description="the run's `dataset` this data is for; empty: data.dataset"
    )
    task_classes: tuple[str, ...] = Field(
        default=(),
        strict=False,
        description="class names of the runs this site takes part in, in their label order; start "
        "and `check` compare the data with them, and a run with others is refused; empty: any",
    )
    data: DataSource
    limits: Limits = Limits()

    @field_validator("task_classes")
    @classmethod
    def _names(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if len(value) == 1 or len(set(value)) < len(value):
            raise ValueError("expected two names or more, and none twice")
        return value

    @field_validator("superlink")
    @classmethod
    def _address(cls, value: str) -> str:
        return value and check_address(value)

    @property
    def run_dataset(self) -> str:
        """The ``dataset`` of the runs this site takes part in."""
        return self.task or self.data.dataset


def check_address(value: str) -> str:
    """Return ``host:port`` as it is, or raise a ``ValueError`` that says what an address is."""
    if "/" in value:
        raise ValueError("expected host:port without https:// or a path")
    match = re.fullmatch(ADDRESS, value)
    if not (match and 0 < int(match[2]) < 65536):
        raise ValueError("expected host:port, such as hub.example:443")
    return value


def read_site_config(path: Path) -> SiteConfig:
    """Read and validate a site's TOML; relative paths in it are relative to the file.

    Raises:
        ConfigError: The file is missing, not TOML, or holds a wrong key or value.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"site file {path} cannot be read ({error.strerror})",
            hint="`python -m client init --site NAME` writes one, --config names another",
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"site file {path} is not TOML: {error}") from error
    _reject_unknown(values, path)
    try:
        config = SiteConfig.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"{path.name}: {explain(error)}") from None
    folder = path.resolve().parent
    try:
        data = config.data.model_copy(
            update={
                name: folder / value.expanduser()
                for name in PATHS
                if isinstance(value := getattr(config.data, name), Path)
            }
        )
        state_dir = folder / config.state_dir.expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path.name}: a path begins with ~ and a user who has no home folder",
            hint="write the path in full",
        ) from None
    return config.model_copy(update={"state_dir": state_dir, "data": data})


def site_file(site: str, config: Path | None) -> Path:
    """Return where a site's file is: ``--config``, else ``<folder>/<site>.toml``.

    The folder is ``$FEDERATION_SITES``, else ``client/sites`` of this installation.
    """
    if config is not None:
        return config
    folder = os.environ.get(SITES_VARIABLE)
    return (Path(folder) if folder else Path(__file__).parent / "sites") / f"{site}.toml"


def _reject_unknown(values: dict[str, Any], path: Path) -> None:
    tables = {"": SiteConfig, "data": DataSource, "limits": Limits}
    for table, schema in tables.items():
        known = {field.alias or name for name, field in schema.model_fields.items()}
        given = values if not table else values.get(table, {})
        for key in given if isinstance(given, dict) else ():
            if key not in known:
                dotted = f"{table}.{key}" if table else key
                raise ConfigError(
                    f"{path.name}: unknown key {dotted}={given[key]}", hint=nearest(key, known)
                )
