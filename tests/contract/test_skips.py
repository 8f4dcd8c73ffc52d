"""`make test-all` fails on a skip that is not on the tracked list, so that no check fades away."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.fixture
def skipping(repository, tmp_path):
    """Run a suite of one skipped test beside this project's conftest; returns the process."""

    def _skipping(reason: str, *options: str) -> subprocess.CompletedProcess[str]:
        for name in ("conftest.py", "skips.txt"):
            (tmp_path / name).write_text((repository / "tests" / name).read_text())
        (tmp_path / "test_one.py").write_text(
            f"import pytest\n\n\ndef test_one():\n    pytest.skip({reason!r})\n"
        )
        return subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, tmp_path],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    return _skipping


def test_a_skip_that_is_not_listed_fails_only_when_asked(skipping):
    assert skipping("no reason at all").returncode == 0
    strict = skipping("no reason at all", "--fail-on-unlisted-skips")
    assert strict.returncode == 1
    assert "skipped for a reason that skips.txt does not have: no reason at all" in strict.stdout
    assert "FAILED test_one.py::test_one" in strict.stdout


def test_every_listed_reason_is_allowed(skipping, repository):
    reasons = (repository / "tests" / "skips.txt").read_text().splitlines()
    assert reasons
    for reason in reasons:
        assert skipping(reason, "--fail-on-unlisted-skips").returncode == 0
