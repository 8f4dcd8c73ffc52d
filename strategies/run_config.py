"""RunConfig: the one schema of a run, shared by coordinator, sites and simulation.

Invariant: ``RunConfig().flatten()`` equals ``[tool.flwr.app.config]`` in pyproject.toml (a contract
test compares), so Flower's overrides, TOML files and scenarios all speak the same dotted kebab-case
keys. Every key has a bound, a unit and a default here and nowhere else. The server validates it,
and so does every site, before anything happens.

Flower carries only int, float, bool and str: lists are comma strings, "not set" is an empty string
or zero, as each field says.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from strategies.cli import nearest
from strategies.errors import ConfigError

Scalar = bool | int | float | str

ScanBackend = Literal["reference", "native", "mamba_ssm", "triton"]
SCAN_BACKENDS: tuple[str, ...] = get_args(ScanBackend)  # a reply names one by its place
MetricName = Literal[
    "precision",
    "sensitivity",
    "specificity",
    "f1",
    "accuracy",
    "auc",
    "balanced_accuracy",
    "ece",
    "loss",
]
METRIC_NAMES: tuple[str, ...] = get_args(MetricName)

# What a person is told in place of pydantic's words for Python types.
KINDS: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number"}
_TYPE_ERRORS = {
    "bool_type": KINDS[bool],
    "int_type": KINDS[int],
    "float_type": KINDS[float],
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "list_type": "a list",
    "model_type": "a table",
    "dict_type": "a table",
}

Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# At most a week: an order lives no longer than its run's deadlines allow.
Seconds = Annotated[float, Field(gt=0, le=604_800, allow_inf_nan=False)]


def kebab(name: str) -> str:
    """Turn a Python name into its spelling in TOML, run configuration and records."""
    return name.replace("_", "-")


def _parts(value: str) -> list[str]:
    return value.split(",") if value else []


class Section(BaseModel):
    """Base of every part of the schema: frozen, kebab-case outside, unknown keys refused.

    Strict, so that "no" is not taken for false nor true for 1. TOML and JSON have no paths and no
    tuples: fields of these types say ``strict=False`` and take texts and lists.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, alias_generator=kebab, populate_by_name=True
    )


class ModelSection(Section):
    """The classifier that every site trains (MedMamba, arXiv 2403.03849)."""

    size: Literal["nano", "tiny", "small", "base"] = Field(
        default="tiny",
        description="named size; the paper's larger small and base set depths themselves",
    )
    depths: str = Field(
        default="", description="blocks per stage, comma separated; empty: the size's"
    )
    dims: str = Field(
        default="", description="channels per stage, comma separated; empty: the size's"
    )
    num_classes: Annotated[int, Field(ge=2)] = Field(
        default=3, description="classes of the dataset"
    )
    in_channels: Literal[1, 3] = Field(default=3, description="3 repeats grey images, as published")
    image_size: Annotated[int, Field(ge=16, le=4096)] = Field(
        default=64, description="side of the square input in pixels"
    )
    small_images: Literal["resize", "pad"] = Field(
        default="resize",
        description="how images reach image-size: bilinear resize, or zero padding around them",
    )
    patch_size: Positive = Field(
        default=4, description="stem patch in pixels; 2 admits 28-pixel images"
    )
    norm: Literal["batch", "group"] = Field(
        default="group",
        description="batch is the paper's; group has no statistics that leave a site",
    )
    drop_path: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1, description="largest stochastic-depth rate of the state-space branch"
    )
    scan_backend: Literal["auto", ScanBackend] = Field(
        default="auto",
        description="what runs the selective scan; auto: the best that a site has, any other: a "
        "site without it refuses",
    )

    @field_validator("depths", "dims")
    @classmethod
    def _comma_integers(cls, value: str) -> str:
        if value and not all(part.strip().isdecimal() and int(part) > 0 for part in _parts(value)):
            raise ValueError("expected positive integers separated by commas, such as 2,2,4,2")
        return value

    @model_validator(mode="after")
    def _same_stages(self) -> Self:
        if bool(self.depths) != bool(self.dims):
            raise ValueError("depths and dims are given together or not at all")
        if len(_parts(self.depths)) != len(_parts(self.dims)):
            raise ValueError(f"depths={self.depths} and dims={self.dims} differ in length")
        return self

    @model_validator(mode="after")
    def _image_reaches_the_last_stage(self) -> Self:
        stages = len(_parts(self.depths)) or 4
        smallest = self.patch_size * 2 ** (stages - 1)
        if self.image_size < smallest:
            raise ValueError(
                f"image-size={self.image_size} with patch-size={self.patch_size} leaves no pixel "
                f"after {stages} stages; expected at least {smallest} (small-images says how "
                "smaller images get there)"
            )
        return self

    @property
    def forced_scan_backend(self) -> str | None:
        """The backend that every site must run; None leaves it to the site."""
        return None if self.scan_backend == "auto" else self.scan_backend

    @property
    def architecture(self) -> dict[str, Any]:
        """Keyword arguments of ``MedMamba.from_name`` beside the size."""
        stages: dict[str, Any] = {}
        if self.depths:
            stages["depths"] = tuple(int(part) for part in _parts(self.depths))
            stages["dims"] = tuple(int(part) for part in _parts(self.dims))
        return {
            **stages,
            "num_classes": self.num_classes,
            "in_channels": self.in_channels,
            "patch_size": self.patch_size,
            "norm": self.norm,
            "drop_path": self.drop_path,
        }


class TrainingSection(Section):
    """Local training at a site; defaults are the published MedMamba protocol."""

    learning_rate: Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)] = Field(
        default=3e-4, description="AdamW, at the first round"
    )
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.05, description="AdamW; none on norms, biases, A_log and D"
    )
    schedule: Literal["cosine", "constant"] = Field(
        default="cosine", description="learning rate over the rounds of the run"
    )
    batch_size: Annotated[int, Field(gt=0, le=1_000_000)] = Field(
        default=64, description="examples a step"
    )
    local_epochs: Positive = Field(default=1, description="passes over the site's data a round")
    local_steps: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="optimiser steps a round in place of local-epochs; 0: local-epochs decides",
    )
    class_weights: Literal["none", "inverse-frequency", "effective-number"] = Field(
        default="inverse-frequency", description="class-reweighted loss from the site's own counts"
    )
    effective_number_beta: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.999, description="beta of Cui et al. (arXiv 1901.05555)"
    )
    focal_gamma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.0, description="focal loss exponent (arXiv 1708.02002); 0: cross-entropy"
    )
    augment: bool = Field(default=True, description="the published augmentation list")
    activation_checkpointing: bool = Field(
        default=False,
        description="compute each block again in backward: less memory, more time, the same result",
    )


class StrategySection(Section):
    """How updates become the next global weights, and how long to wait for them."""

    name: Literal["fedavg", "fedprox"] = Field(
        default="fedavg", description="aggregation algorithm"
    )
    proximal_mu: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.0, description="FedProx term in every site's loss; 0 equals fedavg"
    )
    min_sites: Positive = Field(default=2, description="quorum: fewer valid updates end the run")
    max_num_examples: Positive = Field(
        default=1_000_000, description="largest num-examples a site may claim"
    )
    wait_seconds: Seconds = Field(default=300.0, description="deadline for the cohort to connect")
    round_timeout_seconds: Seconds = Field(
        default=3600.0,
        description="deadline for the replies of a round; also the instructions' lifetime",
    )
    selection_metric: MetricName = Field(
        default="auc",
        description="chooses the round on validation data; loss and ece: lower is better",
    )

    @model_validator(mode="after")
    def _mu_belongs_to_fedprox(self) -> Self:
        if self.name == "fedavg" and self.proximal_mu > 0:
            raise ValueError(
                f"proximal-mu={self.proximal_mu} has no effect with name=fedavg; use name=fedprox"
            )
        return self


class PrivacySection(Section):
    """Differential privacy at the sites."""

    mode: Literal["off"] = Field(
        default="off", description="off: updates carry no privacy guarantee"
    )


class EncryptionSection(Section):
    """Encryption of updates towards the coordinator."""

    mode: Literal["off"] = Field(
        default="off", description="off: the coordinator sees each site's update"
    )


class RunConfig(Section):
    """Everything that defines a run, whoever runs it."""

    dataset: Annotated[str, Field(min_length=1)] = Field(
        default="phantom", description="the task; each site maps it to its own data"
    )
    classes: str = Field(
        default="",
        description="class names in label order, comma separated, a name with a comma in double "
        "quotes; each site matches its own names to them; empty: only their number is compared",
    )
    num_server_rounds: Positive = Field(default=20, description="rounds of the run")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        default=0, description="initial weights and training order; never privacy randomness"
    )
    model: ModelSection = ModelSection()
    training: TrainingSection = TrainingSection()
    strategy: StrategySection = StrategySection()
    privacy: PrivacySection = PrivacySection()
    encryption: EncryptionSection = EncryptionSection()

    @field_validator("classes")
    @classmethod
    def _names(cls, value: str) -> str:
        names = split_names(value)
        # They are shown on every site's screen and in its log.
        if not all(name and name.isprintable() for name in names):
            raise ValueError("expected names of printable characters, none of them empty")
        if len(set(names)) < len(names):
            raise ValueError("expected no name twice")
        return value

    @model_validator(mode="after")
    def _one_name_a_class(self) -> Self:
        if self.classes and len(self.class_names) != self.model.num_classes:
            raise ValueError(
                f"classes={self.classes} names {len(self.class_names)} classes; "
                f"model.num-classes={self.model.num_classes}"
            )
        return self

    @model_validator(mode="after")
    def _batch_norm_needs_two_examples(self) -> Self:
        if self.model.norm == "batch" and self.training.batch_size == 1:
            raise ValueError("training.batch-size=1 with model.norm=batch: expected at least 2")
        return self

    @classmethod
    def parse(cls, values: Mapping[str, Any]) -> RunConfig:
        """Validate nested or dotted kebab-case values (a TOML table, or Flower's run_config).

        Raises:
            ConfigError: An unknown key (with the nearest valid one) or a value out of bounds.
        """
        flat = flatten(values)
        known = RunConfig().flatten()
        for key in flat:
            if key not in known:
                raise ConfigError(f"unknown key {key}={flat[key]}", hint=nearest(key, known))
        typed = {key: natural(key, value, type(known[key])) for key, value in flat.items()}
        try:
            return cls.model_validate(unflatten(typed))
        except ValidationError as error:
            raise ConfigError(explain(error)) from None

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in label order; empty when the run does not declare them."""
        return split_names(self.classes)

    def flatten(self) -> dict[str, Scalar]:
        """Return dotted kebab-case keys and plain values, as Flower carries them."""
        return flatten(self.model_dump(by_alias=True))


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Scalar]:
    """Join nested tables into dotted keys.

    >>> flatten({"seed": 1, "model": {"in-channels": 3}, "model.norm": "group"})
    {'seed': 1, 'model.in-channels': 3, 'model.norm': 'group'}
    """
    flat: dict[str, Scalar] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))  # pyright: ignore[reportUnknownArgumentType]
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def unflatten(flat: Mapping[str, Scalar]) -> dict[str, Any]:
    """Split dotted keys into nested tables.

    >>> unflatten({"seed": 1, "model.in-channels": 3})
    {'seed': 1, 'model': {'in-channels': 3}}
    """
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        table = nested
        for part in path:
            table = table.setdefault(part, {})
        table[last] = value
    return nested


def split_names(text: str) -> tuple[str, ...]:
    """Split names at commas; a name in double quotes keeps its own.

    >>> split_names('malignant, "normal, benign"')
    ('malignant', 'normal, benign')

    Raises:
        ValueError: A quote does not end, or there is more than one line.
    """
    try:
        lines = list(csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True))
    except csv.Error as error:
        raise ValueError(f"expected names separated by commas: {error}") from None
    if len(lines) > 1:
        raise ValueError("expected names separated by commas, in one line")
    return tuple(name.strip() for name in lines[0]) if lines else ()


def join_names(names: Iterable[str]) -> str:
    """Join names with commas; the reverse of :func:`split_names`.

    >>> join_names(["malignant", "normal, benign"])
    'malignant,"normal, benign"'
    """
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(names)
    return text.getvalue()


def explain(error: ValidationError, prefix: str = "") -> str:
    """Return the first problem of a pydantic error as ``dotted.key=value: what was expected``."""
    problem = error.errors(include_url=False)[0]
    key = prefix + ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] in _TYPE_ERRORS:
        message = f"expected {_TYPE_ERRORS[problem['type']]}"
    if problem["type"] == "missing":
        return f"{key} is missing"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {key}={problem['input']}"
    if isinstance(problem["input"], BaseModel | Mapping):
        return f"{key}: {message}" if key else message
    return f"{key}={problem['input']}: {message}"


def parse_assignments(assignments: list[str]) -> dict[str, Scalar]:
    """Split the ``key=value`` words of a command line; the schema gives the text its type.

    >>> parse_assignments(["seed=3", "model.size=nano"])
    {'seed': '3', 'model.size': 'nano'}

    Raises:
        ConfigError: A word without ``=``.
    """
    values: dict[str, Scalar] = {}
    for word in assignments:
        key, separator, text = word.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {word}: expected key=value", hint="--set model.size=nano")
        values[key.strip()] = text.strip()
    return values


def natural(key: str, value: Scalar, kind: type) -> Scalar:
    """Turn a command line's text into the type of its setting; refuse another type.

    >>> natural("training.learning-rate", "1e-3", float)
    0.001

    Args:
        key: Dotted key, for the error.
        value: Text, or a value that has a type already.
        kind: bool, int or float; of any other kind the text stays as it is.

    Raises:
        ConfigError: The value is no number, or neither true nor false.
    """
    if kind not in KINDS:
        return value
    found = _scalar(value) if isinstance(value, str) else value
    # The exact type, because true is an int in Python; a whole number is a number too.
    if type(found) is not kind and not (kind is float and type(found) is int):
        raise ConfigError(f"{key}={value}: expected {KINDS[kind]}")
    return found


def _scalar(text: str) -> Scalar:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
