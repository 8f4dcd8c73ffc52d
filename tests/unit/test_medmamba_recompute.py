"""Activation checkpointing changes memory and time, and no bit of the result."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from medmamba import MedMamba
from medmamba.blocks import SSConvSSM


def make(activation_checkpointing, norm="batch"):
    torch.manual_seed(0)
    return MedMamba.from_name(
        "nano", 5, norm=norm, drop_path=0.5, activation_checkpointing=activation_checkpointing
    )


def train_one_step(model):
    torch.manual_seed(1)
    images = torch.randn(4, 3, 32, 40)
    loss = functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 3]))
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters()), *model.buffers(), torch.rand(1)]


def count_block_calls(model):
    calls = []
    for block in model.modules():
        if isinstance(block, SSConvSSM):
            block.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_gradients_statistics_and_random_numbers_are_the_same_to_the_bit(norm):
    plain, checkpointed = (train_one_step(make(kind, norm)) for kind in (False, True))
    assert len(plain) == len(checkpointed)
    assert all(torch.equal(a, b) for a, b in zip(plain, checkpointed, strict=True))


def test_running_statistics_stay_the_tensors_they_were():
    model = make(True)
    before = {name: buffer.data_ptr() for name, buffer in model.named_buffers()}
    train_one_step(model)
    assert {name: buffer.data_ptr() for name, buffer in model.named_buffers()} == before


def test_each_block_is_computed_again_in_training_alone():
    model = make(True)
    calls = count_block_calls(model)
    train_one_step(model)
    assert len(calls) == 2 * 4
    calls.clear()
    with torch.no_grad():
        model(torch.randn(2, 3, 32, 32))
    model.eval()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert len(calls) == 2 * 4


def test_less_is_kept_for_backward():
    def kept_bytes(model):
        sizes = {}

        def keep(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(torch.randn(4, 3, 64, 64))
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert logits.requires_grad
        return sum(size for pointer, size in sizes.items() if pointer not in parameters)

    assert kept_bytes(make(True)) < 0.4 * kept_bytes(make(False))
