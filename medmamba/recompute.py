"""Activation checkpointing: a module's inner results are computed again when backward needs them.

Invariant: output, gradients and buffers are those of the plain call, to the bit. The second
computation draws the same random numbers, and moves copies of the running statistics of
normalisations, which have counted this batch already.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recomputed(module: nn.Module, x: Tensor) -> Tensor:
    """Call a module on x (b, ...), keeping nothing else for backward."""

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _buffers_kept(module)

    y = checkpoint(module, x, use_reentrant=False, context_fn=contexts)
    assert isinstance(y, Tensor)
    return y


@contextmanager
def _buffers_kept(module: nn.Module) -> Generator[None]:
    kept = [
        (owner, name, buffer)
        for owner in module.modules()
        for name, buffer in owner.named_buffers(recurse=False)
    ]
    for owner, name, buffer in kept:
        setattr(owner, name, buffer.clone())
    try:
        yield
    finally:
        for owner, name, buffer in kept:
            setattr(owner, name, buffer)
