"""The fault matrix: its plugin, and the fixtures that its tests share."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

from faults.plugin import pytest_addoption, pytest_configure  # noqa: F401 (hooks)
from faults.real_processes import PASSED, federation, hospitals, whole  # noqa: F401 (fixtures)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if call.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture(scope="session")
def environment(repository: Path) -> dict[str, str]:
    """Of a child process: the packages of this checkout, and the helpers of its tests."""
    paths = (repository, repository / "tests")
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
