"""The native kernel: right to float32's last digits, the same bytes however it is run."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from medmamba import MedMamba
from medmamba.config import ModelError
from medmamba.scan import native, path_order, selective_scan, ss2d_scan
from medmamba.scan.native import library, ops
from medmamba.ss2d import DirectionalScan

missing = native.unavailable()
pytestmark = pytest.mark.skipif(missing is not None, reason="the native scan kernel is not built")

FORWARD, BACKWARD = 1e-5, 1e-4  # largest error, relative to the largest value
TINIEST = 1e-30  # below it an answer counts as 0: the kernel flushes denormal numbers
ORDINARY = (0.0, 1.0)  # mean and deviation of delta, before its bias and softplus
EXTREME = ((-12.0, 4.0), (0.0, 60.0), (30.0, 30.0))


def error(got, expected, floor=TINIEST):
    if not got.numel():
        return 0.0
    return float((got.double() - expected).abs().max() / expected.abs().max().clamp_min(floor))


def scan_inputs(b, g, channels, l, n, constant, per_example, delta, seed):  # noqa: E741
    generator = torch.Generator().manual_seed(seed)
    d = g * channels

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    own = (b,) if per_example else ()
    mean, deviation = delta
    return {
        "u": normal(b, d, l),
        "delta": mean + deviation * normal(b, d, l),
        "A": -(1.5 * normal(*own, d, n)).exp(),
        "B": normal(d, n) if "B" in constant else normal(b, g, n, l),
        "C": normal(d, n) if "C" in constant else normal(b, g, n, l),
        "D": normal(*own, d),
        "delta_bias": normal(*own, d),
    }


def differentiate(inputs, dtype, backend, softplus=True):
    """y, the last state and all gradients of a loss that weighs both."""
    tensors = {k: t.detach().to(dtype).requires_grad_() for k, t in inputs.items()}
    y, state = selective_scan(
        **tensors, delta_softplus=softplus, return_last_state=True, backend=backend
    )
    generator = torch.Generator().manual_seed(1)
    loss = sum(
        (t * torch.randn(t.shape, generator=generator, dtype=torch.float64).to(dtype)).sum()
        for t in (y, state)
    )
    gradients = torch.autograd.grad(loss, list(tensors.values()))
    return {"y": y.detach(), "last_state": state.detach()} | dict(
        zip(tensors, gradients, strict=True)
    )


def assert_precise(inputs, softplus=True):
    expected = differentiate(inputs, torch.float64, "reference", softplus)
    got = differentiate(inputs, torch.float32, "native", softplus)
    for name, value in got.items():
        bound = FORWARD if name in ("y", "last_state") else BACKWARD
        assert error(value, expected[name]) <= bound, name


shapes = st.fixed_dictionaries(
    {
        "b": st.integers(1, 3),
        "g": st.integers(1, 8),
        "channels": st.integers(1, 40),
        "l": st.one_of(st.integers(1, 70), st.sampled_from([31, 32, 33, 64]), st.integers(1, 5000)),
        "n": st.one_of(st.integers(1, 20), st.sampled_from([32, 64])),
        "constant": st.sets(st.sampled_from(["B", "C"])),
        "per_example": st.booleans(),
        "delta": st.sampled_from([ORDINARY, ORDINARY, *EXTREME]),
        "seed": st.integers(0, 2**31),
    }
)


def limited(shape):
    """Shapes whose float64 reference takes no minute."""
    size = shape["b"] * shape["g"] * shape["channels"] * shape["l"] * shape["n"]
    return size <= 4_000_000


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.filter_too_much])
@given(shapes.filter(limited), st.sampled_from(library.isas() or ("none",)), st.booleans())
def test_any_shape_is_as_precise_as_promised(shape, isa, gated):
    inputs = scan_inputs(**shape)
    if gated:
        inputs["z"] = torch.randn_like(inputs["u"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.ISA_VARIABLE, isa)
        assert_precise(inputs)


@pytest.mark.parametrize("isa", library.isas())
@pytest.mark.parametrize("delta", [ORDINARY, *EXTREME])
def test_five_thousand_steps_are_as_precise_as_promised(delta, isa, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    assert_precise(scan_inputs(1, 2, 9, 5000, 16, (), False, delta, seed=3))


def test_delta_may_come_without_softplus_bias_and_skip():
    inputs = scan_inputs(2, 2, 5, 40, 3, (), False, ORDINARY, seed=0)
    inputs = {"u": inputs["u"], "delta": inputs["delta"].abs(), "A": inputs["A"]} | {
        name: inputs[name] for name in ("B", "C")
    }
    assert_precise(inputs, softplus=False)


def test_a_gate_multiplies_the_output():
    inputs = scan_inputs(2, 1, 5, 40, 3, (), False, ORDINARY, seed=0)
    assert_precise(inputs | {"z": torch.randn(2, 5, 40)})


@pytest.mark.parametrize("value", [0.0, 1e-40, -1e-45])
def test_zero_and_denormal_inputs_give_finite_answers(value):
    inputs = scan_inputs(1, 1, 5, 40, 3, (), False, ORDINARY, seed=0)
    inputs["u"] = torch.full_like(inputs["u"], value)
    assert_precise(inputs)
    inputs["B"] = torch.full_like(inputs["B"], value)
    assert_precise(inputs)


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "delta_bias"])
@pytest.mark.parametrize("per_example", [False, True])
@pytest.mark.parametrize("isa", library.isas())
def test_nan_in_gives_nan_out_where_the_reference_has_it(name, per_example, isa, monkeypatch):
    monkeypatch.setenv(library.ISA_VARIABLE, isa)
    inputs = scan_inputs(2, 2, 5, 40, 3, (), per_example, ORDINARY, seed=0)
    flat = inputs[name].view(-1)
    flat[flat.numel() // 2] = torch.nan
    expected = differentiate(inputs, torch.float64, "reference")
    got = differentiate(inputs, torch.float32, "native")
    for key, value in got.items():
        assert torch.equal(value.isnan(), expected[key].isnan()), key


@pytest.mark.parametrize("value", [torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["u", "delta", "B", "C"])
def test_infinities_end_where_they_do_in_the_reference(name, value):
    inputs = scan_inputs(1, 1, 5, 40, 3, (), False, ORDINARY, seed=0)
    inputs[name].view(-1)[17] = value
    expected = selective_scan(**inputs, delta_softplus=True, backend="reference")
    got = selective_scan(**inputs, delta_softplus=True, backend="native")
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got.isinf(), expected.isinf())
    finite = expected.isfinite()
    torch.testing.assert_close(got[finite], expected[finite], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rate", [1e-6, 1e-4, 1e-3])
def test_a_state_that_hardly_decays_is_as_precise_as_float32_allows(rate):
    """1e-5 is out of reach where the rounding of exp(delta A) adds up over thousands of steps."""
    inputs = scan_inputs(1, 1, 5, 3000, 4, (), False, ORDINARY, seed=4)
    inputs["delta"] = torch.full_like(inputs["delta"], 0.5)
    inputs["A"] = -rate * torch.rand_like(inputs["A"])
    expected = differentiate(inputs, torch.float64, "reference")
    single = differentiate(inputs, torch.float32, "reference")
    got = differentiate(inputs, torch.float32, "native")
    for name, value in got.items():
        bound = max(FORWARD, 3 * error(single[name], expected[name]))
        assert error(value, expected[name]) <= bound, name


LOSSES = {
    "expanded": lambda y, state: y.sum() + state.sum(),
    "transposed": lambda y, state: (y.mT * torch.ones_like(y.mT)).sum() + (state.mT * 2).sum(),
    "the last state alone": lambda y, state: (state.mT * torch.ones_like(state.mT)).sum(),
    "y alone": lambda y, state: (y[..., ::2] * 3).sum(),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_may_arrive_in_any_layout(loss):
    inputs = scan_inputs(2, 2, 40, 300, 5, (), False, ORDINARY, seed=1)
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "native")):
        tensors = {k: t.to(dtype).requires_grad_() for k, t in inputs.items()}
        y, state = selective_scan(
            **tensors, delta_softplus=True, return_last_state=True, backend=backend
        )
        results.append(
            torch.autograd.grad(loss(y, state), list(tensors.values()), materialize_grads=True)
        )
    for name, expected, got in zip(inputs, *results, strict=True):
        assert error(got, expected) <= BACKWARD, name


def ss2d_inputs(b, height, width, d, n, r, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    k = 4
    return [
        normal(b, height * width, d),
        normal(b, height * width, k * (r + 2 * n)),
        normal(k, d, r) / r**0.5,
        normal(k, d) - 2,
        -normal(k, d, n).exp(),
        normal(k, d),
    ]


def differentiate_paths(inputs, order, dtype, backend):
    tensors = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    y = ss2d_scan(*tensors, order, backend=backend)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return y.detach(), *torch.autograd.grad((y * weight.to(dtype)).sum(), tensors)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(1, 150),
    st.integers(1, 20), st.integers(1, 26),
)  # fmt: skip
def test_the_fused_scan_is_the_four_scans(b, height, width, d, n, r):
    inputs = ss2d_inputs(b, height, width, d, n, r)
    order = path_order(height, width, torch.device("cpu"))
    expected = differentiate_paths(inputs, order, torch.float64, "reference")
    got = differentiate_paths(inputs, order, torch.float32, "native")
    assert error(got[0], expected[0]) <= FORWARD
    for value, truth in zip(got[1:], expected[1:], strict=True):
        assert error(value, truth) <= BACKWARD


@pytest.mark.parametrize("loss", [torch.sum, lambda y: (y.mT * torch.ones_like(y.mT)).sum()])
def test_gradients_along_paths_may_arrive_in_any_layout(loss):
    inputs = ss2d_inputs(3, 12, 11, 90, 16, 3)
    order = path_order(12, 11, torch.device("cpu"))
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "native")):
        tensors = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        y = ss2d_scan(*tensors, order, backend=backend)
        results.append(torch.autograd.grad(loss(y), tensors))
    for expected, got in zip(*results, strict=True):
        assert error(got, expected) <= BACKWARD


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("index", range(6))
def test_what_is_no_number_spreads_along_paths_as_in_the_reference(index, value):
    inputs = ss2d_inputs(2, 4, 9, 18, 3, 2)
    flat = inputs[index].view(-1)
    flat[flat.numel() // 2] = value
    order = path_order(4, 9, torch.device("cpu"))
    expected = differentiate_paths(inputs, order, torch.float32, "reference")
    got = differentiate_paths(inputs, order, torch.float32, "native")
    for tensor, truth in zip(got, expected, strict=True):
        assert not (truth.isnan() & tensor.isfinite()).any()
    assert torch.equal(got[0].isfinite(), expected[0].isfinite())


def test_paths_take_half_precision_any_layout_and_no_example():
    inputs = ss2d_inputs(2, 4, 9, 18, 3, 2)
    order = path_order(4, 9, torch.device("cpu"))
    expected = ss2d_scan(*inputs, order, backend="native")
    apart = [torch.stack((tensor, tensor), -1)[..., 0] for tensor in inputs]
    table = torch.stack((order, order), -1)[..., 0]
    assert torch.equal(ss2d_scan(*apart, table, backend="native"), expected)
    half = [tensor.bfloat16() for tensor in inputs]
    rounded = ss2d_scan(*(tensor.float() for tensor in half), order, backend="native")
    y = ss2d_scan(*half, order, backend="native")
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, rounded.bfloat16())
    none = [inputs[0][:0], inputs[1][:0], *inputs[2:]]
    assert ss2d_scan(*none, order, backend="native").shape == (0, 36, 18)


@pytest.mark.parametrize("table", [[[0, 1, 1]], [[0, 1, 3]], [[-1, 0, 1]], [[0, 1, 2], [2, 2, 0]]])
def test_a_path_that_is_no_permutation_is_refused(table):
    order = torch.tensor(table, dtype=torch.int32)
    k, d, n, r = len(table), 5, 3, 2
    arguments = (
        torch.zeros(1, 3, d), torch.zeros(1, 3, k * (r + 2 * n)), torch.zeros(k, d, r),
        torch.zeros(k, d), torch.zeros(k, d, n), torch.zeros(k, d), order,
    )  # fmt: skip
    with pytest.raises(
        ModelError, match=r"^order\[[01]\]=\[.*\] expected every position from 0 to 2 once"
    ):
        ss2d_scan(*arguments, backend="native")


def everything(threads):
    """All outputs and gradients of both operators, at shapes that are split into parts too."""
    torch.set_num_threads(threads)
    results = []
    for b in (1, 3):
        results += differentiate(
            scan_inputs(b, 1, 200, 100, 16, (), False, ORDINARY, seed=5), torch.float32, "native"
        ).values()
        order = path_order(9, 8, torch.device("cpu"))
        results += differentiate_paths(
            ss2d_inputs(b, 9, 8, 200, 16, 6), order, torch.float32, "native"
        )
    return results


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_any_number_of_threads_gives_the_same_bytes(threads):
    one = everything(1)
    for count in (2, 3, 7):
        for got, expected in zip(everything(count), one, strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("d", [20, 400])
def test_an_example_gets_the_same_bytes_in_any_batch(d):
    """Outputs and all gradients, of 400 channels too, whose sums are taken in parts."""
    inputs = scan_inputs(5, 1, d, 50, 5, (), True, ORDINARY, seed=2)
    paths = ss2d_inputs(5, 5, 4, d, 5, 3)
    order = path_order(5, 4, torch.device("cpu"))
    weight = torch.randn(5, d, 50, generator=torch.Generator().manual_seed(3))

    def scan(chosen):
        tensors = {k: t[chosen].requires_grad_() for k, t in inputs.items()}
        y = selective_scan(**tensors, delta_softplus=True, backend="native")
        return y, *torch.autograd.grad((y * weight[chosen]).sum(), list(tensors.values()))

    def along(chosen):
        x, projected = (tensor[chosen].requires_grad_() for tensor in paths[:2])
        y = ss2d_scan(x, projected, *paths[2:], order, backend="native")
        return y, *torch.autograd.grad(y.square().sum(), (x, projected))

    for run in (scan, along):
        together = run(slice(None))
        for i in range(5):
            for got, expected in zip(run(slice(i, i + 1)), together, strict=True):
                assert torch.equal(got[0], expected[i])


@pytest.mark.parametrize("constant", [(), ("B",), ("C",), ("B", "C")])
def test_gradients_per_example_are_those_of_each_example_alone(constant):
    inputs = scan_inputs(3, 2, 20, 50, 5, constant, True, ORDINARY, seed=2)
    first = {k: t if k in constant else t[:1] for k, t in inputs.items()}
    tensors = {k: t.detach().requires_grad_() for k, t in inputs.items()}
    y = selective_scan(**tensors, delta_softplus=True, backend="native")
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    gradients = dict(
        zip(tensors, torch.autograd.grad((y * weight).sum(), list(tensors.values())), strict=True)
    )
    leaves = {k: t.detach().requires_grad_() for k, t in first.items()}
    y_first = selective_scan(**leaves, delta_softplus=True, backend="native")
    own = torch.autograd.grad((y_first * weight[:1]).sum(), list(leaves.values()))
    for (name, gradient), expected in zip(gradients.items(), own, strict=True):
        if name not in constant:
            assert torch.equal(gradient[:1], expected), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    half = {k: t.to(dtype) for k, t in scan_inputs(2, 2, 9, 40, 5, (), False, ORDINARY, 0).items()}
    options = {"delta_softplus": True, "return_last_state": True, "backend": "native"}
    y, state = selective_scan(**half, **options)
    single = {k: t.float() for k, t in half.items()}
    expected, expected_state = selective_scan(**single, **options)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(state, expected_state)


def test_autocast_hands_the_operator_float32():
    x, *rest = ss2d_inputs(2, 3, 3, 5, 3, 2)
    order = path_order(3, 3, torch.device("cpu"))
    per_example = [t.expand(2, *t.shape) for t in rest[1:]]
    expected, _ = torch.ops.medmamba.native_ss2d(x, rest[0], *per_example, order, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        halved = torch.ops.medmamba.native_ss2d(x.bfloat16(), rest[0], *per_example, order, False)[
            0
        ]
    assert halved.dtype == torch.float32
    torch.testing.assert_close(halved, expected, rtol=0.05, atol=0.05)


def test_memory_layout_does_not_matter():
    inputs = scan_inputs(2, 2, 9, 40, 5, ("B",), True, ORDINARY, 0)
    apart = {k: torch.stack((t, t), -1)[..., 0] for k, t in inputs.items()}
    apart["u"] = inputs["u"].permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not any(t.is_contiguous() for t in apart.values())
    expected = differentiate(inputs, torch.float32, "native")
    for name, got in differentiate(apart, torch.float32, "native").items():
        assert torch.equal(got, expected[name]), name


def test_an_empty_batch_is_scanned_to_an_empty_batch():
    inputs = scan_inputs(0, 2, 4, 6, 3, (), False, ORDINARY, 0)
    got = differentiate(inputs, torch.float32, "native")
    assert got["y"].shape == (0, 8, 6)
    assert got["last_state"].shape == (0, 8, 3)
    assert_precise(inputs)


def test_only_states_between_chunks_are_kept():
    kernel = library.load()
    u = torch.zeros(2, 40, 100)
    arguments = (u, u, torch.zeros(2, 40, 5), torch.zeros(2, 2, 5, 100), torch.zeros(2, 2, 5, 100))
    *_, kept = torch.ops.medmamba.native_scan(*arguments, None, None, True, True)
    blocks, chunks = -(-20 // kernel.width), -(-100 // kernel.chunk)
    assert kept.numel() == 2 * 2 * blocks * chunks * 5 * kernel.width
    *_, kept = torch.ops.medmamba.native_scan(*arguments, None, None, True, False)
    assert kept.numel() == 0


def test_float64_is_refused_by_name():
    inputs = scan_inputs(1, 1, 2, 3, 2, (), False, ORDINARY, 0)
    inputs["B"] = inputs["B"].double()
    with pytest.raises(ModelError, match=r"^B.dtype=torch.float64 expected float32, bfloat16 or"):
        selective_scan(**inputs, backend="native")


def test_a_second_derivative_is_refused_rather_than_wrong():
    inputs = scan_inputs(1, 1, 2, 3, 2, (), False, ORDINARY, 0)
    u = inputs.pop("u").requires_grad_()
    y = selective_scan(u, **inputs, backend="native")
    (gradient,) = torch.autograd.grad(y.square().sum(), u, create_graph=True)
    with pytest.raises(ModelError, match=r"^create_graph=True expected False: the native backend"):
        gradient.sum().backward()


def operator_arguments():
    b, g, d, l, n = 2, 2, 6, 10, 3  # noqa: E741
    scan = scan_inputs(b, g, d // g, l, n, (), True, ORDINARY, 0)
    paths = ss2d_inputs(b, 2, 3, 5, n, 2)
    paths[2:] = [t.expand(b, *t.shape).contiguous() for t in paths[2:]]
    order = path_order(2, 3, torch.device("cpu"))
    return {
        "native_scan": (*scan.values(), True, True),
        "native_ss2d": (*paths, order, True),
    }


@pytest.mark.parametrize("name", ["native_scan", "native_ss2d"])
@pytest.mark.parametrize("grad", [False, True])
def test_the_operators_keep_pytorchs_rules(name, grad):
    arguments = [
        t.requires_grad_(grad) if isinstance(t, torch.Tensor) and t.is_floating_point() else t
        for t in operator_arguments()[name]
    ]
    torch.library.opcheck(
        getattr(torch.ops.medmamba, name).default,
        tuple(arguments),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_a_compiled_and_an_exported_model_give_the_same_logits():
    torch.manual_seed(0)
    model = MedMamba.from_name("nano", num_classes=3, norm="group").eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    exported = torch.export.export(model, (images,), strict=False)
    assert any("native_ss2d" in str(node.target) for node in exported.graph.nodes)
    assert torch.equal(exported.module()(images), expected)
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert torch.equal(traced(images), expected)


def test_a_compiled_training_step_gives_the_same_gradients():
    torch.manual_seed(0)
    scan = DirectionalScan(d_inner=8, d_state=4, rank=2)
    x, projected = torch.randn(2, 4, 4, 8), torch.randn(2, 4, 4, 4 * (2 + 8))
    scan(x, projected).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in scan.named_parameters()}
    scan.zero_grad()
    torch.compile(scan, backend="aot_eager", fullgraph=True)(x, projected).square().sum().backward()
    for name, parameter in scan.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def scan_in_child(arrays, queue):
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.no_grad():
        queue.put(selective_scan(**inputs, delta_softplus=True, backend="native").tolist())


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_process_scans_too_and_to_the_same_bytes(method, threads):
    torch.set_num_threads(2)
    inputs = scan_inputs(2, 2, 20, 50, 5, (), False, ORDINARY, seed=2)
    expected = selective_scan(**inputs, delta_softplus=True, backend="native")  # makes the pool
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    child = context.Process(target=scan_in_child, args=(arrays, queue), daemon=True)
    child.start()
    got = torch.tensor(queue.get())
    child.join(60)
    assert child.exitcode == 0
    assert torch.equal(got, expected)


def test_a_child_scans_although_its_parent_never_has():
    """The parent's pool of threads exists, from another operation, and is lost in the fork."""
    script = """
import os, torch, medmamba.scan
torch.set_num_threads(2)
u = torch.randn(1, 64, 4000); A = -torch.rand(64, 4); B = torch.randn(1, 4, 4000)
torch.mm(torch.randn(1500, 1500), torch.randn(1500, 1500)); torch.randn(10**6).exp()
pid = os.fork()
if pid == 0:
    with torch.no_grad():
        medmamba.scan.selective_scan(u, u, A, B, B, backend="native")
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        capture_output=True, text=True, check=True, timeout=60,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert done.stdout.strip() == "7"


def test_what_was_exported_without_gradients_can_be_differentiated():
    torch.manual_seed(0)
    scan = DirectionalScan(d_inner=8, d_state=4, rank=2)
    x, projected = torch.randn(2, 4, 4, 8), torch.randn(2, 4, 4, 4 * (2 + 8))
    with torch.no_grad():
        exported = torch.export.export(scan, (x, projected), strict=False).module()
    leaf = x.clone().requires_grad_()
    scan(leaf, projected).square().sum().backward()
    expected, leaf.grad = leaf.grad, None
    exported(leaf, projected).square().sum().backward()
    assert torch.equal(leaf.grad, expected)


def test_a_kept_scan_of_another_instruction_set_is_refused(monkeypatch):
    if len(library.isas()) < 2:
        pytest.skip("this processor has one instruction set")
    u = torch.randn(1, 8, 40, requires_grad=True)
    A, B = -torch.rand(8, 3), torch.randn(1, 3, 40)
    y = selective_scan(u, u, A, B, B, backend="native")
    monkeypatch.setenv(library.ISA_VARIABLE, library.isas()[-1])
    with pytest.raises(ModelError, match=r"^boundaries.shape=\(.*\) expected \(") as failure:
        y.sum().backward()
    assert failure.value.hint.startswith("leave MEDMAMBA_SCAN_ISA unchanged")


def shortened(tensor):
    return tensor[..., :-1] if tensor.is_floating_point() else tensor[:, :-1]


@pytest.mark.parametrize("name", ["native_scan", "native_ss2d"])
@pytest.mark.parametrize("change", [shortened, torch.Tensor.double, lambda t: t[0]])
def test_an_operator_called_by_itself_checks_what_it_gets(name, change):
    arguments = operator_arguments()[name]
    operator = getattr(torch.ops.medmamba, name)
    for i, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            changed = [*arguments[:i], change(argument), *arguments[i + 1 :]]
            with pytest.raises(ModelError, match=r"^[\w.]+=.* expected "):
                operator(*changed)


@pytest.mark.parametrize("name", ["native_scan", "native_ss2d"])
def test_an_operators_backward_checks_what_it_gets(name):
    arguments = operator_arguments()[name][:-1]
    y, *_, kept = getattr(torch.ops.medmamba, name)(*arguments, True)
    backward = getattr(torch.ops.medmamba, f"{name}_backward")
    grads = (y, None) if name == "native_scan" else (y,)
    backward(*grads, *arguments, kept)
    for bad, boundaries in ((y[:, :-1], kept), (y.double(), kept), (y, kept[:-1]), (y, y)):
        with pytest.raises(ModelError, match=r"^[\w.]+=.* expected "):
            backward(bad, *grads[1:], *arguments, boundaries)


def test_tracing_leaves_nothing_behind():
    scan = DirectionalScan(d_inner=8, d_state=4, rank=2)
    x, projected = torch.randn(2, 7, 3, 8), torch.randn(2, 7, 3, 4 * (2 + 8))
    with FakeTensorMode(allow_non_fake_inputs=True):
        scan(x, projected)
    assert type(scan(x, projected)) is torch.Tensor
    make_fx(lambda *given: scan(*given), tracing_mode="fake", _allow_non_fake_inputs=True)(
        x, projected
    )
    assert type(scan(x, projected)) is torch.Tensor


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
@pytest.mark.parametrize("fused", [False, True])
def test_forward_mode_is_refused_rather_than_zero(fused):
    if fused:
        x, *rest = ss2d_inputs(1, 2, 3, 4, 3, 2)
        order = path_order(2, 3, torch.device("cpu"))

        def scan(given, backend):
            return ss2d_scan(given, *rest, order, backend=backend)
    else:
        x, A, B = torch.randn(1, 4, 6), -torch.rand(4, 3), torch.randn(1, 3, 6)

        def scan(given, backend):
            return selective_scan(given, given, A, B, B, backend=backend)

    with pytest.raises(ModelError, match=r"^forward-mode differentiation expected backend=ref"):
        torch.func.jvp(lambda t: scan(t, "native"), (x,), (torch.ones_like(x),))
    _, tangent = torch.func.jvp(lambda t: scan(t, "reference"), (x,), (torch.ones_like(x),))
    assert tangent.abs().sum() > 0


def test_one_float64_tensor_takes_the_whole_scan_to_the_reference():
    inputs = scan_inputs(1, 1, 4, 6, 3, (), False, ORDINARY, seed=0)
    expected = selective_scan(**{k: t.double() for k, t in inputs.items()}).float()
    assert torch.equal(selective_scan(**inputs | {"D": inputs["D"].double()}), expected)


def test_whole_model_logits_and_gradients_are_those_of_float64():
    torch.manual_seed(0)
    model = MedMamba.from_name("nano", num_classes=3, norm="group", drop_path=0.0)
    wide = MedMamba.from_name("nano", num_classes=3, norm="group", drop_path=0.0).double()
    wide.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    images, labels = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])
    logits, truth = model(images), wide(images.double())
    assert error(logits.detach(), truth.detach()) <= FORWARD
    functional.cross_entropy(logits, labels).backward()
    functional.cross_entropy(truth, labels).backward()
    truths = dict(wide.named_parameters())
    # A convolution's bias in front of a normalisation has no gradient but rounding.
    floor = 1e-3 * max(truth.grad.abs().max() for truth in truths.values())
    for name, parameter in model.named_parameters():
        assert error(parameter.grad, truths[name].grad, floor) <= BACKWARD, name


def test_memory_that_is_short_is_an_error(monkeypatch):
    class Short:
        width, chunk = library.load().width, library.load().chunk

        @staticmethod
        def scan_forward(_):
            return ops.NO_MEMORY

    monkeypatch.setattr(library, "load", Short)
    inputs = scan_inputs(1, 1, 2, 3, 2, (), False, ORDINARY, 0)
    with pytest.raises(MemoryError, match="found no memory for its work space"):
        selective_scan(**inputs, backend="native")


def test_the_seam_and_the_kernel_import_without_a_second_openmp_runtime():
    script = (
        "import torch; from medmamba.scan import native; native.library.load();"
        "print(*{line.split()[-1] for line in open('/proc/self/maps') if 'omp' in line})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )  # fmt: skip
    assert len(done.stdout.split()) == 1
