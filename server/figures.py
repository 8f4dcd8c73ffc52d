"""Figures of the report as inline SVG: validation and loss curves, partition bars.

Invariant: the same numbers give the same bytes, and nothing is read, fetched or run by the figure.
Colours are CSS variables of the page (``--ink``, ``--c0`` ...), so a figure follows the reader's
light or dark setting; its text is text, in the page's font.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

NUM_COLOURS = 8
# Colour alone does not tell lines apart for everyone; the legend repeats the pattern.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 2), (1.5, 1.5), (7, 2, 1.5, 2))
MAX_NAMED_BARS = 40
MAX_MARKED_ROUNDS = 40

_WIDTH_INCHES = 5.0
_CSS = {
    "#fe0001": "var(--ink)",
    "#fe0002": "var(--muted)",
    "#fe0003": "var(--rule)",
    **{f"#fe01{index:02x}": f"var(--c{index})" for index in range(NUM_COLOURS)},
}
_INK, _MUTED, _RULE = list(_CSS)[:3]
_COLOURS = list(_CSS)[3:]
_SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "medmamba-federation",
    "text.parse_math": False,  # names are data: a dollar sign in one is a dollar sign
    "font.size": 10,
    "axes.edgecolor": _RULE,
    "axes.labelcolor": _MUTED,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "ytick.left": False,
    "grid.color": _RULE,
    "grid.linewidth": 0.6,
}


Points = Sequence[tuple[int, float | None]]


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: What it shows.
        points: Server round and value; a value of None leaves a gap.
        index: Into the page's colours and ``DASHES``, modulo their numbers; None: in ink, for what
            stands for all sites.
    """

    name: str
    points: Points
    index: int | None


def curves(
    title: str, series: Sequence[Series], spread: Sequence[Points], chosen_round: int | None
) -> Markup:
    """Draw values over server rounds.

    Args:
        title: Names the figure to those who cannot see it, and makes its ids unique on the page.
        series: Lines, the most important last so that it lies on top.
        spread: Points of sites too many to name: shown as their range and its middle half.
        chosen_round: Marked with a vertical line.
    """
    with matplotlib.rc_context(_SETTINGS):
        figure, axes = _canvas(height_inches=2.9)
        axes.grid(axis="y")
        if chosen_round is not None:
            axes.axvline(chosen_round, color=_MUTED, linewidth=0.8, dashes=(2, 2))
        if spread:
            rounds, quartiles = _quartiles(spread)
            for low, high in ((0, 4), (1, 3)):
                axes.fill_between(
                    rounds, quartiles[low], quartiles[high], color=_MUTED, alpha=0.22, linewidth=0
                )
        for line in series:
            rounds = [server_round for server_round, _ in line.points]
            values = [float("nan") if value is None else value for _, value in line.points]
            few = len(rounds) <= MAX_MARKED_ROUNDS
            axes.plot(
                rounds,
                values,
                color=_INK if line.index is None else _colour(line.index),
                dashes=() if line.index is None else DASHES[line.index % len(DASHES)],
                linewidth=2.2 if line.index is None else 1.4,
                marker="o" if few else "",
                markersize=3.4 if line.index is None else 2.6,
            )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.set_xlabel("server round")
        return _inline(figure, title, _describe(title, series))


def partition_bars(
    title: str, classes: Sequence[str], sites: Mapping[str, Sequence[int]]
) -> Markup:
    """Draw each site's number of examples, stacked by class.

    Args:
        title: As in :func:`curves`.
        classes: Class names; their colours repeat, paler, after ``NUM_COLOURS``.
        sites: Examples per class, by site.
    """
    counts = np.array(list(sites.values())).reshape(len(sites), len(classes))
    ends = counts.cumsum(axis=1)
    starts = ends - counts
    totals = [int(total) for total in counts.sum(axis=1)]
    looks = [{"color": _colour(k), "alpha": class_opacity(k)} for k in range(len(classes))]
    with matplotlib.rc_context(_SETTINGS):
        if len(sites) <= MAX_NAMED_BARS:
            figure, axes = _canvas(height_inches=0.7 + 0.3 * len(sites))
            for k, look in enumerate(looks):
                axes.barh(range(len(sites)), counts[:, k], left=starts[:, k], height=0.72, **look)
            axes.set_yticks(range(len(sites)), list(sites))
            axes.tick_params(axis="y", labelcolor=_INK)
            axes.invert_yaxis()
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
            axes.grid(axis="x")
            axes.set_xlabel("training images")
            what = ", ".join(f"{site} {n:,}" for site, n in zip(sites, totals, strict=True))
        else:
            figure, axes = _canvas(height_inches=2.9)
            edges = range(len(sites) + 1)
            for k, look in enumerate(looks):
                axes.stairs(ends[:, k], edges, baseline=starts[:, k], fill=True, **look)
            axes.grid(axis="y")
            axes.set_xlabel("sites, in the order of the table; height: training images")
            what = f"{len(sites)} sites with {min(totals):,} to {max(totals):,} each"
        axes.set_axisbelow(True)
        return _inline(figure, title, f"{title}: {what}.")


def class_opacity(index: int) -> float:
    """Return the opacity of a class's colour; the second and later uses of a colour are paler."""
    return 1.0 if index < NUM_COLOURS else 0.45


def _canvas(height_inches: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_INCHES, height_inches), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _quartiles(spread: Sequence[Points]) -> tuple[list[int], NDArray[np.float64]]:
    """Return rounds, and minimum, quartiles and maximum over sites. ``(5, rounds)``."""
    by_round: dict[int, list[float]] = {}
    for points in spread:
        for server_round, value in points:
            if value is not None:
                by_round.setdefault(server_round, []).append(value)
    rounds = sorted(by_round)
    columns = [np.percentile(by_round[where], [0, 25, 50, 75, 100]) for where in rounds]
    return rounds, np.array(columns).reshape(-1, 5).T


def _colour(index: int) -> str:
    return _COLOURS[index % NUM_COLOURS]


def _describe(title: str, series: Sequence[Series]) -> str:
    """Say in words what a chart shows: the ends of each named line."""
    sentences = []
    for line in series:
        known = [(where, value) for where, value in line.points if value is not None]
        if known:
            (first, start), (last, end) = known[0], known[-1]
            sentences.append(
                f"{line.name}: {start:.3f} at round {first}, {end:.3f} at round {last}."
            )
    return " ".join([f"{title} by server round.", *reversed(sentences)])


def _inline(figure: Figure, title: str, label: str) -> Markup:
    """Render as an ``<svg>`` element that takes its colours and font from the page."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        # The browser has the glyphs that matplotlib's measuring font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    size = re.search(r'viewBox="([^"]+)"', svg)
    assert size is not None, "matplotlib writes a viewBox"
    body = svg[svg.index("<defs") : svg.rindex("</svg>")]
    body = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body, count=1, flags=re.DOTALL)
    # Releases before 3.11 write the font's size and family in one property.
    body = re.sub(r"font: ([\d.]+px) [^;\"]+", r"font-size: \1", body)
    body = re.sub(r"font-family: [^;\"]+; ", "", body)
    for placeholder, colour in _CSS.items():
        body = body.replace(placeholder, colour)
    # Ids are unique within matplotlib's file only.
    prefix = re.sub(r"\W+", "-", title.lower())
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", body)
    head = f'<svg role="img" viewBox="{size[1]}" aria-label="{escape(label)}">'
    return Markup(head + body + "</svg>")
