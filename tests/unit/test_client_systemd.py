"""The printed unit is one that systemd reads without complaint, for any path, and names no more."""

import getpass
import shutil
import subprocess
import sys

import pytest

from client.enrol import initialise
from client.site_config import read_site_config
from client.systemd import unit
from strategies.errors import ConfigError


def make(folder, text=""):
    path = folder / "A.toml"
    initialise("A", path)
    path.write_text(path.read_text().replace('device = "auto"', text or 'device = "auto"'))
    return read_site_config(path), path


def settings(text: str) -> dict[str, str]:
    lines = [line for line in text.splitlines() if "=" in line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def test_the_unit_runs_this_site_with_this_python(tmp_path, repository, monkeypatch):
    monkeypatch.delenv("FEDERATION_DATA", raising=False)
    config, path = make(tmp_path)
    found = settings(unit(config, path))
    assert found["ExecStart"] == f"{sys.executable} -m client --site A --config {path}"
    assert found["WorkingDirectory"] == str(repository)
    assert found["User"] == getpass.getuser()
    assert found["ReadWritePaths"] == str(config.state_dir)
    expected = {
        "Restart": "on-failure",
        "RestartPreventExitStatus": "2",
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "read-only",
        "CapabilityBoundingSet": "",
        "UMask": "0077",
        "KillSignal": "SIGTERM",
        "TimeoutStopSec": "30",
    }
    assert {name: found[name] for name in expected} == expected


def test_only_a_site_without_a_gpu_hides_devices(tmp_path):
    config, path = make(tmp_path)
    assert "PrivateDevices" not in unit(config, path)
    assert f"Environment=TRITON_CACHE_DIR={config.state_dir / 'triton'}" in unit(config, path)
    config, path = make(tmp_path, 'device = "cpu"')
    assert settings(unit(config, path))["PrivateDevices"] == "yes"
    assert "TRITON_CACHE_DIR" not in unit(config, path)


def test_where_images_are_is_passed_on(tmp_path, monkeypatch):
    config, path = make(tmp_path, 'device = "cpu"')
    monkeypatch.delenv("FEDERATION_DATA", raising=False)
    assert "Environment" not in unit(config, path)
    monkeypatch.setenv("FEDERATION_DATA", "/data/med mnist")
    assert settings(unit(config, path))["Environment"] == '"FEDERATION_DATA=/data/med mnist"'


def test_a_site_without_a_state_folder_is_told(tmp_path):
    config, path = make(tmp_path)
    shutil.rmtree(config.state_dir)
    with pytest.raises(ConfigError, match=r"state-dir=.* cannot be read \(No such file") as error:
        unit(config, path)
    assert "python -m client init --site A" in error.value.hint


def test_a_users_number_serves_where_the_name_is_unknown(tmp_path, monkeypatch):
    config, path = make(tmp_path)

    def unknown(number):
        raise KeyError(number)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    assert settings(unit(config, path))["User"] == str(config.state_dir.stat().st_uid)


AWKWARD = ("plain", "two words", "50%h", "$HOME", 'quo"te', "apo'strophe", "back\\slash", "semi;c")


def test_what_systemd_would_expand_is_escaped(tmp_path):
    config, path = make(tmp_path / 'a %h $HOME "b"')
    found = settings(unit(config, path))
    escaped = f'{tmp_path}/a %%h {{}} \\"b\\"'
    assert found["ExecStart"].endswith(f' --config "{escaped.format("$$HOME")}/A.toml"')
    assert found["ReadWritePaths"] == f'"{escaped.format("$HOME")}/state/A"'


def verify(text: str, folder) -> str:
    """What systemd has to say."""
    path = folder / "medmamba-federation-A.service"
    path.write_text(text)
    result = subprocess.run(
        ["systemd-analyze", "verify", str(path)], capture_output=True, text=True, timeout=60
    )
    return result.stdout + result.stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize("name", AWKWARD)
def test_systemd_accepts_the_unit(tmp_path, name):
    folder = tmp_path / name
    config, path = make(folder)
    text = unit(config, path)
    assert verify(text, tmp_path) == ""
    # It says so when it does not.
    assert "kill mode" in verify(text.replace("KillMode=mixed", "KillMode=mixd"), tmp_path)
