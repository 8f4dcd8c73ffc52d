"""The coordinator's state folder: made once, closed to others, and the register of sites in it."""

from __future__ import annotations

import json
import stat
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.serialization import load_pem_public_key

import server.admissions
import server.federation
from fakes.enrolments import Keys, request
from server.federation import Federation
from server.federation_file import Identity, host_of
from strategies.enrolment import FederationPolicy, JoinDocument
from strategies.errors import ConfigError, FederationError
from strategies.files import write_atomic
from strategies.identity import read_secret

OPTIONS = {"name": "lungs", "address": "hub.example.org:443"}


@pytest.fixture
def federation(tmp_path) -> Federation:
    return Federation.create(tmp_path / "state", **OPTIONS)


def content(folder) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def events(federation: Federation) -> list[tuple[str, dict]]:
    federation.audit.verify()
    lines = federation.audit.path.read_text().splitlines()
    return [(entry["event"], entry["fields"]) for entry in map(json.loads, lines)]


# --- making and opening --------------------------------------------------------------------------


def test_a_new_federation_has_everything_and_is_closed_to_others(federation):
    folder = federation.state_dir
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in folder.iterdir()
        if not path.name.endswith("lock")
    }
    assert modes == {
        "audit.jsonl": 0o644,
        "ca.key": 0o600,
        "ca.pem": 0o644,
        "federation.json": 0o600,
        "flower": 0o700,
        "order.key": 0o600,
        "server.key": 0o600,
        "server.pem": 0o644,
        "sites": 0o700,
        "superlink.secret": 0o600,
    }
    assert len((folder / "superlink.secret").read_bytes()) == 32
    assert federation.certificates().hosts == ["hub.example.org", "localhost", "127.0.0.1", "::1"]
    name, _, digits = federation.id.rpartition("-")
    assert (name, len(digits)) == ("lungs", 16)
    assert events(federation) == [
        ("created", {}),
        (
            "federation-created",
            {"federation": federation.id, "order_key": federation.fingerprint},
        ),
    ]


def test_its_parts_are_where_it_says(federation):
    folder = federation.state_dir
    assert federation.ca_file == folder / "ca.pem"
    assert federation.server_certificate_file == folder / "server.pem"
    assert federation.server_key_file == folder / "server.key"
    assert federation.secret_file == folder / "superlink.secret"
    assert federation.database_file == folder / "superlink.sqlite"
    assert federation.flower_home == folder / "flower"
    assert (federation.name, federation.address, federation.port) == (*OPTIONS.values(), 8000)
    assert federation.superlink_address == "127.0.0.1:8000"
    assert federation.policy == FederationPolicy()


def test_two_federations_share_nothing(tmp_path):
    one, two = (Federation.create(tmp_path / name, **OPTIONS) for name in ("one", "two"))
    assert one.id != two.id
    assert one.fingerprint != two.fingerprint
    first, second = content(one.state_dir), content(two.state_dir)
    assert [name for name in first if first[name] == second[name] and first[name]] == []


def test_made_again_it_is_the_same_to_the_byte(federation):
    before = content(federation.state_dir)
    again = Federation.create(federation.state_dir, **OPTIONS)
    assert (again.id, again.fingerprint) == (federation.id, federation.fingerprint)
    assert content(federation.state_dir) == before


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"name": "hearts"}, "name=hearts: this federation has name=lungs"),
        ({"address": "hub.example.org:8443"}, "has address=hub.example.org:443"),
        ({"port": 9000}, "port=9000: this federation has port=8000"),
        ({"sans": ["b.example.org"]}, "sans=b.example.org: this federation has sans="),
        ({"policy": FederationPolicy(min_cohort=5)}, '"min-cohort":5'),
    ],
)
def test_other_values_for_an_existing_one_are_refused_and_change_nothing(federation, change, shown):
    before = content(federation.state_dir)
    with pytest.raises(ConfigError) as caught:
        Federation.create(federation.state_dir, **{**OPTIONS, **change})
    assert shown in str(caught.value)
    assert caught.value.hint
    assert content(federation.state_dir) == before


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"name": "two words"}, "name=two words"),
        ({"name": ""}, "name="),
        ({"address": "hub.example.org"}, "expected host:port"),
        ({"address": "hub.example.org:0"}, "expected host:port"),
        ({"address": "https://hub.example.org:443"}, "expected brackets around an IPv6 address"),
        ({"address": "https:443/x"}, "expected host:port"),
        ({"address": "0.0.0.0:443"}, "not one to listen on"),
        ({"address": "[::]:443"}, "not one to listen on"),
        ({"address": "2001:db8::1:443"}, "expected brackets"),
        ({"address": "[::0]:443"}, "not one to listen on"),
        ({"address": "[hub]:443"}, "expected a DNS name"),
        ({"address": "hub.example.org:8000"}, "has flower-superlink's own port=8000"),
        ({"port": 0}, "port=0"),
        ({"port": 65536}, "port=65536"),
        ({"sans": ["a b"]}, "expected a DNS name or an IP address"),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_is_made(tmp_path, change, shown):
    with pytest.raises(ConfigError) as caught:
        Federation.create(tmp_path / "state", **{**OPTIONS, **change})
    assert shown in str(caught.value)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    ("address", "host"),
    [("hub.example.org:443", "hub.example.org"), ("192.0.2.1:1", "192.0.2.1"), ("[::1]:8", "::1")],
)
def test_the_host_of_an_address(address, host):
    assert host_of(address) == host


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_sites_of_this_machine_connect_without_a_gateway(tmp_path, host):
    address = f"{host}:8000"
    assert Federation.create(tmp_path / "s", name="demo", address=address).address == address


@pytest.mark.parametrize(
    "step", ["create_authority", "issue_server_certificate", "create_signing_key", "AuditLog"]
)
def test_an_interrupted_making_is_refused_until_it_is_finished(tmp_path, monkeypatch, step):
    def power_failure(*_):
        raise KeyboardInterrupt

    folder = tmp_path / "state"
    with monkeypatch.context() as patch:
        patch.setattr(server.federation, step, power_failure)
        with pytest.raises(KeyboardInterrupt):
            Federation.create(folder, **OPTIONS)
    with pytest.raises(ConfigError, match="was interrupted") as caught:
        Federation.open(folder)
    assert caught.value.hint == "run the same `python -m server init` again"
    unfinished = json.loads((folder / "federation.json").read_text())["id"]
    assert Federation.create(folder, **OPTIONS).id == unfinished
    assert Federation.open(folder).admitted() == {}


def test_two_that_make_it_at_once_make_one(tmp_path):
    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(Federation.create(tmp_path / "state", **OPTIONS))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({(one.id, one.fingerprint) for one in found}) == 1
    assert len(found) == 4


def test_a_lost_federation_file_is_not_made_anew_over_the_keys(federation):
    (federation.state_dir / "federation.json").unlink()
    before = content(federation.state_dir)
    with pytest.raises(ConfigError, match=r"has no federation\.json but has audit") as caught:
        Federation.create(federation.state_dir, **OPTIONS)
    assert "restore federation.json from a backup" in caught.value.hint
    assert content(federation.state_dir) == before


@pytest.mark.parametrize(
    ("name", "use"),
    [
        ("order.key", lambda federation: federation.order_key),
        ("superlink.secret", lambda federation: read_secret(federation.secret_file)),
        ("ca.pem", Federation.certificates),
        ("server.key", Federation.certificates),
    ],
)
def test_a_lost_key_is_not_replaced(federation, name, use):
    (federation.state_dir / name).unlink()
    again = Federation.create(federation.state_dir, **OPTIONS)
    with pytest.raises(ConfigError, match=rf"{name} cannot be read \(No such file or directory\)"):
        use(again)


def test_the_authoritys_key_may_be_kept_elsewhere_but_for_renewing(federation):
    (federation.state_dir / "ca.key").unlink()
    again = Federation.open(federation.state_dir)
    again.admit(request("A"))
    again.certificates().require_valid()
    with pytest.raises(ConfigError, match=r"secret file ca\.key cannot be read"):
        again.renew()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"id": 1}'])
def test_a_damaged_federation_file_is_one_line(federation, text):
    path = federation.state_dir / "federation.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        Federation.open(federation.state_dir)
    assert str(caught.value).startswith(f"{path} is damaged: ")
    assert "\n" not in str(caught.value)
    assert caught.value.hint == "restore it from a backup"


def test_an_unknown_field_is_refused(federation):
    path = federation.state_dir / "federation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "adress": "x:1"}))
    with pytest.raises(ConfigError, match=r"unknown key adress=x:1"):
        Federation.open(federation.state_dir)


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o755, 0o710])
def test_a_folder_that_others_may_enter_is_refused(federation, mode):
    federation.state_dir.chmod(mode)
    with pytest.raises(ConfigError, match=rf"has mode {mode:04o}: others may enter") as caught:
        Federation.open(federation.state_dir)
    assert caught.value.hint == f"chmod 700 {federation.state_dir}"


@pytest.mark.parametrize("name", ["ca.key", "server.key", "order.key", "superlink.secret"])
def test_a_secret_that_others_may_read_stops_everything(federation, name):
    (federation.state_dir / name).chmod(0o640)
    with pytest.raises(ConfigError, match=rf"{name} has mode 0640: others may read it"):
        Federation.open(federation.state_dir)


def test_an_empty_folder_that_others_may_enter_is_closed(tmp_path):
    (tmp_path / "state").mkdir(mode=0o755)
    federation = Federation.create(tmp_path / "state", **OPTIONS)
    assert stat.S_IMODE(federation.state_dir.stat().st_mode) == 0o700


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    mode = tmp_path.stat().st_mode
    with pytest.raises(ConfigError, match=r"has no federation\.json but has thesis\.tex"):
        Federation.create(tmp_path, **OPTIONS)
    assert tmp_path.stat().st_mode == mode


def test_where_a_file_is_no_folder_can_be(tmp_path):
    (tmp_path / "state").write_text("x")
    with pytest.raises(ConfigError, match=r"folder .*state cannot be made \(File exists\)"):
        Federation.create(tmp_path / "state", **OPTIONS)


# --- renewing ------------------------------------------------------------------------------------


def test_renewing_adds_names_and_keeps_all_that_sites_pinned(federation):
    before = content(federation.state_dir)
    federation.renew(["hub2.example.org", "hub.example.org"])
    after = content(federation.state_dir)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"server.pem", "federation.json", "audit.jsonl"}
    hosts = ["hub.example.org", "hub2.example.org", "localhost", "127.0.0.1", "::1"]
    assert federation.certificates().hosts == hosts
    federation.renew()
    assert Federation.open(federation.state_dir).certificates().hosts == hosts
    assert events(federation)[-1] == (
        "certificate-renewed",
        {"hosts": "hub.example.org hub2.example.org hub.example.org"},
    )


def test_a_certificate_renewed_with_a_bad_name_stays_as_it_was(federation):
    before = content(federation.state_dir)
    with pytest.raises(ConfigError, match="expected a DNS name"):
        federation.renew(["a b"])
    assert content(federation.state_dir) == before


def test_a_lost_server_key_and_certificate_are_renewed(federation):
    for name in ("server.key", "server.pem"):
        (federation.state_dir / name).unlink()
    federation.renew()
    federation.certificates().require_valid()


def test_an_expired_certificate_is_renewed(federation):
    federation.renew(now=datetime.now(UTC) - timedelta(minutes=5))
    later = datetime.now(UTC) + timedelta(days=400)
    with pytest.raises(ConfigError, match="expired"):
        federation.certificates().require_valid(later)
    federation.renew(now=later)
    federation.certificates().require_valid(later)


# --- admitting and revoking ----------------------------------------------------------------------


def test_an_admitted_site_counts_and_gets_what_it_joins_with(federation):
    keys = Keys()
    asked = keys.request("A")
    document = federation.admit(asked)
    assert JoinDocument.parse(document.to_json()) == document
    assert document.federation == federation.id
    assert (document.name, document.address) == ("lungs", "hub.example.org:443")
    assert (document.site, document.site_fingerprint) == ("A", asked.fingerprint)
    assert document.ca_certificate == federation.ca_file.read_text()
    assert document.fingerprint == federation.fingerprint
    assert document.policy == federation.policy
    assert federation.admitted() == {"A": keys.signing_key.public_key()}
    site = federation.sites()["A"]
    assert (site.name, site.revoked_at, site.request) == ("A", None, asked)
    assert load_pem_public_key(site.node_key) == keys.node_key.public_key()
    path = federation.state_dir / "sites" / "A.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert events(federation)[-1] == (
        "site-admitted",
        {"site": "A", "fingerprint": asked.fingerprint},
    )


def test_admitted_again_it_is_the_same_site(federation):
    keys = Keys()
    federation.admit(keys.request("A"))
    before = content(federation.state_dir)
    federation.admit(keys.request("A"))  # written anew by the site, with the same keys
    assert content(federation.state_dir) == before


def test_another_request_for_an_admitted_name_is_refused(federation):
    first = request("A")
    federation.admit(first)
    before = content(federation.state_dir)
    with pytest.raises(ConfigError) as caught:
        federation.admit(request("A"))
    assert f"site=A: admitted with other keys, fingerprint {first.fingerprint}" in str(caught.value)
    assert "`revoke` the old ones first" in caught.value.hint
    assert content(federation.state_dir) == before


@pytest.mark.parametrize("key", ["signing_key", "node_key", "wrap_key"])
@pytest.mark.parametrize("revoked", [False, True])
def test_a_key_of_one_site_does_not_serve_another(federation, key, revoked):
    keys = Keys()
    federation.admit(keys.request("A"))
    if revoked:
        federation.revoke("A")
    with pytest.raises(ConfigError, match=r"^site=B: its keys are those of site A$"):
        federation.admit(Keys(keys, key).request("B"))
    assert set(federation.sites()) == {"A"}


@pytest.mark.parametrize("key", ["signing_key", "node_key", "wrap_key"])
def test_half_new_keys_are_another_request(federation, key):
    keys = Keys()
    federation.admit(keys.request("A"))
    with pytest.raises(ConfigError, match=r"^site=A: admitted with other keys"):
        federation.admit(Keys(keys, key).request("A"))


def test_names_that_differ_in_case_only_are_refused(federation):
    federation.admit(request("Ulm"))
    with pytest.raises(ConfigError, match=r"^site=ULM: differs from site Ulm in upper and lower"):
        federation.admit(request("ULM"))


def test_a_revoked_site_counts_no_more_at_the_next_question(federation):
    elsewhere = Federation.open(federation.state_dir)
    for name in "AB":
        federation.admit(request(name))
    assert set(elsewhere.admitted()) == {"A", "B"}
    assert federation.revoke("A") is True
    assert set(elsewhere.admitted()) == {"B"}
    assert elsewhere.sites()["A"].revoked_at is not None
    event, fields = events(federation)[-1]
    assert (event, fields["site"]) == ("site-revoked", "A")


def test_revoked_again_nothing_changes(federation):
    federation.admit(request("A"))
    federation.revoke("A")
    before = content(federation.state_dir)
    assert federation.revoke("A") is False
    assert content(federation.state_dir) == before


def test_a_site_that_nobody_admitted_cannot_be_revoked(federation):
    with pytest.raises(ConfigError, match=r"^site=A: not in this federation$") as caught:
        federation.revoke("A")
    assert caught.value.hint == "no site is admitted yet"
    federation.admit(request("Ulm"))
    with pytest.raises(ConfigError) as caught:
        federation.revoke("Ulmm")
    assert caught.value.hint == "did you mean Ulm?"


@pytest.mark.parametrize("key", ["signing_key", "node_key", "wrap_key"])
def test_a_revoked_name_comes_back_with_new_keys_only(federation, key):
    first, second = Keys(), Keys()
    federation.admit(first.request("A"))
    federation.revoke("A")
    for keys in (first, Keys(first, key)):
        with pytest.raises(ConfigError, match=r"^site=A: was revoked, and the request has keys"):
            federation.admit(keys.request("A"))
    federation.admit(second.request("A"))
    assert federation.admitted() == {"A": second.signing_key.public_key()}

    # The first keys stay known for ever, under any name.
    federation.revoke("A")
    for name, reason in (("A", "was revoked"), ("B", "its keys are those of site A")):
        with pytest.raises(ConfigError, match=reason):
            federation.admit(Keys(first, key).request(name))
    federation.admit(request("A"))
    assert len(federation.sites()["A"].earlier) == 2


def damage(path, change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["request"].update(site="B"), "damaged: signature does not match"),
        (lambda d: d["request"].update(signing_public_key="AAAA"), "damaged: "),
        (lambda d: d.pop("request"), "damaged: request is missing"),
        (lambda d: d.update(revoked=False), "damaged: unknown key revoked=False"),
        (lambda d: d.update({"revoked-at": 0}), "damaged: revoked-at=0"),
    ],
)
def test_a_damaged_site_file_admits_nobody(federation, change, reason):
    federation.admit(request("A"))
    federation.admit(request("C"))
    path = federation.state_dir / "sites" / "A.json"
    damage(path, change)
    with pytest.raises(ConfigError) as caught:
        federation.admitted()
    assert str(caught.value).startswith(f"{path} is {reason}")
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError):
        federation.admit(request("B"))


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]"])
def test_an_unreadable_site_file_admits_nobody(federation, text):
    federation.admit(request("A"))
    path = federation.state_dir / "sites" / "A.json"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        federation.admitted()
    assert str(caught.value).startswith(f"{path} is damaged: ")


def test_a_site_file_under_another_name_admits_nobody(federation):
    federation.admit(request("A"))
    sites = federation.state_dir / "sites"
    (sites / "A.json").rename(sites / "B.json")
    with pytest.raises(ConfigError, match=r"B\.json is of site A$"):
        federation.admitted()


def test_a_lost_register_is_not_an_empty_one(federation):
    (federation.state_dir / "sites").rmdir()
    with pytest.raises(ConfigError, match="nobody can say who is admitted"):
        federation.admitted()


def test_nobody_is_admitted_unless_the_audit_log_has_it(federation):
    federation.audit.path.write_text("x\n")
    with pytest.raises(FederationError, match="audit log"):
        federation.admit(request("A"))
    assert federation.admitted() == {}


def test_nobody_is_admitted_without_an_order_key(federation):
    (federation.state_dir / "order.key").unlink()
    with pytest.raises(ConfigError, match=r"order\.key cannot be read"):
        federation.admit(request("A"))
    assert federation.admitted() == {}


def at_once(calls) -> list[str]:
    """Run calls in threads and return what they refused."""
    refused = []

    def run(call) -> None:
        try:
            call()
        except ConfigError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return refused


def test_of_two_that_ask_for_a_name_at_once_one_gets_it(federation, monkeypatch):
    both = threading.Barrier(2)

    def write_together(path, *arguments, **options):
        with suppress(threading.BrokenBarrierError):
            both.wait(timeout=0.5)  # without the lock, both are here at once
        write_atomic(path, *arguments, **options)

    monkeypatch.setattr(server.admissions, "write_atomic", write_together)
    requests = [request("A"), request("A")]
    refused = at_once(
        [lambda r=r: Federation.open(federation.state_dir).admit(r) for r in requests]
    )
    assert len(refused) == 1
    assert "admitted with other keys" in refused[0]
    assert [event for event, _ in events(federation)].count("site-admitted") == 1


def test_many_sites_are_admitted_at_once(federation):
    names = [f"site-{index}" for index in range(8)]
    requests = [request(name) for name in names]
    assert at_once([lambda r=r: federation.admit(r) for r in requests]) == []
    assert list(federation.admitted()) == names
    assert [event for event, _ in events(federation)].count("site-admitted") == 8


def test_the_identity_survives_its_file():
    identity = Identity.model_validate(
        {
            "id": "x-1",
            "name": "x",
            "address": "a:1",
            "created": "now",
            "sans": ["b"],
            "policy": {"min-cohort": 3},
        }
    )
    assert Identity.model_validate_json(identity.model_dump_json(by_alias=True)) == identity
