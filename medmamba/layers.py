"""The layers this network is made of: PyTorch's, with channels last, quick on a CPU.

Invariant: which code computes a layer depends on shapes, device and dtype alone, never on a clock,
so the same seed gives the same bits. Names, shapes and initial values of the weights are those of
PyTorch's layers, and so is what hooks see of a layer's input and output.

A sampler of gradients per example must be registered for these very classes and must read strides:
a convolution's input here is (b, c, h, w) with the channels last in memory, for which the sampler
of Opacus 1.6 returns zeros without a word. Opacus looks samplers up by exact type, so its own never
meet these layers; what it falls back to differentiates the layer's forward, and is right.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# From so many rows (positions of all examples) and multiplications on, a product in float32 on a
# CPU is 1.2 to 2.1 times quicker as a convolution of one pixel, by oneDNN. With fewer rows it
# takes longer to rearrange the weights, in smaller products to start.
MIN_ROWS = 192
MIN_PRODUCTS = 8_000_000
# The rows are dealt out to this many images: with fewer than 16, PyTorch on one thread leaves
# oneDNN out; with many, each is too small.
NUM_IMAGES = range(16, 65)


class Linear(nn.Linear):
    """``nn.Linear``, run as a convolution of one pixel where that is quicker."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in_features) to (..., out_features)."""
        images = _num_images(x, self.weight)
        if not images:
            return super().forward(x)
        return _convolved(x, images, self.weight[:, :, None, None], self.bias)


class Conv2d(nn.Conv2d):
    """``nn.Conv2d``, for images whose channels lie last in memory; 1 x 1 as ``Linear``."""

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, in_channels, h, w) to (b, out_channels, h, w), h and w as the kernel makes."""
        pixels = x.permute(0, 2, 3, 1)  # (b, h, w, in)
        product = self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0)
        images = _num_images(pixels, self.weight) if product and self.groups == 1 else 0
        if not images:
            return super().forward(x)
        return _convolved(pixels, images, self.weight, self.bias).permute(0, 3, 1, 2)


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` whose backward may be asked for some gradients and not for others.

    PyTorch (2.13 is what was seen) kills the process on a CPU when the weights' gradients are asked
    for and the input's is not, and the channels lie last: as behind frozen layers.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, c, h, w) to the same shape."""
        if x.device.type != "cpu":
            return super().forward(x)
        # Autocast casts what the function below takes as it is; compilers may not trace it.
        if torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling():
            return super().forward(x.contiguous())
        last = x.stride(1) == 1
        x = x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
        return _AllGradients.apply(x, self.weight, self.bias, self.num_groups, self.eps)[0]


class _AllGradients(torch.autograd.Function):
    """Group normalisation whose backward always computes all three gradients."""

    generate_vmap_rule = True  # for gradients per example by torch.func

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y (b, c, h, w), and mean and 1 / deviation (b, groups)."""
        b, c, height, width = x.shape
        return torch.ops.aten.native_group_norm(x, weight, bias, b, c, height * width, groups, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep what backward reads."""
        x, weight, _, ctx.groups, _ = inputs
        _, mean, reciprocal = output
        ctx.save_for_backward(x, weight, mean, reciprocal)
        ctx.mark_non_differentiable(mean, reciprocal)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, weight and bias."""
        x, weight, mean, reciprocal = ctx.saved_tensors
        b, c, height, width = x.shape
        gradients = torch.ops.aten.native_group_norm_backward(
            grad, x, mean, reciprocal, weight, b, c, height * width, ctx.groups, [True] * 3
        )
        return (*gradients, None, None)


def _convolved(x: Tensor, images: int, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply x (..., in) by weight (out, in, 1, 1), its rows dealt out to so many images."""
    out_features, in_features = weight.shape[:2]
    pixels = x.reshape(images, -1, 1, in_features).permute(0, 3, 1, 2)  # (i, in, rows / i, 1)
    y = functional.conv2d(pixels, weight, bias).permute(0, 2, 3, 1)  # (i, rows / i, 1, out)
    return y.reshape(*x.shape[:-1], out_features)


def _num_images(x: Tensor, weight: Tensor) -> int:
    """Return how many images x (..., in) becomes for a convolution; 0: none, it is quicker not."""
    if (
        x.device.type != "cpu"
        or torch.compiler.is_compiling()  # shapes may be symbols, and compilers choose themselves
        or not x.dtype == weight.dtype == torch.float32
        or torch.is_autocast_enabled("cpu")
        or not torch.backends.mkldnn.is_available()
    ):
        return 0
    rows = x.numel() // weight.shape[1]
    return _divisor(rows) if rows >= MIN_ROWS and rows * weight.numel() >= MIN_PRODUCTS else 0


@lru_cache
def _divisor(rows: int) -> int:
    return next((images for images in NUM_IMAGES if rows % images == 0), 0)
