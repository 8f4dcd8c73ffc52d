"""What the report says in words, and how it writes numbers.

Invariant: a sentence states what the files say and no more; a missing figure is ``n/a``.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from server.metrics import MIN_INTERVAL_IMAGES, auc_error_text
from server.report_files import Evaluation, History, RunFacts, Summary
from strategies.evaluation import CALIBRATION_BINS, SCORE_BINS

TITLES = {
    "auc": "AUC",
    "balanced_accuracy": "balanced accuracy",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "precision": "precision",
    "f1": "F1",
    "accuracy": "accuracy",
    "ece": "ECE",
    "loss": "loss",
}
SPLITS = {"train": "training", "val": "validation", "test": "test"}
STRATEGIES = {"fedavg": "FedAvg", "fedprox": "FedProx"}
NO_INTERVAL = "too few images of a class for an interval"


def headline(summary: Summary, kind: str, num_sites: int) -> list[str]:
    """Say in plain words what came out."""
    pooled, worst, baseline = summary.pooled, summary.worst_site, summary.baselines.get("pooled")
    sentences = [
        f"{strategy_name(summary)} trained a classifier for {len(summary.classes)} classes "
        f"on {summary.dataset} across {plural(num_sites, kind)} in "
        f"{plural(summary.num_server_rounds, 'round')} ({duration(summary.seconds)})."
    ]
    chosen = "" if summary.best_round is None else f" of round {summary.best_round}"
    if pooled.num_examples:
        sentences[0] += (
            f" On {pooled.num_examples:,} test images of all sites, the model{chosen} reached "
            f"{_auc_words(pooled)} and a balanced accuracy of {or_na(pooled.balanced_accuracy)}."
        )
    if worst and worst.balanced_accuracy is not None:
        compared = _compared(worst.balanced_accuracy, pooled.balanced_accuracy)
        sentences.append(
            f"The worst site is {worst.site}, with a balanced accuracy of "
            f"{number(worst.balanced_accuracy)}{compared}."
        )
    if baseline is None:
        sentences.append("No training on pooled data was run for comparison.")
    else:
        sentences.append(
            "The same model trained on the data of all sites in one place reached "
            f"{_auc_words(baseline)} and a balanced accuracy of "
            f"{or_na(baseline.balanced_accuracy)} on the same images."
        )
    return sentences


def strategy_name(summary: Summary) -> str:
    """Return the strategy as its authors write it."""
    return STRATEGIES.get(summary.strategy, summary.strategy)


def notices(summary: Summary, facts: RunFacts) -> list[tuple[str, str]]:
    """Return what a reader must know before trusting the figures: title and text."""
    found = []
    private = summary.privacy.get("mode") != "off"
    if summary.simulated:
        text = "All sites ran on one computer, on parts of one dataset; no hospital took part."
        if private:
            text += " A simulated run is not private, whatever its privacy settings."
        found.append(("Simulated.", text))
    if facts.data.get("official") is False:
        text = f"{facts.data.get('file')} has MD5 {facts.data.get('md5')}, not the published one."
        found.append(("The data file was altered.", text))
    if not private:
        text = (
            "Neither the updates nor the trained model carry a privacy guarantee: they may reveal "
            "details of single patients' images."
        )
        found.append(("Differential privacy was off.", text))
    if summary.encryption.get("mode") == "off":
        text = "The coordinator could read the update of each single site."
        found.append(("Encryption of updates was off.", text))
    if summary.not_tested:
        reasons = "; ".join(f"{site}: {why}" for site, why in summary.not_tested.items())
        title = f"Test figures lack {plural(len(summary.not_tested), 'site')}."
        found.append((title, f"{reasons}."))
    return found


def table_caption(summary: Summary) -> str:
    """Say which weights the test figures are of, and how they were chosen."""
    if summary.best_round is None:
        return "Test images."
    selection = summary.selection
    metric = TITLES.get(selection.metric, selection.metric)
    value = "" if selection.value is None else f" ({number(selection.value)})"
    return (
        f"Test images, model of round {summary.best_round} of {summary.num_server_rounds}, chosen "
        f"by its {metric}{value} on {SPLITS.get(selection.split, selection.split)} images."
    )


def course(summary: Summary, history: History) -> str:
    """Introduce the charts."""
    seconds = [line.seconds for line in history.rounds.values()]
    text = "Round 0 is the model before training."
    if summary.best_round is not None:
        text += f" The dotted vertical line is round {summary.best_round}, whose model is reported."
    if seconds:
        text += f" A round took {duration(median(seconds))} (median)."
    return text


def methods(summary: Summary) -> list[str]:
    """Return the definitions and limits that the figures come with."""
    errors = [e.auc_max_error for e in (summary.pooled, *summary.sites.values())]
    known = [error for error in errors if error is not None]
    bound = f"; here by at most {max(known):.4f}" if known else ""
    equal = " With two classes the two are the same number." if len(summary.classes) == 2 else ""
    return [
        "Pooled figures come from counts added over the sites. They equal those of one evaluation "
        "of all images together.",
        "Macro averages: each class against the rest, then the mean over the classes with images "
        "in the set. The precision and F1 of a class that is never predicted are 0. Balanced "
        "accuracy is the macro average of sensitivity. Macro averages of sensitivity and "
        f"specificity hide which class is missed: see the sensitivity by class.{equal}",
        f"AUC is computed from histograms of the log-odds with {SCORE_BINS} bins, narrowest around "
        "even odds; it can differ from the exact one by half of the pairs that share a "
        f"bin{bound}.",
        "The 95% interval is a percentile bootstrap over images with the number of each class "
        "fixed. It takes images as independent: several images of one patient make it too narrow. "
        "With more than two classes it is wider than 95% needs. It does not cover training again "
        "or other hospitals. There is none where a class that is present has fewer than "
        f"{MIN_INTERVAL_IMAGES} images.",
        f"ECE, the expected calibration error, uses {CALIBRATION_BINS} equal bins of the highest "
        "class probability. Loss is the unweighted cross-entropy in nats. Of both, lower is "
        "better.",
        "The worst site is the one with the lowest balanced accuracy. With few images at a site "
        "this is partly chance: see its interval.",
        "The round is chosen on validation images; test images are read once, after that.",
    ]


def number(value: float) -> str:
    """Return a count with separators, another figure with three decimals."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def or_na(value: float | None) -> str:
    """Return :func:`number`, or ``n/a``."""
    return "n/a" if value is None else number(value)


def signed(value: float) -> str:
    """Return a difference with its sign."""
    return f"{value:+.3f}".replace("-", "\N{MINUS SIGN}")


def _compared(value: float, pooled: float | None) -> str:
    if pooled is None:
        return ""
    difference = f"{abs(value - pooled):.3f}"
    if difference == "0.000":
        return ", the same as all sites together"
    return f", {difference} {'below' if value < pooled else 'above'} all sites together"


def interval_text(figures: Evaluation) -> str:
    """Return the AUC's interval, empty where there is none."""
    low, high = figures.auc_low_95, figures.auc_high_95
    return "" if low is None or high is None else f"{low:.3f} to {high:.3f}"


def lacks_interval(figures: Evaluation) -> bool:
    """Say whether an AUC has no interval because a class has too few images."""
    if figures.auc is None or interval_text(figures):
        return False
    return any(0 < sum(row) < MIN_INTERVAL_IMAGES for row in figures.confusion or [])


def _auc_words(figures: Evaluation) -> str:
    auc = f"an AUC of {or_na(figures.auc)}{auc_error_text(figures.model_dump())}"
    interval = interval_text(figures)
    if interval:
        return f"{auc} (95% interval {interval})"
    return f"{auc} ({NO_INTERVAL})" if lacks_interval(figures) else auc


def plural(count: int, word: str) -> str:
    """Return a count with its word.

    >>> plural(1, "site"), plural(1200, "site")
    ('1 site', '1,200 sites')
    """
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def duration(seconds: float) -> str:
    """Return a time with two units at most.

    >>> duration(7.25), duration(133.2), duration(7384)
    ('7.2 s', '2 min 13 s', '2 h 3 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def ranges(numbers: Sequence[int]) -> str:
    """Return numbers in order, runs of them joined.

    >>> ranges([3, 5, 6, 7, 7, 9, 10])
    '3, 5-7, 9, 10'
    """
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs
    )
