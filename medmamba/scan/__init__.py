"""The selective scan behind one function; ``dispatch`` chooses the code that runs it."""

from medmamba.scan.dispatch import (
    BACKEND_VARIABLE,
    BACKENDS,
    active_backend,
    backend_details,
    is_reproducible,
    selective_scan,
    ss2d_scan,
)
from medmamba.scan.paths import path_order

__all__ = [
    "BACKENDS",
    "BACKEND_VARIABLE",
    "active_backend",
    "backend_details",
    "is_reproducible",
    "path_order",
    "selective_scan",
    "ss2d_scan",
]
