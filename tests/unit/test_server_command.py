"""``server run``: what can never run is refused first; how a run ends is told, and kept."""

from __future__ import annotations

import errno
import fcntl
import json
import time
from datetime import UTC, datetime, timedelta

import pytest

from fakes.enrolments import Superlink, request
from fakes.hosted_runs import Runs, audited, federation
from medmamba import ModelError
from server import command
from server.certificates import create_authority, issue_server_certificate
from server.command import Request, read_run_config, run
from server.hosting import (
    LAST_ORDER,
    LOCK,
    current_run,
    hosting,
    is_hosting,
    issue_order,
    longest_seconds,
)
from server.run_directory import RunDirectory
from strategies.code import code_sha256
from strategies.errors import (
    CheckpointError,
    ConfigError,
    FederationError,
    QuorumError,
    StoppedError,
)
from strategies.identity import fingerprint
from strategies.orders import CLOCK_TOLERANCE_SECONDS, Order
from strategies.run_config import RunConfig


@pytest.fixture
def lungs(tmp_path):
    """A federation of two sites."""
    return federation(tmp_path / "state", "A", "B")


@pytest.fixture
def refused(lungs, tmp_path, monkeypatch):
    """Ask for a run that must be refused before flower-superlink hears of it."""
    monkeypatch.setattr(command, "host_run", lambda **words: pytest.fail("submitted"))

    def ask(*assignments: str, resume=None, coordinator=lungs):
        output = None if resume else tmp_path / "out"
        return run(Request(coordinator, None, list(assignments), output, resume))

    yield ask
    assert not (tmp_path / "out").exists()


@pytest.fixture
def runs(monkeypatch):
    """A superlink that takes every run, and rounds that a test writes."""
    runs = Runs()

    def host_run(*, address, ca_file, secret_file, run, main):
        main(None, None)

    monkeypatch.setattr(command, "host_run", host_run)
    monkeypatch.setattr(command, "run_app", runs)
    monkeypatch.setattr(command, "finish", lambda path, summary: 0)
    return runs


@pytest.fixture
def start(lungs, tmp_path, runs):
    """Run, or resume, in ``out``."""

    def _start(*assignments: str, resume: bool = False) -> int:
        where = {"resume" if resume else "output": tmp_path / "out"}
        return run(Request(lungs, None, list(assignments), **where))

    return _start


# --- refused ---------------------------------------------------------------------------------


def test_a_quorum_that_the_sites_cannot_meet(refused):
    with pytest.raises(ConfigError, match=r"strategy\.min-sites=3: only 2 sites are admitted"):
        refused("strategy.min-sites=3")


def test_a_revoked_site_does_not_count(refused, lungs):
    lungs.revoke("B")
    with pytest.raises(ConfigError, match=r"admitted sites=1: .* promised min-cohort=2"):
        refused("strategy.min-sites=1")


def test_what_was_promised_to_the_sites(refused, tmp_path):
    promised = federation(tmp_path / "other", "A", "B", min_cohort=3, max_num_examples=10)
    with pytest.raises(ConfigError, match=r"admitted sites=2: .* promised min-cohort=3") as caught:
        refused(coordinator=promised)
    assert "admit" in caught.value.hint
    promised.admit(request("C"))
    with pytest.raises(
        ConfigError, match=r"strategy.min-sites=2: .* promised min-cohort=3"
    ) as caught:
        refused(coordinator=promised)
    assert caught.value.hint == "--set strategy.min-sites=3"
    with pytest.raises(ConfigError, match=r"max-num-examples=1000000: .* at most 10") as caught:
        refused("strategy.min-sites=3", coordinator=promised)
    assert caught.value.hint == "--set strategy.max-num-examples=10"


def test_an_expired_certificate(refused, lungs):
    for name in ("ca.key", "ca.pem", "server.key", "server.pem"):
        (lungs.state_dir / name).unlink()
    long_ago = datetime.now(UTC) - timedelta(days=4000)
    create_authority(lungs.state_dir, lungs.id, long_ago)
    issue_server_certificate(lungs.state_dir, lungs.id, ["127.0.0.1"], long_ago)
    with pytest.raises(ConfigError, match="expired on"):
        refused()


def test_a_model_that_cannot_be_built(refused):
    with pytest.raises(ModelError, match="dims"):
        refused("model.depths=1,1,1,1", "model.dims=16,20,64,128")


@pytest.mark.parametrize("words", [["modle.size=nano"], ["model=3", "model.size=nano"]])
def test_an_unknown_key(refused, words):
    with pytest.raises(ConfigError, match="unknown key mod"):
        refused(*words)


@pytest.mark.parametrize("content", ["{}", '{"run_config": 3}', '{"run_config": {}}'])
def test_a_directory_that_is_no_run(refused, tmp_path, content):
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json has no run_"):
        refused(resume=folder)


def test_a_second_run_of_the_federation(refused, lungs, monkeypatch):
    monkeypatch.setattr("server.hosting.PATIENCE_SECONDS", 0.01)
    assert not is_hosting(lungs)
    with hosting(lungs):
        assert is_hosting(lungs)
        with pytest.raises(ConfigError, match="federation=lungs hosts a run already"):
            refused()
    assert not is_hosting(lungs)


def test_two_that_ask_at_once_do_not_take_each_other_for_a_host(lungs):
    with (lungs.state_dir / LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        assert not is_hosting(lungs)


def test_a_run_directory_of_another_federation(start, runs, tmp_path):
    start()
    (tmp_path / "out" / "summary.json").unlink()
    other = federation(tmp_path / "other", "A", "B")
    with pytest.raises(ConfigError, match="is of federation=lungs-") as caught:
        run(Request(other, resume=tmp_path / "out"))
    assert "--state-dir" in caught.value.hint
    assert len(runs.settings) == 1


def test_resuming_takes_no_settings(start, tmp_path):
    start()
    (tmp_path / "out" / "summary.json").unlink()
    with pytest.raises(ConfigError, match="takes the run's own configuration"):
        start("seed=2", resume=True)


# --- the order -------------------------------------------------------------------------------


def test_the_order_is_what_the_sites_will_verify(start, runs, lungs):
    began = time.time()
    start("num-server-rounds=3", "strategy.wait-seconds=10", "strategy.round-timeout-seconds=20")
    [settings] = runs.settings
    order = settings.order
    key = lungs.order_key.public_key()
    assert Order.verify(order.text, order.signature, key, federation=lungs.id) == order
    manifest = order.manifest
    assert manifest.cohort == ("A", "B")
    assert manifest.code_sha256 == code_sha256()
    assert manifest.run_uuid == settings.directory.config()["run_uuid"]
    assert manifest.run_config["num-server-rounds"] == 3
    assert manifest.issued_ms >= began * 1000 - 1
    assert manifest.expires_ms - manifest.issued_ms == longest_seconds(order.run) * 1000
    assert settings.sites() == lungs.admitted()
    assert settings.order_key.public_key() == key
    events = dict(audited(lungs))
    assert events["order-issued"]["order"] == order.sha256
    assert events["order-issued"]["cohort"] == "A,B"


def test_a_later_order_has_a_larger_number_whatever_the_clock_says(lungs, monkeypatch):
    now = time.time_ns()
    numbers = []
    for clock in (now, now, now - 100 * 10**9, now + 10**9):
        monkeypatch.setattr("server.hosting.time.time_ns", lambda clock=clock: clock)
        numbers.append(issue_order(lungs, "a1b2", RunConfig(), ["A", "B"]).manifest.issued_ms)
    first = now // 1_000_000
    assert numbers == [first, first + 1, first + 2, first + 1000]


def test_a_clock_that_went_far_back_is_told_before_every_site_refuses(lungs, monkeypatch):
    issue_order(lungs, "a1b2", RunConfig(), ["A", "B"])
    hour = time.time_ns() - 3600 * 10**9
    monkeypatch.setattr("server.hosting.time.time_ns", lambda: hour)
    with pytest.raises(ConfigError, match=r"issued 1\.0 h ahead of this machine's clock") as caught:
        issue_order(lungs, "a1b2", RunConfig(), ["A", "B"])
    assert LAST_ORDER in caught.value.hint
    (lungs.state_dir / LAST_ORDER).unlink()
    issue_order(lungs, "a1b2", RunConfig(), ["A", "B"])


@pytest.mark.parametrize("content", ["", "{}", '{"issued_ms": "x"}', "[1]"])
def test_a_lost_number_is_not_begun_anew(lungs, content):
    (lungs.state_dir / LAST_ORDER).write_text(content)
    with pytest.raises(ConfigError, match=rf"{LAST_ORDER} is damaged"):
        issue_order(lungs, "a1b2", RunConfig(), ["A", "B"])


def test_the_number_is_kept_before_the_order_is_signed(lungs, monkeypatch):
    def fail(key, manifest):
        raise OSError("killed here")

    monkeypatch.setattr("server.hosting.Order.issue", fail)
    with pytest.raises(OSError, match="killed here"):
        issue_order(lungs, "a1b2", RunConfig(), ["A", "B"])
    assert json.loads((lungs.state_dir / LAST_ORDER).read_text())["issued_ms"] > 0


def test_an_order_lives_as_long_as_its_run_can_take():
    short = RunConfig.parse({"num-server-rounds": 1})
    long = RunConfig.parse({"num-server-rounds": 11})
    phase = short.strategy.wait_seconds + short.strategy.round_timeout_seconds
    assert longest_seconds(long) - longest_seconds(short) == 10 * phase
    # A round and two evaluations, each with a wait and its replies.
    assert longest_seconds(short) > 3 * phase + CLOCK_TOLERANCE_SECONDS


# --- a run -----------------------------------------------------------------------------------


def test_a_complete_run(start, runs, lungs, tmp_path):
    assert start("seed=4", "model.scan-backend=native") == 0
    directory = RunDirectory(tmp_path / "out")
    config = directory.config()
    assert config["federation"] == lungs.id
    assert config["seed"] == config["run_config"]["seed"] == 4
    assert config["provenance"] == {"scan_backend": "native", "simulated": False}
    assert config["sites"] == {site: fingerprint(key) for site, key in lungs.admitted().items()}
    assert directory.summary() == {"best_round": 1}
    current = current_run(lungs)
    assert (current.run_uuid, current.directory) == (config["run_uuid"], str(tmp_path / "out"))
    assert audited(lungs)[-1] == ("run-complete", {"run_uuid": config["run_uuid"]})


def test_provenance_says_who_chose_the_scan_backend(start, tmp_path):
    """The coordinator runs no scan; only what it forces on every site is known here."""
    start()
    config = RunDirectory(tmp_path / "out").config()
    assert config["provenance"]["scan_backend"] == "auto"


def test_a_complete_run_that_lacks_its_report_gets_it(start, runs, lungs, tmp_path, monkeypatch):
    start()
    finished = []
    monkeypatch.setattr(command, "finish", lambda path, summary: finished.append(summary) or 0)
    with hosting(lungs):  # nothing is hosted for that
        assert start(resume=True) == 0
    assert finished == [{"best_round": 1}]
    assert len(runs.settings) == 1


def stop(settings):
    raise StoppedError("the run was interrupted")


def test_a_stopped_run_says_how_it_goes_on(start, runs, lungs, tmp_path, capsys):
    runs.act = stop
    assert start() == 130
    assert capsys.readouterr().err.splitlines() == [
        "the run was interrupted",
        f"stopped; continue with --resume {tmp_path / 'out'}",
    ]
    event, fields = audited(lungs)[-1]
    assert (event, fields["reason"]) == ("run-stopped", "the run was interrupted")
    assert not (tmp_path / "out" / "summary.json").exists()


def test_a_run_that_was_stopped_before_it_began(start, monkeypatch, capsys):
    monkeypatch.setattr(command, "host_run", lambda **words: stop(None))
    assert start() == 130
    assert capsys.readouterr().err.endswith("stopped; nothing was begun\n")


def test_it_goes_on_with_the_sites_that_are_admitted_then(start, runs, lungs, caplog):
    caplog.set_level("INFO")
    runs.act = stop
    start("seed=4")
    lungs.admit(request("C"))
    lungs.revoke("A")
    runs.act = lambda settings: None
    assert start(resume=True) == 0
    first, second = (settings.order for settings in runs.settings)
    assert second.manifest.cohort == ("B", "C")
    assert second.manifest.issued_ms > first.manifest.issued_ms
    assert second.manifest.run_uuid == first.manifest.run_uuid
    assert second.run == first.run
    assert "site=A left since the run was first started" in caplog.text
    assert "site=C joined since" in caplog.text
    assert "site=B" not in caplog.text


def test_no_weights_go_to_a_node_that_nobody_admitted(start, lungs, monkeypatch, caplog):
    superlink = Superlink()
    monkeypatch.setattr("server.flower_control.Control", superlink.connect)
    superlink.register("A", b"a stranger's key")
    assert start() == 0
    keys = {site.node_key for site in lungs.sites().values()}
    assert {node.public_key for node in superlink.list if not node.unregistered} == keys
    assert "unregistered node A: its list had changed" in caplog.text


def test_a_run_that_flower_lost_goes_on_in_its_directory(start, runs, monkeypatch):
    def host_run(*, main, **words):
        for _ in range(2):
            main(None, None)

    monkeypatch.setattr(command, "host_run", host_run)
    assert start() == 0
    first, second = runs.settings
    assert first.directory is second.directory
    assert first.order.manifest.run_uuid == second.order.manifest.run_uuid
    assert second.order.manifest.issued_ms > first.order.manifest.issued_ms


def test_too_few_sites(start, runs, lungs, tmp_path):
    def act(settings):
        raise QuorumError("connected sites=0", hint="start them")

    runs.act = act
    with pytest.raises(QuorumError) as caught:
        start()
    assert caught.value.exit_code == 3
    assert caught.value.hint == f"start them; continue with --resume {tmp_path / 'out'}"
    assert audited(lungs)[-1][1]["reason"] == "connected sites=0"


def test_a_hint_that_says_it_already_is_left_alone(start, runs):
    def act(settings):
        raise FederationError("x", hint="then continue with --resume")

    runs.act = act
    with pytest.raises(FederationError) as caught:
        start()
    assert caught.value.hint == "then continue with --resume"


def test_a_full_disk_is_told_in_a_line(start, runs, tmp_path):
    def act(settings):
        raise OSError(errno.ENOSPC, "No space left on device")

    runs.act = act
    with pytest.raises(FederationError, match=r"out: cannot write .*No space left") as caught:
        start()
    assert caught.value.hint == f"make room; continue with --resume {tmp_path / 'out'}"


def test_an_error_that_is_not_the_disks_stays_what_it_is(start, runs, lungs):
    def act(settings):
        raise OSError(errno.ECONNRESET, "reset")

    runs.act = act
    with pytest.raises(OSError, match="reset"):
        start()
    assert audited(lungs)[-1][1]["reason"] == "ConnectionResetError"


def test_an_audit_log_that_cannot_be_written_does_not_hide_what_happened(
    start, runs, lungs, caplog
):
    def act(settings):
        lungs.audit.path.unlink()
        raise QuorumError("too few")

    runs.act = act
    with pytest.raises(QuorumError, match="too few"):
        start()
    assert "audit entry run-failed not written" in caplog.text


def test_words_go_before_the_file_and_the_file_before_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("seed = 4\n[model]\nsize = 'base'\n")
    found = read_run_config(path, ["model.size=nano"])
    assert (found.seed, found.model.size, found.model.norm) == (4, "nano", "group")
