"""``server init``, ``admit``, ``revoke``, ``audit``: what is typed, told and refused."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime, timedelta

import pytest

import server.__main__
from fakes.coordinators import Coordinator, serving
from fakes.enrolments import Superlink, request
from server.certificates import create_authority, issue_server_certificate
from server.federation import Federation
from server.flower_control import Control, SuperlinkDownError, SuperlinkRefusalError
from server.provisioning import (
    InitOptions,
    admit,
    initialise,
    read_request,
    revoke,
    tell_superlink,
)
from strategies.enrolment import JoinDocument
from strategies.errors import ConfigError, FederationError

ADDRESS = "hub.example.org:443"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def federation(tmp_path) -> Federation:
    return Federation.create(tmp_path / "state", name="lungs", address=ADDRESS, port=free_port())


@pytest.fixture
def typed(federation, monkeypatch, capsys):
    """Runs ``python -m server WORDS`` here and returns the lines it printed, warnings first."""

    def run(*words) -> list[str]:
        arguments = [*map(str, words), "--state-dir", str(federation.state_dir)]
        assert server.__main__.command(arguments) == 0
        captured = capsys.readouterr()
        return captured.err.splitlines() + captured.out.splitlines()

    return run


def save(folder, asked, name="A.enroll.json"):
    path = folder / name
    path.write_text(asked.to_json())
    return path


def field(told: str, name: str) -> str:
    [line] = [line for line in told.splitlines() if line.startswith(f"{name} ")]
    return line.removeprefix(name).strip()


def content(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- init ----------------------------------------------------------------------------------------


def test_a_new_federation_is_described(tmp_path):
    options = InitOptions(name="lungs", address=ADDRESS, sans=["hub2.example.org"], min_cohort=3)
    told = initialise(tmp_path / "state", options)
    federation = Federation.open(tmp_path / "state")
    assert field(told, "federation") == federation.id
    assert field(told, "address").startswith(ADDRESS)
    assert field(told, "superlink").startswith("127.0.0.1:8000")
    assert field(told, "min-cohort") == "3"
    assert field(told, "fingerprint").startswith(federation.fingerprint)
    for line in federation.certificates().expiries():
        assert f"certificate   {line}" in told
    assert "for hub.example.org hub2.example.org localhost 127.0.0.1 ::1" in told
    assert "Keep a backup" in told


def test_what_is_left_out_has_a_default_but_for_the_address(tmp_path):
    with pytest.raises(ConfigError, match=r"^--address is missing: expected host:port") as caught:
        initialise(tmp_path / "state", InitOptions())
    assert caught.value.hint == "--address hub.example.org:443"
    assert not (tmp_path / "state").exists()
    initialise(tmp_path / "state", InitOptions(address=ADDRESS))
    federation = Federation.open(tmp_path / "state")
    assert (federation.name, federation.port) == ("federation", 8000)
    assert federation.policy.min_cohort == 2


@pytest.mark.parametrize(
    "again",
    [
        InitOptions(),
        InitOptions(name="lungs"),
        InitOptions(address=ADDRESS, sans=["hub2.example.org"], min_cohort=3),
        InitOptions(sans=["hub2.example.org", "hub.example.org"]),
    ],
)
def test_asked_again_it_tells_the_same_and_changes_nothing(tmp_path, again):
    first = InitOptions(name="lungs", address=ADDRESS, sans=["hub2.example.org"], min_cohort=3)
    told = initialise(tmp_path / "state", first)
    before = content(tmp_path / "state")
    assert initialise(tmp_path / "state", again) == told
    assert content(tmp_path / "state") == before


@pytest.mark.parametrize(
    ("again", "shown", "hint"),
    [
        (InitOptions(name="hearts"), "name=hearts", "leave it out"),
        (InitOptions(address="a:1"), "address=a:1", "--renew --san NAME"),
        (InitOptions(port=9), "port=9", "leave it out"),
        (InitOptions(min_cohort=4), '"min-cohort":4', "leave it out"),
        (InitOptions(sans=["c.example.org"]), "sans=c.example.org", "--renew --san NAME"),
        (InitOptions(min_cohort=0), "--min-cohort 0: expected at least 1", ""),
        (InitOptions(address="a:1", renew=True), "address=a:1", "--renew --san NAME"),
    ],
)
def test_contradictions_are_refused_and_change_nothing(tmp_path, again, shown, hint):
    initialise(tmp_path / "state", InitOptions(name="lungs", address=ADDRESS))
    before = content(tmp_path / "state")
    with pytest.raises(ConfigError) as caught:
        initialise(tmp_path / "state", again)
    assert shown in str(caught.value)
    assert hint in caught.value.hint
    assert content(tmp_path / "state") == before


def test_renewing_says_what_to_start_again(tmp_path):
    initialise(tmp_path / "state", InitOptions(name="lungs", address=ADDRESS))
    before = content(tmp_path / "state")
    told = initialise(tmp_path / "state", InitOptions(sans=["new.example.org"], renew=True))
    assert "for hub.example.org new.example.org localhost" in told
    assert "Start `python -m server superlink` again" in told
    after = content(tmp_path / "state")
    assert before["server.pem"] != after["server.pem"]
    kept = ("ca.pem", "ca.key", "order.key", "server.key", "superlink.secret")
    assert [before[name] for name in kept] == [after[name] for name in kept]
    assert initialise(tmp_path / "state", InitOptions()).splitlines()[:-2] == told.splitlines()[:-1]


def test_there_must_be_something_to_renew(tmp_path):
    with pytest.raises(ConfigError, match="has no federation"):
        initialise(tmp_path / "state", InitOptions(address=ADDRESS, renew=True))
    assert not (tmp_path / "state").exists()


# --- admit ---------------------------------------------------------------------------------------


def test_admitting_writes_what_the_site_joins_with(federation, tmp_path):
    asked = request("A")
    told = admit(federation, save(tmp_path, asked))
    path = tmp_path / "A.join.json"
    document = JoinDocument.parse(path.read_text())
    assert (document.site, document.site_fingerprint) == ("A", asked.fingerprint)
    assert field(told, "site") == "A admitted"
    assert field(told, "fingerprint") == (
        f"{asked.fingerprint}  compare it with the site by telephone"
    )
    assert field(told, "join file").startswith(str(path))
    assert field(told, "coordinator").startswith(federation.fingerprint)


def test_admitting_again_changes_nothing(federation, tmp_path):
    file = save(tmp_path, request("A"))
    admit(federation, file)
    before = content(tmp_path)
    assert field(admit(federation, file), "site") == "A was admitted before"
    assert content(tmp_path) == before


def test_a_lost_join_file_is_written_again(federation, tmp_path):
    file = save(tmp_path, request("A"))
    admit(federation, file)
    (tmp_path / "A.join.json").unlink()
    admit(federation, file, output=tmp_path / "again.json")
    assert JoinDocument.parse((tmp_path / "again.json").read_text()).site == "A"
    assert not (tmp_path / "A.join.json").exists()


def test_a_join_file_of_another_federation_is_replaced(federation, tmp_path):
    file = save(tmp_path, request("A"))
    other = Federation.create(tmp_path / "other", name="hearts", address=ADDRESS)
    admit(other, file)
    admit(federation, file)
    assert JoinDocument.parse((tmp_path / "A.join.json").read_text()).name == "lungs"


@pytest.mark.parametrize("spell", [str, str.upper, lambda text: text.replace("-", " ")])
def test_the_fingerprint_told_by_telephone_is_compared(federation, tmp_path, spell):
    asked = request("A")
    told = admit(federation, save(tmp_path, asked), spell(asked.fingerprint))
    assert field(told, "fingerprint").endswith("it is the one you gave")


@pytest.mark.parametrize("given", ["0000-0000-0000-0000-0000", "x", "-", ""])
def test_another_fingerprint_is_refused(federation, tmp_path, given):
    asked = request("A")
    for expected in (given, asked.fingerprint[:-1]):
        with pytest.raises(ConfigError) as caught:
            admit(federation, save(tmp_path, asked), expected)
        assert str(caught.value) == (
            f"fingerprint={expected}: the request of site=A has {asked.fingerprint}"
        )
        assert "do not admit this file" in caught.value.hint
    assert federation.admitted() == {}
    assert not (tmp_path / "A.join.json").exists()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a file of this kind"),
        (b"{}", "is missing"),
        (b"\xff\xfe", "is not text"),
        (b"[" * 60_000, "not a file of this kind"),
        (b" " * 70_000, "longer than 65536 bytes"),
    ],
)
def test_a_file_that_is_no_request_is_refused(federation, tmp_path, data, reason):
    path = tmp_path / "A.enroll.json"
    path.write_bytes(data)
    with pytest.raises(ConfigError) as caught:
        admit(federation, path)
    assert str(caught.value).startswith(str(path))
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "NAME.enroll.json" in caught.value.hint
    assert federation.admitted() == {}


def test_a_request_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(ConfigError, match=rf"^{path} cannot be read \("):
            read_request(path)


@pytest.mark.parametrize(
    "key", ["site", "created", "node_public_key", "signing_public_key", "wrap_public_key"]
)
def test_a_request_that_was_changed_on_its_way_is_refused(federation, tmp_path, key):
    document = json.loads(request("A").to_json())
    other = {**json.loads(request("B").to_json()), "created": "2026-01-01T00:00:00.000+00:00"}
    document[key] = other[key]
    path = tmp_path / "A.enroll.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"A\.enroll\.json: signature does not match"):
        admit(federation, path)
    assert federation.admitted() == {}


def test_a_join_document_is_no_request(federation, tmp_path):
    admit(federation, save(tmp_path, request("A")))
    with pytest.raises(ConfigError, match="EnrolmentRequest"):
        admit(federation, tmp_path / "A.join.json")


@pytest.mark.parametrize("name", ["A.enroll.json", "thesis.tex"])
def test_no_other_file_is_replaced(federation, tmp_path, name):
    file = save(tmp_path, request("A"))
    (tmp_path / "thesis.tex").write_text("x")
    before = content(tmp_path)
    with pytest.raises(ConfigError, match="exists and is no join document: not replaced"):
        admit(federation, file, output=tmp_path / name)
    assert content(tmp_path) == before
    assert federation.admitted() == {}


def test_the_folder_of_the_join_file_must_be_there(federation, tmp_path):
    with pytest.raises(ConfigError, match="none is not a folder"):
        admit(federation, save(tmp_path, request("A")), output=tmp_path / "none" / "A.json")
    assert federation.admitted() == {}


def test_a_full_disk_at_the_join_file_is_told_with_what_was_done(federation, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    file = save(tmp_path, request("A"))
    with monkeypatch.context() as patch:
        patch.setattr("server.provisioning.write_atomic", full)
        with pytest.raises(ConfigError, match=r"site=A is admitted, but .*No space left") as caught:
            admit(federation, file)
    assert "--output FILE" in caught.value.hint
    assert field(admit(federation, file), "site") == "A was admitted before"
    assert (tmp_path / "A.join.json").exists()


def test_revoking_says_whether_it_had_to(federation):
    federation.admit(request("A"))
    assert "A revoked: nothing that it sends from now on counts" in revoke(federation, "A")
    assert "A was revoked before" in revoke(federation, "A")
    assert federation.admitted() == {}


# --- flower-superlink ----------------------------------------------------------------------------


def test_a_superlink_that_does_not_run_learns_later(federation):
    federation.admit(request("A"))
    assert "does not run; it learns of this when it starts" in tell_superlink(federation)


@pytest.fixture
def superlink(federation, monkeypatch):
    superlink = Superlink()
    monkeypatch.setattr("server.flower_control.Control", superlink.connect)
    with socket.create_server(("127.0.0.1", federation.port)):
        yield superlink


def test_a_superlink_that_runs_is_told_at_once(federation, superlink, typed, tmp_path):
    file = save(tmp_path, request("A"))
    assert typed("admit", file)[-1] == "superlink     registered node A"
    assert typed("admit", file)[-1] == "superlink     knows this already"
    assert superlink.connectable() == ["A"]
    assert typed("revoke", "A") == [
        "site          A revoked: nothing that it sends from now on counts",
        "superlink     unregistered node A",
    ]
    assert superlink.connectable() == []


def test_what_is_done_is_told_before_the_superlinks_refusal(federation, tmp_path, capsys):
    with serving() as address:  # another program, without TLS
        port = int(address.rpartition(":")[2])
        other = Federation.create(tmp_path / "s", name="x", address=f"127.0.0.1:{port}", port=port)
        words = ["admit", str(save(tmp_path, request("A"))), "--state-dir", str(other.state_dir)]
        with pytest.raises(FederationError, match="is not this federation's flower-superlink"):
            server.__main__.command(words)
    assert "site          A admitted" in capsys.readouterr().out
    assert set(other.admitted()) == {"A"}


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(typed, tmp_path, monkeypatch):
    coordinator = Coordinator()
    ca_file = tmp_path / "ca.pem"
    ca_file.write_text(coordinator.ca_pem)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("NO_PROXY", "intranet.example.org")
    monkeypatch.setenv("no_proxy", "")

    def ask() -> None:
        with coordinator.server(tmp_path) as address, Control(address, ca_file) as control:
            control.nodes()

    with pytest.raises(SuperlinkDownError):  # nobody listens where the proxy should
        ask()
    typed("audit")
    with pytest.raises(SuperlinkRefusalError, match="answered HTTP 501"):
        ask()
    assert os.environ["NO_PROXY"] == "intranet.example.org,127.0.0.1"


# --- the command line ----------------------------------------------------------------------------


def age(federation: Federation, days: float) -> None:
    """Let the certificates be as old as that."""
    then = datetime.now(UTC) - timedelta(days=days)
    for name in ("ca.pem", "server.pem"):
        (federation.state_dir / name).unlink()
    create_authority(federation.state_dir, federation.id, then)
    issue_server_certificate(federation.state_dir, federation.id, federation.identity.hosts, then)


@pytest.mark.parametrize("words", [["init"], ["audit", "--verify"], ["revoke", "A"]])
@pytest.mark.parametrize(("days", "warned"), [(366, False), (368, True), (398, True)])
def test_every_command_warns_of_a_certificate_that_ends(federation, typed, words, days, warned):
    federation.admit(request("A"))
    age(federation, days)
    warnings = [line for line in typed(*words) if line.startswith("warning: ")]
    assert [line.split()[1] for line in warnings] == (["server.pem"] if warned else [])


@pytest.mark.parametrize(
    "words", [["superlink"], ["superlink", "--print"], ["run", "--output", "x"]]
)
def test_with_an_expired_certificate_nothing_starts(federation, typed, words):
    age(federation, 398)
    with pytest.raises(ConfigError, match=r"^server\.pem expired on .*: sites refuse it$") as error:
        typed(*words)
    assert error.value.hint.startswith("python -m server init --renew")
    assert typed("init", "--renew")[-1].startswith("Renewed.")
    Federation.open(federation.state_dir).certificates().require_valid()


def test_a_damaged_certificate_stops_only_what_needs_it(federation, typed):
    (federation.state_dir / "server.pem").write_text("x")
    assert typed("audit", "--verify")[0] == "warning: server.pem is not a PEM certificate"
    with pytest.raises(ConfigError, match=r"^server\.pem is not a PEM certificate$"):
        typed("superlink")
    assert typed("init", "--renew")[-1].startswith("Renewed.")


def test_the_audit_log_is_shown_and_verified(federation, typed, tmp_path):
    asked = request("A")
    typed("admit", save(tmp_path, asked), "--fingerprint", asked.fingerprint)
    typed("revoke", "A")
    entries = [json.loads(line) for line in typed("audit")]
    assert [entry["event"] for entry in entries] == [
        "created",
        "federation-created",
        "site-admitted",
        "site-revoked",
    ]
    [verified] = typed("audit", "--verify")
    assert verified == f"audit log intact entries=4 head={entries[-1]['hash']}"

    lines = federation.audit.path.read_text().splitlines(keepends=True)
    federation.audit.path.write_text("".join([*lines[:2], *lines[3:]]))
    with pytest.raises(FederationError, match="line 3: a line before it is missing"):
        typed("audit", "--verify")
    federation.audit.path.unlink()
    for words in (["audit"], ["audit", "--verify"]):
        with pytest.raises(FederationError, match="missing or empty"):
            typed(*words)


def test_run_needs_one_directory(typed):
    for words in ([], ["--output", "a", "--resume", "b"]):
        with pytest.raises(ConfigError, match="give either --output"):
            typed("run", *words)


def test_options_reach_what_they_are_for(federation, typed, monkeypatch, tmp_path):
    requests, services = [], []
    monkeypatch.setattr("server.command.run", lambda asked: requests.append(asked) or 0)
    monkeypatch.setattr(
        "server.superlink.serve",
        lambda asked, *, executor: services.append((asked.id, executor)) or 0,
    )
    typed("run", "--output", "runs/x", "--set", "seed=1", "--run-config", "r.toml")
    [asked] = requests
    assert asked.federation.id == federation.id
    assert (str(asked.output), asked.resume, str(asked.run_config)) == ("runs/x", None, "r.toml")
    assert asked.assignments == ["seed=1"]
    typed("superlink")
    typed("superlink", "--executor")
    assert services == [(federation.id, False), (federation.id, True)]
    # Sites come from outside: nginx stands before it.
    assert (federation.state_dir / "nginx.conf").exists()


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (["--name", "x"], "--name"),
        (["--address", "a:1"], "--address"),
        (["--san", "x"], "--san"),
        (["--min-cohort", "2"], "--min-cohort"),
        (["--renew"], "--renew"),
    ],
)
def test_the_demo_decides_for_itself(typed, words, option):
    with pytest.raises(ConfigError, match=rf"^--demo with {option}: the demo decides that itself$"):
        typed("init", "--demo", *words)


def test_what_is_sent_to_a_site_holds_no_private_key(federation, tmp_path):
    admit(federation, save(tmp_path, request("A")))
    sent = (tmp_path / "A.join.json").read_bytes()
    for name in ("ca.key", "server.key", "order.key"):
        body = (federation.state_dir / name).read_bytes().splitlines()[1:-1]
        assert body
        assert not any(line in sent for line in body)
