"""The selective scan's CUDA backends, on the device, against the reference in float64."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from medmamba import MedMamba
from medmamba.scan import reference, selective_scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BACKENDS = ("triton", "mamba_ssm")
# k d and l of the four stages at 224 pixels; n = 16 and k = 4 groups.
LENGTHS = (3136, 784, 196, 49)
STAGES = {
    f"{size}-{stage}": (4 * dims * 2**stage, length)
    for size, dims in (("tiny", 96), ("base", 128))
    for stage, length in enumerate(LENGTHS)
}
PER_EXAMPLE = ("A", "D", "delta_bias")
FORWARD, BACKWARD = 1e-5, 1e-4  # relative, of the Euclidean norm
HALF = 2**-8  # what the rounding of a bfloat16 result adds to them, at most


@pytest.fixture
def scan(request):
    """A backend's function; skips where the backend cannot run."""
    module = importlib.import_module(f"medmamba.scan.{request.param}")
    if request.param == "mamba_ssm" and importlib.util.find_spec("selective_scan_cuda") is None:
        pytest.skip("mamba-ssm is not installed")
    assert module.unavailable() is None
    return module.selective_scan


def make_inputs(
    b, d, l, n=16, g: int | None = 4,  # noqa: E741
    constant="", per_example=(), leave_out=(), dtype=torch.float32,
) -> dict[str, Any]:  # fmt: skip
    """Arguments as a trained model has them: small steps, A as at the start of training."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, device="cuda")

    def matrix(name):
        if name in constant:
            return normal(d, n)
        return normal(b, n, l).to(dtype) if g is None else normal(b, g, n, l).to(dtype)

    lead = {name: (b,) if name in per_example else () for name in PER_EXAMPLE}
    steps = torch.arange(1.0, n + 1, device="cuda")
    inputs = {
        "u": normal(b, d, l).to(dtype),
        "delta": normal(b, d, l).to(dtype),
        "A": -steps * normal(*lead["A"], d, 1).exp(),
        "B": matrix("B"),
        "C": matrix("C"),
        "D": normal(*lead["D"], d),
        "z": normal(b, d, l).to(dtype),
        "delta_bias": normal(*lead["delta_bias"], d) - 4,
    }
    return {name: x for name, x in inputs.items() if name not in leave_out}


def results(scan, inputs: dict[str, Tensor], *, last: bool = False) -> dict[str, Tensor]:
    """Output and gradients; with ``last`` also of the last state."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    y, state = scan(**leaves, delta_softplus=True, return_last_state=True)
    weights = [(torch.arange(x.numel(), device="cuda") % 8 + 1) / 8 for x in (y, state)]
    loss = (y * weights[0].reshape(y.shape).to(y.dtype)).sum()
    if last:
        loss = loss + (state * weights[1].reshape(state.shape)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"grad_{name}": x for name, x in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), "state": state.detach(), **named}


def check(scan, inputs: dict[str, Tensor], *, last: bool = False) -> None:
    ours = results(scan, inputs, last=last)
    doubled = {name: x.double() for name, x in inputs.items()}
    for name, right in results(reference.selective_scan, doubled, last=last).items():
        error = (ours[name].double() - right).norm() / right.norm().clamp(min=1e-2)
        limit = BACKWARD if name.startswith("grad_") else FORWARD
        assert error <= limit + (HALF if ours[name].dtype == torch.bfloat16 else 0), (name, error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("scan", BACKENDS, indirect=True)
def test_a_stage_is_that_of_the_reference(scan, stage, dtype):
    check(scan, make_inputs(2, *STAGES[stage], dtype=dtype, leave_out=("z",)))


@pytest.mark.parametrize(
    "case",
    [
        {"b": 1, "d": 1, "l": 1, "n": 1, "g": 1},
        {"b": 2, "d": 5, "l": 131, "n": 3, "g": None},
        {"b": 3, "d": 9, "l": 300, "n": 17, "g": 3},
        {"b": 2, "d": 6, "l": 64, "n": 64, "g": 1, "constant": "B"},
        {"b": 2, "d": 6, "l": 50, "n": 8, "g": 2, "constant": "C"},
        {"b": 2, "d": 6, "l": 129, "n": 5, "g": 2, "constant": "B"},
        {"b": 2, "d": 7, "l": 257, "n": 2, "g": 1, "constant": "BC"},
        {"b": 1, "d": 4, "l": 5000, "n": 4, "g": 1, "leave_out": ("D", "delta_bias")},
        {"b": 2, "d": 8, "l": 33, "n": 256, "g": 8, "per_example": ("D",)},
        {"b": 2, "d": 8, "l": 200, "n": 16, "g": 2, "per_example": PER_EXAMPLE},
    ],
    ids=lambda case: "-".join(str(case[letter]) for letter in "bdlng"),
)
@pytest.mark.parametrize("scan", BACKENDS, indirect=True)
def test_every_kind_of_argument(scan, case):
    check(scan, make_inputs(**case))


@pytest.mark.parametrize("scan", ["triton"], indirect=True)
def test_the_last_state_has_a_gradient(scan):
    check(scan, make_inputs(2, 6, 300, 5, 2), last=True)
    check(scan, make_inputs(2, 6, 256, 5, 2), last=True)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("scan", BACKENDS, indirect=True)
def test_gradients_per_example_are_those_of_a_loop(scan, request, stage):
    inputs = make_inputs(3, *STAGES[stage], per_example=PER_EXAMPLE, leave_out=("z",))
    together = results_of_sum(scan, inputs)
    to_the_bit = request.node.callspec.params["scan"] == "triton"
    for i in range(3):
        alone = results_of_sum(scan, {name: x[i : i + 1] for name, x in inputs.items()})
        for name, x in alone.items():
            if to_the_bit:
                assert torch.equal(together[name][i : i + 1], x), name
            else:
                torch.testing.assert_close(together[name][i : i + 1], x, rtol=1e-4, atol=1e-4)


def results_of_sum(scan, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of the sum of the output, which weighs all examples alike."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    scan(**leaves, delta_softplus=True).sum().backward()
    return {name: x.grad for name, x in leaves.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("scan", ["triton"], indirect=True)
def test_triton_gives_the_same_bytes_each_time(scan, dtype):
    inputs = make_inputs(8, *STAGES["tiny-1"], dtype=dtype)
    first = results(scan, inputs)
    for _ in range(5):
        again = results(scan, inputs)
        assert all(torch.equal(x, again[name]) for name, x in first.items())


@pytest.mark.parametrize("scan", ["triton"], indirect=True)
def test_what_is_not_a_number_stays_so(scan):
    for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias"):
        inputs = make_inputs(1, 6, 150, 3, 2)
        inputs[name].view(-1)[0] = torch.nan
        ours = scan(**inputs, delta_softplus=True).isnan()
        right = reference.selective_scan(**inputs, delta_softplus=True).isnan()
        assert ours.any()
        assert torch.equal(ours, right), name


@pytest.mark.parametrize("scan", ["triton"], indirect=True)
def test_addresses_beyond_31_bits(scan):
    b, d, l = 2, 4096, 2**18 + 3  # noqa: E741  more than 2^31 numbers in u
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    inputs = make_inputs(b, d, l, 1, 1, dtype=torch.bfloat16, leave_out=("z", "D"))
    with torch.no_grad():
        both = scan(**inputs, delta_softplus=True)
        alone = {name: x[1:] if len(x) == b else x for name, x in inputs.items()}
        assert torch.equal(both[1:], scan(**alone, delta_softplus=True))


@pytest.mark.parametrize("scan", ["triton"], indirect=True)
def test_triton_is_registered_as_pytorch_expects(scan):
    inputs = make_inputs(2, 6, 40, 3, 2, per_example=PER_EXAMPLE)
    names = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    arguments = [inputs[name].requires_grad_() for name in names]
    torch.library.opcheck(torch.ops.medmamba.triton_scan_forward.default, (*arguments, True, False))


@pytest.mark.parametrize("scan", ["triton"], indirect=True)
def test_triton_compiles_without_a_break(scan):
    inputs = make_inputs(2, 96, 196)
    eager = results(scan, inputs)
    traced = results(torch.compile(scan, fullgraph=True), inputs)
    for name in eager:  # the gate is PyTorch's, and fused otherwise
        torch.testing.assert_close(traced[name], eager[name], rtol=1e-4, atol=1e-4)


def test_the_default_on_cuda_is_one_of_them():
    inputs = make_inputs(1, 8, 30)
    expected = reference.selective_scan(**inputs, delta_softplus=True)
    torch.testing.assert_close(
        selective_scan(**inputs, delta_softplus=True), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("scan", ["reference", *BACKENDS], indirect=True)
def test_a_whole_model_trains_on_every_backend_as_on_the_cpu(scan, request):
    name = request.node.callspec.params["scan"]
    torch.manual_seed(0)
    model = MedMamba.from_name("nano", 2, norm="group", drop_path=0.0, scan_backend=name).cuda()
    wide = MedMamba.from_name("nano", 2, norm="group", drop_path=0.0).double()
    wide.load_state_dict({key: value.double().cpu() for key, value in model.state_dict().items()})
    images = torch.randn(2, 3, 64, 64)
    logits, expected = model(images.cuda()), wide(images.double())
    torch.testing.assert_close(logits.double().cpu(), expected, rtol=1e-3, atol=1e-4)
    logits.sum().backward()
    expected.sum().backward()
    for got, truth in zip(model.parameters(), wide.parameters(), strict=True):
        floor = 1e-3 * float(truth.grad.abs().max()) + 1e-6
        torch.testing.assert_close(got.grad.double().cpu(), truth.grad, rtol=1e-2, atol=floor)
