"""Scenario: a simulated federation in one TOML file.

Invariant: a scenario embeds a RunConfig under ``[run]`` and never redefines one of its keys; what
is not about the run (data, partition, baselines) is beside it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import Field, ValidationError, model_validator

from client.data.source import DataSource
from strategies.cli import nearest
from strategies.errors import ConfigError
from strategies.run_config import RunConfig, Scalar, Section, explain, flatten, unflatten

FOLDER = Path(__file__).parent / "scenarios"


class FederationSection(Section):
    """The simulated sites."""

    num_sites: Annotated[int, Field(gt=0, le=10_000)] = Field(
        default=3, description="simulated sites"
    )
    partition: Literal["dirichlet", "iid", "natural"] = Field(
        default="dirichlet", description="natural: the dataset's own sites"
    )
    dirichlet_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = Field(
        default=0.5, description="label skew: small is skewed, large is near iid"
    )
    min_examples: Annotated[int, Field(gt=0)] = Field(
        default=10, description="fewest training examples of a site; honoured or refused"
    )
    baselines: tuple[Literal["pooled"], ...] = Field(
        default=(),
        description="pooled: one model on all data at the same number of optimiser steps",
    )


class Scenario(Section):
    """One simulated federation."""

    description: str = Field(default="", description="what it shows, in a sentence")
    data: DataSource = DataSource.model_validate({})
    federation: FederationSection = FederationSection()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _quorum_fits(self) -> Scenario:
        if self.run.strategy.min_sites > self.federation.num_sites:
            raise ValueError(
                f"run.strategy.min-sites={self.run.strategy.min_sites} is more than "
                f"federation.num-sites={self.federation.num_sites}"
            )
        return self


def names() -> list[str]:
    """Return the shipped scenarios."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def read_scenario(name: str, changes: Mapping[str, Scalar]) -> Scenario:
    """Read a shipped scenario by name, or any by path, and apply changes.

    Args:
        name: ``quick``, or a path that ends in ``.toml``.
        changes: Dotted keys: ``federation.*`` and ``data.*`` as they are, anything else is a key of
            the run configuration.

    Raises:
        ConfigError: An unknown scenario or key (with the nearest valid one), or a bad value.
    """
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    try:
        values = flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(f"scenario={name} is not known", hint=nearest(name, names())) from None
    except OSError as error:
        raise ConfigError(f"scenario={name} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"scenario={name} is not TOML: {error}") from error
    for key, value in changes.items():
        own = key.startswith(("federation.", "data."))
        values[key if own else f"run.{key.removeprefix('run.')}"] = value
    return parse_scenario(values)


def parse_scenario(values: Mapping[str, Any]) -> Scenario:
    """Validate a scenario's values, nested or dotted; a comma separates the items of a text list.

    Raises:
        ConfigError: An unknown key (with the nearest valid one) or a value out of bounds.
    """
    tables = {"federation": FederationSection, "data": DataSource}
    known = {
        f"{table}.{field.alias}": field.annotation
        for table, section in tables.items()
        for field in section.model_fields.values()
    }
    flat = flatten(values)
    run = {key.removeprefix("run."): flat.pop(key) for key in list(flat) if key.startswith("run.")}
    for key, value in flat.items():
        if key not in known and key != "description":
            raise ConfigError(f"unknown key {key}={value}", hint=nearest(key, known))
        if get_origin(known.get(key)) is tuple and isinstance(value, str):
            flat[key] = tuple(part.strip() for part in value.split(",") if part.strip())  # pyright: ignore[reportArgumentType]
    config = RunConfig.parse(run)
    try:
        return Scenario.model_validate({**unflatten(flat), "run": config})
    except ValidationError as error:
        raise ConfigError(explain(error)) from None
