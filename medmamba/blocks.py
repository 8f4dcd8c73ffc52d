"""The parts a MedMamba is stacked from: stem, block and merging.

Invariant: inside the network a tensor is (b, h, w, c), contiguous. Convolutions see it as
(b, c, h, w) with the channels last in memory, a view, and linear layers as (b, l, c). What a
sampler of gradients per example must know of these layouts is in ``medmamba.layers``.

Source: sections 3.3 and 3.4 of arXiv 2403.03849 and the official code, which differ: the code's
convolution branch is dense, starts with a normalisation and has no GELU. The code counts.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from medmamba.config import BATCH_NORM_MOMENTUM, NORM_EPS, Norm, num_groups
from medmamba.layers import Conv2d, GroupNorm, Linear
from medmamba.ss2d import SS2D


class PatchEmbed(nn.Module):
    """Cut the image into patches and project each to one position.

    Args:
        in_channels: Channels of the image.
        channels: Channels of a position.
        patch_size: Side of a patch, in pixels; pixels beyond the last whole patch are unused.
    """

    def __init__(self, in_channels: int, channels: int, patch_size: int) -> None:
        super().__init__()
        self.projection = Conv2d(in_channels, channels, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(channels, eps=NORM_EPS)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (b, c, h, w) to positions (b, h, w, c)."""
        return self.norm(
            self.projection(images.contiguous(memory_format=torch.channels_last)).permute(
                0, 2, 3, 1
            )
        )


class SSConvSSM(nn.Module):
    """Half of the channels go through convolutions, half through SS2D; shuffled, plus the input.

    Args:
        channels: Channels of input and output, even.
        d_state: Size of the state of each scanned channel.
        norm: Normalisation of the convolution branch.
        drop_path: Probability that the state-space half is dropped in training.
        scan_backend: What runs the scan; None takes the default of the device.
    """

    def __init__(
        self,
        channels: int,
        d_state: int,
        norm: Norm,
        drop_path: float,
        scan_backend: str | None = None,
    ) -> None:
        super().__init__()
        half = channels // 2
        self.conv_branch = _conv_branch(half, norm)
        self.ssm_norm = nn.LayerNorm(half, eps=NORM_EPS)
        self.ssm = SS2D(half, d_state, scan_backend)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, h, w, c) to the same shape."""
        left, right = x.chunk(2, dim=-1)  # twice (b, h, w, c/2)
        left = self.conv_branch(left.contiguous().permute(0, 3, 1, 2))  # (b, c/2, h, w)
        right = self.drop_path(self.ssm(self.ssm_norm(right)))  # (b, h, w, c/2)
        shuffled = torch.stack((left.permute(0, 2, 3, 1), right), dim=-1)  # (b, h, w, c/2, 2)
        return shuffled.flatten(3) + x  # (b, h, w, c); the input is added unshuffled


class PatchMerge(nn.Module):
    """Join each 2 x 2 positions into one of twice the channels; an odd last row or column goes.

    Args:
        channels: Channels of the input.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * channels, eps=NORM_EPS)
        self.projection = Linear(4 * channels, 2 * channels, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, h, w, c) to (b, h/2, w/2, 2c), sizes rounded down."""
        height, width = x.shape[1] // 2, x.shape[2] // 2
        x = x[:, : 2 * height, : 2 * width].unflatten(2, (width, 2)).unflatten(1, (height, 2))
        x = x.permute(0, 1, 3, 4, 2, 5).flatten(3).flatten(1, 2)  # (b, l, (column row c))
        return self.projection(self.norm(x)).unflatten(1, (height, width))  # (b, h/2, w/2, 2c)


class DropPath(nn.Module):
    """In training drop whole examples of a branch, and scale the rest to keep the expectation.

    Args:
        probability: Chance that one example is dropped.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, ...) to the same shape."""
        if not self.training or self.probability == 0.0:
            return x
        keep = 1.0 - self.probability
        mask = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(keep)  # (b, 1, ...)
        return x * (mask / keep)


def _conv_branch(channels: int, norm: Norm) -> nn.Sequential:
    return nn.Sequential(
        OrderedDict(
            norm_in=_norm(channels, norm),
            conv_1=Conv2d(channels, channels, 3, padding=1),
            norm_1=_norm(channels, norm),
            relu_1=nn.ReLU(),
            conv_2=Conv2d(channels, channels, 3, padding=1),
            norm_2=_norm(channels, norm),
            relu_2=nn.ReLU(),
            conv_out=Conv2d(channels, channels, 1),
            relu_out=nn.ReLU(),
        )
    )


def _norm(channels: int, norm: Norm) -> nn.Module:
    if norm == "group":
        return GroupNorm(num_groups(channels), channels, eps=NORM_EPS)
    return nn.BatchNorm2d(channels, eps=NORM_EPS, momentum=BATCH_NORM_MOMENTUM)
