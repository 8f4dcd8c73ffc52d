"""The selective scan of the mamba-ssm package, where its CUDA kernel is installed.

Invariant: the kernel sees only what it takes (``csrc/selective_scan/selective_scan.cpp`` of
state-spaces/mamba), in dtypes, strides, groups and grid; what cannot be brought there is a
``ModelError``. The package is imported at the first use, never with this module: without a GPU its
import fails.

Its backward adds with atomics, in another order each time: the bytes of its gradients differ from
run to run, so ``REPRODUCIBLE`` is false.

The kernel knows one set of parameters for all examples. One set per example is had by folding the
batch into the channels: (b, d, l) becomes (1, b d, l), with b g groups. A fold's channels are the
second axis of the kernel's grid, which ends at 65,535, so a large batch takes several folds.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medmamba.config import ModelError

REPRODUCIBLE = False  # atomics, see above

MAX_CHANNELS = 65_535  # the second axis of a CUDA grid
MAX_STATE = 256
DEVICE = "cuda"
DEVICES = (DEVICE,)
INTERFACE = "mamba_ssm.ops.selective_scan_interface"
HOW_TO_GET_IT = "docs/install.md has the commands; the triton backend needs no installation"

Scan = dict[str, Tensor | None]  # tensors by the kernel's names


def unavailable() -> tuple[str, str] | None:
    """Return what is missing to run here and how to get it, or None."""
    if not torch.cuda.is_available():
        return "a CUDA device is missing", "choose another backend on this machine"
    if importlib.util.find_spec("selective_scan_cuda") is None:
        return "selective_scan_cuda, the kernel of mamba-ssm, is not installed", HOW_TO_GET_IT
    try:
        _kernel()
    except Exception as error:  # whatever a build for another torch, Python or driver raises
        first = (str(error).splitlines() or [""])[0]
        return f"mamba-ssm does not load: {type(error).__name__}: {first}", HOW_TO_GET_IT
    return None


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
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the scan; arguments and result as in ``medmamba.scan.selective_scan``.

    Shapes are not checked here: the dispatcher has done it.

    Args:
        u: (b, d, l).
        delta: (b, d, l).
        A: (d, n) or (b, d, n).
        B: (d, n), (b, n, l) or (b, g, n, l).
        C: In the shapes of B.
        D: (d) or (b, d).
        z: (b, d, l).
        delta_bias: (d) or (b, d).
        delta_softplus: Apply softplus to delta, after the bias.
        return_last_state: Also return the state after the last step (b, d, n); the kernel has no
            gradient for it.

    Raises:
        ModelError: The kernel does not take such tensors; or, in the backward pass, the last state
            was asked for its gradient.
    """
    inputs = {"u": u, "delta": delta, "z": z}
    parameters = {"A": A, "D": D, "delta_bias": delta_bias}
    _check(inputs | {"B": B, "C": C} | parameters)
    if not u.numel():
        y, state = u.new_empty(u.shape), u.new_zeros(len(u), *A.shape[-2:], dtype=torch.float32)
        return (y, state) if return_last_state else y

    over_time = [x for x in (u, delta, z, B, C) if x is not None and x.dim() > 2]
    dtype = u.dtype if all(x.dtype == u.dtype for x in over_time) else torch.float32
    groups = max(x.shape[1] if x.dim() == 4 else 1 for x in (B, C))
    scan = {name: x if x is None else _row(x.to(dtype)) for name, x in inputs.items()}
    scan |= {name: x if x is None else x.float() for name, x in parameters.items()}
    scan |= {"B": _matrix(B, groups, dtype), "C": _matrix(C, groups, dtype)}
    per_example = A.dim() == 3 or any(x is not None and x.dim() == 2 for x in (D, delta_bias))
    run = _in_folds if per_example else _in_groups
    y, state = run(scan, delta_softplus)
    return (y.to(u.dtype), _NoGradient.apply(state)) if return_last_state else y.to(u.dtype)


def _check(given: dict[str, Tensor | None]) -> None:
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tensor.device.type != DEVICE:
            raise ModelError(
                f"{name}.device={tensor.device} expected a CUDA device for the mamba_ssm backend",
                "move the model and its input there, or choose another backend",
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(
                f"{name}.dtype={tensor.dtype} expected float32, bfloat16 or float16 for the "
                "mamba_ssm backend",
                "the reference backend computes in float64",
            )
        if name == "A" and tensor.shape[-1] > MAX_STATE:
            raise ModelError(
                f"A.shape={tuple(tensor.shape)} expected n of at most {MAX_STATE} for the "
                "mamba_ssm backend",
                "the triton backend takes any n",
            )
        if name == "u" and tensor.shape[1] > MAX_CHANNELS:
            raise ModelError(
                f"u.shape={tuple(tensor.shape)} expected d of at most {MAX_CHANNELS} for the "
                "mamba_ssm backend",
                "the triton backend takes any d",
            )


def _row(x: Tensor) -> Tensor:
    """The same with steps next to each other in memory."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _matrix(matrix: Tensor, groups: int, dtype: torch.dtype) -> Tensor:
    """B or C: constant (d, n) as float32, or (b, g, n, l) with the groups of the other one."""
    if matrix.dim() == 2:
        return matrix.float()
    grouped = matrix if matrix.dim() == 4 else matrix.unsqueeze(1)
    return _row(grouped.to(dtype).expand(-1, groups, -1, -1))


def _in_folds(scan: Scan, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """Scan with one set of parameters for each example."""
    u = scan["u"]
    assert u is not None
    b, d, _ = u.shape
    step = MAX_CHANNELS // d
    dims = {"A": 3, "B": 3, "C": 3, "D": 2, "delta_bias": 2}  # with an entry for each example

    def fold(name: str, x: Tensor, examples: slice) -> Tensor:
        shared = x.dim() < dims.get(name, 0)
        folded = (x.expand(b, *x.shape) if shared else x)[examples].flatten(0, 1)
        over_time = name in ("u", "delta", "z") or x.dim() == 4
        return folded.unsqueeze(0) if over_time else folded

    folds = [
        _in_groups(
            {
                name: x if x is None else fold(name, x, slice(start, start + step))
                for name, x in scan.items()
            },
            delta_softplus,
        )
        for start in range(0, b, step)
    ]
    y, state = (
        torch.cat([x[0].unflatten(0, (-1, d)) for x in xs]) for xs in zip(*folds, strict=True)
    )
    return y, state  # (b, d, l), (b, d, n)


def _in_groups(scan: Scan, delta_softplus: bool) -> tuple[Tensor, Tensor]:
    """Scan with one set of parameters; group by group where B is constant and C is not.

    The kernel takes the number of groups from B, and that of a constant B is one.
    """
    B, C = scan["B"], scan["C"]
    assert B is not None
    assert C is not None
    groups = C.shape[1] if B.dim() == 2 and C.dim() == 4 else 1
    if groups == 1:
        return _kernel()(**scan, delta_softplus=delta_softplus, return_last_state=True)

    def group(name: str, x: Tensor, i: int) -> Tensor:
        axis = 1 if name in ("u", "delta", "z", "C") else 0
        return x.chunk(groups, axis)[i]

    parts = [
        {name: x if x is None else group(name, x, i) for name, x in scan.items()}
        for i in range(groups)
    ]
    results = [_in_groups(part, delta_softplus) for part in parts]
    y, state = (torch.cat(xs, 1) for xs in zip(*results, strict=True))
    return y, state


class _NoGradient(torch.autograd.Function):
    """The last state as it is; the kernel would take its gradient and drop it without a word."""

    @staticmethod
    def forward(ctx: Any, state: Tensor) -> Tensor:
        """Return the state."""
        return state.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """Refuse."""
        raise ModelError(
            "last_state.requires_grad=True expected False: mamba-ssm has no gradient for it",
            "detach the state, or choose the triton backend",
        )


def _kernel() -> Callable[..., tuple[Tensor, Tensor]]:
    return importlib.import_module(INTERFACE).selective_scan_fn
