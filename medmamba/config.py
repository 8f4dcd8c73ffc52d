"""What a MedMamba is made of: its sizes, their checks and their names.

Invariant: a ``MedMambaConfig`` that exists describes a model that can be built. Imports no torch,
so that a program may read or check a configuration without loading it.

Source: the official code (YubiaoYue/MedMamba, commit 104beb3) and arXiv 2403.03849.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, Literal, get_args

Norm = Literal["batch", "group"]

NUM_DIRECTIONS = 4  # scan paths: along rows, along columns, and both of them backwards
EXPAND = 2  # d_inner / d_model of the state-space branch
NORM_EPS = 1e-5  # every LayerNorm, BatchNorm and GroupNorm
BATCH_NORM_MOMENTUM = 0.1
MAX_GROUPS = 32  # of a GroupNorm, as Opacus' ModuleValidator chooses them
DT_RANK_DIVISOR = 16  # dt_rank = ceil(d_model / this)


class ModelError(ValueError):
    """A model, input or weights file that cannot be used as asked.

    Attributes:
        hint: What the reader can do about it; empty when there is nothing to add.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True)
class MedMambaConfig:
    """The architecture of one MedMamba.

    Attributes:
        depths: Blocks in each stage.
        dims: Channels of each stage; even, because a block halves them, and each twice the one
            before, because merging doubles them.
        num_classes: Number of logits.
        norm: Normalisation of the convolution branch. "batch" is the official model; "group"
            replaces every BatchNorm by GroupNorm(gcd(32, channels)), whose output for one example
            depends on no other: what differentially private training needs.
        drop_path: Highest probability that the state-space half of a block is dropped in training;
            grows linearly from 0 over the blocks.
        in_channels: Channels of an image.
        patch_size: Side of the square patches of the stem, in pixels.
        d_state: Size of the state of each scanned channel.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    num_classes: int
    norm: Norm = "batch"
    drop_path: float = 0.1
    in_channels: int = 3
    patch_size: int = 4
    d_state: int = 16

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ModelError: A field is outside its range; the text names it and what was expected.
        """
        for name in ("depths", "dims"):
            value = getattr(self, name)
            if isinstance(value, str) or not hasattr(value, "__iter__"):
                raise ModelError(f"{name}={value!r} expected a list of integers, one per stage")
            object.__setattr__(self, name, tuple(value))
            for entry in getattr(self, name):
                _check_positive_integer(name, entry, shown=value)
        for name in ("num_classes", "in_channels", "patch_size", "d_state"):
            _check_positive_integer(name, getattr(self, name))
        if not self.depths or len(self.depths) != len(self.dims):
            raise ModelError(
                f"depths={self.depths} and dims={self.dims} expected one entry per stage in both"
            )
        if self.dims[0] % 2:
            raise ModelError(f"dims={self.dims} expected even numbers: a block halves its channels")
        if any(
            after != 2 * before for before, after in zip(self.dims, self.dims[1:], strict=False)
        ):
            raise ModelError(f"dims={self.dims} expected each stage to be twice the one before it")
        if self.norm not in get_args(Norm):
            raise ModelError(f"norm={self.norm!r} expected 'batch' or 'group'")
        number = isinstance(self.drop_path, int | float) and not isinstance(self.drop_path, bool)
        if not number or not 0.0 <= self.drop_path < 1.0:
            raise ModelError(f"drop_path={self.drop_path!r} expected a number in [0, 1)")

    @property
    def minimum_image_size(self) -> int:
        """Smallest height and width in pixels: the last stage then has one position."""
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @classmethod
    def from_name(cls, name: str, num_classes: int, **overrides: Any) -> MedMambaConfig:
        """Build the configuration of a named size.

        Args:
            name: A key of ``SIZES``.
            num_classes: Number of logits.
            **overrides: Any other field of the configuration; these win over the named size.

        Raises:
            ModelError: The name or an override is unknown, or a value is outside its range.
        """
        if name not in SIZES:
            raise ModelError(
                f"name={name!r} expected one of {', '.join(SIZES)}", _did_you_mean(name, SIZES)
            )
        fields = cls.__dataclass_fields__
        for override in overrides:
            if override not in fields:
                raise ModelError(
                    f"{override}={overrides[override]!r} is no field of a model; "
                    f"expected one of {', '.join(fields)}",
                    _did_you_mean(override, fields),
                )
        return cls(**{**SIZES[name], "num_classes": num_classes, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON values; ``MedMambaConfig(**...)`` reads them back."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


def num_groups(channels: int) -> int:
    """Groups of the GroupNorm that stands for a BatchNorm of so many channels."""
    return math.gcd(MAX_GROUPS, channels)


def dt_rank(d_model: int) -> int:
    """Rank of the projection from which the step size delta is made."""
    return math.ceil(d_model / DT_RANK_DIVISOR)


def _check_positive_integer(name: str, value: Any, shown: Any = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        shown = value if shown is None else shown
        raise ModelError(f"{name}={shown!r} expected integers of at least 1")


def _did_you_mean(word: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(word), known, n=1, cutoff=0.0)
    return f"did you mean {close[0]!r}?" if close else ""


# As the official *code* builds them. The parameter counts in the paper's table need more blocks in
# the third stage: from_name("small", ..., depths=(2, 2, 12, 2)) has the paper's 22.8 M parameters
# and from_name("base", ..., depths=(2, 2, 16, 2)) its 47.1 M. "nano" is this project's own, for
# tests and demonstrations on a CPU.
SIZES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "nano": {"depths": (1, 1, 1, 1), "dims": (16, 32, 64, 128)},
        "tiny": {"depths": (2, 2, 4, 2), "dims": (96, 192, 384, 768)},
        "small": {"depths": (2, 2, 8, 2), "dims": (96, 192, 384, 768)},
        "base": {"depths": (2, 2, 12, 2), "dims": (128, 256, 512, 1024)},
    }
)
