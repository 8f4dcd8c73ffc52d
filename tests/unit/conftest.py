"""Fixtures that several files of this folder use."""

from __future__ import annotations

import pytest


@pytest.fixture
def poll_often(monkeypatch):
    monkeypatch.setattr("strategies.base.POLL_SECONDS", 0.005)
