"""``join`` pins one coordinator; what is pinned is checked at every start, all else refused."""

import json
import re

import pytest

from client.enrol import initialise, read_request
from client.membership import join, read_membership
from client.site_config import read_site_config
from fakes.coordinators import Coordinator
from strategies.audit import AuditLog
from strategies.enrolment import FederationPolicy
from strategies.errors import ConfigError, FederationError


def make_site(folder, name="A", extra=""):
    path = folder / f"{name}.toml"
    initialise(name, path)
    path.write_text(extra + path.read_text())
    return read_site_config(path)


def write(folder, document, name="A.join.json"):
    path = folder / name
    path.write_text(document.to_json())
    return path


def later(document, order_key, moment="2999-01-01T00:00:00.000+00:00", **changes):
    """The same coordinator's document, made at another time."""
    return document.model_copy(update={"created": moment, **changes})._signed_by(order_key)


def contents(folder) -> dict:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def entries(config) -> list[dict]:
    lines = (config.state_dir / "audit.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def site(tmp_path):
    return make_site(tmp_path)


@pytest.fixture
def coordinator():
    return Coordinator()


@pytest.fixture
def document(site, coordinator):
    return coordinator.admit(read_request(site), address="hub.example:443")


@pytest.fixture
def joined(tmp_path, site, document):
    join(site, write(tmp_path, document))
    return site


def refused(site, path, expected=None) -> ConfigError:
    """The error, after a look that nothing has changed."""
    before = contents(site.state_dir)
    with pytest.raises(ConfigError) as error:
        join(site, path, expected)
    assert contents(site.state_dir) == before
    assert "\n" not in str(error.value)
    return error.value


def test_a_site_that_joined_has_its_membership(tmp_path, site, coordinator, document):
    text = join(site, write(tmp_path, document))
    member = read_membership(site)
    assert member.document == document
    assert (member.federation, member.name) == ("f1", "lungs")
    assert member.address == "hub.example:443"
    assert member.policy == FederationPolicy()
    assert member.order_key == coordinator.order_key.public_key()
    assert member.ca_path.read_text() == coordinator.ca_pem
    for shown in ("lungs (f1)", "hub.example:443", document.fingerprint, "by telephone"):
        assert shown in text
    assert re.search(r"valid until \d{4}-\d\d-\d\d$", text, re.MULTILINE)
    last = entries(site)[-1]
    assert last["event"] == "joined"
    assert last["fields"] == {
        "federation": "f1",
        "coordinator": document.fingerprint,
        "address": "hub.example:443",
        "created": document.created,
    }
    AuditLog(site.state_dir / "audit.jsonl").verify()


def test_a_site_may_reach_the_coordinator_elsewhere(tmp_path, coordinator):
    site = make_site(tmp_path, extra='superlink = "10.0.0.7:8443"\n')
    text = join(site, write(tmp_path, coordinator.admit(read_request(site))))
    assert read_membership(site).address == "10.0.0.7:8443"
    assert "10.0.0.7:8443" in text


def test_joining_again_with_the_same_file_changes_nothing(tmp_path, joined, document):
    before = contents(joined.state_dir)
    join(joined, write(tmp_path, document))
    assert contents(joined.state_dir) == before


def test_a_join_that_was_cut_off_is_completed(tmp_path, joined, document):
    (joined.state_dir / "ca.pem").unlink()
    join(joined, write(tmp_path, document))
    assert read_membership(joined).document == document


@pytest.mark.parametrize("typed", ["{0}", "  {0}\n", "{1}", "{2}"])
def test_the_fingerprint_may_be_typed_as_it_was_heard(tmp_path, site, document, typed):
    told = document.fingerprint
    given = typed.format(told, told.upper().replace("-", " "), told.replace("-", ""))
    assert "the one that you gave" in join(site, write(tmp_path, document), given)


@pytest.mark.parametrize(
    "change",
    [lambda f: f[:-1], lambda f: f + "0", lambda f: "0000" + f[4:], lambda f: ""],
)
def test_another_fingerprint_is_refused(tmp_path, site, document, change):
    told = change(document.fingerprint)
    error = refused(site, write(tmp_path, document), told)
    assert str(error) == f"coordinator's fingerprint={document.fingerprint}; expected {told}"
    assert not (site.state_dir / "join.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "x.json: not a file of this kind"),
        (b"{", "x.json: not a file of this kind"),
        (b"[]", "x.json: JoinDocument: "),
        (b"\xff", "x.json: not text"),
        (b"[" * 100_000, "x.json: not a file of this kind"),
        (b"{}", "x.json: JoinDocument: created is missing"),
    ],
)
def test_a_file_that_is_no_join_document_is_refused(tmp_path, site, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    assert str(refused(site, path)).startswith(message)


def test_an_enrolment_request_is_no_join_document(site):
    error = refused(site, site.state_dir / "A.enroll.json")
    assert str(error).startswith("A.enroll.json: JoinDocument: ")


@pytest.mark.parametrize("path", ["missing.json", "."])
def test_a_file_that_cannot_be_read_is_told(tmp_path, site, path):
    error = refused(site, tmp_path / path)
    assert "cannot be read" in str(error)
    assert error.hint.startswith("check its path")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("federation", "f2"),
        ("name", "other"),
        ("site_fingerprint", "0000-0000-0000-0000-0000"),
        ("address", "evil.example:443"),
        ("created", "2999-01-01T00:00:00.000+00:00"),
        ("policy", {"min_cohort": 1, "max_num_examples": 5}),
        ("ca_certificate", Coordinator().ca_pem),
        ("order_public_key", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="),
    ],
)
def test_an_altered_field_is_refused(tmp_path, site, document, name, value):
    fields = json.loads(document.to_json())
    assert fields[name] != value
    path = tmp_path / "A.join.json"
    path.write_text(json.dumps({**fields, name: value}))
    assert str(refused(site, path)).startswith("A.join.json: ")


def test_another_sites_document_is_refused(tmp_path, site, coordinator):
    other = make_site(tmp_path, "B")
    path = write(tmp_path, coordinator.admit(read_request(other)), "B.join.json")
    assert str(refused(site, path)) == "B.join.json is for site=B; expected site=A"


def test_a_document_for_a_key_of_the_past_is_refused(tmp_path, site, document):
    for name in ("node.key", "signing.key", "wrap.key", "A.enroll.json"):
        (site.state_dir / name).unlink()
    initialise("A", tmp_path / "A.toml")
    error = refused(site, write(tmp_path, document))
    own = read_request(site).fingerprint
    assert str(error) == (
        f"A.join.json is for signing key {document.site_fingerprint}; this site's is {own}"
    )


def test_a_site_without_keys_joins_nothing(tmp_path, site, document):
    (site.state_dir / "signing.key").unlink()
    assert "signing.key cannot be read" in str(refused(site, write(tmp_path, document)))


def test_a_key_that_others_may_read_joins_nothing(tmp_path, site, document):
    (site.state_dir / "signing.key").chmod(0o644)
    assert "signing.key has mode 0644" in str(refused(site, write(tmp_path, document)))


@pytest.mark.parametrize(
    "address", ["", "hub", "https://hub:443", "hub:0", "--insecure:1", "a\n:1"]
)
def test_an_address_that_is_none_is_refused(tmp_path, site, coordinator, address):
    path = write(tmp_path, coordinator.admit(read_request(site), address=address))
    # The command line prints errors in one line whatever is in them.
    with pytest.raises(ConfigError, match="expected host:port"):
        join(site, path)
    assert not (site.state_dir / "join.json").exists()


def test_an_authority_that_expired_is_refused(tmp_path, site):
    path = write(tmp_path, Coordinator(days=-1).admit(read_request(site)))
    error = refused(site, path)
    assert str(error).startswith("A.join.json: ca_certificate expired on 20")
    assert "clock" in error.hint


def test_a_newer_document_of_the_same_coordinator_replaces(tmp_path, joined, coordinator):
    renewed = Coordinator().ca_pem
    newer = coordinator.admit(
        read_request(joined),
        address="hub.example:8443",
        policy=FederationPolicy(min_cohort=3),
        ca_certificate=renewed,
    )
    newer = later(newer, coordinator.order_key)
    join(joined, write(tmp_path, newer))
    member = read_membership(joined)
    assert (member.address, member.policy.min_cohort) == ("hub.example:8443", 3)
    assert member.ca_path.read_text() == renewed
    assert [entry["event"] for entry in entries(joined)].count("joined") == 2


@pytest.mark.parametrize(
    "moment", ["1999-01-01T00:00:00.000+00:00", "1999-01-01T00:00:00", None, "tomorrow"]
)
def test_an_older_document_of_the_same_coordinator_is_refused(
    tmp_path, joined, coordinator, document, moment
):
    old = later(document, coordinator.order_key, moment or document.created, address="old:1")
    error = refused(joined, write(tmp_path, old))
    if moment == "tomorrow":
        assert str(error) == "A.join.json: created=tomorrow: expected a time"
    else:
        assert str(error) == (
            f"A.join.json was created {old.created}; expected later than {document.created}, "
            "as joined"
        )


@pytest.mark.parametrize("same_key", [False, True])
def test_another_federation_is_refused_until_a_person_leaves(
    tmp_path, joined, coordinator, document, same_key
):
    other = coordinator if same_key else Coordinator()
    asked = other.admit(read_request(joined), federation="f2", name="brains")
    path = write(tmp_path, later(asked, other.order_key))
    error = refused(joined, path)
    assert str(error) == (
        f"A.join.json is of federation brains (coordinator {asked.fingerprint}); "
        f"this site has joined lungs (coordinator {document.fingerprint})"
    )
    assert error.hint.endswith(f"remove {joined.state_dir / 'join.json'} yourself")
    (joined.state_dir / "join.json").unlink()
    join(joined, path)
    assert read_membership(joined).federation == "f2"


def test_another_coordinator_of_the_same_name_is_refused(tmp_path, joined):
    path = write(tmp_path, Coordinator().admit(read_request(joined)))
    assert "this site has joined lungs" in str(refused(joined, path))


def test_a_pinned_file_that_is_damaged_is_not_overwritten(tmp_path, joined, document):
    (joined.state_dir / "join.json").write_text("{")
    error = refused(joined, write(tmp_path, document))
    assert str(error).startswith("join.json: ")
    assert "remove " in error.hint


def test_a_site_that_cannot_write_its_log_joins_nothing(tmp_path, site, document):
    (site.state_dir / "audit.jsonl").unlink()
    with pytest.raises(FederationError, match=r"audit log audit\.jsonl is missing"):
        join(site, write(tmp_path, document))
    assert not (site.state_dir / "join.json").exists()
    assert not (site.state_dir / "ca.pem").exists()


def test_nothing_of_a_strangers_document_controls_the_terminal(tmp_path, site, coordinator):
    asked = coordinator.admit(read_request(site), name="a\x1b[2J\nb")
    text = join(site, write(tmp_path, asked))
    assert "\x1b" not in text
    assert len(text.splitlines()) == 5


def unusable(config) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        read_membership(config)
    assert "\n" not in str(error.value)
    return error.value


def test_a_site_that_joined_nothing_is_told(site):
    error = unusable(site)
    assert str(error) == "site=A has joined no federation: join.json is missing"
    assert "python -m client join FILE --site A" in error.hint


def test_a_pinned_document_that_was_altered_is_refused(joined):
    path = joined.state_dir / "join.json"
    path.write_text(path.read_text().replace("hub.example", "hub.exampel"))
    error = unusable(joined)
    assert str(error) == "join.json: signature does not match the signed content"
    assert "restore it from a backup" in error.hint


@pytest.mark.parametrize("content", [b"", b"null", b"\xff"])
def test_a_pinned_document_that_is_damaged_is_refused(joined, content):
    (joined.state_dir / "join.json").write_bytes(content)
    assert str(unusable(joined)).startswith("join.json: ")


def test_a_pinned_document_of_another_site_is_refused(tmp_path, joined, coordinator):
    other = coordinator.admit(read_request(make_site(tmp_path, "B")))
    (joined.state_dir / "join.json").write_text(other.to_json())
    assert str(unusable(joined)) == "join.json is for site=B; expected site=A"


def test_a_membership_of_another_key_is_refused(tmp_path, joined):
    make_site(tmp_path, "B")
    key = (tmp_path / "state" / "B" / "signing.key").read_bytes()
    (joined.state_dir / "signing.key").write_bytes(key)
    assert str(unusable(joined)).startswith("join.json is for signing key ")


def test_another_authority_beside_the_document_is_refused(joined):
    (joined.state_dir / "ca.pem").write_text(Coordinator().ca_pem)
    assert str(unusable(joined)) == "ca.pem is not the certificate that join.json names"
    (joined.state_dir / "ca.pem").unlink()
    assert str(unusable(joined)) == "ca.pem cannot be read (No such file or directory)"
