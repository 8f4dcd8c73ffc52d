"""The selective scan as Triton kernels of our own, for CUDA devices without mamba-ssm.

They need neither nvcc nor a build against the installed PyTorch, only what Triton needs itself: it
comes with PyTorch's CUDA build, and at its first use builds a launcher with the host's C compiler.

Registered as ``torch.ops.medmamba.triton_scan_forward`` and ``..._backward``, so that autograd,
``torch.compile`` and ``torch.export`` see one operation each. ``triton`` itself is imported at the
first launch: this module loads where there is none.

Invariant: the result is a function of the input alone. Block sizes come from shapes, never from
timing, and nothing is summed by atomics, so every run gives the same bytes; and no choice depends
on the number of examples, so an example gives the same bytes in every batch.

With ``TRITON_INTERPRET=1`` set before this module is imported the operations also take CPU tensors:
Triton's interpreter then computes them, which checks the arithmetic and is of no other use.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import math
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from medmamba.config import ModelError

if TYPE_CHECKING:
    from types import ModuleType

REPRODUCIBLE = True  # see the invariant
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)

# Sizes of the launches, chosen by what the compiler makes of the kernels for sm_80 and sm_90
# (registers, spills, instructions of the inner loops); not yet timed on a GPU.
#
# Programs per example up to which the backward pass splits the channels of a group. Every split
# holds its own sums for the gradients of B and C: more fill the device, fewer take less memory.
PROGRAMS_PER_EXAMPLE = 128
TILE_CHANNELS = 4  # of a program; each has one warp
SUM_BLOCK = 256  # elements that a program of the last sums writes


def unavailable() -> tuple[str, str] | None:
    """Return what is missing to run here and how to get it, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed", "install torch with CUDA, which brings triton"
    if INTERPRETED:
        return None
    if not torch.cuda.is_available():
        return "a CUDA device is missing", "choose another backend on this machine"
    try:
        importlib.import_module("triton").runtime.driver.active.get_current_device()
    except Exception as error:  # no compiler, no headers, a driver too old: each its own
        first = (str(error).splitlines() or [""])[0]
        return (
            f"triton does not start: {type(error).__name__}: {first}",
            "it builds a launcher at its first use: install a C compiler and Python's headers",
        )
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

    Args:
        u: (b, d, l).
        delta: (b, d, l).
        A: (d, n), or (b, d, n) for one set of parameters per example.
        B: (d, n), (b, n, l) or (b, g, n, l).
        C: In the shapes of B.
        D: (d) or (b, d).
        z: (b, d, l).
        delta_bias: (d) or (b, d).
        delta_softplus: Apply softplus to delta, after the bias.
        return_last_state: Also return the state after the last step (b, d, n).

    Raises:
        ModelError: A tensor is on a device or of a dtype that the kernels do not take.
    """
    parameters = {"A": A, "D": D, "delta_bias": delta_bias}
    _check({"u": u, "delta": delta, "B": B, "C": C, "z": z} | parameters)
    # The operation knows parameters per example, and B and C with groups or per channel. Expanding
    # copies nothing, and its gradient is the sum over the examples.
    A = _per_example(A.float(), len(u), 3)  # (b, d, n)
    y, states = torch.ops.medmamba.triton_scan_forward(
        u,
        delta,
        A,
        _matrix(B, len(u)),
        _matrix(C, len(u)),
        D if D is None else _per_example(D.float(), len(u), 2),  # (b, d)
        delta_bias if delta_bias is None else _per_example(delta_bias.float(), len(u), 2),
        delta_softplus,
        z is not None,
    )
    # The gate is no part of the recurrence; the operation keeps float32 for it.
    if z is not None:
        y = (y * functional.silu(z.float())).to(u.dtype)
    return (y, states[:, -1].mT.contiguous()) if return_last_state else y


def block_steps(length: int) -> int:
    """Return the steps of a program's tile, which is TILE_CHANNELS wide: a power of two.

    Long tiles have fewer boundary states and carries, and fewer rounds of exchange for each step;
    short sequences waste less of a short tile. 128 steps of 4 channels are 16 elements for each
    thread of a warp: twice as many make the backward kernel spill its registers.
    """
    return min(max(1 << (length - 1).bit_length(), 16), 128)


def _check(given: dict[str, Tensor | None]) -> None:
    for name, tensor in given.items():
        if tensor is None:
            continue
        if not (tensor.is_cuda or (INTERPRETED and tensor.device.type == "cpu")):
            raise ModelError(
                f"{name}.device={tensor.device} expected a CUDA device for the triton backend",
                "move the model and its input there, or choose another backend",
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(
                f"{name}.dtype={tensor.dtype} expected float32, bfloat16 or float16 for the triton "
                "backend",
                "the reference backend computes in float64",
            )


def _per_example(parameter: Tensor, b: int, dims: int) -> Tensor:
    return parameter if parameter.dim() == dims else parameter.expand(b, *parameter.shape)


def _matrix(matrix: Tensor, b: int) -> Tensor:
    """B or C for the operation: varying (b, g, n, l), constant (b, d, n)."""
    if matrix.dim() == 2:
        return matrix.float().expand(b, *matrix.shape)
    return matrix.unsqueeze(1) if matrix.dim() == 3 else matrix


# The two operations. A is (b, d, n), D and delta_bias (b, d) or None, B and C (b, g, n, l) where
# they vary and (b, d, n) where they are constant; all gradients are per example.


def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    float_output: bool,
) -> tuple[Tensor, Tensor]:
    """Return y (b, d, l) and the states after each block of time (b, K, n, d)."""
    y, states = _fake_forward(u, delta, A, B, C, D, delta_bias, delta_softplus, float_output)
    if u.numel():
        shared = _shared_arguments(u, delta, A, B, C, D, delta_bias, delta_softplus)
        _launch("forward_kernel", shared["walks"], shared | {"y": y, "states": states})
    return y, states


def _fake_forward(u: Tensor, delta: Tensor, A: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    b, d, l = u.shape  # noqa: E741 the letter of the shapes
    blocks = -(-l // block_steps(l))
    dtype = torch.float32 if rest[-1] else u.dtype
    y = torch.empty(u.shape, dtype=dtype, device=u.device)
    return y, u.new_empty(b, blocks, A.shape[2], d, dtype=torch.float32)


def _backward(
    grad_y: Tensor,
    grad_last: Tensor | None,
    states: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """Return the gradients of u, delta, A, B, C, D and delta_bias; empty ones for None."""
    given = (u, delta, A, B, C, D, delta_bias)
    gradients = _fake_backward(grad_y, grad_last, states, *given, delta_softplus)
    if not u.numel():
        return gradients
    shared = _shared_arguments(*given, delta_softplus)
    shared |= {"grad_y": grad_y.contiguous(), "states": states, "carries": torch.empty_like(states)}
    shared |= {"grad_last": u if grad_last is None else grad_last.contiguous()}
    shared |= {
        "HAS_LAST": grad_last is not None,
        "grad_u": gradients[0],
        "grad_delta": gradients[1],
    }
    _launch("carry_kernel", shared["walks"], shared)

    # What is summed over programs; one that is the only part is the gradient itself.
    sums: list[tuple[Tensor, Tensor]] = []
    for name, gradient in zip(("A", "B", "C", "D", "bias"), gradients[2:], strict=True):
        parts, count = gradient, shared["blocks"]
        if gradient.dim() == 4:
            count = shared["splits"] * (shared["groups"] // gradient.shape[1])
        if gradient.numel() and (count > 1 or gradient.dtype != torch.float32):
            shape = (len(u), count, *gradient.shape[1:])
            parts = u.new_empty(shape, dtype=torch.float32)
            sums.append((parts, gradient))
        shared[f"grad_{name}"] = parts
    programs = len(u) * shared["groups"] * shared["splits"] * shared["blocks"]
    _launch("backward_kernel", programs, shared)
    for parts, out in sums:
        size = out[0].numel()
        sizes = {"count": parts.shape[1], "size": size, "BLOCK": SUM_BLOCK}
        programs = len(u) * -(-size // SUM_BLOCK)
        _launch("sum_parts_kernel", programs, {"parts": parts, "out": out, **sizes})
    return gradients


def _fake_backward(
    grad_y: Tensor, grad_last: Tensor | None, states: Tensor, *given: Any
) -> list[Tensor]:
    *inputs, _ = given
    return [
        grad_y.new_empty(0) if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for x in inputs
    ]


def _shared_arguments(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> dict[str, Any]:
    """Arguments of the kernels by name, and ``walks``, the programs of a walk over time."""
    b, d, l = u.shape  # noqa: E741
    steps = block_steps(l)
    B_groups, C_groups = (x.shape[1] if x.dim() == 4 else 1 for x in (B, C))
    groups = max(B_groups, C_groups)
    tiles, blocks = -(-(d // groups) // TILE_CHANNELS), -(-l // steps)
    align = math.gcd(l, 16)
    A, D, bias = (u if x is None else _rows(x) for x in (A, D, delta_bias))
    return {
        "walks": b * groups * tiles,
        "u": u.contiguous(),
        "delta": delta.contiguous(),
        "A": A,
        "B": (B if B.dim() == 4 else B[0]).contiguous(),
        "C": (C if C.dim() == 4 else C[0]).contiguous(),
        "D": D,
        "bias": bias,
        "d": d,
        "l_units": l // align,
        "n": A.shape[2],
        "groups": groups,
        "blocks": blocks,
        "splits": max(1, min(tiles, PROGRAMS_PER_EXAMPLE // (groups * blocks))),
        "A_batch": A.stride(0),
        "D_batch": D.stride(0),
        "bias_batch": bias.stride(0),
        "B_groups": B_groups,
        "C_groups": C_groups,
        "HAS_D": D is not u,
        "HAS_BIAS": bias is not u,
        "SOFTPLUS": delta_softplus,
        "B_CONSTANT": B.dim() == 3,
        "C_CONSTANT": C.dim() == 3,
        "ALIGN": align,
        "BLOCK_D": TILE_CHANNELS,
        "BLOCK_T": steps,
    }


def _rows(parameter: Tensor) -> Tensor:
    """A parameter whose examples are contiguous; examples may be one and the same memory."""
    return parameter if parameter[0].is_contiguous() else parameter.contiguous()


def _launch(kernel: str, programs: int, arguments: dict[str, Any]) -> None:
    """Run a kernel of ``triton_kernels`` with those arguments that it has parameters for."""
    function = getattr(_kernels(), kernel)
    named = {name: arguments[name] for name in function.arg_names}
    device = next(x for x in arguments.values() if isinstance(x, Tensor)).device
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        function[(programs,)](**named, num_warps=1, enable_fp_fusion=True)


def _kernels() -> ModuleType:
    from medmamba.scan import triton_kernels  # not before it is needed: imports triton

    return triton_kernels


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_states: Tensor | None) -> tuple[Any, ...]:
    *tensors, states = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    # Only the last state ever leaves selective_scan.
    grad_last = None if grad_states is None else grad_states[:, -1].mT
    gradients = torch.ops.medmamba.triton_scan_backward(
        grad_y, grad_last, states, *tensors, ctx.delta_softplus
    )
    pairs = zip(gradients, tensors, strict=True)
    return (*(None if tensor is None else gradient for gradient, tensor in pairs), None, None)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise ModelError(
        "create_graph=True expected False: the triton backend has no second derivative",
        "choose the reference backend",
    )


def _register() -> torch.library.Library:
    library = torch.library.Library("medmamba", "FRAGMENT")
    inputs = (
        "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, "
        "bool delta_softplus"
    )
    operations = {
        f"triton_scan_forward({inputs}, bool float_output) -> (Tensor, Tensor)": (
            _forward,
            _fake_forward,
        ),
        f"triton_scan_backward(Tensor grad_y, Tensor? grad_last, Tensor states, {inputs}) "
        "-> Tensor[]": (_backward, _fake_backward),
    }
    for schema, (run, fake) in operations.items():
        name = library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        for device in ("CUDA", "CPU") if INTERPRETED else ("CUDA",):
            library.impl(name, run, device)
        torch.library.register_fake(f"medmamba::{name}", fake, lib=library)
    torch.library.register_autograd(
        "medmamba::triton_scan_forward", _differentiate, setup_context=_keep, lib=library
    )
    torch.library.register_autograd("medmamba::triton_scan_backward", _refuse, lib=library)
    return library


_LIBRARY = _register()  # the operations live as long as this
