"""What a person at the coordinator sees of a run: a line a round, and at the end who contributed.

Invariant: standard output has the same aligned text on a terminal and in a file, but for colours;
a site that did not contribute stands below its round with the reason.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.text import Text

from server.metrics import auc_error_text
from server.progress import Progress, SiteRound, read_progress
from server.report import write_report
from server.rounds import RoundResult
from server.run_directory import RunDirectory
from strategies.run_config import METRIC_NAMES, RunConfig

COLOURS = {"refused": "yellow", "dropped": "red", "missing": "yellow"}
CONTRIBUTED, MISSED, ABSENT = "●", "○", " "
# A longer row of marks is not read any more.
MAX_MARKS = 60
MAX_SITES = 20

log = logging.getLogger(__name__)

ShowRound = Callable[[RoundResult], None]


@contextmanager
def shown_rounds(run: RunConfig) -> Generator[ShowRound]:
    """Print rounds as they finish; on a terminal there is a bar with the time below them.

    On a terminal the log leaves out what the lines say already.
    """
    console = Console(highlight=False, soft_wrap=True)
    lines = [Text(head(run))]

    def show(result: RoundResult) -> None:
        lines.extend(round_lines(run, result))
        try:
            while lines:
                console.print(lines.pop(0))
        except (OSError, SystemExit) as error:
            # Who reads along may leave; Rich would end the program. The history has every line.
            log.warning("standard output is closed (%s): rounds are not shown", error)
            lines.clear()
            console.quiet = True

    if not (console.is_terminal and sys.stderr.isatty()):
        yield show
        return
    screen = sys.stderr
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is screen
    ]
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=run.num_server_rounds)

        def show_and_move(result: RoundResult) -> None:
            show(result)
            bar.update(task, completed=result.server_round)

        for handler in handlers:
            handler.setStream(sys.stderr)  # the bar's, which prints above it
            handler.addFilter(_is_news)
        try:
            yield show_and_move
        finally:
            for handler in handlers:
                handler.removeFilter(_is_news)
                handler.setStream(screen)


def _is_news(record: logging.LogRecord) -> bool:
    """Say whether a log record is not in the rounds' lines."""
    message = record.getMessage()
    in_round = record.name == "server.rounds" and message.startswith("round=")
    in_site = record.name == "strategies.base" and " task=train site=" in message
    return not (in_round or in_site)


def head(run: RunConfig) -> str:
    """Return the names of the columns; validation is of the weights that a round began with."""
    metric = f"val {run.strategy.selection_metric}"
    return (
        f"{'round':>9}{'sites':>8}{'examples':>10}{'train loss':>12}{metric:>{_width(run)}}"
        f"{'seconds':>10}  privacy  encryption"
    )


def round_lines(run: RunConfig, result: RoundResult) -> list[Text]:
    """Return a round's line, and one for each site that did not contribute."""
    value = result.validation.get(run.strategy.selection_metric)
    contributed = sum(outcome.status == "ok" for outcome in result.outcomes)
    line = (
        f"{f'{result.server_round}/{run.num_server_rounds}':>9}"
        f"{f'{contributed}/{len(result.outcomes)}':>8}{result.num_examples:>10}"
        f"{result.train_loss:>12.4f}{'n/a' if value is None else f'{value:.4f}':>{_width(run)}}"
        f"{result.seconds:>10.1f}  {run.privacy.mode:<7}  {run.encryption.mode}"
    )
    return [
        Text(line),
        *(
            Text.assemble(
                f"{'':>9}  {outcome.site} ",
                (outcome.status, COLOURS[outcome.status]),
                f": {outcome.reason}",
            )
            for outcome in result.outcomes
            if outcome.status != "ok"
        ),
    ]


def finish(path: Path, summary: Mapping[str, Any]) -> int:
    """Write a run's report and print its last lines; returns the exit code."""
    write_report(path)
    contributed = contribution_lines(read_progress(RunDirectory(path)))
    text = "\n".join([*contributed, "", result_lines(summary, path)])
    encoding = sys.stdout.encoding or "utf-8"
    try:
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
    except BrokenPipeError:  # the run is complete all the same
        log.warning("standard output is closed: the results are in %s", path)
    return 0


def contribution_lines(progress: Progress) -> list[str]:
    """Return who contributed when: a line a site, a mark a round.

    ``●`` contributed, ``○`` did not; a gap: the site was not in the run then. Of many sites only
    those are listed that missed a round.
    """
    rounds = sorted(progress.rounds)
    listed = progress.sites
    if len(listed) > MAX_SITES:
        missed = {site: done for site, done in listed.items() if _missed(done)}
        listed = dict(list(missed.items())[:MAX_SITES])
    width = max((len(site) for site in listed), default=0)
    lines = []
    for site, done in listed.items():
        contributed = sum(entry.status == "ok" for entry in done.values())
        marks = "".join(_mark(done.get(where)) for where in rounds)
        shown = f"{marks}  " if len(rounds) <= MAX_MARKS else ""
        line = f"{site:<{width}}  {shown}{contributed} of {len(rounds)} rounds"
        lines.append("; ".join([line, *_missed(done)]))
    if len(listed) < len(progress.sites):
        always = sum(not _missed(done) for done in progress.sites.values())
        lines.append(f"{always} of {len(progress.sites)} sites missed no round")
    return ["who contributed when", *lines]


def _missed(done: Mapping[int, SiteRound]) -> list[str]:
    """Return why and when a site did not contribute, such as ``missing in 3-5, 9``."""
    rounds: dict[str, list[int]] = {}
    for where, entry in sorted(done.items()):
        if entry.status != "ok":
            rounds.setdefault(entry.status, []).append(where)
    return [f"{status} in {ranges(numbers)}" for status, numbers in rounds.items()]


def ranges(numbers: Sequence[int]) -> str:
    """Shorten ascending numbers.

    >>> ranges([1, 3, 4, 5, 9])
    '1, 3-5, 9'
    """
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(str(number) for number in part) for part in parts)


def _mark(entry: SiteRound | None) -> str:
    if entry is None:
        return ABSENT
    return CONTRIBUTED if entry.status == "ok" else MISSED


def result_lines(summary: Mapping[str, Any], path: Path) -> str:
    """Return the last lines of a run: test figures of all sites together and of each."""
    names = ("auc", "balanced_accuracy", "accuracy", "f1")
    assert set(names) <= set(METRIC_NAMES)
    rows = [("pooled", summary["pooled"]), *summary["sites"].items()]
    if "pooled" in summary.get("baselines", {}):
        rows.append(("pooled training", summary["baselines"]["pooled"]))
    width = max(len(auc_error_text(figures)) for _, figures in rows)
    head = f"{'test':<16}{'examples':>9}" + "".join(f"{name:>19}" for name in names)
    lines = [head]
    for name, figures in rows:
        shown = {metric: _shown(figures[metric]) for metric in names}
        # An AUC without an error is padded: decimal points stay below each other.
        shown["auc"] += auc_error_text(figures).ljust(width)
        values = "".join(f"{text:>19}" for text in shown.values())
        lines.append(f"{name:<16}{figures['num_examples']:>9}{values}")
    low, high = summary["pooled"]["auc_low_95"], summary["pooled"]["auc_high_95"]
    if low is not None:
        lines.append(f"pooled AUC 95 % interval {low:.3f} to {high:.3f}")
    lines.append(
        f"round {summary['best_round']} of {summary['num_server_rounds']} chosen on validation "
        f"{summary['selection']['metric']}; privacy={summary['privacy']['mode']} "
        f"encryption={summary['encryption']['mode']}"
    )
    lines.append(f"report {path / 'report.html'}")
    return "\n".join(lines)


def _shown(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def _width(run: RunConfig) -> int:
    return max(len(f"val {run.strategy.selection_metric}"), 8) + 2
