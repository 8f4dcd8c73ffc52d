"""The report: honest about what is missing, safe to hand on, the same bytes every time."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from server.figures import Series, curves
from server.metrics import auc_interval, metrics, worst_site
from server.report import write_report
from server.report_files import scrub
from strategies.errors import ConfigError
from strategies.evaluation import EvaluationSums

CLASSES = ["normal", "benign", "malignant"]
SIZES = {"A": 240, "B": 90, "C": 160, "D": 40}
ROUNDS = 6


def sums(seed: int, n: int, margin: float, num_classes: int = 3) -> EvaluationSums:
    generator = np.random.default_rng(seed)
    labels = generator.choice(num_classes, n, p=[0.6, 0.25, 0.15])
    logits = generator.normal(size=(n, num_classes))
    logits[np.arange(n), labels] += margin
    return EvaluationSums.from_logits(logits, labels)


def final(parts: EvaluationSums) -> dict[str, Any]:
    low, high = auc_interval(parts, resamples=100) or (None, None)
    confusion = parts.confusion.tolist()
    return {**metrics(parts), "auc_low_95": low, "auc_high_95": high, "confusion": confusion}


def history_lines() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for server_round in range(ROUNDS + 1):
        parts = {
            site: sums(10 * server_round + index, n, 0.2 + 0.35 * server_round - 0.15 * index)
            for index, (site, n) in enumerate(SIZES.items())
        }
        if server_round:
            loss = 1.1 - 0.1 * server_round
            lines.append(
                {
                    "type": "round",
                    "server_round": server_round,
                    "seconds": 11.5 + server_round,
                    "num_sites": 4,
                    "num_examples": 2120,
                    "train_loss": loss,
                }
            )
            for index, (site, n) in enumerate(SIZES.items()):
                refused = site == "D" and server_round in (3, 4, 5)
                lines.append(
                    {
                        "type": "site",
                        "server_round": server_round,
                        "site": site,
                        "status": "refused" if refused else "ok",
                        "reason": "cohort: 3 sites are fewer than this site's 4" if refused else "",
                        "num_examples": None if refused else 4 * n,
                        "train_loss": None if refused else loss + 0.05 * index,
                        "seconds": None if refused else 9.0,
                    }
                )
        lines.append(
            {
                "type": "evaluation",
                "server_round": server_round,
                "split": "val",
                "pooled": metrics(sum(parts.values(), EvaluationSums.zeros(3))),
                "sites": {site: metrics(part) for site, part in parts.items()},
            }
        )
    reason = "val-loss-sum=nan: expected a finite number of at least 0"
    lines.append(
        {
            "type": "site",
            "server_round": 2,
            "site": "C",
            "status": "dropped",
            "reason": reason,
            "num_examples": None,
            "train_loss": None,
            "seconds": None,
        }
    )
    return lines


def make_files() -> dict[str, Any]:
    """Return the files of a finished simulated run, as Python values."""
    parts = {site: sums(900 + i, n, 1.9 - 0.25 * i) for i, (site, n) in enumerate(SIZES.items())}
    sites = {site: final(part) for site, part in parts.items()}
    return {
        "config.json": {
            "run_uuid": "7b7d1f6e-0f0e-4ef5-9d35-5f1c5d0f6a11",
            "command": "simulation/run.py --scenario demo --data-dir /home/ada/scans --seed 7",
            "run_config": {
                "dataset": "phantom",
                "num-server-rounds": ROUNDS,
                "seed": 7,
                "model": {"size": "nano", "norm": "group", "depths": ""},
                "training": {"learning-rate": 0.0003, "augment": True, "batch-size": 64},
                "privacy": {"mode": "off"},
            },
            "seed": 7,
            "git_commit": "0123456789abcdef",
            "versions": {"torch": "2.13.0", "flwr": "1.41.0"},
            "provenance": {"scan_backend": "native", "device": "cpu", "num_threads": 2},
        },
        "history.jsonl": history_lines(),
        "summary.json": {
            "run_uuid": "7b7d1f6e-0f0e-4ef5-9d35-5f1c5d0f6a11",
            "dataset": "phantom",
            "classes": CLASSES,
            "strategy": "fedavg",
            "num_server_rounds": ROUNDS,
            "best_round": 5,
            "selection": {"metric": "auc", "split": "val", "value": 0.9123},
            "pooled": final(sum(parts.values(), EvaluationSums.zeros(3))),
            "sites": sites,
            "worst_site": worst_site(sites),
            "not_tested": {},
            "baselines": {"pooled": final(sums(990, 530, 2.0))},
            "privacy": {"mode": "off"},
            "encryption": {"mode": "off"},
            "seconds": 133.2,
            "simulated": True,
        },
        "partition.json": {
            "scheme": "dirichlet",
            "alpha": 0.5,
            "classes": CLASSES,
            "sites": {
                site: {
                    "train": [3 * n, (index + 1) * n // 3, (4 - index) * n // 4],
                    "val": [n // 2, n // 4, n // 4],
                    "test": [n // 2, n // 4, n // 4],
                    "num_patients": 2 * n,
                }
                for index, (site, n) in enumerate(SIZES.items())
            },
        },
    }


FILES = make_files()


def write_files(run_dir: Path, change: Callable[[dict[str, Any]], object] = lambda _: None) -> Path:
    """Write the run directory, after ``change`` was made to a copy of its files."""
    files = copy.deepcopy(FILES)
    change(files)
    run_dir.mkdir(exist_ok=True)
    for name, content in files.items():
        if name.endswith(".jsonl"):
            text = "".join(json.dumps(line) + "\n" for line in content)
        else:
            text = json.dumps(content)
        (run_dir / name).write_text(text, encoding="utf-8")
    return run_dir


def render(
    run_dir: Path, change: Callable[[dict[str, Any]], object], *, charts: bool = False
) -> tuple[str, str]:
    """Return the page, and the words a reader sees in it.

    Drawing takes most of the time, so without ``charts`` there is nothing to draw.
    """

    def prepare(files: dict[str, Any]) -> None:
        if not charts:
            del files["partition.json"]
            lines = [line for line in files["history.jsonl"] if line["type"] != "evaluation"]
            files["history.jsonl"] = [{**line, "train_loss": None} for line in lines]
        change(files)

    page = write_report(write_files(run_dir, prepare)).read_text(encoding="utf-8")
    return page, visible(page)


def visible(page: str) -> str:
    """Return the words of a page, joined by single spaces."""
    parser = _Words()
    parser.feed(page)
    return " ".join(" ".join(parser.words).split())


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[str, str]:
    """The page of the unchanged run, and its words."""
    run_dir = write_files(tmp_path_factory.mktemp("run"))
    page = write_report(run_dir).read_text(encoding="utf-8")
    return page, visible(page)


class _Words(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.hidden = False

    def handle_starttag(self, tag, attrs):
        self.hidden = tag == "style" or self.hidden

    def handle_endtag(self, tag):
        self.hidden = self.hidden and tag != "style"

    def handle_data(self, data):
        if not self.hidden:
            self.words.append(data)


def test_says_first_what_came_out(plain):
    _, words = plain
    summary = FILES["summary.json"]
    pooled, worst = summary["pooled"], summary["worst_site"]
    below = pooled["balanced_accuracy"] - worst["balanced_accuracy"]
    assert (
        "fedavg trained a classifier for 3 classes on phantom across 4 simulated sites in 6 rounds "
        f"(2 min 13 s). On 530 test images of all sites, the model of round 5 reached an AUC of "
        f"{pooled['auc']:.3f} (95% interval {pooled['auc_low_95']:.3f} to "
        f"{pooled['auc_high_95']:.3f}) and a balanced accuracy of "
        f"{pooled['balanced_accuracy']:.3f}. The worst site is D, with a balanced accuracy of "
        f"{worst['balanced_accuracy']:.3f}, {below:.3f} below all sites together. The same model "
        "trained on the data of all sites in one place reached an AUC of "
        f"{summary['baselines']['pooled']['auc']:.3f}"
    ) in words
    gap = pooled["auc"] - summary["baselines"]["pooled"]["auc"]
    assert f"AUC gap to pooled training {gap:+.3f}".replace("-", "\N{MINUS SIGN}") in words
    assert "model of round 5 of 6, chosen by its AUC (0.912) on validation images" in words


def test_the_table_has_every_site_the_pool_the_worst_and_the_baseline(plain):
    page, _ = plain
    table = page[page.index('class="figures"') : page.index("Confusion matrix, all")]
    labels = re.findall(r'<th scope="row">([^<]+)', table)
    assert labels == ["All sites", "D", "Pooled training", "A", "B", "C", "D"]
    for figures in (FILES["summary.json"]["pooled"], FILES["summary.json"]["sites"]["B"]):
        for name in ("auc", "balanced_accuracy", "specificity", "precision", "f1", "ece", "loss"):
            assert f"{figures[name]:.3f}" in table


def test_confusion_matrix_has_counts_and_shares_of_the_row(tmp_path):
    def change(files):
        files["summary.json"]["pooled"]["confusion"] = [[1200, 300, 0], [0, 0, 0], [1, 0, 3]]

    page, words = render(tmp_path, change)
    assert "normal 1,200 80% 300 20% 0 0% benign 0 0 0 malignant 1 25% 0 0% 3 75%" in words
    assert "rgba(var(--shade), 0.480)" in page
    assert page.count('class="hit"') == 3


def test_warns_where_protection_was_off_and_where_the_run_was_simulated(tmp_path, plain):
    _, words = plain
    assert "Differential privacy was off." in words
    assert "Encryption of updates was off." in words
    assert "no hospital took part" in words

    def protect(files):
        files["summary.json"]["privacy"] = {"mode": "patient", "epsilon": 3.0}
        files["summary.json"]["encryption"] = {"mode": "bfv"}

    _, words = render(tmp_path, protect)
    assert "was off" not in words
    assert "A simulated run is not private" in words
    assert "privacy.epsilon 3.0" in words

    def real(files):
        protect(files)
        files["summary.json"]["simulated"] = False

    page, words = render(tmp_path, real)
    assert "simulated" not in words
    assert 'class="notice"' not in page


def test_names_sites_that_the_test_figures_lack(tmp_path):
    def change(files):
        files["summary.json"]["not_tested"] = {"E": "no reply within 60 s"}

    _, words = render(tmp_path, change)
    assert "Test figures lack 1 site. E: no reply within 60 s." in words


def test_a_figure_that_does_not_exist_is_na_with_its_reason(tmp_path):
    def change(files):
        sites = files["summary.json"]["sites"]
        sites["A"].update(auc=None, specificity=None, num_classes_present=1)
        sites["B"] = {name: None for name in sites["B"]} | {"num_examples": 0}
        del sites["C"]["ece"]

    _, words = render(tmp_path, change)
    assert "a Does not exist: the test images are of fewer than two classes." in words
    assert "b Does not exist: no test images." in words
    assert "c Not recorded in the summary of this run." in words
    assert re.search(r" A n/a a 0\.\d{3} n/a a 0\.\d{3}", words)


def test_an_encrypted_run_says_why_it_has_no_figures(tmp_path):
    def change(files):
        empty = {"pooled": {}, "sites": {}, "worst_site": None, "baselines": {}}
        files["summary.json"].update(empty, encryption={"mode": "bfv"})
        for line in files["history.jsonl"]:
            if line["type"] == "evaluation":
                line.update(pooled={}, sites={})

    _, words = render(tmp_path, change, charts=True)
    assert "the metrics of an encrypted run are not readable here" in words
    assert "Validation AUC higher is better No values were recorded." in words
    assert "across 4 simulated sites" in words


def test_configuration_and_provenance_are_shown(tmp_path):
    def change(files):
        files["config.json"]["scenario"] = {"federation": {"baselines": ["pooled"], "num-sites": 4}}
        files["config.json"]["git_commit"] = None

    _, words = render(tmp_path, change)
    assert "model.depths (not set) model.norm group model.size nano num-server-rounds 6" in words
    assert "training.augment true training.batch-size 64 training.learning-rate 0.0003" in words
    assert "Scenario federation.baselines pooled federation.num-sites 4 Provenance" in words
    assert "run uuid 7b7d1f6e-0f0e-4ef5-9d35-5f1c5d0f6a11 git commit n/a (not recorded)" in words
    assert "device cpu num-threads 2 scan-backend native" in words
    assert "Versions flwr 1.41.0 torch 2.13.0" in words


def test_optional_files_and_keys_may_be_absent(tmp_path):
    def change(files):
        del files["partition.json"], files["config.json"]["command"]
        del files["summary.json"]["baselines"], files["summary.json"]["not_tested"]
        files["history.jsonl"] = []

    _, words = render(tmp_path, change, charts=True)
    assert "No training on pooled data was run for comparison." in words
    assert "Data by site" not in words
    assert "Command" not in words
    assert "None: every reply of every round was used." in words


def test_unused_replies_are_grouped_by_site_and_reason(plain):
    _, words = plain
    assert "C dropped 2 val-loss-sum=nan: expected a finite number of at least 0" in words
    assert "D refused 3-5 cohort: 3 sites are fewer than this site's 4" in words


def test_partition_has_a_bar_and_numbers_for_each_site(plain):
    page, words = plain
    assert "dirichlet, alpha=0.5" in words
    assert "A 1,040 240 240 480" in words
    assert "Training images of each site by class: A 1,040, B 397, C 720, D 183." in page


def test_many_sites_stay_readable(tmp_path):
    def change(files):
        names = [f"site-{index}" for index in range(60)]
        figures = files["summary.json"]["sites"]["A"]
        files["summary.json"]["sites"] = dict.fromkeys(names, figures)
        files["summary.json"]["worst_site"]["site"] = "site-7"
        counts = files["partition.json"]["sites"]["A"]
        files["partition.json"]["sites"] = dict.fromkeys(names, counts)
        files["history.jsonl"] = [
            {
                "type": "evaluation",
                "server_round": server_round,
                "split": "val",
                "pooled": figures,
                "sites": dict.fromkeys(names, figures),
            }
            for server_round in range(3)
        ]

    page, words = render(tmp_path, change, charts=True)
    assert "range of the 59 other sites" in words
    assert "<summary>Each of the 60 sites</summary>" in page
    assert "60 sites with 1,040 to 1,040 each" in page
    assert len(page) < 150_000


def test_two_runs_of_the_same_files_give_the_same_bytes(tmp_path):
    first = write_report(write_files(tmp_path / "one")).read_bytes()
    second = write_report(write_files(tmp_path / "two")).read_bytes()
    assert first == second
    assert write_report(tmp_path / "one").read_bytes() == first


def test_needs_no_network_and_runs_nothing(plain):
    page, _ = plain
    assert "http" not in page
    assert not re.search(r"<(script|link|iframe|img|object|embed)\b|\bsrc=|@import|\bon\w+=", page)
    assert set(re.findall(r"(?:href=\"|url\()(.)", page)) == {"#"}


HOSTILE = "<script>alert('1')</script>"


def test_every_text_of_the_run_is_escaped(tmp_path):
    def change(files):
        summary, partition = files["summary.json"], files["partition.json"]
        summary["classes"][1] = partition["classes"][1] = f"class {HOSTILE}"
        summary["dataset"] = f"data {HOSTILE}"
        summary["sites"][f"site {HOSTILE}"] = summary["sites"].pop("B")
        summary["worst_site"]["site"] = f"worst {HOSTILE}"
        summary["not_tested"] = {"E": f"untested {HOSTILE}"}
        partition["sites"][f'bar " {HOSTILE}'] = partition["sites"].pop("B")
        files["config.json"]["command"] = f"command {HOSTILE}"
        files["config.json"]["run_config"]["dataset"] = f"config {HOSTILE}"
        for line in files["history.jsonl"]:
            if line.get("reason"):
                line["reason"] = f"reason {HOSTILE}"

    page, words = render(tmp_path, change, charts=True)
    assert "<script" not in page
    for start in ("class", "data", "site", "worst", "untested", "command", "config", "reason"):
        assert f"{start} {HOSTILE}" in words
    assert f'bar " {HOSTILE}' in words


def test_names_are_shown_as_they_are(tmp_path):
    name = "St. Luke $x_1$ \N{CJK UNIFIED IDEOGRAPH-75C5}"

    def change(files):
        for place in (files["summary.json"]["sites"], files["partition.json"]["sites"]):
            place[name] = place.pop("A")

    page, _ = render(tmp_path, change, charts=True)
    figure = page[page.index("Training images of each site by class:") :]
    assert f">{name}</text>" in figure


def test_no_absolute_path_is_shown(tmp_path):
    def change(files):
        files["config.json"]["provenance"]["data"] = "/srv/hospital/ada lovelace"
        files["summary.json"]["classes"][0] = "/srv/classes"
        files["history.jsonl"][-1]["reason"] = "cannot read C:\\scans\\ada.dcm"

    page, words = render(tmp_path, change, charts=True)
    assert "--data-dir [path] --seed 7" in words
    assert "cannot read [path]" in words
    for secret in ("/home", "ada", "/srv", "scans", str(tmp_path)):
        assert secret not in page


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/data", "[path]"),
        ("/data/ada lovelace/x", "[path]"),
        ("open '/data/ada lovelace/x' failed", "open [path] failed"),
        ("--data=/home/ada/x --seed 1", "--data=[path] --seed 1"),
        ("see file:///home/ada/x", "see [path]"),
        ("in ~/scans or ~ada/scans", "in [path] or [path]"),
        ("/usr/bin/python run.py --data-dir D:/x", "[path] run.py --data-dir [path]"),
        ("</b>", "</b>"),
        ("path:/home/ada, then", "path:[path], then"),
        (r"see C:\scans\ada.dcm and \\server\share", "see [path] and [path]"),
        ("CNV/DME, 1/2, a / b, ../x, runs/x", "CNV/DME, 1/2, a / b, ../x, runs/x"),
        ("https://host:9092/fleet 10:30 key: value", "https://host:9092/fleet 10:30 key: value"),
    ],
)
def test_absolute_paths_are_replaced_and_other_text_is_not(text, shown):
    assert scrub({text: [text, 1, None]}) == {shown: [shown, 1, None]}


def test_ids_are_unique_and_every_figure_has_words(plain):
    page, _ = plain
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="|url\()#([\w.-]+)', page)) <= set(ids)
    figures = re.findall(r'<svg role="img"[^>]*aria-label="([^"]+)"', page)
    assert len(figures) == 5
    assert figures[0].startswith("Validation AUC by server round. All sites: 0.")
    assert [int(level) for level in re.findall(r"<h(\d)", page)][:3] == [1, 2, 3]


def test_follows_light_and_dark(plain):
    page, _ = plain
    figures = "".join(re.findall(r'<svg role="img".*?</svg>', page, flags=re.DOTALL))
    assert "prefers-color-scheme: dark" in page
    assert "var(--ink)" in figures
    assert not re.search(r"#[0-9a-f]{6}\b", figures)
    used = set(re.findall(r"var\((--\w+)", page))
    light, dark = page.split("prefers-color-scheme: dark")
    assert used <= set(re.findall(r"(--\w+):", light))
    assert used <= set(re.findall(r"(--\w+):", dark))


def test_a_curve_has_a_gap_where_a_value_is_missing():
    def strokes(values: list[float | None]) -> int:
        svg = curves("T", [Series("A", list(enumerate(values)), 0)], [], None)
        line = re.search(r'<path d="([^"]+)"[^>]*stroke: var\(--c0\); stroke-width: 1.4', svg)
        return line[1].count("M")

    assert strokes([0.1, 0.2, 0.3, 0.4]) == 1
    assert strokes([0.1, 0.2, None, 0.3, 0.4]) == 2


def test_a_site_that_missed_a_round_has_a_gap_in_its_training_loss(plain):
    page, _ = plain
    figure = page[page.index('aria-label="Training loss') : page.index("Data by site")]
    line = re.search(r'<path d="([^"]+)"[^>]*stroke: var\(--c3\); stroke-width: 1.4', figure)
    assert line[1].count("M") == 2


def test_of_a_round_done_twice_the_last_counts(tmp_path):
    def change(files):
        first = {line["type"]: line for line in reversed(files["history.jsonl"])}
        files["history.jsonl"] += [
            {**first["evaluation"], "pooled": {"auc": 0.123}},
            {**first["round"], "train_loss": 0.456},
        ]

    page, _ = render(tmp_path, change, charts=True)
    assert "Validation AUC by server round. All sites: 0.123 at round 0" in page
    assert "Training loss by server round. All sites: 0.456 at round 1" in page


def test_lines_and_splits_that_the_report_does_not_show_are_left_alone(tmp_path, plain):
    expected, _ = plain
    evaluation = {"type": "evaluation", "server_round": 0, "split": "test", "pooled": {"auc": 0.1}}

    def change(files):
        files["history.jsonl"] += [{"type": "resumed", "server_round": 3}, evaluation]

    assert render(tmp_path, change, charts=True)[0] == expected


def test_a_figure_that_is_not_finite_does_not_exist(tmp_path):
    def change(files):
        files["summary.json"]["pooled"]["loss"] = float("nan")

    _, words = render(tmp_path, change)
    assert "Not recorded in the summary of this run." in words
    assert "nan " not in words


@pytest.mark.parametrize("name", ["config.json", "history.jsonl", "summary.json"])
def test_a_missing_file_is_named(tmp_path, name):
    (write_files(tmp_path) / name).unlink()
    with pytest.raises(ConfigError, match=f"^{name} is missing$") as error:
        write_report(tmp_path)
    assert "run directory" in error.value.hint
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("name", ["config.json", "history.jsonl", "summary.json", "partition.json"])
@pytest.mark.parametrize("content", [b'{"run_uuid": "7', b"\xff\xfe", b"[1]", b"7", b"[" * 9999])
def test_a_damaged_file_is_named(tmp_path, name, content):
    (write_files(tmp_path) / name).write_bytes(content)
    with pytest.raises(ConfigError, match=f"^{name}") as error:
        write_report(tmp_path)
    assert "resume the run" in error.value.hint


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("summary.json", {"selection": {"split": "val"}}, "selection.metric is missing"),
        ("summary.json", {"seconds": "long"}, "seconds=long: Input should be a valid number"),
        ("summary.json", {"classes": ["a", "b"]}, "pooled.confusion: expected 2 rows and columns"),
        ("summary.json", {"classes": []}, "classes"),
        ("partition.json", {"classes": ["a"]}, "sites.A: expected 1 counts per split"),
        ("partition.json", {"sites": {}}, "sites"),
        ("config.json", {"run_config": None}, "run_config"),
    ],
)
def test_a_wrong_value_is_named(tmp_path, name, change, message):
    with pytest.raises(ConfigError, match=f"^{name}: {re.escape(message)}"):
        render(tmp_path, lambda files: files[name].update(change), charts=True)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"type": "round", "server_round": 1, "num_sites": 2}, "line 2: round.seconds is missing"),
        ({"server_round": 1}, "line 2: expected an object with a type"),
    ],
)
def test_a_damaged_line_of_the_history_is_named(tmp_path, line, message):
    with pytest.raises(ConfigError, match=re.escape(f"history.jsonl {message}")):
        render(tmp_path, lambda files: files["history.jsonl"].insert(1, line))


@pytest.mark.parametrize(
    ("seconds", "shown"), [(7.25, "7.2 s"), (59.97, "60.0 s"), (133.2, "2 min 13 s"), (7384, "2 h")]
)
def test_durations_are_readable(tmp_path, seconds, shown):
    _, words = render(tmp_path, lambda files: files["summary.json"].update(seconds=seconds))
    assert f"in 6 rounds ({shown}" in words
