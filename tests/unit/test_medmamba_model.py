"""The whole model: sizes, inputs, initial weights and what training code relies on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from medmamba import MedMamba, MedMambaConfig, ModelError, no_weight_decay
from medmamba.blocks import SSConvSSM
from medmamba.layers import Conv2d, GroupNorm, Linear
from medmamba.ss2d import DirectionalScan

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "medmamba_logits.json"


def make(norm="batch", seed=0, **overrides):
    torch.manual_seed(seed)
    return MedMamba.from_name("nano", num_classes=5, norm=norm, **overrides)


def blocks(model):
    return [module for module in model.modules() if isinstance(module, SSConvSSM)]


def conv_stds(model):
    return {n: m.weight.std().item() for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}


@pytest.mark.parametrize(
    ("name", "num_classes", "overrides", "parameters"),
    [
        ("nano", 5, {}, 239_069),
        ("tiny", 6, {}, 14_457_222),
        ("tiny", 1000, {}, 15_221_608),
        ("small", 6, {}, 18_625_158),
        ("small", 1000, {}, 19_389_544),
        ("base", 6, {}, 39_864_838),
        ("base", 1000, {}, 40_883_688),
        ("small", 6, {"depths": (2, 2, 12, 2)}, 22_793_094),
        ("base", 6, {"depths": (2, 2, 16, 2)}, 47_126_022),
        ("tiny", 6, {"norm": "group"}, 14_457_222),
    ],
)
def test_sizes_have_the_official_number_of_parameters(name, num_classes, overrides, parameters):
    with torch.device("meta"):
        model = MedMamba.from_name(name, num_classes, **overrides)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_logits_do_not_change_from_version_to_version():
    """Weights and image are written by a formula, so that no random generator is involved."""
    golden = json.loads(GOLDEN.read_text())
    for norm, expected in golden["logits"].items():
        model = make(norm).double().eval()
        with torch.no_grad():
            for i, tensor in enumerate(model.parameters()):
                wave = torch.sin(0.7 * torch.arange(tensor.numel(), dtype=torch.float64) + i)
                tensor.copy_(0.2 * wave.view(tensor.shape))
            image = torch.cos(0.01 * torch.arange(3 * 45 * 61, dtype=torch.float64))
            logits = model(image.view(1, 3, 45, 61))
        torch.testing.assert_close(
            logits[0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=golden["tolerance"]
        )


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("height", "width"), [(32, 32), (45, 61), (64, 33)])
def test_any_size_from_the_minimum_up_works(norm, height, width):
    model, images = make(norm), torch.randn(2, 3, height, width)
    logits = model(images)
    assert logits.shape == (2, 5)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_pixels_beyond_the_last_patch_are_not_used():
    model = make("group").eval()
    images = torch.randn(1, 3, 45, 61)
    torch.testing.assert_close(model(images), model(images[:, :, :44, :60]))


@pytest.mark.parametrize(
    ("shape", "patch_size", "message", "hint"),
    [
        (
            (28, 28),
            4,
            "image size=28x28 expected at least 32x32 with patch_size=4",
            "resize the images, pad them to 32x32, or build the model with patch_size=2",
        ),
        (
            (64, 31),
            4,
            "image size=64x31 expected at least 32x32 with patch_size=4",
            "resize the images, pad them to 32x32, or build the model with patch_size=2",
        ),
        (
            (15, 40),
            2,
            "image size=15x40 expected at least 16x16 with patch_size=2",
            "resize the images, pad them to 16x16, or build the model with patch_size=1",
        ),
        (
            (7, 7),
            2,
            "image size=7x7 expected at least 16x16 with patch_size=2",
            "resize the images, pad them to 16x16",
        ),
    ],
)
def test_an_image_too_small_is_refused_with_the_ways_out(shape, patch_size, message, hint):
    with pytest.raises(ModelError) as error:
        make(patch_size=patch_size)(torch.zeros(1, 3, *shape))
    assert (str(error.value), error.value.hint) == (message, hint)


def test_native_medmnist_images_work_with_smaller_patches():
    assert make("group", patch_size=2)(torch.zeros(1, 3, 28, 28)).shape == (1, 5)


@pytest.mark.parametrize("shape", [(2, 1, 32, 32), (3, 32, 32), (2, 32, 32, 3)])
def test_wrong_channels_are_refused(shape):
    with pytest.raises(ModelError) as error:
        make()(torch.zeros(shape))
    assert str(error.value) == f"images.shape={shape} expected (b, 3, h, w)"
    assert "in_channels" in error.value.hint


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_a_dtype_other_than_the_weights_is_refused(dtype):
    with pytest.raises(ModelError, match=f"images.dtype={dtype} expected torch.float32"):
        make()(torch.zeros(1, 3, 32, 32, dtype=dtype))


def test_an_unknown_name_gets_the_nearest_one():
    with pytest.raises(ModelError, match=r"^name='nanno' expected one of nano, tiny, small, base$"):
        MedMamba.from_name("nanno", num_classes=5)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_same_seed_makes_the_same_model(norm):
    first, second, other = make(norm), make(norm), make(norm, seed=1)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert not torch.equal(first.head.weight, other.head.weight)
    assert not torch.equal(blocks(first)[0].ssm.scan.dt_bias, blocks(other)[0].ssm.scan.dt_bias)


def test_training_is_reproducible_under_a_seed():
    def gradient():
        model = make(drop_path=0.5)
        images = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(4, 3, 32, 32)
        functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 3])).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert torch.equal(gradient(), gradient())


def test_group_norm_has_no_buffers_and_batch_norm_has_its_statistics():
    assert list(make("group").buffers()) == []
    names = {name.rsplit(".", 1)[1] for name, _ in make("batch").named_buffers()}
    assert names == {"running_mean", "running_var", "num_batches_tracked"}


def test_with_group_norm_no_example_depends_on_another():
    model = make("group", drop_path=0.0).double().train()
    images = torch.randn(3, 3, 32, 40, dtype=torch.float64)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]))


def test_with_group_norm_a_batch_may_be_empty():
    model = make("group")
    logits = model(torch.zeros(0, 3, 32, 32))
    logits.sum().backward()
    assert logits.shape == (0, 5)


def test_drop_path_grows_linearly_over_the_blocks():
    with torch.device("meta"):
        model = MedMamba.from_name("tiny", num_classes=6)
    rates = [block.drop_path.probability for block in blocks(model)]
    assert rates == pytest.approx([i * 0.1 / 9 for i in range(10)])


def test_a_single_block_is_not_dropped():
    model = MedMamba(MedMambaConfig((1,), (8,), num_classes=2))
    assert blocks(model)[0].drop_path.probability == 0.0
    assert model(torch.zeros(2, 3, 4, 4)).shape == (2, 2)


def test_nothing_normalises_after_the_last_block():
    model = make("group").eval()
    seen = []
    model.stages[-1].register_forward_hook(lambda *args: seen.append(args[2]))
    logits = model(torch.randn(2, 3, 64, 64))
    torch.testing.assert_close(logits, model.head(seen[0].mean((1, 2))))


def test_no_weight_decay_names_norms_biases_and_the_diagonal_of_the_state():
    model = make()
    names = no_weight_decay(model)
    decayed = {name for name, _ in model.named_parameters()} - names
    assert {name.rsplit(".", 1)[1] for name in names} == {"weight", "bias", "A_log", "D", "dt_bias"}
    assert {name.rsplit(".", 1)[1] for name in decayed} == {"weight", "dt_weight"}
    assert not any("norm" in name for name in decayed)
    parameters = dict(model.named_parameters())
    assert all(parameters[n].dim() == 1 for n in names if not n.endswith("A_log"))
    assert all(parameters[n].dim() > 1 for n in decayed)


def test_linear_layers_start_narrow_without_bias():
    model = make()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith("x_proj"):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.12), name
    assert torch.equal(model.head.bias, torch.zeros(5))


def test_convolutions_start_kaiming_by_fan_out_with_torchs_bias():
    model = make()
    stds = conv_stds(model)
    assert len(stds) == 1 + 4 * 4
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            receptive = math.prod(module.kernel_size)
            expected = math.sqrt(2 / (module.out_channels * receptive))
            few = module.weight.numel() < 1000
            assert stds[name] == pytest.approx(expected, rel=0.25 if few else 0.06), name
            bound = 1 / math.sqrt(module.in_channels // module.groups * receptive)
            assert module.bias is not None
            assert 0 < module.bias.abs().max() <= bound


def test_normalisations_start_at_the_identity():
    for module in make().modules():
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d):
            assert torch.equal(module.weight, torch.ones_like(module.weight))
            assert torch.equal(module.bias, torch.zeros_like(module.bias))
            assert module.eps == 1e-5


def test_the_whole_model_leaves_the_scan_and_x_proj_as_they_were_made():
    ssm = blocks(make())[3].ssm
    assert ssm.x_proj.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 128), rel=0.05)
    assert torch.equal(ssm.scan.D, torch.ones(512))


def test_bfloat16_weights_and_images_work():
    model = make("group").bfloat16()
    logits = model(torch.randn(2, 3, 32, 32).bfloat16())
    logits.sum().backward()
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_works_and_is_near(dtype):
    model, images = make("group").eval(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(images.to(dtype))
    torch.testing.assert_close(logits.float(), model(images), rtol=0.0, atol=0.02)


def test_layers_get_what_samplers_of_gradients_per_example_can_read():
    """3-D or less at a linear layer, channels last at a convolution, a batch first everywhere."""
    model = make("group").train()
    seen = []

    def look(module, args):
        seen.append(type(module))
        assert all(isinstance(arg, torch.Tensor) and arg.shape[0] == 3 for arg in args)
        if isinstance(module, nn.Linear):
            assert args[0].dim() <= 3
        if isinstance(module, nn.Conv2d):
            assert args[0].is_contiguous(memory_format=torch.channels_last)

    for module in model.modules():
        module.register_forward_pre_hook(look)
        own = list(module.parameters(recurse=False))
        assert not own or list(module.children()) == []
    model(torch.randn(3, 3, 32, 40).contiguous(memory_format=torch.channels_last))
    assert {Linear, Conv2d, DirectionalScan, nn.LayerNorm, GroupNorm} <= set(seen)


@pytest.mark.parametrize("backend", [None, "reference"])
def test_the_scan_backend_reaches_every_scan_and_no_configuration(backend):
    model = MedMamba.from_name("nano", num_classes=5, scan_backend=backend)
    scans = [module for module in model.modules() if isinstance(module, DirectionalScan)]
    assert [scan.backend for scan in scans] == [backend] * 4
    assert model.config == MedMambaConfig.from_name("nano", num_classes=5)


def test_a_scan_backend_that_does_not_exist_is_an_error():
    model = MedMamba.from_name("nano", num_classes=5, norm="group", scan_backend="refrence")
    with pytest.raises(ModelError, match="backend=refrence expected one of reference, native"):
        model(torch.zeros(1, 3, 32, 32))
