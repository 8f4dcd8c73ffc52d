"""Layers compute what PyTorch's do, on the path that shapes and dtype decide."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.grad_sample import GradSampleModule
from torch import nn
from torch.nn import functional

from medmamba import MedMamba
from medmamba import layers as layers_module
from medmamba.blocks import SSConvSSM
from medmamba.layers import MIN_PRODUCTS, MIN_ROWS, Conv2d, GroupNorm, Linear


@pytest.fixture
def convolutions(monkeypatch):
    """The shapes of images that layers hand to a convolution."""
    seen = []

    def spy(pixels, *rest):
        seen.append(tuple(pixels.shape))
        return torch.conv2d(pixels, *rest)

    monkeypatch.setattr(layers_module.functional, "conv2d", spy)
    return seen


def make(in_features, out_features, bias=False):
    torch.manual_seed(0)
    return Linear(in_features, out_features, bias=bias)


def gradients(layer, x, function):
    x = x.detach().requires_grad_()
    y = function(x)
    weights = torch.linspace(0, 1, y.numel()).view(y.shape)  # sums without cancellation
    return y, torch.autograd.grad((y * weights).sum(), [x, *layer.parameters()])


@given(st.integers(1, 9), st.integers(1, 400), st.integers(1, 3), st.booleans())
@settings(max_examples=30, deadline=None)
def test_a_linear_layer_computes_what_torchs_does(b, length, width, bias):
    """On both paths: some of these shapes are large enough for the convolution, some are not."""
    layer = make(64 * width, 192, bias)
    x = torch.randn(b, length, 64 * width)
    ours = gradients(layer, x, layer)
    theirs = gradients(layer, x, lambda x: functional.linear(x, layer.weight, layer.bias))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert ours[0].is_contiguous()


def test_both_paths_are_taken(convolutions):
    layer = make(64, 192)
    layer(torch.randn(2, 40, 64))
    assert convolutions == []
    layer(torch.randn(2, 400, 64))
    assert convolutions == [(16, 64, 50, 1)]


@pytest.mark.parametrize(
    ("rows", "features"),
    [
        (MIN_ROWS - 2, 512),
        (MIN_ROWS, 64),  # too few products
        (211, 512),  # prime: no number of images divides it
        (0, 512),
    ],
)
def test_small_and_indivisible_products_stay_with_torch(convolutions, rows, features):
    make(features, features)(torch.randn(1, rows, features))
    assert convolutions == []


def test_at_the_threshold_it_is_a_convolution(convolutions):
    features = round(MIN_PRODUCTS / MIN_ROWS / 512) + 1
    make(features, 512)(torch.randn(1, MIN_ROWS, features))
    assert convolutions == [(16, features, MIN_ROWS // 16, 1)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay_with_torch(convolutions, dtype):
    make(64, 192).to(dtype)(torch.randn(2, 400, 64, dtype=dtype))
    assert convolutions == []


def test_autocast_stays_with_torch(convolutions):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = make(64, 192)(torch.randn(2, 400, 64))
    assert convolutions == []
    assert y.dtype == torch.bfloat16


def test_strides_of_the_input_do_not_matter():
    layer, x = make(64, 192), torch.randn(64, 2, 400)
    y = layer(x.permute(1, 2, 0))
    assert torch.equal(y, layer(x.permute(1, 2, 0).contiguous()))


@pytest.mark.parametrize(
    ("size", "images"), [((14, 14), (16, 192, 49, 1)), ((1, 47), (4, 192, 1, 47))]
)
def test_a_convolution_of_one_pixel_computes_what_torchs_does(size, images, convolutions):
    torch.manual_seed(0)
    layer, x = Conv2d(192, 64, 1), torch.randn(4, *size, 192).permute(0, 3, 1, 2)
    ours = gradients(layer, x, layer)
    assert convolutions == [images]
    theirs = gradients(layer, x, lambda x: torch.conv2d(x, layer.weight, layer.bias))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(
    "options", [{"stride": 2}, {"padding": 1}, {"groups": 2}, {"kernel_size": 3}]
)
def test_other_convolutions_stay_with_torch(options, convolutions):
    layer = Conv2d(192, 64, **{"kernel_size": 1, **options})
    layer(torch.randn(4, 192, 20, 20))
    assert convolutions == [(4, 192, 20, 20)]


@pytest.mark.filterwarnings("ignore")  # of the compiler's own parts
def test_a_program_for_any_batch_can_be_exported():
    batch = torch.export.Dim("batch", min=2, max=64)
    layer, x = make(64, 192).eval(), torch.randn(4, 400, 64)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},)).module()
    more = torch.randn(7, 400, 64)
    torch.testing.assert_close(exported(more), layer(more))


def test_the_same_input_gives_the_same_bits():
    layer, x = make(64, 192), torch.randn(2, 400, 64)
    first, second = gradients(layer, x, layer), gradients(layer, x, layer)
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_hooks_see_the_layers_input_and_output():
    layer, x, seen = make(64, 192), torch.randn(2, 400, 64), []
    layer.register_forward_hook(lambda _, args, y: seen.append((args[0].shape, y.shape)))
    layer.register_full_backward_hook(lambda _, gx, gy: seen.append((gx[0].shape, gy[0].shape)))
    layer(x.requires_grad_()).sum().backward()
    assert seen == [((2, 400, 64), (2, 400, 192))] * 2


def test_weights_are_torchs():
    torch.manual_seed(3)
    ours = nn.Sequential(Linear(5, 7), Conv2d(2, 4, 3)).state_dict()
    torch.manual_seed(3)
    theirs = nn.Sequential(nn.Linear(5, 7), nn.Conv2d(2, 4, 3)).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("needs_gradient", [False, True])
def test_a_group_norm_gives_its_weights_gradients_alone(needs_gradient):
    """As behind frozen layers, or when a part of the gradients is asked for."""
    norm, x = GroupNorm(4, 8), torch.randn(2, 5, 6, 8).permute(0, 3, 1, 2)
    x.requires_grad_(needs_gradient)
    stock = nn.GroupNorm(4, 8)
    expected = torch.autograd.grad(
        stock(x.detach().contiguous()).square().sum(), list(stock.parameters())
    )
    got = torch.autograd.grad(norm(x).square().sum(), list(norm.parameters()))
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_norm_is_pytorchs(dtype):
    ours, theirs = GroupNorm(4, 8).to(dtype), nn.GroupNorm(4, 8).to(dtype)
    x = torch.randn(3, 5, 6, 8, dtype=dtype).permute(0, 3, 1, 2).requires_grad_()
    leaf = x.detach().contiguous().requires_grad_()
    torch.testing.assert_close(ours(x), theirs(leaf))
    ours(x).square().sum().backward()
    theirs(leaf).square().sum().backward()
    torch.testing.assert_close(x.grad, leaf.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(ours(x).float(), theirs(leaf).float(), rtol=1e-2, atol=1e-2)


def test_a_part_of_a_models_gradients_may_be_asked_for():
    model = MedMamba.from_name("nano", num_classes=2, norm="group", drop_path=0.0)
    images = torch.randn(2, 3, 64, 64)
    model(images).sum().backward()
    chosen = {name: p for name, p in model.named_parameters() if "norm_1" in name}
    gradients = torch.autograd.grad(model(images).sum(), list(chosen.values()))
    for gradient, parameter in zip(gradients, chosen.values(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)


def test_opacus_has_no_sampler_of_its_own_for_these_layers():
    """Its sampler of convolutions reads channels that lie last as if they lay first."""
    model = MedMamba.from_name("nano", num_classes=2, norm="group")
    layers = (nn.Conv2d, nn.Linear, nn.GroupNorm)
    kinds = {type(m) for m in model.modules() if isinstance(m, layers)}
    assert kinds == {Linear, Conv2d, GroupNorm}
    assert kinds.isdisjoint(GradSampleModule.GRAD_SAMPLERS)


@pytest.mark.parametrize("part", ["conv_branch", "ssm.depthwise", "ssm.in_proj"])
def test_opacus_still_gets_the_gradient_of_each_example(part):
    torch.manual_seed(0)
    layer = SSConvSSM(16, 4, "group", 0.0).get_submodule(part).double()
    channels = {"conv_branch": 8, "ssm.depthwise": 16, "ssm.in_proj": 8}[part]
    x = torch.randn(3, 5, 6, channels, dtype=torch.float64)
    x = x.flatten(1, 2) if part == "ssm.in_proj" else x.permute(0, 3, 1, 2)
    expected = []
    for i in range(3):
        loss = layer(x[i : i + 1]).square().sum()
        expected.append(torch.autograd.grad(loss, list(layer.parameters())))
    wrapped = GradSampleModule(layer, loss_reduction="sum")
    wrapped(x.requires_grad_()).square().sum().backward()
    for parameter, each in zip(layer.parameters(), zip(*expected, strict=True), strict=True):
        torch.testing.assert_close(parameter.grad_sample, torch.stack(each))
