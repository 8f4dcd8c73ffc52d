"""What is shipped loads, changes land where they belong, mistakes get the nearest name."""

import json
from pathlib import Path

import pytest

from client.data.source import DataSource
from simulation.run import command
from simulation.scenario import SCENARIOS, Scenario, names, parse_scenario, read_scenario
from strategies.errors import ConfigError, DataError
from strategies.run_config import RunConfig, parse_assignments


def read(name: str = "quick", *assignments: str) -> Scenario:
    return read_scenario(name, parse_assignments(list(assignments)))


@pytest.fixture
def write(tmp_path):
    def _write(text: str) -> str:
        path = tmp_path / "mine.toml"
        path.write_text(text)
        return str(path)

    return _write


# --- shipped


def test_quick_is_shipped():
    assert "quick" in names()


@pytest.mark.parametrize("name", names())
def test_a_shipped_scenario_loads_and_says_what_it_shows(name):
    scenario = read(name)
    assert scenario.description
    assert scenario.run.dataset == scenario.data.dataset


@pytest.mark.parametrize("name", names())
def test_a_shipped_scenario_begins_with_the_command_that_runs_it(name):
    header = []
    for line in (SCENARIOS / f"{name}.toml").read_text().splitlines():
        if not line.startswith("#"):
            break
        header.append(line.removeprefix("#").strip())
    commands = [line for line in header if line.startswith("python simulation/run.py")]
    assert len(commands) >= 1
    assert name == "quick" or f"--scenario {name}" in commands[0]


# --- changes


def test_changes_land_in_the_run_the_federation_or_the_data():
    changed = read(
        "quick",
        "seed=7",
        "training.batch-size=5",
        "run.training.local-epochs=4",
        "federation.num-sites=4",
        "federation.partition=dirichlet",
        "federation.dirichlet-alpha=0.1",
        "data.patients-per-site=9",
    )
    assert changed.run.seed == 7
    assert changed.run.training.batch_size == 5
    assert changed.run.training.local_epochs == 4
    assert changed.federation.num_sites == 4
    assert changed.federation.partition == "dirichlet"
    assert changed.federation.dirichlet_alpha == 0.1
    assert changed.data.patients_per_site == 9


def test_everything_else_stays_as_the_scenario_says():
    plain, changed = read(), read("quick", "seed=7")
    assert changed.data == plain.data
    assert changed.federation == plain.federation
    assert changed.run.model_copy(update={"seed": plain.run.seed}) == plain.run


def test_baselines_can_be_asked_for_on_the_command_line():
    assert read("quick", "federation.baselines=pooled").federation.baselines == ("pooled",)
    assert read("breastmnist", "federation.baselines=").federation.baselines == ()


def test_text_of_the_command_line_gets_its_settings_type():
    changed = read(
        "quick",
        "federation.dirichlet-alpha=1",
        "dataset=breastmnist",
        "data.dataset=breastmnist",
        "data.patients-per-site=40",
        "data.image-size=64",
        "data.download=True",
        "data.data-dir=2024",
    )
    assert changed.federation.dirichlet_alpha == 1.0
    assert changed.data.image_size == 64
    assert changed.data.download is True
    assert changed.data.data_dir == Path("2024")


def test_lists_on_the_command_line_are_separated_by_commas():
    words = ("data.dataset=npz", "data.patients-per-site=40", "data.file=own.npz")
    assert read("quick", *words, "data.classes= no, yes ").data.classes == ("no", "yes")


def test_numbers_in_a_list_on_the_command_line_are_numbers():
    words = ("data.dataset=folder", "data.patients-per-site=40", "data.folder=d", "dataset=x")
    changed = read("quick", *words, "data.split-fractions=0.5,0.25,0.25")
    assert changed.data.split_fractions == (0.5, 0.25, 0.25)
    with pytest.raises(ConfigError, match=r"^data\.split-fractions=x: expected a number$"):
        read("quick", *words, "data.split-fractions=0.5,x,0.25")


def test_own_class_names_are_mapped_whatever_their_spelling(write):
    names = '[data.label-map]\n"b.1 x" = "benign"\nM = "bad"\n'
    text = '[data]\ndataset = "folder"\nfolder = "d"\n' + names
    scenario = read(write(text))
    assert scenario.data.label_map == {"b.1 x": "benign", "M": "bad"}
    changed = read(write(text), "data.label-map.M=malignant")
    assert changed.data.label_map["M"] == "malignant"


def test_paths_in_a_file_are_relative_to_it(write, tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    text = '[data]\ndataset = "npz"\nfile = "own/a.npz"\nclasses = ["x", "y"]\n'
    assert read(write(text)).data.file == tmp_path / "own/a.npz"
    text = '[data]\ndataset = "dicom"\nfolder = "own"\nlabels = "own.csv"\n'
    data = read(write(text)).data
    assert (data.folder, data.labels) == (tmp_path / "own", tmp_path / "own.csv")
    text = '[data]\ndataset = "breastmnist"\ndata-dir = "{}"\n[run]\ndataset = "breastmnist"\n'
    assert read(write(text.format("files"))).data.data_dir == tmp_path / "files"
    assert read(write(text.format("/srv"))).data.data_dir == Path("/srv")
    monkeypatch.setenv("HOME", "/home/researcher")
    assert read(write(text.format("~/d"))).data.data_dir == Path("/home/researcher/d")


def test_a_path_in_a_file_does_not_depend_on_the_working_directory(write, tmp_path, monkeypatch):
    write('[data]\ndataset = "npz"\nfile = "a.npz"\nclasses = ["x", "y"]\n')
    monkeypatch.chdir(tmp_path)
    assert read("mine.toml").data.file == tmp_path / "a.npz"


def test_paths_on_the_command_line_are_relative_to_the_working_directory(write):
    name = write('[data]\ndataset = "npz"\nfile = "a.npz"\nclasses = ["x", "y"]\n')
    assert read(name, "data.file=b.npz").data.file == Path("b.npz")


def test_a_file_of_ones_own_is_a_scenario(write):
    name = write('[federation]\nnum-sites = 2\nbaselines = ["pooled"]\n[run]\nseed = 3\n')
    scenario = read(name)
    assert scenario.federation.baselines == ("pooled",)
    assert scenario.run.seed == 3
    assert scenario.data == DataSource.model_validate({})
    assert scenario.run.model == RunConfig().model


# --- mistakes


def test_an_empty_name_is_no_scenario():
    with pytest.raises(ConfigError, match=r"^scenario=: expected a shipped scenario") as error:
        read("")
    assert "quick" in error.value.hint


@pytest.mark.parametrize(("name", "hint"), [("quik", "did you mean quick?"), ("zzzz", "valid: ")])
def test_an_unknown_scenario_gets_the_nearest_name(name, hint):
    with pytest.raises(ConfigError, match=f"scenario={name} is not known") as error:
        read(name)
    assert error.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("assignment", "message", "hint"),
    [
        ("modle.size=nano", "unknown key modle.size=nano", "did you mean model.size?"),
        ("sede=1", "unknown key sede=1", "did you mean seed?"),
        ("federation.num-site=2", "unknown key federation.num-site=2", "federation.num-sites?"),
        ("data.patients=2", "unknown key data.patients=2", "data.patients-per-site?"),
        ("model=nano", "unknown key model=nano", "model."),
        ("model.size.name=x", "unknown key model.size.name=x", "model.size"),
        ("federation.num-sites.x=2", "unknown key federation.num-sites.x=2", "federation.num-s"),
        ("data.dataset.x=2", "unknown key data.dataset.x=2", "data.dataset"),
    ],
)
def test_an_unknown_key_gets_the_nearest_name(assignment, message, hint):
    with pytest.raises(ConfigError) as error:
        read("quick", assignment)
    assert message in str(error.value)
    assert hint in error.value.hint


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("seed = 3\n", "unknown key seed=3", "put it under [run]"),
        ("num-server-rounds = 3\n", "unknown key num-server-rounds=3", "put it under [run]"),
        ('dataset = "npz"\n', "unknown key dataset=npz", "put it under [run]"),
        ('[model]\nsize = "nano"\n', "unknown key model.size=nano", "put it under [run]"),
        ('[model]\nsise = "nano"\n', "unknown key model.sise=nano", "put it under [run]"),
        ("num-sites = 3\n", "unknown key num-sites=3", "did you mean federation.num-sites?"),
        ("patients-per-site = 3\n", "unknown key", "did you mean data.patients-per-site?"),
        ("num_server_rounds = 3\n", "unknown key", "did you mean run.num-server-rounds?"),
        ('descripton = "x"\n', "unknown key descripton=x", "did you mean description?"),
        ("zzzz = 3\n", "unknown key zzzz=3", "valid: data.allow-altered, "),
    ],
)
def test_a_key_in_the_wrong_place_is_told_where_it_belongs(write, text, message, hint):
    with pytest.raises(ConfigError) as error:
        read(write(text))
    assert str(error.value).startswith(message)
    assert error.value.hint.startswith(hint)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[federation]\nnum-sites = true\n", "num-sites=True: expected a whole number"),
        ('[federation]\nnum-sites = "5"\n', "num-sites=5: expected a whole number"),
        ("[federation]\nmin-examples = 2.0\n", "min-examples=2.0: expected a whole number"),
        ('[federation]\ndirichlet-alpha = "1"\n', "dirichlet-alpha=1: expected a number"),
        ('[federation]\nbaselines = "pooled"\n', "baselines=pooled: expected a list"),
        ("[data]\npatients-per-site = true\n", "patients-per-site=True: expected a whole number"),
        ("[data]\ndata-dir = 3\n", "data.data-dir=3: expected a path"),
        ("[data]\nclasses = 3\n", "data.classes=3: expected a list"),
        ("description = 3\n", "description=3: expected text"),
        ("[federaton]\nnum-sites = 2\n", "unknown key federaton.num-sites=2"),
        ("[run.modle]\nsize = 'nano'\n", "unknown key modle.size=nano"),
        ("federation = 3\n", "unknown key federation=3"),
        ("run = 3\n", "unknown key run=3"),
        ("[federation\n", "is not TOML: "),
    ],
)
def test_a_file_with_a_mistake_is_refused_in_one_line(write, text, message):
    with pytest.raises(ConfigError) as error:
        read(write(text))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(ConfigError) as error:
        read(str(tmp_path / "absent.toml"))
    assert str(error.value) == f"scenario={tmp_path / 'absent.toml'}: no such file"
    assert not any(name in error.value.hint for name in names())
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        read(str(tmp_path / "folder.toml"))
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is not TOML: "):
        read(str(tmp_path / "binary.toml"))


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("federation.num-sites=0", "federation.num-sites=0: Input should be greater than 0"),
        ("federation.num-sites=many", "federation.num-sites=many: expected a whole number"),
        ("federation.num-sites=true", "federation.num-sites=true: expected a whole number"),
        ("federation.num-sites=2.5", "federation.num-sites=2.5: expected a whole number"),
        ("federation.num-sites=1001", "num-sites=1001: Input should be less than or equal to 1000"),
        ("federation.dirichlet-alpha=x", "federation.dirichlet-alpha=x: expected a number"),
        ("data.patients-per-site=x", "data.patients-per-site=x: expected a whole number"),
        ("data.image-size=true", "data.image-size=true: expected a whole number"),
        ("data.download=yes", "data.download=yes: expected true or false"),
        ("federation.dirichlet-alpha=nan", "federation.dirichlet-alpha=nan: "),
        ("federation.dirichlet-alpha=0", "federation.dirichlet-alpha=0: Input should be greater"),
        ("federation.partition=random", "federation.partition=random: Input should be "),
        ("federation.baselines=local", "federation.baselines"),
        ("training.batch-size=0", "training.batch-size=0: Input should be greater than 0"),
        ("model.image-size=16", "image-size=16 with patch-size=4 leaves no pixel after 4 stages"),
    ],
)
def test_a_value_out_of_bounds_is_named(assignment, message):
    with pytest.raises(ConfigError) as error:
        read("quick", assignment)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_quorum_of_more_sites_than_there_are_is_refused():
    with pytest.raises(ConfigError, match=r"min-sites=4 is more than federation\.num-sites=3"):
        read("quick", "strategy.min-sites=4")


@pytest.mark.parametrize(
    ("assignment", "run", "data"),
    [
        ("dataset=breastmnist", "breastmnist", "phantom"),
        ("data.dataset=breastmnist", "phantom", "breastmnist"),
    ],
)
def test_run_and_data_name_the_same_data_set(write, assignment, run, data):
    with pytest.raises(ConfigError) as error:
        read(write(""), assignment)
    assert str(error.value) == f"run.dataset={run}: expected data.dataset={data}"
    assert "`--set dataset=X` and `--set data.dataset=X`" in error.value.hint


@pytest.mark.parametrize(
    "text",
    [
        'dataset = "npz"\nfile = "a.npz"\nclasses = ["x", "y"]\n',
        'dataset = "folder"\nfolder = "d"\n',
        'dataset = "csv"\nfile = "d.csv"\n',
        'dataset = "dicom"\nfolder = "d"\nlabels = "d.csv"\n',
    ],
)
def test_own_files_may_stand_for_any_data_set(write, text):
    text = f"[data]\n{text}"
    assert read(write(text), "dataset=breastmnist").run.dataset == "breastmnist"


def test_a_data_set_that_does_not_exist_is_refused():
    with pytest.raises(DataError, match="dataset=fantom"):
        read("quick", "data.dataset=fantom")


def test_an_assignment_without_a_value_is_refused():
    with pytest.raises(ConfigError, match=r"--set seed: expected key=value"):
        command(["--set", "seed"])


# --- config.json


@pytest.mark.parametrize(
    "scenario",
    [
        {},
        {"federation": {"num-sites": 5, "baselines": ["pooled"]}, "run": {"seed": 9}},
        {"data": {"dataset": "npz", "file": "own.npz", "classes": ["x", "y"]}},
        {
            "data": {
                "dataset": "csv",
                "file": "d.csv",
                "split-fractions": [0.5, 0.25, 0.25],
                "label-map": {"a.b": "x", "c": "y"},
            }
        },
        {
            "data": {"dataset": "breastmnist", "data-dir": "DATA", "image-size": 64},
            "run": {"dataset": "breastmnist"},
        },
    ],
)
def test_what_config_json_keeps_gives_the_scenario_back(scenario):
    first = parse_scenario(scenario)
    kept = json.dumps(
        {
            "scenario": first.model_dump(mode="json", by_alias=True, exclude={"run"}),
            "run_config": first.run.model_dump(by_alias=True),
        }
    )
    stored = json.loads(kept)
    assert parse_scenario({**stored["scenario"], "run": stored["run_config"]}) == first
