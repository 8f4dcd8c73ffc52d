"""Fixtures that several files of this folder use."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def poll_often(monkeypatch):
    monkeypatch.setattr("strategies.base.POLL_SECONDS", 0.005)


@pytest.fixture
def threads():
    """Gives PyTorch its number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_bench(tmp_path, monkeypatch):
    """Make the one site of this process, with limits of its own."""
    from client import site as site_module
    from fakes.benches import Bench

    monkeypatch.setattr(site_module, "_SITES", {})
    return lambda **limits: Bench(tmp_path / "A", **limits)


@pytest.fixture
def bench(make_bench):
    """A site that allows what a small run asks."""
    return make_bench()
