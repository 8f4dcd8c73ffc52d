"""MedMamba (arXiv 2403.03849): a hybrid convolution and state-space image classifier.

The names below load on first use, so that ``import medmamba.config`` costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medmamba.config import SIZES, MedMambaConfig, ModelError
    from medmamba.model import MedMamba, no_weight_decay

__all__ = [
    "SIZES",
    "MedMamba",
    "MedMambaConfig",
    "ModelError",
    "no_weight_decay",
]

_HOME = {
    "SIZES": "medmamba.config",
    "MedMamba": "medmamba.model",
    "MedMambaConfig": "medmamba.config",
    "ModelError": "medmamba.config",
    "no_weight_decay": "medmamba.model",
}


def __getattr__(name: str) -> Any:
    if name in ("scan", "weights"):
        return import_module(f"medmamba.{name}")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
