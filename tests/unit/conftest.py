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
