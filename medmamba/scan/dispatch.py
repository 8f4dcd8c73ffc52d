"""Which code runs a selective scan: one registry of backends by name.

Invariant: the backend that was asked for runs, or a ``ModelError`` says what is missing and how to
get it. Nothing falls back silently: what runs by default is logged once, with the reason where a
better one is missing. Every backend gets checked shapes and no autocast.
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from medmamba.config import ModelError
from medmamba.scan import native, paths, reference  # noqa: F401 native's hook on fork
from medmamba.scan.checks import check_order, check_scan, check_ss2d, wide

log = logging.getLogger(__name__)

BACKEND_VARIABLE = "MEDMAMBA_SCAN_BACKEND"

_logged: set[tuple[str, str]] = set()

ScanResult = Tensor | tuple[Tensor, Tensor]

# Each is a module of this package with ``selective_scan``, ``unavailable`` and ``REPRODUCIBLE``,
# and where it needs or has more, ``DEVICES``, ``details`` and ``ss2d_scan``.
BACKENDS = ("reference", "native", "mamba_ssm", "triton")
# What a device takes if nothing is asked for: the first that is available.
_PREFERRED = {"cpu": ("native", "reference"), "cuda": ("mamba_ssm", "triton", "reference")}


def active_backend(
    device: torch.device | str = "cpu",
    backend: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> str:
    """Return the name of the backend that a scan on this device runs.

    Args:
        device: Where the scan's tensors lie.
        backend: A backend asked for by name; None takes the environment variable
            ``MEDMAMBA_SCAN_BACKEND``, and without it the default of the device.
        dtype: What the scan computes in; by default float64 takes the reference, which alone has
            it.

    Raises:
        ModelError: The backend does not exist, or cannot run here; says how to get it.
    """
    device_type = torch.device(device).type
    source, name = "backend", backend
    if name is None:
        source, name = BACKEND_VARIABLE, os.environ.get(BACKEND_VARIABLE) or None
    if name is not None:
        _check_available(source, name, device_type)
        _log_choice(name, device_type)
        return name
    if dtype == torch.float64:
        _log_choice("reference", device_type, "; it alone has float64")
        return "reference"
    return _default(device_type)


def backend_details(name: str) -> dict[str, Any]:
    """Return what provenance says of a backend: its name, reproducibility, and what it runs on."""
    module = _module(name)
    details = module.details() if hasattr(module, "details") else {}
    return {"scan_backend": name, "scan_reproducible": module.REPRODUCIBLE} | {
        f"scan_{key}": value for key, value in details.items()
    }


def is_reproducible(name: str) -> bool:
    """Tell whether a backend gives the same bytes each time; it need not be available."""
    return _module(name).REPRODUCIBLE


def _check_available(source: str, name: str, device_type: str) -> None:
    if name not in BACKENDS:
        close = difflib.get_close_matches(name, BACKENDS, n=1)
        hint = f"leave {source} unset to take the default of the device"
        raise ModelError(
            f"{source}={name} expected one of {', '.join(BACKENDS)}",
            f"did you mean {close[0]}? Or {hint}" if close else hint,
        )
    missing = _unavailable(name, device_type)
    if missing:
        reason, remedy = missing
        raise ModelError(f"{source}={name} cannot run here: {reason}", remedy)


@lru_cache
def _default(device_type: str) -> str:
    passed_over = ""
    for name in _PREFERRED.get(device_type, ("reference",)):
        missing = _unavailable(name, device_type)
        if missing is None:
            break
        passed_over += f"; {name}: {missing[0]} ({missing[1]})"
    _log_choice(name, device_type, passed_over)
    return name


def _log_choice(name: str, device_type: str, passed_over: str = "") -> None:
    """Log what runs: once for each device of a process."""
    if (name, device_type) in _logged:
        return
    _logged.add((name, device_type))
    shown = " ".join(f"{key}={value}" for key, value in backend_details(name).items())
    if name == "reference":
        log.warning("%s device=%s: slow, in plain PyTorch%s", shown, device_type, passed_over)
    else:
        log.info("%s device=%s", shown, device_type)


@lru_cache
def _unavailable(name: str, device_type: str) -> tuple[str, str] | None:
    module = _module(name)
    if device_type not in getattr(module, "DEVICES", (device_type,)):
        others = ", ".join(_PREFERRED.get(device_type, ("reference",)))
        return f"it does not run on {device_type}", f"{device_type} has {others}"
    return module.unavailable()


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Turn autocast off where it is on; an exported program otherwise holds a block for it."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def _check_no_tangent(module: ModuleType, tensors: tuple[Tensor | None, ...]) -> None:
    """Refuse forward-mode differentiation, which operators of our own would pass over as zero."""
    given = (tensor for tensor in tensors if tensor is not None)
    if module is not reference and any(unpack_dual(t).tangent is not None for t in given):
        raise ModelError(
            "forward-mode differentiation expected backend=reference",
            "give backend=reference, or differentiate backwards",
        )


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"medmamba.scan.{name}")


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: Literal[False] = False,
    backend: str | None = None,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    return_last_state: Literal[True],
    backend: str | None = None,
) -> tuple[Tensor, Tensor]: ...


@torch.compiler.allow_in_graph  # the choice of a backend is none of the compiler's business
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    backend: str | None = None,
) -> ScanResult:
    """Run the selective scan of Mamba, with the arguments and meaning of mamba-ssm.

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t and y_t = C_t . h_t + D u_t, from h_0 = 0.

    A, D and delta_bias may have a leading b: one set of parameters for each example. Their
    gradients are then per example too; differential privacy takes them from
    ``A.expand(b, -1, -1)``. From the native and the triton backend they equal to the bit what that
    example alone would give.

    Args:
        u: Input (b, d, l), floating.
        delta: Step sizes (b, d, l).
        A: State matrix, diagonal, real (d, n), or (b, d, n).
        B: Input matrix: constant (d, n), varying (b, n, l), or varying in g groups (b, g, n, l);
            channel i then uses group i // (d / g).
        C: Output matrix, in the shapes of B.
        D: Skip (d), or (b, d), or None.
        z: Gate (b, d, l): the output is multiplied by silu(z); or None.
        delta_bias: Added to delta (d), or (b, d), or None.
        delta_softplus: Apply softplus to delta, after the bias.
        return_last_state: Also return the state after the last step.
        backend: See ``active_backend``.

    Returns:
        y (b, d, l) in the dtype of u; with return_last_state also the state (b, d, n). Inside
        everything is float32, or float64 if any tensor is.

    Raises:
        ModelError: A shape does not fit, a tensor is not real, or the backend cannot run.
    """
    check_scan(u, delta, A, B, C, D, z, delta_bias)
    tensors = (u, delta, A, B, C, D, z, delta_bias)
    module = _module(active_backend(u.device, backend, wide(*tensors)))
    _check_no_tangent(module, tensors)
    with _no_autocast(u.device.type):
        return module.selective_scan(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state
        )


@torch.compiler.allow_in_graph
def ss2d_scan(
    x: Tensor,
    projected: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    order: Tensor,
    backend: str | None = None,
) -> Tensor:
    """Scan an image along k paths and sum what they give each position.

    A path is a row of ``order``: step t of path i is at position order[i, t]. A position's step
    size on it is softplus(dt_weight . its r columns + dt_bias). All but x, projected and order may
    have a leading b, as in ``selective_scan``.

    Args:
        x: What is scanned (b, l, d), floating; the position runs over the image.
        projected: For each position and path r columns of the step size, B and C
            (b, l, k (r + 2n)).
        dt_weight: (k, d, r).
        dt_bias: (k, d).
        A: (k, d, n).
        D: (k, d).
        order: Positions that each path visits, every one once (k, l), int32.
        backend: See ``active_backend``.

    Returns:
        (b, l, d), in the dtype of x; inside everything is float32, or float64 if any tensor is.

    Raises:
        ModelError: A shape does not fit, or the backend cannot run.
    """
    check_ss2d(x, projected, dt_weight, dt_bias, A, D, order)
    tensors = (x, projected, dt_weight, dt_bias, A, D)
    dtype = wide(*tensors)
    module = _module(active_backend(x.device, backend, dtype))
    _check_no_tangent(module, tensors)
    with _no_autocast(x.device.type):
        if hasattr(module, "ss2d_scan"):
            return module.ss2d_scan(x, projected, dt_weight, dt_bias, A, D, order)
        # Not in tracing, and not on a GPU, which would have to be waited for.
        if type(order) is Tensor and order.device.type == "cpu":
            check_order(order)
        each = paths.each_path(
            module.selective_scan,
            x.to(dtype),
            projected.to(dtype),
            dt_weight.to(dtype),
            dt_bias.to(dtype),
            A.to(dtype),
            D.to(dtype),
            order,
        )
        return each.sum(2).to(x.dtype)
