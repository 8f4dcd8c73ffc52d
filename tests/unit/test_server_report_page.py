"""The report's page: readable charts, safe to hand on, the same bytes every time."""

from __future__ import annotations

import re

import pytest

from fakes.report_files import render, visible, write_files
from server.figures import Series, curves
from server.report import write_report
from server.report_files import scrub

SPLITS = ("train", "val", "test")


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[str, str]:
    """The page of the unchanged run, and its words."""
    run_dir = write_files(tmp_path_factory.mktemp("run"))
    page = write_report(run_dir).read_text(encoding="utf-8")
    return page, visible(page)


def test_partition_has_a_bar_and_numbers_for_each_site(plain):
    page, words = plain
    assert "dirichlet, alpha=0.5" in words
    assert "Site Train Validation Test Patients A 1,040 240 240 480" in words
    assert "Training images of each site by class: A 1,040, B 397, C 720, D 183." in page


def test_patients_are_not_counted_where_each_image_is_its_own(tmp_path):
    def change(files):
        for counts in files["partition.json"]["sites"].values():
            counts["num_patients"] = sum(map(sum, (counts[name] for name in SPLITS)))

    _, words = render(tmp_path, change, charts=True)
    assert "Number of images Site Train Validation Test A 1,040 240 240 B " in words
    assert "Patients" not in words


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
    assert page.count("<summary>Each of the 60 sites</summary>") == 2
    above = page[page.index('class="figures"') : page.index("<summary>Each of the 60 sites")]
    assert "site-7<small>worst site</small>" in above
    assert "60 sites with 1,040 to 1,040 each" in page
    assert len(page) < 150_000


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
