"""The fault matrix as a pytest plugin: who injects which fault, and the page of what came out.

A test here says ``@pytest.mark.fault("F8", fault=..., injection=..., promise=...)``. Several tests
may inject one fault: one of them has the texts, the others name its id alone, and the row passes
when all of them do. ``simulated=True`` marks a fault that the test raises because this project's
machines cannot have it for real.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from faults.matrix import FAIL, IDS, PASS, PENDING, SKIPPED, Row, count_line, page, result_of

TEXTS = ("fault", "injection", "promise")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fault matrix")
    group.addoption(
        "--write-reliability",
        type=Path,
        metavar="FILE",
        help="write the page of the fault matrix after a complete run",
    )
    group.addoption(
        "--list-faults",
        action="store_true",
        help="print as JSON which test injects which fault, and run nothing",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Matrix(config), "fault-matrix")


class Matrix:
    """Collects what the markers say and how their tests ended.

    Attributes:
        rows: Row by fault id, from the markers.
        tests: Fault id by test.
        results: (outcome, reason of a skip) by test.
        seconds: Wall time by fault id.
    """

    def __init__(self, config: pytest.Config) -> None:
        # The options are unknown when a run begins above this folder.
        self.page: Path | None = config.getoption("--write-reliability", default=None)
        self.listing: bool = config.getoption("--list-faults", default=False)
        self.rows: dict[str, Row] = {}
        self.tests: dict[str, str] = {}
        self.results: dict[str, tuple[str, str]] = {}
        self.seconds: dict[str, float] = defaultdict(float)
        self.said = ""

    # Before -k and -m take tests away: what is left out is known to be missing.
    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        here = Path(__file__).parent
        for item in items:
            if here in item.path.parents:
                self._add(item)
        # One test by its name, or what failed last time, need not bring its row's texts.
        is_whole = self.listing or self.page is not None
        for id_ in self.tests.values():
            if is_whole and id_ not in self.rows:
                raise pytest.UsageError(f"{id_}: no test of it has {', '.join(TEXTS)}")

    def _add(self, item: pytest.Item) -> None:
        marker = item.get_closest_marker("fault")
        if marker is None or len(marker.args) != 1:
            raise pytest.UsageError(f'{item.nodeid}: expected @pytest.mark.fault("F1", ...)')
        id_, texts = marker.args[0], dict(marker.kwargs)
        if id_ not in IDS or id_ in PENDING:
            raise pytest.UsageError(f"{item.nodeid}: fault {id_} is not one to test")
        self.tests[item.nodeid] = id_
        if not texts:
            return
        simulated = texts.pop("simulated", False)
        if set(texts) != set(TEXTS) or not all(texts.values()):
            raise pytest.UsageError(f"{item.nodeid}: fault {id_} needs {', '.join(TEXTS)}")
        if any("|" in text or "\n" in text for text in texts.values()):
            raise pytest.UsageError(f"{item.nodeid}: a text of {id_} does not fit a table cell")
        row = Row(id_, **texts, simulated=simulated)
        if self.rows.setdefault(id_, row) != row:
            raise pytest.UsageError(f"{item.nodeid}: another test has other texts for {id_}")

    def pytest_runtestloop(self) -> bool | None:
        if not self.listing:
            return None
        by_fault: dict[str, list[str]] = defaultdict(list)
        for test, id_ in self.tests.items():
            by_fault[id_].append(test)
        print(json.dumps({id_: {**asdict(self.rows[id_]), "tests": by_fault[id_]} for id_ in IDS
                          if id_ in self.rows}, indent=1))  # fmt: skip
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        id_ = self.tests.get(report.nodeid)
        if id_ is None:
            return
        self.seconds[id_] += report.duration
        if report.failed or hasattr(report, "wasxfail"):  # an expected failure is no kept promise
            self.results[report.nodeid] = FAIL, ""
        elif report.skipped:
            assert isinstance(report.longrepr, tuple)
            self.results[report.nodeid] = SKIPPED, report.longrepr[2].removeprefix("Skipped: ")
        elif report.when == "call":
            self.results[report.nodeid] = PASS, ""

    def finished(self) -> Iterator[Row]:
        """Yield the rows whose tests have all run, with their results."""
        for id_, row in self.rows.items():
            tests = [test for test, of in self.tests.items() if of == id_]
            if all(test in self.results for test in tests):
                yield replace(row, result=result_of(self.results[test] for test in tests))

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.page is None:
            return
        rows = {row.id: row for row in self.finished()}
        missing = [id_ for id_ in IDS if id_ not in rows and id_ not in PENDING]
        if missing:
            self.said = f"{self.page} is not written: {', '.join(missing)} did not run completely"
            session.exitstatus = session.exitstatus or pytest.ExitCode.TESTS_FAILED
            return
        self.page.write_text(page(rows), encoding="utf-8")
        self.said = f"{self.page} is written"

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        rows = sorted(self.finished(), key=lambda row: IDS.index(row.id))
        if self.listing or not (rows or self.said):
            return
        terminalreporter.section("fault matrix")
        for row in rows:
            seconds = self.seconds[row.id]
            terminalreporter.line(f"{row.id:4} {seconds:6.1f} s  {row.fault}: {row.result}")
        terminalreporter.line(count_line([*rows, *PENDING.values()]))
        if self.said:
            terminalreporter.line(self.said)
