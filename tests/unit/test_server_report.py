"""The report says what came out, is honest about what is missing, and names a damaged file."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest

from fakes.report_files import FILES, render, visible, write_files
from server.console import result_lines
from server.report import write_report
from strategies.errors import ConfigError


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> tuple[str, str]:
    """The page of the unchanged run, and its words."""
    run_dir = write_files(tmp_path_factory.mktemp("run"))
    page = write_report(run_dir).read_text(encoding="utf-8")
    return page, visible(page)


def test_says_first_what_came_out(plain):
    _, words = plain
    summary = FILES["summary.json"]
    pooled, worst = summary["pooled"], summary["worst_site"]
    below = pooled["balanced_accuracy"] - worst["balanced_accuracy"]
    assert (
        "FedAvg trained a classifier for 3 classes on phantom across 4 simulated sites in 6 rounds "
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


def test_strategies_are_written_as_their_authors_do(tmp_path):
    _, words = render(tmp_path, lambda files: files["summary.json"].update(strategy="fedprox"))
    assert "phantom: FedProx across 4 simulated sites" in words
    assert "FedProx trained a classifier" in words


def test_the_table_has_the_pool_the_baseline_and_every_site_once_with_the_worst_marked(plain):
    page, _ = plain
    table = page[page.index('class="figures"') : page.index("Sensitivity by class")]
    labels = re.findall(r'<th scope="row">([^<]+)(?:<small>([^<]+))?', table)
    assert labels == [
        ("All sites", "pooled"),
        ("Pooled training", "baseline"),
        *[("A", ""), ("B", ""), ("C", ""), ("D", "worst site")],
    ]
    for title in ("Macro sensitivity", "Macro specificity", "Macro precision", "Macro F1"):
        assert f"{title}<" in table
    for figures in (FILES["summary.json"]["pooled"], FILES["summary.json"]["sites"]["B"]):
        for name in ("auc", "balanced_accuracy", "specificity", "precision", "f1", "ece", "loss"):
            assert f"{figures[name]:.3f}" in table


def test_each_class_has_its_sensitivity_and_number_of_images_by_site(tmp_path):
    def change(files):
        summary = files["summary.json"]
        summary["pooled"]["confusion"] = [[1200, 300, 0], [0, 7, 3], [34, 0, 8]]
        summary["sites"]["A"]["confusion"] = [[3, 0, 0], [0, 0, 0], [1, 0, 2]]
        summary["sites"]["B"]["confusion"] = None

    page, words = render(tmp_path, change)
    table = words[words.index("Sensitivity by class Test images") :]
    assert (
        "normal benign malignant All sites pooled 80% 1,200 of 1,500 70% 7 of 10 19% 8 of 42"
        in (table)
    )
    assert " A 100% 3 of 3 n/a no images 67% 2 of 3 B n/a a n/a a n/a a C " in table
    assert "a Not recorded in the summary of this run." in words
    assert page.count("Pooled training") == 2


def test_an_auc_of_few_images_of_a_class_has_no_interval_and_says_so(tmp_path):
    def change(files):
        summary = files["summary.json"]
        none = {"auc_low_95": None, "auc_high_95": None}
        summary["pooled"].update(none, auc=0.8, confusion=[[90, 0, 0], [9, 9, 9], [1, 0, 3]])
        summary["sites"]["A"].update(none, auc=0.7, confusion=[[90, 0, 0], [0, 0, 0], [1, 0, 4]])

    _, words = render(tmp_path, change)
    assert "an AUC of 0.800 (too few images of a class for an interval)" in words
    assert "Test AUC, all sites pooled 0.800 a too few images of a class for an interval" in words
    assert "a Too few images of a class for an interval." in words
    assert re.search(r" A 0\.700 0\.\d{3} ", words)  # no interval, for another reason


def test_an_uncertain_auc_shows_its_error_in_the_headline_only(tmp_path, plain):
    _, words = plain
    assert "±" not in words

    def change(files):
        summary = files["summary.json"]
        summary["pooled"].update(auc=0.553, auc_max_error=0.0131)
        summary["baselines"]["pooled"].update(auc=0.61, auc_max_error=0.01)

    _, words = render(tmp_path, change)
    assert "an AUC of 0.553±0.02 (95% interval" in words
    assert "one place reached an AUC of 0.610 (95% interval" in words
    assert words.count("±") == 1


def test_printed_lines_show_an_uncertain_auc_and_stay_aligned():
    summary = copy.deepcopy(FILES["summary.json"])
    certain = result_lines(summary, Path("run")).splitlines()
    assert "±" not in "".join(certain)
    assert {len(line) for line in certain[:7]} == {101}

    summary["sites"]["B"].update(auc=0.553, auc_max_error=0.0131)
    summary["sites"]["C"].update(auc=None, auc_max_error=None)
    lines = result_lines(summary, Path("run")).splitlines()
    assert {len(line) for line in lines[:7]} == {101}
    assert "0.553±0.02" in lines[3]
    assert "".join(lines).count("±") == 1
    points = [line.index(".") for line in (*lines[1:4], *lines[5:7])]
    assert len(set(points)) == 1


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


@pytest.mark.parametrize("official", [True, False])
def test_warns_of_a_data_file_that_is_not_the_published_one(tmp_path, official):
    def change(files):
        files["config.json"]["data"] = {"file": "b.npz", "md5": "ab12", "official": official}

    _, words = render(tmp_path, change)
    assert ("b.npz has MD5 ab12, not the published one." in words) is not official


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


def test_the_report_lists_who_contributed_when(tmp_path):
    def change(files):
        files["history.jsonl"] += [
            {"type": "site", "server_round": 2, "site": "E", "status": "missing", "reason": "away"}
        ]

    _, words = render(tmp_path, change)
    start, end = words.index("Who contributed when"), words.index("Replies that were not used")
    # Those who missed a round come first.
    rows = words[start:end].split("Which ")[1]
    assert rows.startswith("D 3 of 6 1, 2, 6 E 0 of 6 none A 6 of 6 1-6 ")


def test_unused_replies_are_grouped_by_site_and_reason(plain):
    _, words = plain
    assert "C dropped 2 val-loss-sum=nan: expected a finite number of at least 0" in words
    assert "D refused 3-5 cohort: 3 sites are fewer than this site's 4" in words


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
        ("summary.json", {"sites": {"A": {"confusion": [[1]]}}}, "sites.A.confusion: expected 3"),
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
