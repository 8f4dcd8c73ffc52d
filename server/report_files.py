"""The run directory's files as the report reads them, checked and without absolute paths.

Invariant: what is missing or damaged is a :class:`ConfigError` that names the file, and no absolute
path passes: paths name people, projects and hospitals, and a report is handed on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from strategies.errors import ConfigError
from strategies.run_config import explain

_START = r"(?:file://|~\w*)?/(?!/)|[A-Za-z]:[\\/]|\\\\"
_PATH = re.compile(
    rf"""(?P<quote>['"])(?:{_START}).*?(?P=quote)"""  # quoted, so it may hold spaces
    rf"""|(?<![\w/.<~])(?:{_START})[^\s'"<>|,;)\]]+"""
)


class Record(BaseModel):
    """Base of every file's schema; keys that the report does not show are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Evaluation(Record):
    """Metrics of one evaluation set; a metric that does not exist is None."""

    precision: float | None = None
    sensitivity: float | None = None
    specificity: float | None = None
    f1: float | None = None
    accuracy: float | None = None
    auc: float | None = None
    balanced_accuracy: float | None = None
    ece: float | None = None
    loss: float | None = None
    num_examples: int | None = None
    num_classes_present: int | None = None
    auc_max_error: float | None = None
    auc_low_95: float | None = None
    auc_high_95: float | None = None
    confusion: list[list[int]] | None = None


class WorstSite(Evaluation):
    """The site with the lowest balanced accuracy."""

    site: str


class Selection(Record):
    """How the reported weights were chosen among the rounds."""

    metric: str
    split: str
    value: float | None = None


class Summary(Record):
    """summary.json."""

    run_uuid: str
    dataset: str
    classes: Annotated[list[str], Field(min_length=2)]
    strategy: str
    num_server_rounds: int
    best_round: int | None = None
    selection: Selection
    pooled: Evaluation = Evaluation()
    sites: dict[str, Evaluation] = {}
    worst_site: WorstSite | None = None
    not_tested: dict[str, str] = {}
    baselines: dict[str, Evaluation] = {}
    privacy: dict[str, Any]
    encryption: dict[str, Any]
    seconds: float
    simulated: bool

    @model_validator(mode="after")
    def _confusion_is_square(self) -> Self:
        size = len(self.classes)
        sets = {
            "pooled": self.pooled,
            **{f"sites.{site}": figures for site, figures in self.sites.items()},
            **{f"baselines.{name}": figures for name, figures in self.baselines.items()},
        }
        for place, figures in sets.items():
            rows = figures.confusion
            if rows is not None and [len(row) for row in rows] != [size] * size:
                raise ValueError(f"{place}.confusion: expected {size} rows and columns")
        return self


class RoundLine(Record):
    """One training round in history.jsonl."""

    type: Literal["round"]
    server_round: int
    seconds: float
    num_sites: int
    train_loss: float | None = None


class SiteLine(Record):
    """One site's outcome of one round."""

    type: Literal["site"]
    server_round: int
    site: str
    status: str
    reason: str = ""
    train_loss: float | None = None


class EvaluationLine(Record):
    """One evaluation of the weights after ``server_round``; 0 is the initial weights."""

    type: Literal["evaluation"]
    server_round: int
    split: str
    pooled: Evaluation = Evaluation()
    sites: dict[str, Evaluation] = {}


class RunFacts(Record):
    """config.json."""

    run_uuid: str
    run_config: dict[str, Any]
    seed: int | None = None
    git_commit: str | None = None
    versions: dict[str, str] = {}
    provenance: dict[str, Any] = {}
    scenario: dict[str, Any] = {}
    data: dict[str, Any] = {}
    command: str | list[str] | None = None


class SitePartition(Record):
    """One site's examples per class."""

    train: list[int]
    val: list[int]
    test: list[int]
    num_patients: int | None = None


class Partition(Record):
    """partition.json."""

    scheme: str
    alpha: float | None = None
    classes: list[str]
    sites: Annotated[dict[str, SitePartition], Field(min_length=1)]

    @model_validator(mode="after")
    def _one_count_per_class(self) -> Self:
        for site, counts in self.sites.items():
            if {len(counts.train), len(counts.val), len(counts.test)} != {len(self.classes)}:
                raise ValueError(f"sites.{site}: expected {len(self.classes)} counts per split")
        return self


Line = Annotated[RoundLine | SiteLine | EvaluationLine, Field(discriminator="type")]
_LINE: TypeAdapter[RoundLine | SiteLine | EvaluationLine] = TypeAdapter(Line)
AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True)
class History:
    """history.jsonl in order; of a round done twice (a resumed run) the last."""

    rounds: dict[int, RoundLine] = field(default_factory=dict)
    validation: dict[int, EvaluationLine] = field(default_factory=dict)
    train_losses: dict[str, dict[int, float | None]] = field(default_factory=dict)
    unused: dict[tuple[str, str, str], list[int]] = field(default_factory=dict)

    @property
    def sites(self) -> list[str]:
        """All sites that were asked, in name order."""
        return sorted({*self.train_losses, *(site for site, _, _ in self.unused)})


def scrub(value: Any) -> Any:
    """Replace absolute paths in every text of a JSON value by ``[path]``.

    >>> scrub({"command": "run.py --data-dir /home/ada/scans --seed 1"})
    {'command': 'run.py --data-dir [path] --seed 1'}
    """
    if isinstance(value, str):
        # Not a command line: the whole text may be a path with spaces in it.
        if re.match(_START, value) and " -" not in value:
            return "[path]"
        return _PATH.sub("[path]", value)
    if isinstance(value, Mapping):
        return {scrub(key): scrub(item) for key, item in value.items()}
    if isinstance(value, list):
        return [scrub(item) for item in value]
    return value


def read(path: Path, kind: type[AnyRecord]) -> AnyRecord:
    """Read one JSON file.

    Raises:
        ConfigError: It is missing or damaged.
    """
    try:
        return kind.model_validate(_parse(_text(path), path.name))
    except ValidationError as error:
        raise _damaged(path.name, explain(error)) from None


def read_history(path: Path) -> History:
    """Read history.jsonl; lines of a type that the report does not show are left alone.

    Raises:
        ConfigError: It is missing, or a line is damaged.
    """
    history = History()
    for number, text in enumerate(_text(path).splitlines(), start=1):
        place = f"{path.name} line {number}"
        values = _parse(text, place)
        if not isinstance(values, dict) or "type" not in values:
            raise _damaged(place, "expected an object with a type")
        if values["type"] not in ("round", "site", "evaluation"):
            continue  # events that the report does not show
        try:
            line = _LINE.validate_python(values)
        except ValidationError as error:
            raise _damaged(place, explain(error)) from None
        where = line.server_round
        if isinstance(line, RoundLine):
            history.rounds[where] = line
        elif isinstance(line, EvaluationLine):
            if line.split == "val":
                history.validation[where] = line
        elif line.status == "ok":
            history.train_losses.setdefault(line.site, {})[where] = line.train_loss
        else:
            history.unused.setdefault((line.site, line.status, line.reason), []).append(where)
    return history


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"{path.name} is missing",
            hint="the report needs the run directory of a finished run",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path.name, type(error).__name__) from None


def _parse(text: str, place: str) -> Any:
    try:
        # A figure that is not finite does not exist.
        return scrub(json.loads(text, parse_constant=lambda _: None))
    except (ValueError, RecursionError) as error:
        raise _damaged(place, f"not JSON: {error}") from None


def _damaged(place: str, problem: str) -> ConfigError:
    return ConfigError(
        f"{place}: {problem}", hint="restore the file, or resume the run to write it again"
    )
