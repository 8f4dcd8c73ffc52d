"""``init`` makes a site's file, keys and request once, keeps what exists and keys at home."""

import stat

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from client.enrol import KEYS, initialise, read_request
from client.site_config import NODE_KEY, SIGNING_KEY, WRAP_KEY, read_site_config
from strategies.audit import AuditLog
from strategies.enrolment import EnrolmentRequest
from strategies.errors import ConfigError
from strategies.identity import fingerprint, load_node_key, load_signing_key, load_wrap_key


def files(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def contents(folder) -> dict:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.fixture
def state(tmp_path):
    """The state folder of an initialised site A."""
    initialise("A", tmp_path / "A.toml")
    return tmp_path / "state" / "A"


def test_a_new_site_gets_its_file_its_keys_and_its_request(tmp_path):
    path = tmp_path / "sites" / "Ulm-1.toml"
    text = initialise("Ulm-1", path)
    config = read_site_config(path)
    assert config.site == "Ulm-1"
    assert config.state_dir == path.parent / "state" / "Ulm-1"
    assert stat.S_IMODE(config.state_dir.stat().st_mode) == 0o700
    for name in (NODE_KEY, SIGNING_KEY, WRAP_KEY):
        assert stat.S_IMODE((config.state_dir / name).stat().st_mode) == 0o600
    assert files(tmp_path) == [
        "sites",
        "sites/Ulm-1.toml",
        "sites/state",
        "sites/state/Ulm-1",
        "sites/state/Ulm-1/Ulm-1.enroll.json",
        "sites/state/Ulm-1/audit.jsonl",
        "sites/state/Ulm-1/audit.lock",
        "sites/state/Ulm-1/node.key",
        "sites/state/Ulm-1/signing.key",
        "sites/state/Ulm-1/wrap.key",
    ]
    request_path = config.state_dir / "Ulm-1.enroll.json"
    request = EnrolmentRequest.parse(request_path.read_text())
    assert request.site == "Ulm-1"
    assert request.signing_key == load_signing_key(config.state_dir / SIGNING_KEY).public_key()
    assert request.wrap_key == load_wrap_key(config.state_dir / WRAP_KEY).public_key()
    assert load_node_key(config.state_dir / NODE_KEY).curve.name == "secp384r1"
    for shown in (str(path), str(request_path), f"fingerprint  {request.fingerprint}"):
        assert shown in text
    entries = (config.state_dir / "audit.jsonl").read_text()
    assert AuditLog(config.state_dir / "audit.jsonl").verify()[0] == 2
    assert f'"event":"keys-created","fields":{{"fingerprint":"{request.fingerprint}"}}' in entries


def test_a_new_site_takes_part_in_nothing_unprotected_unless_asked_for(tmp_path):
    initialise("A", tmp_path / "A.toml")
    limits = read_site_config(tmp_path / "A.toml").limits
    assert (limits.require_privacy, limits.require_encryption) == (True, True)
    initialise("B", tmp_path / "B.toml", unprotected=True)
    limits = read_site_config(tmp_path / "B.toml").limits
    assert (limits.require_privacy, limits.require_encryption) == (False, False)
    before = (tmp_path / "A.toml").read_text()
    with pytest.raises(ConfigError, match=r"--allow-unprotected: .*A\.toml exists"):
        initialise("A", tmp_path / "A.toml", unprotected=True)
    assert (tmp_path / "A.toml").read_text() == before


def test_a_second_init_changes_nothing(tmp_path):
    path = tmp_path / "A.toml"
    first = initialise("A", path)
    path.write_text(path.read_text() + "max-image-size = 99\n")
    before = contents(tmp_path)
    assert initialise("A", path) == first
    assert contents(tmp_path) == before


def test_a_request_that_was_deleted_is_made_again_of_the_same_keys(tmp_path, state):
    first = EnrolmentRequest.parse((state / "A.enroll.json").read_text())
    (state / "A.enroll.json").unlink()
    text = initialise("A", tmp_path / "A.toml")
    second = EnrolmentRequest.parse((state / "A.enroll.json").read_text())
    assert second.fingerprint == first.fingerprint
    assert second.node_public_key == first.node_public_key
    assert second.wrap_public_key == first.wrap_public_key
    assert first.fingerprint in text


@pytest.mark.parametrize("lost", KEYS)
def test_a_lost_key_is_not_replaced_behind_the_coordinators_back(tmp_path, state, lost):
    (state / lost).unlink()
    before = contents(tmp_path)
    with pytest.raises(ConfigError) as error:
        initialise("A", tmp_path / "A.toml")
    others = ", ".join([*(key for key in KEYS if key != lost), "A.enroll.json"])
    assert str(error.value) == f"{lost} missing in {state} beside {others}"
    assert error.value.hint == (
        f"restore from a backup, or remove {others} and enrol anew with the coordinator"
    )
    assert contents(tmp_path) == before


@pytest.mark.parametrize("left", ["A.enroll.json", "join.json"])
def test_a_site_that_lost_all_its_keys_is_told_so(tmp_path, state, left):
    for name in (*KEYS, "A.enroll.json"):
        if name != left:
            (state / name).unlink()
    (state / left).touch()
    with pytest.raises(ConfigError, match=f"{', '.join(KEYS)} missing in .* beside {left}"):
        initialise("A", tmp_path / "A.toml")
    # The hint's advice works.
    (state / left).unlink()
    initialise("A", tmp_path / "A.toml")


def test_a_log_that_was_deleted_is_not_begun_again(tmp_path, state):
    (state / "audit.jsonl").unlink()
    initialise("A", tmp_path / "A.toml")
    assert not (state / "audit.jsonl").exists()


@pytest.mark.parametrize("name", KEYS)
def test_a_key_that_others_may_read_is_refused(tmp_path, state, name):
    (state / name).chmod(0o640)
    with pytest.raises(ConfigError, match=rf"{name} has mode 0640: others may read it"):
        initialise("A", tmp_path / "A.toml")


def test_a_node_key_that_flower_does_not_take_is_refused(tmp_path, state):
    small = ec.generate_private_key(ec.SECP256R1())
    pem = small.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    (state / NODE_KEY).write_bytes(pem)
    (state / "A.enroll.json").unlink()
    with pytest.raises(ConfigError, match="node_public_key is not an EC P-384 key"):
        initialise("A", tmp_path / "A.toml")


@pytest.mark.parametrize("name", KEYS)
def test_a_request_of_other_keys_is_not_shown(tmp_path, state, name):
    initialise("B", tmp_path / "B.toml")
    (state / name).write_bytes((tmp_path / "state" / "B" / name).read_bytes())
    with pytest.raises(ConfigError) as error:
        initialise("A", tmp_path / "A.toml")
    assert str(error.value) == f"A.enroll.json is not of the {name} beside it"
    assert error.value.hint.startswith("remove A.enroll.json and run `python -m client init")
    (state / "A.enroll.json").unlink()
    initialise("A", tmp_path / "A.toml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "A.enroll.json: "),
        (b"{", "A.enroll.json: "),
        (b"[]", "A.enroll.json: "),
        (b"\xff\xfe", "A.enroll.json: not text"),
        (b"{}", "A.enroll.json: EnrolmentRequest: created is missing"),
    ],
)
def test_a_damaged_request_is_told_in_a_line(tmp_path, state, content, message):
    (state / "A.enroll.json").write_bytes(content)
    with pytest.raises(ConfigError) as error:
        initialise("A", tmp_path / "A.toml")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert (state / "A.enroll.json").read_bytes() == content


def test_an_altered_request_is_told_in_a_line(tmp_path, state):
    path = state / "A.enroll.json"
    path.write_text(path.read_text().replace('"created": "20', '"created": "19'))
    with pytest.raises(ConfigError, match=r"A\.enroll\.json: signature does not match"):
        initialise("A", tmp_path / "A.toml")


def test_a_request_of_another_site_is_refused(tmp_path, state):
    initialise("B", tmp_path / "B.toml")
    other = tmp_path / "state" / "B" / "B.enroll.json"
    (state / "A.enroll.json").write_bytes(other.read_bytes())
    with pytest.raises(ConfigError, match=r"A\.enroll\.json is of site=B; expected site=A"):
        read_request(read_site_config(tmp_path / "A.toml"))


def test_a_site_without_a_request_says_how_to_make_one(tmp_path, state):
    (state / "A.enroll.json").unlink()
    with pytest.raises(ConfigError, match=r"A\.enroll\.json cannot be read \(No such") as error:
        read_request(read_site_config(tmp_path / "A.toml"))
    assert "python -m client init --site A" in error.value.hint


def test_a_folder_that_cannot_be_made_is_told_in_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"folder .* cannot be made \(Not a directory\)"):
        initialise("A", tmp_path / "file" / "sites" / "A.toml")


def test_no_private_key_is_in_a_file_that_leaves_or_on_the_screen(tmp_path):
    path = tmp_path / "A.toml"
    text = initialise("A", path)
    state = tmp_path / "state" / "A"
    shown = text + (state / "A.enroll.json").read_text() + path.read_text()
    assert "PRIVATE" not in shown
    for name in KEYS:
        for line in (state / name).read_text().splitlines()[1:-1]:
            assert line not in shown


@pytest.mark.parametrize("site", ["", "a b", "../x", "-a", "x" * 33, "\xe4", "a\n"])
def test_a_name_that_cannot_be_used_is_refused_before_anything_is_written(tmp_path, site):
    with pytest.raises(ConfigError, match="expected letters, digits and hyphens") as error:
        initialise(site, tmp_path / "site.toml")
    assert repr(site) in str(error.value)
    assert files(tmp_path) == []


def test_a_file_of_another_site_is_refused_and_gets_no_key(tmp_path):
    path = tmp_path / "A.toml"
    path.write_text('site = "B"\n[data]\n')
    with pytest.raises(ConfigError, match=r"--site A but A\.toml says site=B"):
        initialise("A", path)
    assert files(tmp_path) == ["A.toml"]


def test_the_fingerprint_is_that_of_the_signing_key(tmp_path, state):
    key = load_signing_key(state / SIGNING_KEY).public_key()
    assert f"fingerprint  {fingerprint(key)}" in initialise("A", tmp_path / "A.toml")
