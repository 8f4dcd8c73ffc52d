"""What the operators of the native kernel share: calling it, its work space, its registration.

    medmamba::native_scan, native_scan_backward    scan_op.py: the layout of mamba-ssm
    medmamba::native_ss2d, native_ss2d_backward    ss2d_op.py: along paths, channels last

Invariant: an operator computes in float32 on the CPU from any strides; shapes and types are checked
before the kernel sees a pointer. Its result is the same for any number of threads, and an example's
is the same in any batch. Parameters of the recurrence come with a leading batch dimension, and so
do their gradients: with parameters expanded from shared ones, autograd's own sum over the batch
makes the usual gradient, and a hook before it sees one gradient per example.

Only chunk-boundary states are kept for backward; the states between are computed again.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from medmamba.config import ModelError
from medmamba.scan.checks import check_order
from medmamba.scan.native import library

# Channels that a part has at least. Forward splits as far as threads need it, for that changes no
# bit. Backward's sums over channels are rounded once per part, so its parts follow from the number
# of channels alone: neither threads nor the rest of the batch change what an example gets.
_FORWARD_PART, _BACKWARD_PART = 32, 96

# What the functions of the kernel return, as in kernel.h.
NO_MEMORY, BAD_ORDER = 1, 2

_LIBRARY = torch.library.Library("medmamba", "FRAGMENT")


def run(function: Callable[[Any], int], arguments: ctypes.Structure) -> None:
    """Call a function of the kernel.

    Raises:
        MemoryError: There is none for the work space.
        ModelError: A path does not visit every position once.
    """
    outcome = function(ctypes.byref(arguments))
    if outcome == NO_MEMORY:
        raise MemoryError("the native selective scan found no memory for its work space")
    if outcome == BAD_ORDER:
        check_order(arguments.fields["order"])  # pyright: ignore[reportAttributeAccessIssue]


def forward_parts(tasks: int, channels: int) -> int:
    """Over how many parts of its channels a task is split, so that each thread gets two."""
    return max(1, min(2 * library.num_threads() // max(tasks, 1), channels // _FORWARD_PART))


def backward_parts(channels: int) -> int:
    """Over how many parts of its channels a task is split."""
    return max(1, channels // _BACKWARD_PART)


def sum_of_parts(whole: Tensor) -> Tensor:
    """Sum a gradient (parts, ...) over its parts, in their order."""
    return whole[0] if len(whole) == 1 else whole.sum(0)


def per_example(**parameters: Tensor | None) -> dict[str, Any]:
    """Return parameters (b, ...) in C order, and what lies between two examples, in floats."""
    given: dict[str, Any] = {}
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        shared = parameter.stride(0) == 0 and parameter.shape[0] > 0
        parameter = parameter[0].contiguous() if shared else parameter.contiguous()
        given |= {name: parameter, f"{name}_stride": 0 if shared else parameter.stride(0)}
    return given


def boundaries_shape(b: int, groups: int, channels: int, n: int, steps: int) -> tuple[int, ...]:
    """Return the shape of the states between chunks; channels are those of one group."""
    kernel = library.load()
    blocks, chunks = -(-channels // kernel.width), -(-steps // kernel.chunk)
    return b, groups, blocks, chunks, n, kernel.width


def check_kept(boundaries: Tensor, shape: tuple[int, ...]) -> None:
    """Check what backward gets from forward.

    Raises:
        ModelError: It comes from another call, or from another instruction set.
    """
    if tuple(boundaries.shape) != shape or boundaries.dtype != torch.float32:
        raise ModelError(
            f"boundaries.shape={tuple(boundaries.shape)} expected {shape}, as forward keeps them",
            f"leave {library.ISA_VARIABLE} unchanged between forward and backward",
        )


def check_float32(**tensors: Tensor | None) -> None:
    """Check what the operators themselves take, whoever calls them.

    Raises:
        ModelError: A tensor is not float32, or not on the CPU.
    """
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            raise ModelError(
                f"{name}.dtype={tensor.dtype} {name}.device={tensor.device} expected float32 on "
                "the CPU"
            )


def register(
    name: str,
    schemas: tuple[str, str],
    implementations: tuple[Callable[..., Any], Callable[..., Any]],
    outputs: tuple[Callable[..., Any], Callable[..., Any]],
    gradient: Callable[..., Any],
    context: Callable[..., None],
) -> None:
    """Make an operator and its backward known to PyTorch: the CPU, tracing, autocast, autograd.

    Args:
        name: Of the operator; its backward's ends in ``_backward``.
        schemas: Arguments and results of both, in PyTorch's language.
        implementations: Of both, on the CPU.
        outputs: Empty tensors of the shapes that both return.
        gradient: Backward of the operator, by the second one.
        context: Saves for it.
    """
    names = (name, f"{name}_backward")
    for operator, schema, implementation, empty in zip(
        names, schemas, implementations, outputs, strict=True
    ):
        _LIBRARY.define(operator + schema)
        _LIBRARY.impl(operator, implementation, "CPU")
        qualified = f"medmamba::{operator}"
        torch.library.register_fake(qualified, empty, lib=_LIBRARY)
        torch.library.register_autocast(qualified, "cpu", torch.float32, lib=_LIBRARY)
    torch.library.register_autograd(
        f"medmamba::{name}", gradient, setup_context=context, lib=_LIBRARY
    )
    torch.library.register_autograd(
        f"medmamba::{name}_backward", _no_second_derivative, lib=_LIBRARY
    )


def _no_second_derivative(ctx: Any, *_: Tensor) -> None:
    raise ModelError(
        "create_graph=True expected False: the native backend has no second derivative",
        "backend=reference has, slowly",
    )
