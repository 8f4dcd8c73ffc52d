"""The Triton kernels' arithmetic, by Triton's interpreter on the CPU, against the reference.

The interpreter has to be chosen before triton is imported, so this file also is the program that
does the work: with TRITON_INTERPRET=1 it prints what it computed as one JSON object, which the
tests judge, and without it compiles the kernels for two GPUs. The interpreter takes most of a
millisecond for every number, hence tiny shapes and tiles; tests/gpu has the real ones.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from medmamba.config import ModelError
from medmamba.scan import reference, triton

FORWARD, BACKWARD = 1e-5, 1e-4  # relative, of the Euclidean norm
PER_EXAMPLE = ("A", "D", "delta_bias")

Case = dict[str, Any]

# Tiles are two channels by 16 steps here, so these have several of both, whole and broken.
CASES: dict[str, Case] = {
    "one step": {"shape": (1, 1, 1, 1)},
    "a whole tile": {"shape": (1, 2, 16, 2)},
    "broken tiles": {"shape": (1, 3, 19, 2), "plain": True},
    "three blocks of time": {"shape": (1, 2, 37, 1)},
    "two groups": {"shape": (2, 4, 18, 3), "groups": (2, 2)},
    "three groups of broken tiles": {"shape": (1, 9, 3, 2), "groups": (3, 3), "programs": 1},
    "one group of B, two of C": {"shape": (1, 4, 5, 2), "groups": (1, 2)},
    "constant B": {"shape": (2, 3, 18, 2), "constant": "B"},
    "constant C and groups": {"shape": (1, 4, 18, 2), "groups": (2, 2), "constant": "C"},
    "both constant, all per example": {
        "shape": (2, 3, 6, 2),
        "constant": "BC",
        "per_example": PER_EXAMPLE,
    },
    "some per example": {"shape": (3, 2, 5, 2), "per_example": ("A",)},
    "large and small steps": {"shape": (1, 2, 18, 2), "delta": 30.0},
    "nothing moves": {"shape": (1, 2, 6, 2), "delta": 0.0, "plain": True},
    "denormal input": {"shape": (1, 2, 6, 2), "u": 1e-40},
    "bfloat16": {"shape": (1, 2, 18, 2), "dtype": "bfloat16"},
    "float16, strided": {"shape": (1, 2, 5, 2), "dtype": "float16", "strided": True},
}


def make_inputs(
    shape, groups=(None, None), constant="", per_example=(), plain=False, delta=1.0, u=1.0,
    dtype="float32", **_,
) -> dict[str, Tensor]:  # fmt: skip
    generator = torch.Generator().manual_seed(len(str(shape)))
    b, d, l, n = shape  # noqa: E741

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def matrix(name, g):
        if name in constant:
            return normal(d, n)
        return normal(b, n, l) if g is None else normal(b, g, n, l)

    lead = {name: (b,) if name in per_example else () for name in PER_EXAMPLE}
    inputs = {
        "u": normal(b, d, l) * u,
        "delta": (normal(b, d, l) * delta).abs() if plain else normal(b, d, l) * delta,
        "A": -normal(*lead["A"], d, n).exp(),
        "B": matrix("B", groups[0]),
        "C": matrix("C", groups[1]),
    }
    if not plain:
        inputs |= {"D": normal(*lead["D"], d), "z": normal(b, d, l)}
        inputs |= {"delta_bias": normal(*lead["delta_bias"], d)}
    return {name: x.to(getattr(torch, dtype)) for name, x in inputs.items()}


def results(scan, inputs: dict[str, Tensor], *, plain: bool = False) -> dict[str, Tensor]:
    """Output, last state and the gradients of a weighted sum of both."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y, state = scan(**leaves, delta_softplus=not plain, return_last_state=True)
    # Numbers that every dtype has.
    weights = [(torch.arange(x.numel()) % 8 + 1).reshape(x.shape) / 8 for x in (y, state)]
    loss = (y * weights[0].to(y.dtype)).sum() + (state * weights[1].to(state.dtype)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"grad_{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def errors(case: Case) -> dict[str, float]:
    """Relative errors of a case; of half precision those beside the rounding of the results."""
    inputs = make_inputs(**case)
    triton.PROGRAMS_PER_EXAMPLE = case.get("programs", 128)
    expected = results(
        reference.selective_scan, {k: x.double() for k, x in inputs.items()},
        plain=case.get("plain", False),
    )  # fmt: skip
    if case.get("strided"):
        inputs = {k: torch.stack((x, x), -1)[..., 0] for k, x in inputs.items()}
    ours = results(triton.selective_scan, inputs, plain=case.get("plain", False))

    def error(x: Tensor, right: Tensor) -> float:
        if x.dtype in (torch.bfloat16, torch.float16):
            # The result's own rounding: half a unit in the last place at most, and a whole one of
            # bfloat16, which the interpreter cuts off where a GPU rounds.
            unit = right.abs() * torch.finfo(x.dtype).eps
            rounding = unit if x.dtype == torch.bfloat16 else unit / 2
            off = ((x.double() - right).abs() - rounding).clamp(min=0)
        else:
            off = x.double() - right
        return (off.norm() / right.norm().clamp(min=1e-30)).item()

    dtypes = {name: inputs[name[5:]].dtype for name in ours if name.startswith("grad_")}
    dtypes |= {"y": inputs["u"].dtype, "state": torch.float32}
    assert {name: x.dtype for name, x in ours.items()} == dtypes
    return {name: error(x, expected[name]) for name, x in ours.items()}


def same_bytes() -> dict[str, bool]:
    """Whether an example is the same alone, and a second run is the same."""
    inputs = make_inputs((2, 4, 18, 2), groups=(2, 2), per_example=PER_EXAMPLE)
    del inputs["z"]  # the gate is PyTorch's, whose bits on a CPU depend on the place in memory
    # An example has 72 outputs and 8 states, so the weights of the loss are alike for each.
    batch, again = (results(triton.selective_scan, inputs) for _ in range(2))
    alone = results(triton.selective_scan, {name: x[1:2] for name, x in inputs.items()})
    same = {name: torch.equal(x[1:2], alone[name]) for name, x in batch.items()}
    return same | {f"again_{name}": torch.equal(x, again[name]) for name, x in batch.items()}


def hooked() -> bool:
    """Whether an expanded parameter's gradient is per example, and its sum that of the shared."""
    inputs = make_inputs((2, 2, 5, 2))
    A, seen = inputs.pop("A").requires_grad_(), []
    expanded = A.expand(2, -1, -1)
    expanded.register_hook(seen.append)
    triton.selective_scan(A=expanded, **inputs, delta_softplus=True).sum().backward()
    assert A.grad is not None
    through_hook, A.grad = A.grad, None
    triton.selective_scan(A=A, **inputs, delta_softplus=True).sum().backward()
    return torch.equal(seen[0].sum(0), through_hook) and torch.equal(A.grad, through_hook)


def not_a_number() -> dict[str, list[bool]]:
    """Which outputs are NaN when one number of an input is."""
    found = {}
    for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"):
        inputs = make_inputs((1, 3, 18, 2), groups=(1, 1))
        inputs[name].view(-1)[0] = torch.nan
        ours = triton.selective_scan(**inputs, delta_softplus=True)
        right = reference.selective_scan(**inputs, delta_softplus=True)
        found[name] = [bool(ours.isnan().any()), torch.equal(ours.isnan(), right.isnan())]
    return found


def extreme_parameters() -> bool:
    """A of minus infinity (an overflown exponential) forgets, also past a broken tile's end."""
    inputs = make_inputs((1, 2, 18, 2))
    inputs["A"][:] = -torch.inf
    ours = triton.selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    right = reference.selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    return all(torch.allclose(x, y, rtol=1e-5, atol=1e-6) for x, y in zip(ours, right, strict=True))


def empty() -> list[list[int]]:
    inputs = make_inputs((0, 4, 18, 2), groups=(2, 2))
    ours = results(triton.selective_scan, inputs)
    return [list(ours[name].shape) for name in ("y", "state", "grad_B", "grad_A")]


def registered() -> bool:
    """Schema, fake tensors and autograd of the operations, and a graph without breaks."""
    b, d, l, n = 2, 3, 17, 2  # noqa: E741
    inputs = make_inputs((b, d, l, n), groups=(1, 1), per_example=PER_EXAMPLE)
    z = inputs.pop("z")
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    arguments = [inputs[name].requires_grad_() for name in names]
    torch.library.opcheck(torch.ops.medmamba.triton_scan_forward.default, (*arguments, True, False))
    y, states = torch.ops.medmamba.triton_scan_forward(*arguments, True, False)
    backward = torch.ops.medmamba.triton_scan_backward.default
    given = (x.detach() for x in (torch.ones_like(y), states[:, -1].mT, states, *arguments))
    torch.library.opcheck(backward, (*given, True), test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(triton.selective_scan, backend="aot_eager", fullgraph=True)
    eager = triton.selective_scan(**inputs, z=z, delta_softplus=True)
    traced = compiled(**inputs, z=z, delta_softplus=True)
    pairs = [torch.autograd.grad(y.sum(), arguments) for y in (eager, traced)]
    return torch.equal(eager, traced) and all(map(torch.equal, *pairs))


def refusals() -> list[str]:
    messages = []
    for name in ("u", "A", "D"):
        inputs = make_inputs((1, 2, 3, 2))
        inputs[name] = inputs[name].double()
        try:
            triton.selective_scan(**inputs)
        except ModelError as error:
            messages.append(str(error))
    u = make_inputs((1, 2, 3, 2))
    u["u"].requires_grad_()
    (slope,) = torch.autograd.grad(triton.selective_scan(**u).sum(), u["u"], create_graph=True)
    try:
        slope.sum().backward()
    except ModelError as error:
        messages.append(str(error))
    return messages


def compile_for_gpus() -> dict[str, int]:
    """Compile the kernels as for tiny's first stage; returns the sizes of their machine code."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as build

    from medmamba.scan import triton_kernels

    flags = {"ALIGN": 16, "BLOCK_D": triton.TILE_CHANNELS, "BLOCK_T": 128, "BLOCK": 256}
    flags |= {"HAS_D": True, "HAS_BIAS": True, "HAS_LAST": True, "SOFTPLUS": True}
    flags |= {"B_CONSTANT": False, "C_CONSTANT": False}
    inputs = ("u", "delta", "B", "C", "y", "grad_y", "grad_u", "grad_delta", "out")
    float32 = ("A", "D", "bias", "states", "carries", "parts", "grad_last", "grad_A", "grad_B")
    float32 += ("grad_C", "grad_D", "grad_bias")
    sizes = {}
    for capability, dtype in ((80, "fp32"), (90, "bf16")):
        types = dict.fromkeys(flags, "constexpr") | dict.fromkeys(inputs, f"*{dtype}")
        types |= dict.fromkeys(float32, "*fp32")
        for name in ("forward_kernel", "carry_kernel", "backward_kernel", "sum_parts_kernel"):
            kernel = getattr(triton_kernels, name)
            source = ASTSource(
                fn=kernel,
                signature={x: types.get(x, "i32") for x in kernel.arg_names},
                constexprs={(i,): flags[x] for i, x in enumerate(kernel.arg_names) if x in flags},
            )
            options = {"num_warps": 1, "enable_fp_fusion": True}
            target = GPUTarget("cuda", capability, 32)
            built = build(source, target=target, options=options)
            sizes[f"{name} sm_{capability}"] = len(built.asm["cubin"])
    return sizes


def interpret() -> dict[str, Any]:
    large = errors({"shape": (1, 1, 130, 1)})  # with the tiles of a GPU
    triton.block_steps, triton.TILE_CHANNELS = lambda length: 16, 2
    return {
        "errors": {"tiles in use": large} | {name: errors(case) for name, case in CASES.items()},
        "same_bytes": same_bytes(),
        "hooked": hooked(),
        "not_a_number": not_a_number(),
        "extreme_parameters": extreme_parameters(),
        "empty": empty(),
        "refusals": refusals(),
        "unavailable": triton.unavailable(),
        "registered": registered(),
    }


def printed(repository, **environment: str) -> Any:
    """What this file prints as a program."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted(repository) -> dict[str, Any]:
    """What ``interpret`` returns."""
    return printed(repository, TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", ["tiles in use", *CASES])
def test_results_and_gradients_are_those_of_the_reference(interpreted, name):
    for result, error in interpreted["errors"][name].items():
        assert error <= (BACKWARD if result.startswith("grad_") else FORWARD), result


def test_an_example_has_the_same_bytes_alone_and_again(interpreted):
    assert all(interpreted["same_bytes"].values()), interpreted["same_bytes"]
    assert triton.REPRODUCIBLE is True


def test_an_expanded_parameter_has_a_gradient_for_each_example(interpreted):
    assert interpreted["hooked"]


def test_what_is_not_a_number_stays_so(interpreted):
    assert interpreted["not_a_number"] == {
        name: [True, True] for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
    }


def test_an_infinite_decay_forgets(interpreted):
    assert interpreted["extreme_parameters"]


def test_a_batch_may_be_empty(interpreted):
    assert interpreted["empty"] == [[0, 4, 18], [0, 4, 2], [0, 2, 2, 18], [4, 2]]


def test_the_operations_are_registered_as_pytorch_expects(interpreted):
    assert interpreted["registered"]


def test_the_interpreter_counts_as_available(interpreted):
    assert interpreted["unavailable"] is None


def test_what_the_kernels_do_not_have_is_refused(interpreted):
    assert interpreted["refusals"] == [
        *(
            f"{name}.dtype=torch.float64 expected float32, bfloat16 or float16 for the triton "
            "backend"
            for name in ("u", "A", "D")
        ),
        "create_graph=True expected False: the triton backend has no second derivative",
    ]


def test_the_kernels_compile_for_gpus_without_one(repository, tmp_path):
    sizes = printed(repository, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert len(sizes) == 8
    assert min(sizes.values()) > 0


def test_a_tensor_elsewhere_is_refused_by_name():
    with pytest.raises(ModelError, match=r"^u.device=cpu expected a CUDA device for the triton "):
        triton.selective_scan(**make_inputs((1, 2, 3, 2)))


def test_what_is_missing_is_told(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton.unavailable() == (
        "triton is not installed",
        "install torch with CUDA, which brings triton",
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason, remedy = triton.unavailable()
    assert (reason, remedy) == (
        "a CUDA device is missing",
        "choose another backend on this machine",
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)

    def no_compiler():
        raise RuntimeError("Failed to find C compiler.\nand more")

    driver = SimpleNamespace(active=SimpleNamespace(get_current_device=no_compiler))
    package = SimpleNamespace(runtime=SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "triton", package)
    reason, remedy = triton.unavailable()
    assert reason == "triton does not start: RuntimeError: Failed to find C compiler."
    assert remedy.endswith("install a C compiler and Python's headers")
    driver.active.get_current_device = lambda: 0
    assert triton.unavailable() is None


def test_a_tile_is_a_power_of_two_that_holds_a_short_sequence():
    steps = {length: triton.block_steps(length) for length in (1, 16, 17, 49, 128, 129, 3136)}
    assert steps == {1: 16, 16: 16, 17: 32, 49: 64, 128: 128, 129: 128, 3136: 128}


if __name__ == "__main__":
    print(json.dumps(interpret() if triton.INTERPRETED else compile_for_gpus()))
