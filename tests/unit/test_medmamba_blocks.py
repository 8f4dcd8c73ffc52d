"""A block splits, shuffles and adds; training drops only its state-space half."""

from __future__ import annotations

import pytest
import torch
from opacus.validators import ModuleValidator
from torch import nn

from medmamba.blocks import DropPath, PatchEmbed, PatchMerge, SSConvSSM
from medmamba.config import Norm


def make_block(norm: Norm = "group", drop_path=0.0):
    torch.manual_seed(0)
    return SSConvSSM(channels=8, d_state=4, norm=norm, drop_path=drop_path).double()


def images(b=4, height=3, width=5, channels=8):
    return torch.randn(b, height, width, channels, dtype=torch.float64)


def test_halves_interleave_and_the_input_is_added_unshuffled():
    block, x = make_block().eval(), images()
    left, right = x[..., :4], x[..., 4:]
    convolved = block.conv_branch(left.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    out = block(x)
    torch.testing.assert_close(out[..., 0::2], convolved + x[..., 0::2])
    torch.testing.assert_close(out[..., 1::2], block.ssm(block.ssm_norm(right)) + x[..., 1::2])


def test_training_drops_only_the_state_space_half_of_whole_examples():
    block, x = make_block(drop_path=0.5), images(b=64)
    kept = block.eval()(x) - x
    torch.manual_seed(1)
    trained = block.train()(x) - x
    torch.testing.assert_close(trained[..., 0::2], kept[..., 0::2])
    dropped = (trained[..., 1::2] == 0).flatten(1).all(1)
    assert 16 < dropped.sum() < 48
    torch.testing.assert_close(trained[~dropped][..., 1::2], 2 * kept[~dropped][..., 1::2])


def test_evaluation_drops_nothing():
    block, x = make_block(drop_path=0.9), images()
    with_dropping = block.eval()(x)
    block.drop_path.probability = 0.0
    assert torch.equal(with_dropping, block(x))


def test_dropping_nothing_draws_no_random_number():
    before = torch.get_rng_state()
    x = images()
    after_making = torch.get_rng_state()
    assert not torch.equal(before, after_making)
    assert DropPath(0.0).train()(x) is x
    assert torch.equal(torch.get_rng_state(), after_making)


def test_the_convolution_branch_is_the_official_one():
    kinds = [
        nn.BatchNorm2d,
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        nn.Conv2d,
        nn.BatchNorm2d,
        nn.ReLU,
        nn.Conv2d,
        nn.ReLU,
    ]
    branch = make_block(norm="batch").conv_branch
    assert all(isinstance(m, kind) for m, kind in zip(branch, kinds, strict=True))


def test_group_norm_is_what_opacus_would_put():
    ours = make_block(norm="group").conv_branch
    fixed = ModuleValidator.fix(make_block(norm="batch").conv_branch)
    assert [repr(module) for module in ours] == [repr(module) for module in fixed]


def test_merging_keeps_the_order_of_the_corners():
    merge = PatchMerge(channels=1)
    merge.norm = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    merge.projection = nn.Identity()  # pyright: ignore[reportAttributeAccessIssue]
    grid = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).view(1, 2, 2, 1)
    assert merge(grid).flatten().tolist() == [0.0, 2.0, 1.0, 3.0]


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 6), (4, 7), (5, 7)])
def test_merging_leaves_out_an_odd_last_row_or_column(height, width, capsys):
    merge, x = PatchMerge(channels=8).double(), images(height=height, width=width)
    assert torch.equal(merge(x), merge(x[:, :4, :6]))
    assert capsys.readouterr().out == ""


def test_the_stem_takes_images_of_either_memory_format():
    stem, x = PatchEmbed(3, 8, 4).double(), torch.randn(2, 3, 9, 10, dtype=torch.float64)
    out = stem(x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(out, stem(x))
    assert out.shape == (2, 2, 2, 8)
    assert out.is_contiguous()
    assert stem(x).is_contiguous()


def test_no_layer_of_a_block_sees_a_tensor_that_is_not_channels_last():
    block, seen = make_block().train(), []

    def look(module, args):
        x = args[0]
        rows = x.permute(0, 2, 3, 1) if x.dim() == 4 and not isinstance(module, nn.LayerNorm) else x
        seen.append((type(module).__name__, rows.is_contiguous()))

    for module in block.conv_branch:
        module.register_forward_pre_hook(look)
    for name in ("in_proj", "depthwise", "x_proj", "out_norm", "out_proj"):
        block.ssm.get_submodule(name).register_forward_pre_hook(look)
    with torch.no_grad():
        assert block(images()).is_contiguous()
    assert block(images().requires_grad_()).is_contiguous()
    assert len(seen) == 2 * (9 + 5)
    assert all(contiguous for _, contiguous in seen), seen
