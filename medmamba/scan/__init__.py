"""The selective scan behind one function; ``dispatch`` chooses the code that runs it."""

from medmamba.scan.dispatch import BACKEND_VARIABLE, active_backend, selective_scan

__all__ = ["BACKEND_VARIABLE", "active_backend", "selective_scan"]
