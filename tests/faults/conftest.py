"""The fault matrix: its plugin, and the fixtures that its tests share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from faults.plugin import pytest_addoption, pytest_configure  # noqa: F401 (hooks)
from faults.real_processes import federation, hospitals, whole  # noqa: F401 (fixtures)


@pytest.fixture(scope="session")
def environment(repository: Path) -> dict[str, str]:
    """Of a child process: the packages of this checkout, and the helpers of its tests."""
    paths = (repository, repository / "tests")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
