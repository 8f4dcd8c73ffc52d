"""MedMamba: an image classifier of blocks that split into convolutions and a state-space scan.

Invariant: with norm="batch" this is the official model, to the last initial distribution; its
weights cross over by ``medmamba.weights``. Two models made under the same torch seed are equal.

Source: arXiv 2403.03849 and the official code (YubiaoYue/MedMamba, commit 104beb3), whose text
differs from the paper in the depths of "small" and "base": see ``medmamba.config.SIZES``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medmamba.blocks import PatchEmbed, PatchMerge, SSConvSSM
from medmamba.config import MedMambaConfig, ModelError
from medmamba.layers import Linear
from medmamba.recompute import recomputed

LINEAR_INIT_STD = 0.02


class MedMamba(nn.Module):
    """The classifier: patches, stages of blocks with merging between them, mean, linear head.

    Args:
        config: The architecture.
        scan_backend: What runs the scans, a name of ``medmamba.scan.BACKENDS``; None takes the
            default of the device.
        activation_checkpointing: In training keep only what enters each block, and compute the
            rest again in backward: less memory, more time, the same bits.
    """

    def __init__(
        self,
        config: MedMambaConfig,
        *,
        scan_backend: str | None = None,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.stem = PatchEmbed(config.in_channels, config.dims[0], config.patch_size)
        last_block = sum(config.depths) - 1
        rates = iter(config.drop_path * i / max(last_block, 1) for i in range(last_block + 1))
        self.stages = nn.ModuleList()
        for depth, channels in zip(config.depths, config.dims, strict=True):
            blocks = [
                SSConvSSM(channels, config.d_state, config.norm, next(rates), scan_backend)
                for _ in range(depth)
            ]
            merge = None if channels == config.dims[-1] else PatchMerge(channels)
            self.stages.append(_Stage(blocks, merge, activation_checkpointing))
        self.head = Linear(config.dims[-1], config.num_classes)
        _initialise(self)

    @classmethod
    def from_name(
        cls,
        name: str,
        num_classes: int,
        *,
        scan_backend: str | None = None,
        activation_checkpointing: bool = False,
        **overrides: Any,
    ) -> MedMamba:
        """Build a named size: "nano", "tiny", "small" or "base".

        Args:
            name: A key of ``medmamba.config.SIZES``.
            num_classes: Number of logits.
            scan_backend: As the class takes it.
            activation_checkpointing: As the class takes it.
            **overrides: Other fields of ``MedMambaConfig``, such as norm="group".

        Raises:
            ModelError: The name or an override is unknown, or a value is outside its range.
        """
        return cls(
            MedMambaConfig.from_name(name, num_classes, **overrides),
            scan_backend=scan_backend,
            activation_checkpointing=activation_checkpointing,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Classify images.

        Args:
            images: (b, c, h, w), floating, normalised as in training; any height and width from
                ``config.minimum_image_size`` up.

        Returns:
            Logits (b, num_classes).

        Raises:
            ModelError: The shape or dtype does not fit.
        """
        _check_images(images, self.config, self.head.weight.dtype)
        x = self.stem(images)  # (b, h, w, c)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean((1, 2)))  # (b, num_classes)


class _Stage(nn.Module):
    """Blocks of one resolution and, but for the last stage, the merge to the next."""

    def __init__(
        self, blocks: list[SSConvSSM], merge: PatchMerge | None, activation_checkpointing: bool
    ) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*blocks)
        self.merge = merge
        self.activation_checkpointing = activation_checkpointing

    def forward(self, x: Tensor) -> Tensor:
        """Map x (b, h, w, c) to (b, h/2, w/2, 2c), or keep its shape in the last stage."""
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            for block in self.blocks:
                x = recomputed(block, x)
        else:
            x = self.blocks(x)
        return x if self.merge is None else self.merge(x)


def no_weight_decay(model: nn.Module) -> frozenset[str]:
    """Name the parameters that weight decay must leave alone.

    These are all that have one dimension (norms, biases, D) and A_log, whose zero means nothing.
    """
    return frozenset(
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 or name.endswith("A_log")
    )


def _initialise(model: MedMamba) -> None:
    """Draw the initial weights as the official code does.

    Left as their modules made them: normalisations (1 and 0), biases of convolutions, x_proj
    (uniform, as torch draws a linear layer) and the parameters of the scan.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear) and not name.endswith("x_proj"):
            nn.init.trunc_normal_(module.weight, std=LINEAR_INIT_STD)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _check_images(images: Tensor, config: MedMambaConfig, dtype: torch.dtype) -> None:
    if images.dim() != 4 or images.shape[1] != config.in_channels:
        raise ModelError(
            f"images.shape={tuple(images.shape)} expected (b, {config.in_channels}, h, w)",
            "repeat or select channels, or build the model with in_channels to match",
        )
    castable = images.is_floating_point() and torch.is_autocast_enabled(images.device.type)
    if images.dtype != dtype and not castable:
        raise ModelError(
            f"images.dtype={images.dtype} expected {dtype} as the weights have",
            "convert and normalise the images as in training",
        )
    smallest, side = config.minimum_image_size, min(images.shape[2:])
    if side < smallest:
        patch_size = _largest_patch_size(side, config)
        smaller_patches = f", or build the model with patch_size={patch_size}" if patch_size else ""
        raise ModelError(
            f"image size={images.shape[2]}x{images.shape[3]} expected at least "
            f"{smallest}x{smallest} with patch_size={config.patch_size}",
            f"resize the images, pad them to {smallest}x{smallest}{smaller_patches}",
        )


def _largest_patch_size(side: int, config: MedMambaConfig) -> int:
    """Largest power of two that still leaves the last stage a position; 0 if none does."""
    patches = side // (config.minimum_image_size // config.patch_size)
    return 1 << (patches.bit_length() - 1) if patches else 0
