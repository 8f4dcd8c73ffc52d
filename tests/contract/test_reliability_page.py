"""docs/reliability.md says what the tests in tests/faults say, and a run says what happened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from faults.matrix import FAIL, IDS, NOT_YET, PASS, PENDING, SKIPPED, Row, page, parse, result_of

pytestmark = pytest.mark.timeout(300)


def pytest_in(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)


# --- the page


@pytest.fixture(scope="module")
def tested(repository) -> dict[str, dict[str, Any]]:
    """What collecting the fault tests finds, by fault."""
    listed = pytest_in(repository, "tests/faults", "--list-faults")
    assert listed.returncode == 0, listed.stdout + listed.stderr
    lines = listed.stdout.splitlines()
    return json.loads("\n".join(lines[lines.index("{") : lines.index("}") + 1]))


@pytest.fixture(scope="module")
def written(repository) -> str:
    return (repository / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_every_fault_is_tested_or_said_to_wait(tested):
    assert {*tested, *PENDING} == set(IDS)
    assert not set(tested) & set(PENDING)


def test_the_page_has_every_fault_once_with_the_texts_of_its_tests(tested, written):
    rows = parse(written)
    assert [row.id for row in rows] == list(IDS), "run: make faults"
    for row in rows:
        if row.id in PENDING:
            assert row == PENDING[row.id]
            continue
        expected = {k: v for k, v in tested[row.id].items() if k not in ("tests", "result")}
        assert {name: getattr(row, name) for name in expected} == expected, "run: make faults"
        assert row.result.partition(":")[0] in (PASS, SKIPPED)


def test_the_page_is_what_its_rows_render_to(written):
    assert page({row.id: row for row in parse(written)}) == written, "run: make faults"


def test_what_waits_says_for_what():
    assert all(row.result.startswith(f"{NOT_YET}: ") for row in PENDING.values())


# --- the results


@pytest.mark.parametrize(
    ("outcomes", "expected"),
    [
        ([(PASS, "")], "pass"),
        ([(PASS, ""), (SKIPPED, "no disk")], "skipped: no disk"),
        ([(SKIPPED, "b"), (PASS, ""), (SKIPPED, "a"), (SKIPPED, "b")], "skipped: a; b"),
        ([(SKIPPED, "no disk"), (FAIL, ""), (PASS, "")], "FAIL"),
    ],
)
def test_a_row_passes_when_all_its_tests_do(outcomes, expected):
    assert result_of(outcomes) == expected


def test_a_page_counts_its_results():
    row = Row("F1", "a", "b", "c", simulated=True)
    found = {id_: Row(id_, "a", "b", "c", result=PASS) for id_ in IDS}
    found["F8"] = Row("F8", "a", "b", "c", True, "skipped: d")
    text = page(found)
    tested = len(IDS) - len(PENDING)
    assert f"Of 28 faults: {tested - 1} pass, 1 skipped, {len(PENDING)} not yet." in text
    assert "| F8 | a | b (simulated) | c | skipped: d |" in text
    assert parse(text)[7] == found["F8"]
    assert row.simulated
    found["F11"] = Row("F11", "a", "b", "c", result=FAIL)
    assert f"Of 28 faults: 1 FAIL, {tested - 2} pass" in page(found)


MARK = '@pytest.mark.fault("F11", fault="late", injection="sleep", promise="on time")'


@pytest.fixture
def matrix_run(repository, tmp_path):
    """Run tests of a text beside the real plugin; returns the process and the page's rows."""

    def _run(source: str, *options: str):
        folder = tmp_path / "faults"
        folder.mkdir()
        shutil.copy(repository / "tests" / "faults" / "plugin.py", folder)
        hooks = "from faults.plugin import pytest_addoption, pytest_configure\n"
        (folder / "conftest.py").write_text(hooks)
        # The real table, but for a matrix of one fault.
        table = (repository / "tests" / "faults" / "matrix.py").read_text()
        waiting = "{i: _row(i, 'a', 'b', 'c', waits_for='d') for i in IDS if i != 'F11'}"
        (folder / "matrix.py").write_text(f"{table}\nPENDING = {waiting}\n")
        (folder / "test_one.py").write_text(f"import pytest\n\n{source}")
        (tmp_path / "pytest.ini").write_text(
            "[pytest]\npythonpath = .\naddopts = --import-mode=importlib --strict-markers\n"
            "markers = fault: a fault\n"
        )
        file = tmp_path / "page.md"
        ended = pytest_in(tmp_path, "faults", f"--write-reliability={file}", *options)
        return ended, parse(file.read_text()) if file.exists() else None

    return _run


@pytest.mark.parametrize(
    ("body", "code", "result"),
    [
        ("pass", 0, "pass"),
        ("assert False", 1, "FAIL"),
        ("pytest.skip('no disk')", 0, "skipped: no disk"),
        ("pytest.xfail('later')", 0, "FAIL"),
    ],
)
def test_the_page_says_what_happened(matrix_run, body, code, result):
    two = f"{MARK}\ndef test_a(): pass\n\n@pytest.mark.fault('F11')\ndef test_b(): {body}\n"
    ended, rows = matrix_run(two)
    assert ended.returncode == code, ended.stdout
    assert rows is not None
    assert rows[10] == Row("F11", "late", "sleep", "on time", False, result)
    assert f"late: {result}" in ended.stdout


def test_a_failing_fixture_fails_its_fault(matrix_run):
    fixture = "@pytest.fixture\ndef broken():\n    yield\n    assert False\n\n"
    _, rows = matrix_run(f"{fixture}{MARK}\ndef test_a(broken): pass\n")
    assert rows is not None
    assert rows[10].result == "FAIL"


def test_part_of_the_matrix_writes_no_page(matrix_run):
    one, other = (
        f"{MARK}\ndef test_a(): pass\n\n",
        "@pytest.mark.fault('F11')\ndef test_b(): pass\n",
    )
    ended, rows = matrix_run(one + other, "-k", "test_a")
    assert rows is None
    assert ended.returncode == 1
    assert "page.md is not written: F11 did not run completely" in ended.stdout


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def test_a(): pass\n", 'expected @pytest.mark.fault("F1", ...)'),
        ("@pytest.mark.fault('F12')\ndef test_a(): pass\n", "fault F12 is not one to test"),
        ("@pytest.mark.fault('F11')\ndef test_a(): pass\n", "F11: no test of it has fault, "),
        (f"{MARK.replace('late', '')}\ndef test_a(): pass\n", "fault F11 needs fault, "),
        (f"{MARK.replace('late', 'a|b')}\ndef test_a(): pass\n", "does not fit a table cell"),
        (
            f"{MARK}\ndef test_a(): pass\n\n{MARK.replace('late', 'l')}\ndef test_b(): pass\n",
            "another test has other texts for F11",
        ),
    ],
    ids=["no-marker", "not-to-test", "no-texts", "empty-text", "bar", "two-texts"],
)
def test_a_marker_that_makes_no_row_is_refused(matrix_run, source, said):
    ended, rows = matrix_run(source)
    assert rows is None
    assert ended.returncode == 4
    assert said in ended.stdout + ended.stderr
