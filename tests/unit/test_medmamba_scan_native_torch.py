"""The native scan keeps PyTorch's rules: tracing, autocast, processes, and calls by strangers."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from fakes.native_scans import (
    ORDINARY,
    assert_precise,
    differentiate,
    scan_inputs,
    ss2d_inputs,
)
from medmamba import MedMamba
from medmamba.config import ModelError
from medmamba.scan import native, path_order, selective_scan, ss2d_scan
from medmamba.scan.native import library, ops
from medmamba.ss2d import DirectionalScan

missing = native.unavailable()
pytestmark = pytest.mark.skipif(missing is not None, reason="the native scan kernel is not built")


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
    torch.testing.assert_close(exported.module()(images), expected, rtol=1e-5, atol=1e-6)
    traced = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(traced(images), expected, rtol=1e-5, atol=1e-6)


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


def test_memory_that_is_short_is_an_error(monkeypatch):
    class Short:
        isa = openmp = "short"
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
