"""``check`` tries each thing that a site needs; what is wrong is one line and exit code 1."""

import logging
import re
import shutil
import socket
import stat
import struct
import threading
from datetime import timedelta
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from pydantic import BaseModel

import client.__main__
from client import check, probe
from client.check import CHECKS, Finding, findings
from client.enrol import initialise, read_request
from client.membership import join
from client.site_config import read_site_config
from fakes import pictures
from fakes.coordinators import Coordinator, serving
from strategies.code import code_sha256
from strategies.errors import FederationError

PHANTOM = '[data]\ndataset = "phantom"'


@pytest.fixture
def site(tmp_path):
    """Write a site's file with changes to the template and return the file as read."""

    def make(**changes: str):
        path = tmp_path / "A.toml"
        if not path.exists():
            initialise("A", path, unprotected=True)
        text = path.read_text()
        for old, new in changes.values():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        return read_site_config(path)

    return make


@pytest.fixture
def coordinator():
    return Coordinator()


def enter(config, coordinator, folder, address="127.0.0.1:1", **changes) -> None:
    document = coordinator.admit(read_request(config), address=address, **changes)
    path = folder / "A.join.json"
    path.write_text(document.to_json())
    join(config, path)


def run(config, *names: str) -> dict[str, Finding]:
    """The findings of some checks, by what they are about."""
    kept = {name: CHECKS[name] for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "CHECKS", kept)
        return {finding.name: finding for finding in findings(config)}


def command(folder, capsys) -> tuple[int, list[str]]:
    code = client.__main__.command(["check", "--site", "A", "--config", str(folder / "A.toml")])
    return code, capsys.readouterr().out.splitlines()


NAMES = [
    *("code", "data", "splits", "patients", "device", "scan", "keys", "membership", "authority"),
    *("superlink", "certificate", "clock", "policy", "audit", "disk", "state"),
]


def test_a_site_that_lacks_nothing(site, coordinator, tmp_path, capsys):
    config = site()
    with coordinator.server(tmp_path) as address:
        enter(config, coordinator, tmp_path, address)
        before = {path.name for path in config.state_dir.iterdir()}
        code, lines = command(tmp_path, capsys)
    assert code == 0
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in NAMES]
    shown = dict(zip(NAMES, lines, strict=True))
    assert "70 training images (normal=22, benign=27, malignant=21)" in shown["data"]
    assert re.search(
        r"train=70 val=25 \(normal=\d+, benign=\d+, malignant=\d+\) test=25 \(", shown["splits"]
    )
    assert "40 in 120 images" in shown["patients"]
    assert f"{address} reached over TLS, status=200" in shown["superlink"]
    assert "396 days" in shown["certificate"]
    assert code_sha256() in shown["code"]
    assert {path.name for path in config.state_dir.iterdir()} == before


def test_a_site_that_lacks_everything_still_gets_every_line(site, tmp_path, capsys):
    npz = f'[data]\ndataset = "npz"\nfile = "{tmp_path}/none.npz"\nclasses = ["a", "b"]'
    config = site(
        data=(PHANTOM, npz),
        limits=("require-privacy = false", "require-privacy = true"),
        device=('device = "auto"', 'device = "cuda"'),
    )
    shutil.rmtree(config.state_dir)
    code, lines = command(tmp_path, capsys)
    assert code == 1
    failed = ("data", "device", "keys", "membership", "superlink", "audit", "disk", "state")
    levels = {"code": "ok", "policy": "warning"} | dict.fromkeys(failed, "FAIL")
    assert {line.split()[1]: line.split()[0] for line in lines} == levels
    assert not any("Traceback" in line for line in lines)
    assert not config.state_dir.exists()


def test_a_file_that_is_wrong_is_told_like_everywhere(site, tmp_path):
    site()
    path = tmp_path / "A.toml"
    path.write_text(path.read_text().replace('device = "auto"', 'device = "tpu"'))
    with pytest.raises(FederationError, match="device=tpu") as error:
        client.__main__.command(["check", "--site", "A", "--config", str(path)])
    assert error.value.exit_code == 2


def test_warnings_alone_are_no_failure(site, coordinator, tmp_path, capsys):
    config = site(limits=("require-privacy = false", "require-privacy = true"))
    with coordinator.server(tmp_path) as address:
        enter(config, coordinator, tmp_path, address)
        code, lines = command(tmp_path, capsys)
    assert code == 0
    assert sum(line.startswith("warning") for line in lines) == 1


def test_a_check_that_breaks_is_a_line_and_hides_no_other(site, monkeypatch):
    def broken(config):
        yield Finding("ok", "first", "")
        raise ZeroDivisionError("a\nb\x1b[2J")

    def without_a_hint(config):
        raise FederationError("text")
        yield

    kept = {"broken": broken, "other": without_a_hint, "disk": CHECKS["disk"]}
    monkeypatch.setattr(check, "CHECKS", kept)
    found = [str(finding).split(maxsplit=2) for finding in findings(site())]
    assert found[:3] == [
        ["ok", "first"],
        ["FAIL", "broken", "ZeroDivisionError: a b [2J"],
        ["FAIL", "other", "text"],
    ]
    assert found[3][1] == "disk"


def own_file(folder, train=(0, 1, 0, 1), val=(0, 1), test=(1,), names=("no", "yes")) -> str:
    arrays = {}
    for split, labels in (("train", train), ("val", val), ("test", test)):
        arrays[f"{split}_images"] = np.zeros((len(labels), 16, 16), np.uint8)
        arrays[f"{split}_labels"] = np.array(labels, np.int64).reshape(-1, 1)
    np.savez(folder / "own.npz", **arrays)
    return f'[data]\ndataset = "npz"\nfile = "own.npz"\nclasses = {list(names)}'


@pytest.mark.parametrize(
    ("data", "level", "detail"),
    [
        ({}, "ok", "npz: 4 training images (no=2, yes=2)"),
        ({"train": [0, 0]}, "warning", "(no=2, yes=0); 1 of the classes have none here"),
    ],
)
def test_class_counts_are_shown(site, tmp_path, data, level, detail):
    found = run(site(data=(PHANTOM, own_file(tmp_path, **data))), "data")
    assert found["data"].level == level
    assert found["data"].detail.endswith(detail)


def test_data_without_a_training_image_fails(site, tmp_path):
    found = run(site(data=(PHANTOM, own_file(tmp_path, train=()))), "data")
    assert found["data"].level == "FAIL"
    assert "train_images=0 expected at least one image" in found["data"].detail


def test_data_that_cannot_be_read_fails(site, tmp_path):
    config = site(data=(PHANTOM, own_file(tmp_path)))
    (tmp_path / "own.npz").write_bytes(b"no zip")
    found = run(config, "data")
    assert list(found) == ["data"]
    assert found["data"].level == "FAIL"
    assert "truncated or no npz file" in found["data"].detail


@pytest.mark.parametrize("empty", ["val", "test"])
def test_an_empty_split_is_said(site, tmp_path, empty):
    found = run(site(data=(PHANTOM, own_file(tmp_path, **{empty: ()}))), "data")
    assert found["splits"].level == "warning"
    assert f"{empty}=0" in found["splits"].detail
    assert f"without {empty} images" in found["splits"].detail


def test_images_without_patients_are_said(site, tmp_path):
    found = run(site(data=(PHANTOM, own_file(tmp_path))), "data")
    assert found["patients"].level == "warning"
    assert found["patients"].detail.startswith("7 of 7 images name no patient")
    # A name of a patient is nowhere.
    assert "npz/train" not in found["patients"].detail


def own_folder(folder, more: str = "") -> str:
    for i in range(20):
        pictures.picture(folder / "own", f"{'no' if i % 2 else 'yes'}/{i}.png", i)
    return f'[data]\ndataset = "folder"\nfolder = "own"\n{more}'


def every(config, name: str) -> list[Finding]:
    """The findings of the check of data that have a name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(check, "CHECKS", {"data": CHECKS["data"]})
        return [finding for finding in findings(config) if finding.name == name]


def test_skipped_and_identical_images_are_said_once_and_not_logged(site, tmp_path, caplog):
    data = own_folder(tmp_path)
    shutil.copy(tmp_path / "own/no/1.png", tmp_path / "own/yes/copy.png")
    (tmp_path / "own/no/notes.txt").touch()
    (tmp_path / "own/no/empty.png").touch()
    config = site(data=(PHANTOM, data + "max-unreadable-share = 0.5\n"))
    for _ in range(2):  # the second time from the cached manifest
        skipped, identical = every(config, "images")
        assert skipped.level == identical.level == "warning"
        assert "skipped: 1 x empty file, 1 x no picture by its name" in skipped.detail
        assert "duplicate_groups=1 images=2" in identical.detail
        assert "label_conflicts=1" in identical.detail
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    logging.getLogger("client.data").warning("as before")
    assert "as before" in caplog.text


def test_sound_images_are_said_to_be_so_before_there_is_a_state_folder(site, tmp_path):
    config = site(data=(PHANTOM, own_folder(tmp_path)))
    config = config.model_copy(update={"state_dir": tmp_path / "not" / "yet"})
    assert [finding.level for finding in every(config, "data")] == ["ok"]
    assert [finding.level for finding in every(config, "cache")] == ["ok"]
    assert not (tmp_path / "not").exists()


def test_the_size_of_the_cache_is_said(site, tmp_path, monkeypatch):
    config = site(data=(PHANTOM, own_folder(tmp_path)))
    (cache,) = every(config, "cache")
    # Twenty RGB images of 224 x 224, one byte a value: 3.01 million bytes.
    assert (cache.level, cache.detail) == (
        "ok",
        "about 3 MiB for a run with model.image-size=224",
    )
    monkeypatch.setattr(check, "MIN_FREE", 2**62)
    (cache,) = every(config, "cache")
    assert cache.level == "warning"
    assert cache.detail.endswith(" MiB are free")


@pytest.mark.parametrize(
    ("expected", "label_map", "level", "detail"),
    [
        (["yes", "no"], "", "ok", "classes=yes, no"),
        (["ill", "no"], '"yes" = "ill"', "ok", "classes=ill, no"),
        ([], '"yes" = "ill"', "ok", "classes=no, ill"),
        (["no", "yes", "odd"], "", "warning", "without training images: odd"),
        (["no", "yes"], '"x" = "no"', "warning", "in label-map and not in the data: x"),
        (["ill", "no"], "", "FAIL", "classes not mapped: yes; the run has ill, no"),
    ],
)
def test_class_names_are_compared_with_the_runs(site, tmp_path, expected, label_map, level, detail):
    data = f"task-classes = {expected}\n{own_folder(tmp_path)}[data.label-map]\n{label_map}\n"
    (classes,) = every(site(data=(PHANTOM, data)), "classes")
    assert classes.level == level
    assert detail in classes.detail


def test_without_a_map_or_expected_classes_there_is_nothing_to_compare(site, tmp_path):
    assert every(site(data=(PHANTOM, own_folder(tmp_path))), "classes") == []


def test_no_gpu_where_one_is_asked_for_fails(site, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = run(site(device=('device = "auto"', 'device = "cuda"')), "device")
    assert list(found) == ["device"]
    assert found["device"].level == "FAIL"
    assert 'set device = "cpu"' in found["device"].detail


def test_the_slow_scan_is_said(site, monkeypatch):
    monkeypatch.setenv("MEDMAMBA_SCAN_BACKEND", "reference")
    found = run(site(), "device")
    assert found["device"].level == "ok"
    assert found["scan"].level == "warning"
    assert found["scan"].detail.startswith("reference: training is many times slower")


def test_a_scan_that_cannot_run_fails_with_its_hint(site, monkeypatch):
    monkeypatch.setenv("MEDMAMBA_SCAN_BACKEND", "mamba_ssm")
    found = run(site(device=('device = "auto"', 'device = "cpu"')), "device")
    assert found["device"].level == "FAIL"
    assert "MEDMAMBA_SCAN_BACKEND=mamba_ssm" in found["device"].detail


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("node.key", lambda path: path.chmod(0o604), "node.key has mode 0604"),
        ("wrap.key", lambda path: path.chmod(0o644), "wrap.key has mode 0644"),
        ("signing.key", Path.unlink, "signing.key cannot be read"),
        ("node.key", lambda path: path.write_text(""), "node.key is not a readable key"),
        ("A.enroll.json", Path.unlink, "A.enroll.json cannot be read"),
        ("A.enroll.json", lambda path: path.write_text("{}"), "A.enroll.json: "),
    ],
)
def test_keys_that_are_not_as_they_should_fail(site, name, damage, message):
    config = site()
    damage(config.state_dir / name)
    found = run(config, "keys")["keys"]
    assert found.level == "FAIL"
    assert message in found.detail


def test_a_state_folder_that_others_enter_is_said(site):
    config = site()
    config.state_dir.chmod(0o750)
    found = run(config, "keys")["keys"]
    assert found.level == "warning"
    assert f"mode 0750: chmod 700 {config.state_dir}" in found.detail
    assert stat.S_IMODE(config.state_dir.stat().st_mode) == 0o750


def test_a_membership_that_is_not_valid_fails_and_nothing_is_asked(site, coordinator, tmp_path):
    config = site()
    enter(config, coordinator, tmp_path)
    (config.state_dir / "ca.pem").write_text(Coordinator().ca_pem)
    found = run(config, "membership", "superlink")
    assert {name: f.level for name, f in found.items()} == {
        "membership": "FAIL",
        "superlink": "FAIL",
    }
    assert "ca.pem is not the certificate" in found["membership"].detail
    assert found["superlink"].detail == "not tried without a valid membership"


@pytest.mark.parametrize(("days", "level"), [(29.5, "warning"), (30.5, "ok")])
def test_an_authority_near_its_end_is_said(site, tmp_path, days, level):
    config = site()
    enter(config, Coordinator(days=days), tmp_path)
    found = run(config, "membership")
    assert found["membership"].level == "ok"
    assert found["authority"].level == level
    assert f"{int(days)} days" in found["authority"].detail


def test_an_authority_that_expired_since_fails(site):
    config = site()
    document = Coordinator(days=-1).admit(read_request(config))
    (config.state_dir / "join.json").write_text(document.to_json())
    (config.state_dir / "ca.pem").write_text(document.ca_certificate)
    found = run(config, "membership")
    assert found["authority"].level == "FAIL"
    assert found["authority"].detail.startswith("expired on 20")


def ask(site, coordinator, tmp_path, **server) -> dict[str, Finding]:
    """What is found of a server on loopback."""
    config = site()
    with coordinator.server(tmp_path, **server) as address:
        enter(config, coordinator, tmp_path, address)
        return run(config, "superlink")


def levels(found: dict[str, Finding]) -> list[str]:
    assert list(found) == ["superlink", "certificate", "clock"]
    return [finding.level for finding in found.values()]


@pytest.mark.parametrize("status", [200, 401, 404])
def test_any_answer_of_the_right_server_is_an_answer(site, coordinator, tmp_path, status):
    found = ask(site, coordinator, tmp_path, status=status)
    assert levels(found) == ["ok", "ok", "ok"]
    assert f"status={status}" in found["superlink"].detail


@pytest.mark.parametrize("status", [500, 502, 503])
def test_a_gateway_with_nothing_behind_it_fails(site, coordinator, tmp_path, status):
    found = ask(site, coordinator, tmp_path, status=status)
    assert levels(found) == ["FAIL", "ok", "ok"]
    assert f"answers {status}: the gateway is there" in found["superlink"].detail


@pytest.mark.parametrize(
    ("server", "reason"),
    [
        ({"days": -1}, "expired; the coordinator renews it: python -m server init --renew"),
        ({"begin": timedelta(days=1)}, "not valid yet: is this machine's clock right?"),
        ({"host": "127.0.0.2"}, "for other names than this"),
        ({"issuer": Coordinator()}, "of another authority"),
        ({"issuer": Coordinator(federation="f2")}, "of another authority"),
        ({"self_signed": True}, "of another authority"),
    ],
)
def test_a_certificate_that_is_not_the_coordinators_fails(
    site, coordinator, tmp_path, server, reason
):
    found = ask(site, coordinator, tmp_path, ahead=timedelta(hours=9), **server)
    assert levels(found) == ["FAIL", "FAIL", "warning"]
    assert "shows a certificate that is not accepted" in found["superlink"].detail
    assert found["certificate"].detail.startswith(reason)
    # The time that such a server tells is not believed.
    assert found["clock"].detail == "not compared: the superlink told no time"


@pytest.mark.parametrize(("days", "level"), [(29.5, "warning"), (30.5, "ok"), (0.5, "warning")])
def test_a_certificate_near_its_end_is_said(site, coordinator, tmp_path, days, level):
    found = ask(site, coordinator, tmp_path, days=days)
    assert levels(found) == ["ok", level, "ok"]
    assert f"{int(days)} days" in found["certificate"].detail


@pytest.mark.parametrize(
    ("seconds", "level", "detail"),
    [
        (0, "ok", "the superlink's"),
        (50, "ok", "behind the superlink's"),
        (-50, "ok", "ahead of the superlink's"),
        (70, "warning", "behind the superlink's; NTP?"),
        (-70, "warning", "ahead of the superlink's; NTP?"),
        (290, "warning", "behind"),
        (310, "FAIL", "behind the superlink's; it refuses more than 300 s: set the clock (NTP)"),
        (-310, "FAIL", "ahead of the superlink's; it refuses more than 300 s: set the clock (NTP)"),
    ],
)
def test_a_clock_that_differs_is_said(site, coordinator, tmp_path, seconds, level, detail):
    found = ask(site, coordinator, tmp_path, ahead=timedelta(seconds=seconds))
    assert levels(found) == ["ok", "ok", level]
    assert detail in found["clock"].detail


def test_a_server_that_tells_no_time_is_said(site, coordinator, tmp_path):
    found = ask(site, coordinator, tmp_path, ahead=None)
    assert levels(found) == ["ok", "ok", "warning"]


def test_a_port_where_nothing_listens_fails(site, coordinator, tmp_path):
    config = site()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        enter(config, coordinator, tmp_path, f"127.0.0.1:{taken.getsockname()[1]}")
        found = run(config, "superlink")
    assert levels(found) == ["FAIL", "warning", "warning"]
    assert found["superlink"].detail.endswith("refuses the connection: nothing listens there")
    assert found["certificate"].detail == "not seen"


def test_a_server_without_tls_fails(site, coordinator, tmp_path):
    config = site()
    with serving() as address:
        enter(config, coordinator, tmp_path, address)
        found = run(config, "superlink")
    assert levels(found) == ["FAIL", "warning", "warning"]
    assert "does not speak TLS as expected" in found["superlink"].detail


def test_a_server_that_says_nothing_is_not_waited_for(site, coordinator, tmp_path, monkeypatch):
    config = site()
    monkeypatch.setattr(check, "ask", lambda *arguments: probe.ask(*arguments, seconds=0.1))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        enter(config, coordinator, tmp_path, f"127.0.0.1:{silent.getsockname()[1]}")
        found = run(config, "superlink")
    assert levels(found) == ["FAIL", "warning", "warning"]
    assert "does not answer within 0.1 s" in found["superlink"].detail


@pytest.mark.parametrize("how", ["an end", "a reset"])
def test_a_line_that_ends_in_the_middle_of_a_greeting_is_no_other_kind_of_server(
    site, coordinator, tmp_path, how
):
    """Which of the two a site sees of a cut line is chance."""

    def end_it(listener):
        connection, _ = listener.accept()
        with connection:
            if how == "a reset":
                linger = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            else:
                connection.recv(1 << 16)

    config = site()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=end_it, args=(listener,))
        thread.start()
        enter(config, coordinator, tmp_path, f"127.0.0.1:{listener.getsockname()[1]}")
        found = run(config, "superlink")
        thread.join()
    assert levels(found) == ["FAIL", "warning", "warning"]
    assert "ends the connection" in found["superlink"].detail


def test_a_name_that_nobody_knows_fails(site, coordinator, tmp_path, monkeypatch):
    def unknown(*arguments, **options):
        raise socket.gaierror(-2, "Name or service not known")

    config = site()
    enter(config, coordinator, tmp_path, "hub.example:443")
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    found = run(config, "superlink")
    assert "hub.example:443 has a name that is not known here" in str(found["superlink"])


def test_the_sites_own_address_is_tried(coordinator, tmp_path, site):
    with coordinator.server(tmp_path) as address:
        config = site(superlink=("state-dir = ", f'superlink = "{address}"\nstate-dir = '))
        enter(config, coordinator, tmp_path, "127.0.0.1:1")
        found = run(config, "superlink")
    assert levels(found) == ["ok", "ok", "ok"]


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("require-privacy = false", "require-privacy = true", "require-privacy: this version"),
        ("require-encryption = false", "require-encryption = true", "require-encryption: this"),
        ("[limits]", "[limits]\nallowed-strategies = []", "allowed-strategies is empty"),
        ("[limits]", "[limits]\nallowed-sizes = []", "allowed-sizes is empty"),
        ("[limits]", f'[limits]\nallowed-code = ["{"0" * 64}"]', "allowed-code lacks the code"),
    ],
)
def test_limits_under_which_nothing_runs_are_said(site, old, new, problem):
    found = run(site(limits=(old, new)), "policy")["policy"]
    assert found.level == "warning"
    assert found.detail.startswith(problem)


def test_the_installed_code_may_be_the_only_one_allowed(site):
    allowed = f'[limits]\nallowed-code = ["{code_sha256()}"]'
    assert run(site(limits=("[limits]", allowed)), "policy")["policy"].level == "ok"


def test_a_requirement_that_a_run_can_meet_is_no_warning(site, monkeypatch):
    class Protected(BaseModel):
        mode: Literal["off", "on"] = "off"

    config = site(
        privacy=("require-privacy = false", "require-privacy = true"),
        encryption=("require-encryption = false", "require-encryption = true"),
    )
    monkeypatch.setattr("strategies.run_config.PrivacySection", Protected)
    monkeypatch.setattr("strategies.run_config.EncryptionSection", Protected)
    assert run(config, "policy")["policy"].level == "ok"


def test_a_log_that_was_edited_fails(site):
    config = site()
    path = config.state_dir / "audit.jsonl"
    path.write_text(path.read_text().replace("keys-created", "keys-deleted"))
    found = run(config, "audit")["audit"]
    assert found.level == "FAIL"
    assert "line 2: content and hash do not agree" in found.detail


MIB = 2**20


@pytest.mark.parametrize(
    ("free", "level"),
    [
        (199 * MIB, "FAIL"),
        (200 * MIB, "warning"),
        (2047 * MIB, "warning"),
        (2048 * MIB, "ok"),
    ],
)
def test_a_disk_that_is_nearly_full_is_said(site, monkeypatch, free, level):
    config = site()
    usage = shutil.disk_usage(config.state_dir)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert run(config, "disk")["disk"].level == level


def test_a_folder_that_cannot_be_written_fails(site):
    config = site()
    (config.state_dir / "results").write_text("a file in the place of the folder")
    found = run(config, "state")["state"]
    assert found.level == "FAIL"
    assert f"{config.state_dir / 'results'} cannot be written" in found.detail
