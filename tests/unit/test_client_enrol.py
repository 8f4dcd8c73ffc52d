"""``init`` makes a site's file and keys once, keeps what exists, and keeps the key to itself."""

import stat

import pytest

from client.enrol import initialise
from client.site import SIGNING_KEY
from client.site_config import read_site_config
from strategies.errors import ConfigError
from strategies.identity import fingerprint, load_signing_key, read_public_keys


def files(folder) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_a_new_site_gets_its_file_its_key_and_its_public_key(tmp_path):
    path = tmp_path / "sites" / "Ulm-1.toml"
    text = initialise("Ulm-1", path)
    config = read_site_config(path)
    assert config.site == "Ulm-1"
    assert config.state_dir == path.parent / "state" / "Ulm-1"
    key = load_signing_key(config.state_dir / SIGNING_KEY)
    assert stat.S_IMODE(config.state_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE((config.state_dir / SIGNING_KEY).stat().st_mode) == 0o600
    assert fingerprint(key.public_key()) in text
    public = read_public_keys(config.state_dir)
    assert public == {"Ulm-1": key.public_key()}
    assert files(tmp_path) == [
        "sites",
        "sites/Ulm-1.toml",
        "sites/state",
        "sites/state/Ulm-1",
        "sites/state/Ulm-1/Ulm-1.pub",
        "sites/state/Ulm-1/audit.jsonl",
        "sites/state/Ulm-1/audit.lock",
        "sites/state/Ulm-1/signing.key",
    ]


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


def test_a_lost_private_key_is_not_replaced_behind_the_coordinators_back(tmp_path):
    initialise("A", tmp_path / "A.toml")
    state = tmp_path / "state" / "A"
    (state / SIGNING_KEY).unlink()
    public = (state / "A.pub").read_bytes()
    with pytest.raises(ConfigError, match=r"A\.pub exists but signing\.key beside it is gone"):
        initialise("A", tmp_path / "A.toml")
    assert (state / "A.pub").read_bytes() == public


def test_a_log_that_was_deleted_is_not_begun_again(tmp_path):
    initialise("A", tmp_path / "A.toml")
    log = tmp_path / "state" / "A" / "audit.jsonl"
    log.unlink()
    initialise("A", tmp_path / "A.toml")
    assert not log.exists()


def test_a_folder_that_cannot_be_made_is_told_in_a_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"folder .* cannot be made \(Not a directory\)"):
        initialise("A", tmp_path / "file" / "sites" / "A.toml")


def test_the_private_key_is_in_no_file_that_leaves(tmp_path):
    path = tmp_path / "A.toml"
    text = initialise("A", path)
    public = next(tmp_path.rglob("*.pub")).read_text()
    assert "PRIVATE" not in text + public + path.read_text()


def test_a_second_init_changes_nothing(tmp_path):
    path = tmp_path / "A.toml"
    first = initialise("A", path)
    path.write_text(path.read_text() + "max-image-size = 99\n")
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert initialise("A", path) == first
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


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
