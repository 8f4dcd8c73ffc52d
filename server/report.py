"""report.html of a run: what was trained, how good it is where, and what to beware of.

Invariant: the page is a function of the run directory's files alone (the same files give the same
bytes), needs no network, runs no script, and shows no absolute path.

Reads ``config.json``, ``history.jsonl``, ``summary.json`` and, of a simulation, ``partition.json``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from server.figures import (
    DASHES,
    NUM_COLOURS,
    Points,
    Series,
    class_opacity,
    curves,
    partition_bars,
)
from server.report_files import (
    Evaluation,
    History,
    Partition,
    RunFacts,
    Summary,
    read,
    read_history,
)
from server.report_template import TEMPLATE
from server.report_text import (
    NO_INTERVAL,
    course,
    headline,
    interval_text,
    lacks_interval,
    methods,
    notices,
    number,
    or_na,
    plural,
    ranges,
    signed,
    strategy_name,
    table_caption,
)
from strategies.files import write_atomic
from strategies.run_config import flatten

MAX_NAMED_SITES = NUM_COLOURS
MAX_TABLE_SITES = 20
MAX_REPLY_ROWS = 50

# Metric, title and a word of explanation.
COLUMNS = (
    ("auc", "AUC", "95% interval"),
    ("balanced_accuracy", "Macro sensitivity", "balanced accuracy"),
    ("specificity", "Macro specificity", ""),
    ("precision", "Macro precision", ""),
    ("f1", "Macro F1", ""),
    ("accuracy", "Accuracy", ""),
    ("ece", "ECE", ""),
    ("loss", "Loss", ""),
    ("num_examples", "Images", ""),
    ("num_classes_present", "Classes present", ""),
)


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` into a run directory and return its path.

    Raises:
        ConfigError: A required file is missing, or a file is damaged. The message names it.
    """
    facts = read(run_dir / "config.json", RunFacts)
    summary = read(run_dir / "summary.json", Summary)
    history = read_history(run_dir / "history.jsonl")
    partition_file = run_dir / "partition.json"
    partition = read(partition_file, Partition) if partition_file.exists() else None
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.from_string(TEMPLATE).render(_context(facts, summary, history, partition))
    path = run_dir / "report.html"
    write_atomic(path, page)
    return path


@dataclass
class Cells:
    """Turns metrics into table cells; what is missing is marked with a letter that has a reason.

    Attributes:
        encrypted: The coordinator could not read any metric of this run.
        notes: Reason to letter, in the order of first use.
    """

    encrypted: bool
    notes: dict[str, str] = field(default_factory=dict)

    def cell(self, figures: Evaluation, name: str) -> dict[str, str]:
        """Return ``text``, the letter of its ``note``, and the interval of an AUC as ``detail``."""
        value = getattr(figures, name)
        if value is None:
            note = self._note(self._reason(figures, name))
            return {"text": "n/a", "note": note, "detail": ""}
        if name != "auc":
            return {"text": number(value), "note": "", "detail": ""}
        few = lacks_interval(figures)
        note = self._note(f"{NO_INTERVAL.capitalize()}.") if few else ""
        return {"text": number(value), "note": note, "detail": interval_text(figures)}

    def row(self, label: str, figures: Evaluation, detail: str = "") -> dict[str, Any]:
        """Return one row of the table of metrics."""
        cells = [self.cell(figures, name) for name, _, _ in COLUMNS]
        return {"label": label, "detail": detail, "cells": cells}

    def class_row(
        self, label: str, figures: Evaluation, num_classes: int, detail: str = ""
    ) -> dict[str, Any]:
        """Return one row of the table of sensitivities by class, with their counts."""
        if figures.confusion is None:
            missing = self.cell(figures, "confusion")
            return {"label": label, "detail": detail, "cells": [missing] * num_classes}
        cells = []
        for true, row in enumerate(figures.confusion):
            total = sum(row)
            share = f"{100 * row[true] / total:.0f}%" if total else "n/a"
            counts = f"{row[true]:,} of {total:,}" if total else "no images"
            cells.append({"text": share, "note": "", "detail": counts})
        return {"label": label, "detail": detail, "cells": cells}

    def _note(self, reason: str) -> str:
        return self.notes.setdefault(reason, chr(ord("a") + len(self.notes)))

    def _reason(self, figures: Evaluation, name: str) -> str:
        if figures.num_examples is None and self.encrypted:
            return "Not available: the metrics of an encrypted run are not readable here."
        if figures.num_examples == 0:
            return "Does not exist: no test images."
        present = figures.num_classes_present
        if name in ("auc", "specificity") and present is not None and present < 2:
            return "Does not exist: the test images are of fewer than two classes."
        return "Not recorded in the summary of this run."


def _context(
    facts: RunFacts, summary: Summary, history: History, partition: Partition | None
) -> dict[str, Any]:
    sites = list(dict.fromkeys([*summary.sites, *history.train_losses]))
    num_sites = len(sites) or max((line.num_sites for line in history.rounds.values()), default=0)
    many = len(sites) > MAX_NAMED_SITES
    worst = summary.worst_site
    named = sites if not many else [worst.site] if worst and worst.site in sites else []
    indices = {site: index for index, site in enumerate(named)}
    cells = Cells(encrypted=summary.encryption.get("mode") != "off")
    kind = "simulated site" if summary.simulated else "site"
    heading = f"{summary.dataset}: {strategy_name(summary)} across {plural(num_sites, kind)}"
    few, num_classes = num_sites <= MAX_TABLE_SITES, len(summary.classes)
    return {
        "title": f"{heading} - federated training report",
        "heading": heading,
        "headline": headline(summary, kind, num_sites),
        "cards": _cards(summary, cells),
        "notices": notices(summary, facts),
        "columns": [{"title": title, "detail": detail} for _, title, detail in COLUMNS],
        "table_caption": table_caption(summary),
        "summary_rows": _summary_rows(summary, cells, few),
        "site_rows": [
            cells.row(site, figures, "worst site" if worst and site == worst.site else "")
            for site, figures in summary.sites.items()
        ],
        "notes": cells.notes,
        "few_sites": few,
        "class_columns": [{"title": name, "detail": ""} for name in summary.classes],
        "class_summary_rows": [
            cells.class_row("All sites", summary.pooled, num_classes, "pooled"),
            *(cells.class_row(*row, num_classes, "baseline") for row in _baselines(summary)),
        ],
        "class_site_rows": [cells.class_row(*row, num_classes) for row in summary.sites.items()],
        "classes": summary.classes,
        "confusion": _confusion(summary.pooled.confusion),
        "course": course(summary, history),
        "named_sites": named,
        "site_index": indices,
        "spread_sites": len(sites) - len(named),
        "charts": _charts(history, sites, indices, summary.best_round),
        "partition": _partition(partition),
        "contributions": _contributions(history)[:MAX_REPLY_ROWS],
        "more_sites": max(0, len(history.sites) - MAX_REPLY_ROWS),
        "replies": _replies(history)[:MAX_REPLY_ROWS],
        "more_replies": max(0, len(history.unused) - MAX_REPLY_ROWS),
        "methods": methods(summary),
        "run_config": _settings(facts.run_config),
        "scenario": _settings(facts.scenario),
        "provenance": _provenance(facts, summary),
        "versions": sorted(facts.versions.items()),
        "command": " ".join(facts.command) if isinstance(facts.command, list) else facts.command,
        "dashes": DASHES,
        "num_colours": NUM_COLOURS,
        "opacity": class_opacity,
    }


def _cards(summary: Summary, cells: Cells) -> list[dict[str, str]]:
    pooled, worst, baseline = summary.pooled, summary.worst_site, summary.baselines.get("pooled")
    interval = interval_text(pooled)
    none = NO_INTERVAL if lacks_interval(pooled) else "no interval"
    cards = [
        {
            **cells.cell(pooled, "auc"),
            "label": "Test AUC, all sites pooled",
            "detail": f"95% interval {interval}" if interval else none,
        },
        {
            **cells.cell(pooled, "balanced_accuracy"),
            "label": "Balanced accuracy, pooled",
            "detail": f"accuracy {or_na(pooled.accuracy)}",
        },
    ]
    if worst:
        cards.append(
            {
                **cells.cell(worst, "balanced_accuracy"),
                "label": f"Worst site: {worst.site}",
                "detail": f"balanced accuracy; AUC {or_na(worst.auc)}",
            }
        )
    if baseline and baseline.auc is not None and pooled.auc is not None:
        cards.append(
            {
                "text": signed(pooled.auc - baseline.auc),
                "note": "",
                "label": "AUC gap to pooled training",
                "detail": f"pooled training {number(baseline.auc)}",
            }
        )
    return cards


def _summary_rows(summary: Summary, cells: Cells, few_sites: bool) -> list[dict[str, Any]]:
    rows = [cells.row("All sites", summary.pooled, "pooled")]
    worst = summary.worst_site
    # Among few sites its own row is marked; the rows of many are folded away.
    if worst and not (few_sites and worst.site in summary.sites):
        rows.append(cells.row(worst.site, summary.sites.get(worst.site, worst), "worst site"))
    rows += [cells.row(*row, "baseline") for row in _baselines(summary)]
    return rows


def _baselines(summary: Summary) -> list[tuple[str, Evaluation]]:
    titles = {"pooled": "Pooled training"}
    return [(titles.get(name, name), figures) for name, figures in summary.baselines.items()]


def _confusion(rows: Sequence[Sequence[int]] | None) -> list[list[dict[str, Any]]]:
    """Return counts, row shares and shades; the strongest shade keeps the text readable."""
    table = []
    for true, row in enumerate(rows or []):
        total = sum(row)
        shares = [count / total if total else None for count in row]
        table.append(
            [
                {
                    "count": f"{count:,}",
                    "share": None if share is None else f"{100 * share:.0f}%",
                    "shade": f"{0.6 * (share or 0):.3f}",
                    "hit": true == predicted,
                }
                for predicted, (count, share) in enumerate(zip(row, shares, strict=True))
            ]
        )
    return table


def _charts(
    history: History, sites: Sequence[str], indices: Mapping[str, int], best_round: int | None
) -> list[dict[str, Any]]:
    charts = []
    for name, title in (
        ("auc", "Validation AUC"),
        ("balanced_accuracy", "Validation balanced accuracy"),
        ("loss", "Validation loss"),
    ):
        lines = sorted(history.validation.items())
        by_site = {
            site: [(where, getattr(line.sites.get(site), name, None)) for where, line in lines]
            for site in sites
        }
        pooled = [(where, getattr(line.pooled, name)) for where, line in lines]
        detail = "cross-entropy in nats, lower is better" if name == "loss" else "higher is better"
        svg = _chart(title, by_site, pooled, indices, best_round)
        charts.append({"title": title, "detail": detail, "svg": svg})
    rounds = sorted(history.rounds)
    by_site = {
        site: [(where, history.train_losses.get(site, {}).get(where)) for where in rounds]
        for site in sites
    }
    pooled = [(where, history.rounds[where].train_loss) for where in rounds]
    svg = _chart("Training loss", by_site, pooled, indices, best_round)
    detail = "the loss that each site minimises, mean over its round"
    charts.append({"title": "Training loss", "detail": detail, "svg": svg})
    return charts


def _chart(
    title: str,
    by_site: Mapping[str, Points],
    pooled: Points,
    indices: Mapping[str, int],
    best_round: int | None,
) -> Markup | None:
    series = [Series(site, by_site[site], index) for site, index in indices.items()]
    series.append(Series("All sites", pooled, None))
    spread = [points for site, points in by_site.items() if site not in indices]
    everything: Iterable[Points] = (*by_site.values(), pooled)
    if all(value is None for points in everything for _, value in points):
        return None
    return curves(title, series, spread, best_round)


def _partition(partition: Partition | None) -> dict[str, Any] | None:
    if partition is None:
        return None
    alpha = "" if partition.alpha is None else f", alpha={partition.alpha:g}"
    train = {site: counts.train for site, counts in partition.sites.items()}
    images = {
        site: [sum(split) for split in (counts.train, counts.val, counts.test)]
        for site, counts in partition.sites.items()
    }
    patients = {site: counts.num_patients for site, counts in partition.sites.items()}
    # A data set without patients counts every image as its own.
    known = any(count not in (None, sum(images[site])) for site, count in patients.items())
    columns = ["Train", "Validation", "Test", *(["Patients"] if known else [])]
    rows = [
        [
            site,
            *(f"{count:,}" for count in counts),
            *([or_na(patients[site])] if known else []),
        ]
        for site, counts in images.items()
    ]
    return {
        "text": f"How the dataset was divided: {partition.scheme}{alpha}. Bars: training images "
        "of each site by class.",
        "classes": partition.classes,
        "svg": partition_bars("Training images of each site by class", partition.classes, train),
        "columns": columns,
        "rows": rows,
        "what": "images and patients" if known else "images",
    }


def _contributions(history: History) -> list[dict[str, str]]:
    """Return who contributed when; sites that missed a round come first."""
    rows = [
        {
            "site": site,
            "rounds": ranges(sorted(history.train_losses.get(site, {}))) or "none",
            "count": f"{len(history.train_losses.get(site, {}))} of {len(history.rounds)}",
        }
        for site in history.sites
    ]
    whole = f"{len(history.rounds)} of {len(history.rounds)}"
    return sorted(rows, key=lambda row: row["count"] == whole)


def _replies(history: History) -> list[dict[str, str]]:
    return [
        {"site": site, "status": status, "rounds": ranges(rounds), "reason": reason or "not given"}
        for (site, status, reason), rounds in sorted(history.unused.items())
    ]


def _provenance(facts: RunFacts, summary: Summary) -> list[tuple[str, str]]:
    return [
        ("run uuid", facts.run_uuid),
        ("git commit", facts.git_commit or "n/a (not recorded)"),
        ("seed", "n/a (not recorded)" if facts.seed is None else str(facts.seed)),
        *_settings({"privacy": summary.privacy, "encryption": summary.encryption}),
        *_settings(facts.provenance),
    ]


def _settings(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return dotted names and values as TOML would show them."""
    pairs = []
    for name, value in sorted(flatten(values).items()):
        parts = value if isinstance(value, list) else [value]
        text = ", ".join(
            str(part).lower() if isinstance(part, bool) else str(part) for part in parts
        )
        pairs.append((name.replace("_", "-"), text or "(not set)"))
    return pairs
