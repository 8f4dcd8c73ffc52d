"""A site's file: relative paths are its own, wrong keys get the nearest name, addresses parse."""

from pathlib import Path
from typing import get_args

import pytest

from client.site_config import SITES_VARIABLE, SiteConfig, read_site_config, site_file
from strategies.errors import ConfigError, DataError
from strategies.run_config import RunConfig

MINIMAL = 'site = "A"\n[data]\ndataset = "phantom"\n'


@pytest.fixture
def write(tmp_path):
    def _write(text: str | bytes) -> Path:
        path = tmp_path / "A.toml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write


def test_a_minimal_file_has_the_safe_defaults(write, tmp_path):
    config = read_site_config(write(MINIMAL))
    assert config.site == "A"
    assert config.limits.require_privacy
    assert config.limits.require_encryption
    assert "custom" not in config.limits.allowed_sizes
    assert config.limits.min_cohort == 2
    assert config.limits.allowed_code == ()
    assert config.limits.max_round_seconds == 6 * 3600
    assert (config.superlink, config.reconnect_seconds) == ("", 0)
    assert config.run_dataset == "phantom"
    assert config.state_dir == tmp_path / "state"


def test_relative_paths_are_relative_to_the_file(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    text = 'site = "A"\nstate-dir = "keys"\n[data]\ndataset = "npz"\n'
    config = read_site_config(write(text + 'file = "own/a.npz"\nclasses = ["x", "y"]\n'))
    assert config.state_dir == tmp_path / "keys"
    assert config.data.file == tmp_path / "own/a.npz"
    text = 'site = "A"\n[data]\ndataset = "dicom"\nfolder = "scans"\nlabels = "scans/labels.csv"\n'
    data = read_site_config(write(text)).data
    assert (data.folder, data.labels) == (tmp_path / "scans", tmp_path / "scans/labels.csv")
    text = 'site = "A"\n[data]\ndataset = "breastmnist"\ndata-dir = "../medmnist"\n'
    data_dir = read_site_config(write(text)).data.data_dir
    assert data_dir is not None
    assert data_dir.resolve() == tmp_path.parent / "medmnist"


def test_absolute_paths_stay(write):
    text = 'site = "A"\nstate-dir = "/srv/a"\n[data]\ndataset = "breastmnist"\ndata-dir = "/d"\n'
    config = read_site_config(write(text))
    assert config.state_dir == Path("/srv/a")
    assert config.data.data_dir == Path("/d")


def test_a_tilde_is_the_home_folder(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/radiology")
    text = 'site = "A"\n[data]\ndataset = "npz"\nfile = "~/a.npz"\nclasses = ["x", "y"]\n'
    file = read_site_config(write(text)).data.file
    assert file is not None
    assert file.expanduser() == Path("/home/radiology/a.npz")


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ('sight = "A"\n' + MINIMAL, "A.toml: unknown key sight=A", "did you mean site?"),
        (MINIMAL + "patient-per-site = 3\n", "unknown key data.patient-per-site=3", "patients-per"),
        (MINIMAL + "[limits]\nmax-epochs = 3\n", "unknown key limits.max-epochs=3", "max-local-ep"),
        ('federation = "lungs"\n' + MINIMAL, "A.toml: unknown key federation=lungs", "valid: "),
        (MINIMAL + '[limit]\nx = "y"\n', "unknown key limit={'x': 'y'}", "did you mean limits?"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(write, text, message, hint):
    with pytest.raises(ConfigError) as error:
        read_site_config(write(text))
    assert message in str(error.value)
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[data]\n", "A.toml: site is missing"),
        ('site = "A"\n', "A.toml: data is missing"),
        ('site = "A"\ndata = 3\n', "A.toml: data=3: expected a table"),
        ("limits = true\n" + MINIMAL, "A.toml: limits=True: expected a table"),
        ("state-dir = 3\n" + MINIMAL, "A.toml: state-dir=3: expected a path"),
        ("superlink = 3\n" + MINIMAL, "A.toml: superlink=3: expected text"),
        ("reconnect-seconds = -1\n" + MINIMAL, "A.toml: reconnect-seconds=-1: Input should be"),
        ('num-threads = "2"\n' + MINIMAL, "A.toml: num-threads=2: expected a whole number"),
        ("num-threads = true\n" + MINIMAL, "A.toml: num-threads=True: expected a whole number"),
        (
            "num-threads = 1025\n" + MINIMAL,
            "A.toml: num-threads=1025: Input should be less than or equal to 1024",
        ),
        ('task-classes = ["a"]\n' + MINIMAL, "task-classes=['a']: expected two names or more"),
        ('task-classes = ["a", "a"]\n' + MINIMAL, "two names or more, and none twice"),
        (MINIMAL + "label-map = 3\n", "A.toml: data.label-map=3: expected a table"),
        (MINIMAL + "[data.label-map]\nx = 3\n", "A.toml: data.label-map.x=3: expected text"),
        (MINIMAL + "file = 3\n", "A.toml: data.file=3: expected a path"),
        (MINIMAL + 'classes = "a,b"\n', "A.toml: data.classes=a,b: expected a list"),
        (MINIMAL + "patients-per-site = true\n", "data.patients-per-site=True: expected a whole"),
        ('site = "hospital a"\n[data]\n', "A.toml: site=hospital a: "),
        (f'site = "{"x" * 33}"\n[data]\n', "A.toml: site=xxx"),
        ('device = "tpu"\n' + MINIMAL, "A.toml: device=tpu: Input should be 'auto', 'cpu' or"),
        (MINIMAL + "[limits]\nmax-local-steps = 0\n", "A.toml: limits.max-local-steps=0: "),
        (
            MINIMAL + '[limits]\nrequire-privacy = "no"\n',
            "require-privacy=no: expected true or false",
        ),
        (MINIMAL + "[limits]\nrequire-encryption = 0\n", "encryption=0: expected true or false"),
        (MINIMAL + "[limits]\nmax-batch-size = 8.0\n", "batch-size=8.0: expected a whole number"),
        (MINIMAL + '[limits]\nallowed-sizes = "nano"\n', "allowed-sizes=nano: expected a list"),
        (MINIMAL + '[limits]\nallowed-sizes = ["huge"]\n', "limits.allowed-sizes.0=huge: Input"),
        (MINIMAL + "[limits]\nmin-cohort = 0\n", "limits.min-cohort=0: Input should be greater"),
        (MINIMAL + "[limits]\nmax-round-seconds = 0\n", "limits.max-round-seconds=0: Input"),
        (
            MINIMAL + f'[limits]\nallowed-code = ["{"a" * 64}", "{"A" * 64}"]\n',
            f"limits.allowed-code.1={'A' * 64}: String should match pattern",
        ),
        (MINIMAL + '[limits]\nallowed-code = "any"\n', "limits.allowed-code=any: expected a list"),
        (
            MINIMAL + '[limits]\nallowed-strategies = ["fedavg", "fedsgd"]\n',
            "limits.allowed-strategies.1=fedsgd: Input should be 'fedavg' or 'fedprox'",
        ),
    ],
)
def test_a_wrong_value_is_named_with_its_file(write, text, message):
    with pytest.raises(ConfigError) as error:
        read_site_config(write(text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_limits_can_name_every_size_and_strategy(write):
    run = RunConfig()
    strategies = get_args(type(run.strategy).model_fields["name"].annotation)
    sizes = (*get_args(type(run.model).model_fields["size"].annotation), "custom")
    limits = f"allowed-strategies = {[*strategies]}\nallowed-sizes = {[*sizes]}\n"
    config = read_site_config(write(f"{MINIMAL}[limits]\n{limits}"))
    assert config.limits.allowed_strategies == strategies
    assert config.limits.allowed_sizes == sizes


def test_a_data_set_that_does_not_exist_is_refused(write):
    with pytest.raises(DataError, match="dataset=fantom expected one of") as error:
        read_site_config(write('site = "A"\n[data]\ndataset = "fantom"\n'))
    assert error.value.hint == "did you mean phantom?"


@pytest.mark.parametrize(
    "superlink",
    [
        *("127.0.0.1", ":8000", "host:", "host:0", "host:65536", "host:80x", "8000", " "),
        *("::1:8000", "-host:80", "--insecure:80", "a b:80", "a\\n:80", "a:8\u0665", "h\xf6st:80"),
    ],
)
def test_an_address_is_host_and_port(write, superlink):
    with pytest.raises(ConfigError, match=r"expected host:port, such as hub\.example:443") as error:
        read_site_config(write(f'superlink = "{superlink}"\n' + MINIMAL))
    assert str(error.value).startswith("A.toml: superlink=")


@pytest.mark.parametrize("superlink", ["https://127.0.0.1:8000", "127.0.0.1/a:80"])
def test_an_address_is_no_url(write, superlink):
    with pytest.raises(ConfigError, match="expected host:port without https:// or a path"):
        read_site_config(write(f'superlink = "{superlink}"\n' + MINIMAL))


@pytest.mark.parametrize(
    "superlink", ["", "hub.example:443", "hub_1:80", "[::1]:8000", "10.0.0.1:65535"]
)
def test_usual_addresses_are_accepted(write, superlink):
    config = read_site_config(write(f'superlink = "{superlink}"\n' + MINIMAL))
    assert config.superlink == superlink


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"site = A\n", "is not TOML: "), (b'site = "\xff"\n', "is not TOML: ")],
)
def test_a_file_that_is_not_toml_is_said_to_be_so(write, content, message):
    with pytest.raises(ConfigError, match=r"site file .*A\.toml is not TOML: "):
        read_site_config(write(content))


def test_a_missing_file_says_how_to_make_one(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be read \(No such file") as error:
        read_site_config(tmp_path / "B.toml")
    assert "python -m client init" in error.value.hint
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        read_site_config(tmp_path)


def test_where_a_sites_file_is(monkeypatch, tmp_path):
    named = tmp_path / "x.toml"
    assert site_file("A", named) == named
    monkeypatch.setenv(SITES_VARIABLE, str(tmp_path))
    assert site_file("A", None) == tmp_path / "A.toml"
    monkeypatch.delenv(SITES_VARIABLE)
    assert site_file("A", None).parts[-3:] == ("client", "sites", "A.toml")


def test_nothing_of_a_site_can_be_changed_once_read():
    config = SiteConfig.model_validate({"site": "A", "data": {}})
    with pytest.raises(ValueError, match="frozen"):
        config.limits.require_privacy = False


def test_a_home_folder_that_does_not_exist_is_told_in_a_line(write):
    with pytest.raises(ConfigError, match="a path begins with ~"):
        read_site_config(write('state-dir = "~nosuchuser/x"\n' + MINIMAL))
