"""Scenario: a simulated federation in one TOML file.

Invariant: a scenario embeds a RunConfig under ``[run]`` and never redefines one of its keys; what
is not about the run (data, partition, baselines) is beside it. Run and data name the same data set,
so that a report names what was trained on; a site's own files stand for any.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import Field, ValidationError, model_validator

from client.data.source import CSV, DICOM, FOLDER, NPZ, PATHS, DataSource
from strategies.cli import nearest
from strategies.errors import ConfigError
from strategies.run_config import (
    KINDS,
    RunConfig,
    Scalar,
    Section,
    explain,
    flatten,
    kebab,
    natural,
    unflatten,
)

SCENARIOS = Path(__file__).parent / "scenarios"
LABEL_MAP = "data.label-map."


class FederationSection(Section):
    """The simulated sites."""

    num_sites: Annotated[int, Field(gt=0, le=1000)] = Field(
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
        strict=False,
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

    @model_validator(mode="after")
    def _one_dataset(self) -> Scenario:
        if self.data.dataset not in (NPZ, FOLDER, CSV, DICOM, self.run.dataset):
            raise ConfigError(
                f"run.dataset={self.run.dataset}: expected data.dataset={self.data.dataset}",
                hint="set both, `--set dataset=X` and `--set data.dataset=X`",
            )
        return self


# Every key of a scenario outside [run], and its type.
_OWN_KEYS: dict[str, Any] = {
    f"{table}.{field.alias}": field.annotation
    for table, section in (("federation", FederationSection), ("data", DataSource))
    for field in section.model_fields.values()
}


def names() -> list[str]:
    """Return the shipped scenarios."""
    return sorted(path.stem for path in SCENARIOS.glob("*.toml"))


def read_scenario(name: str, changes: Mapping[str, Scalar]) -> Scenario:
    """Read a shipped scenario by name, or any by path, and apply changes.

    Args:
        name: ``quick``, or a path that ends in ``.toml``. Relative paths in the file are relative
            to it.
        changes: Dotted keys: ``federation.*`` and ``data.*`` as they are, anything else is a key of
            the run configuration. Text gets its setting's type, commas separating the items of a
            list. Relative paths are relative to the working directory.

    Raises:
        ConfigError: An unknown scenario or key (with the nearest valid one), or a bad value.
    """
    if not name:
        raise ConfigError(
            "scenario=: expected a shipped scenario or the path of a .toml file",
            hint=f"valid: {', '.join(names())}",
        )
    path = Path(name) if name.endswith(".toml") else SCENARIOS / f"{name}.toml"
    try:
        values = flatten(tomllib.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        if name.endswith(".toml"):
            raise ConfigError(f"scenario={path}: no such file", hint="check the path") from None
        raise ConfigError(f"scenario={name} is not known", hint=nearest(name, names())) from None
    except OSError as error:
        raise ConfigError(f"scenario={name} cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"scenario={name} is not TOML: {error}") from error
    for key in (f"data.{kebab(name)}" for name in PATHS):
        if isinstance(value := values.get(key), str):
            values[key] = str(path.resolve().parent / Path(value).expanduser())
    for key, value in changes.items():
        if key.startswith(("federation.", "data.")):
            values[key] = _typed(key, value)
        else:
            values[f"run.{key.removeprefix('run.')}"] = value
    return parse_scenario(values)


def parse_scenario(values: Mapping[str, Any]) -> Scenario:
    """Validate a scenario's values, nested or dotted.

    Raises:
        ConfigError: An unknown key (with the nearest valid one) or a value out of bounds.
    """
    flat = flatten(values)
    run = {key.removeprefix("run."): flat.pop(key) for key in list(flat) if key.startswith("run.")}
    # Its keys are the source's own names, of any spelling.
    label_map = {
        key.removeprefix(LABEL_MAP): flat.pop(key)
        for key in list(flat)
        if key.startswith(LABEL_MAP)
    }
    for key, value in flat.items():
        if key not in _OWN_KEYS and key != "description":
            raise ConfigError(f"unknown key {key}={value}", hint=_where(key))
    config = RunConfig.parse(run)
    nested = unflatten(flat)
    if label_map:
        nested.setdefault("data", {})["label-map"] = label_map
    try:
        return Scenario.model_validate({**nested, "run": config})
    except ValidationError as error:
        raise ConfigError(explain(error)) from None


def _typed(key: str, value: Scalar) -> Any:
    """Give a command line's text the type of its setting; files have types of their own."""
    annotation = _OWN_KEYS.get(key)
    if get_origin(annotation) is tuple and isinstance(value, str):
        kind = next((kind for kind in KINDS if kind in get_args(annotation)), str)
        parts = (part.strip() for part in value.split(",") if part.strip())
        return tuple(natural(key, part, kind) for part in parts)
    # An optional number is a union; its members are looked at.
    kinds = (annotation, *get_args(annotation))
    return natural(key, value, next((kind for kind in KINDS if kind in kinds), str))


def _where(key: str) -> str:
    """Return the hint for a key that a scenario does not have where it stands."""
    run = RunConfig().flatten()
    if key.partition(".")[0] in {name.partition(".")[0] for name in run}:
        return "put it under [run]"
    return nearest(key, ["description", *_OWN_KEYS, *(f"run.{name}" for name in run)])
