"""Which code runs a selective scan: one registry of backends by name.

Invariant: the backend that was asked for runs, or a ``ModelError`` says which ones exist. Nothing
falls back silently, and every backend gets checked shapes and no autocast.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from typing import Literal, overload

import torch
from torch import Tensor

from medmamba.config import ModelError
from medmamba.scan import reference

BACKEND_VARIABLE = "MEDMAMBA_SCAN_BACKEND"

ScanResult = Tensor | tuple[Tensor, Tensor]

# A backend takes selective_scan's arguments up to and without ``backend``.
_BACKENDS: dict[str, Callable[..., ScanResult]] = {"reference": reference.selective_scan}
# The backend of each device type that has a better one than the reference.
_DEFAULTS: dict[str, str] = {}


def active_backend(device: torch.device | str = "cpu", backend: str | None = None) -> str:
    """Return the name of the backend that a scan on this device runs.

    Args:
        device: Where the scan's tensors lie.
        backend: A backend asked for by name; None takes the environment variable
            ``MEDMAMBA_SCAN_BACKEND``, and without it the default of the device.

    Raises:
        ModelError: The backend does not exist.
    """
    source, name = "backend", backend
    if name is None:
        source, name = BACKEND_VARIABLE, os.environ.get(BACKEND_VARIABLE) or None
    if name is None:
        return _DEFAULTS.get(torch.device(device).type, "reference")
    if name not in _BACKENDS:
        close = difflib.get_close_matches(name, _BACKENDS, n=1)
        hint = f"leave {source} unset to take the default of the device"
        raise ModelError(
            f"{source}={name!r} is not available; expected one of {', '.join(_BACKENDS)}",
            f"did you mean {close[0]!r}? Or {hint}" if close else hint,
        )
    return name


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

    Args:
        u: Input (b, d, l), floating.
        delta: Step sizes (b, d, l).
        A: State matrix, diagonal, real (d, n).
        B: Input matrix: constant (d, n), varying (b, n, l), or varying in g groups (b, g, n, l);
            channel i then uses group i // (d / g).
        C: Output matrix, in the shapes of B.
        D: Skip (d), or None.
        z: Gate (b, d, l): the output is multiplied by silu(z); or None.
        delta_bias: Added to delta (d), or None.
        delta_softplus: Apply softplus to delta, after the bias.
        return_last_state: Also return the state after the last step.
        backend: See ``active_backend``.

    Returns:
        y (b, d, l) in the dtype of u; with return_last_state also the state (b, d, n). Inside
        everything is float32, or float64 if u, delta, A, B or C is.

    Raises:
        ModelError: A shape does not fit, a tensor is not real, or the backend does not exist.
    """
    run = _BACKENDS[active_backend(u.device, backend)]
    _check_shapes(u, delta, A, B, C, D, z, delta_bias)
    with torch.autocast(u.device.type, enabled=False):
        return run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> None:
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
    given |= {"D": D, "z": z, "delta_bias": delta_bias}
    for name, tensor in given.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ModelError(f"{name}.dtype={tensor.dtype} expected a real floating-point dtype")
    if u.dim() != 3 or u.shape[2] == 0:
        raise ModelError(f"u.shape={tuple(u.shape)} expected (b, d, l) with l of at least 1")
    b, d, l = u.shape  # noqa: E741 the letter of the shapes
    if A.dim() != 2 or A.shape[0] != d:
        raise ModelError(f"A.shape={tuple(A.shape)} expected (d, n) with d={d} as in u")
    n = A.shape[1]
    for name, tensor in {"delta": delta, "z": z}.items():
        if tensor is not None and tensor.shape != u.shape:
            raise ModelError(f"{name}.shape={tuple(tensor.shape)} expected {(b, d, l)} as u has")
    for name, tensor in {"D": D, "delta_bias": delta_bias}.items():
        if tensor is not None and tensor.shape != (d,):
            raise ModelError(f"{name}.shape={tuple(tensor.shape)} expected {(d,)}")
    for name, tensor in {"B": B, "C": C}.items():
        grouped = tensor.dim() == 4 and tensor.shape[1] > 0 and d % tensor.shape[1] == 0
        if tensor.shape not in ((d, n), (b, n, l)) and not (
            grouped and tensor.shape == (b, tensor.shape[1], n, l)
        ):
            raise ModelError(
                f"{name}.shape={tuple(tensor.shape)} expected {(d, n)}, {(b, n, l)} or "
                f"(b, g, n, l)=({b}, g, {n}, {l}) with g a divisor of d={d}"
            )
    if B.dim() == C.dim() == 4 and 1 not in (B.shape[1], C.shape[1]) and B.shape[1] != C.shape[1]:
        raise ModelError(
            f"B.shape={tuple(B.shape)} and C.shape={tuple(C.shape)} expected the same g in both"
        )
