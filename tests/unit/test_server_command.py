"""A run that could never work is refused before anything is sent or written."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from medmamba import ModelError
from server import command
from server.command import Request, read_run_config, run
from strategies.errors import CheckpointError, ConfigError
from strategies.identity import write_public_key


@pytest.fixture
def request_run(tmp_path, monkeypatch):
    """Ask for a run with two admitted sites; flower-superlink must not be reached."""
    monkeypatch.setattr(command, "host_run", lambda *words: pytest.fail("submitted"))
    keys = tmp_path / "keys"
    keys.mkdir()
    for site in ("A", "B"):
        write_public_key(keys / f"{site}.pub", Ed25519PrivateKey.generate().public_key())

    def _request_run(*assignments: str, resume=None):
        return run(
            Request(
                address="127.0.0.1:1",
                secret_file=tmp_path / "secret",
                site_keys=keys,
                federation="lung",
                run_config=None,
                assignments=list(assignments),
                output=None if resume else tmp_path / "out",
                resume=resume,
                run_uuid="a1b2",
            )
        )

    yield _request_run
    assert not (tmp_path / "out").exists()


def test_a_quorum_that_the_keys_cannot_meet(request_run):
    with pytest.raises(ConfigError, match=r"strategy\.min-sites=3: only 2 sites are admitted"):
        request_run("strategy.min-sites=3")


def test_a_model_that_cannot_be_built(request_run):
    with pytest.raises(ModelError, match="dims"):
        request_run("model.depths=1,1,1,1", "model.dims=16,20,64,128")


@pytest.mark.parametrize("words", [["modle.size=nano"], ["model=3", "model.size=nano"]])
def test_an_unknown_key(request_run, words):
    with pytest.raises(ConfigError, match="unknown key mod"):
        request_run(*words)


@pytest.mark.parametrize("content", ["{}", '{"run_config": 3}', '{"run_config": {}}'])
def test_a_directory_that_is_no_run(request_run, tmp_path, content):
    folder = tmp_path / "foreign"
    folder.mkdir()
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json has no run_"):
        request_run(resume=folder)


def test_words_go_before_the_file_and_the_file_before_defaults(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("seed = 4\n[model]\nsize = 'base'\n")
    found = read_run_config(path, ["model.size=nano"])
    assert (found.seed, found.model.size, found.model.norm) == (4, "nano", "group")


@pytest.mark.parametrize(("asked", "recorded"), [("auto", "auto"), ("native", "native")])
def test_provenance_says_who_chose_the_scan_backend(tmp_path, asked, recorded):
    """The coordinator runs no scan; only what it forces on every site is known here."""
    keys = {site: Ed25519PrivateKey.generate().public_key() for site in ("A", "B")}
    request = Request(
        address="127.0.0.1:1",
        secret_file=tmp_path / "secret",
        site_keys=tmp_path,
        federation="lung",
        run_config=None,
        assignments=[f"model.scan-backend={asked}"],
        output=tmp_path / "out",
        resume=None,
        run_uuid="a1b2",
    )
    make_directory, *_ = command._new(request, keys)
    assert make_directory().config()["provenance"]["scan_backend"] == recorded
