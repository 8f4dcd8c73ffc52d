"""RunConfig: one spelling, one bound and one default for every setting of a run."""

from __future__ import annotations

import contextlib
import math
import string
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from strategies.errors import ConfigError
from strategies.run_config import (
    METRIC_NAMES,
    RunConfig,
    Section,
    TrainingSection,
    explain,
    flatten,
    join_names,
    natural,
    parse_assignments,
    unflatten,
)


def refusal(values) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        RunConfig.parse(values)
    assert "\n" not in str(caught.value)
    return caught.value


def test_dotted_and_nested_values_mean_the_same():
    dotted = {"seed": 3, "model.size": "nano", "training.batch-size": 8}
    nested = {"seed": 3, "model": {"size": "nano"}, "training": {"batch-size": 8}}
    assert RunConfig.parse(dotted) == RunConfig.parse(nested)
    assert RunConfig.parse(nested).training.batch_size == 8


def test_what_is_not_given_has_its_default():
    assert RunConfig.parse({}) == RunConfig()
    changed = RunConfig.parse({"model": {"size": "nano"}}).flatten()
    assert changed == {**RunConfig().flatten(), "model.size": "nano"}


def test_numbers_may_be_written_as_text():
    run = RunConfig.parse({"num-server-rounds": "7", "training.learning-rate": "1e-3"})
    assert (run.num_server_rounds, run.training.learning_rate) == (7, 1e-3)


def test_a_run_config_cannot_be_changed_after_validation():
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().seed = 1
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().model.size = "base"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("model.sise", "did you mean model.size?"),
        ("training.bach-size", "did you mean training.batch-size?"),
        ("model.num_classes", "did you mean model.num-classes?"),
        ("num-server-round", "did you mean num-server-rounds?"),
    ],
)
def test_an_unknown_key_is_refused_and_the_nearest_one_named(key, hint):
    error = refusal({key: 4})
    assert str(error) == f"unknown key {key}=4"
    assert error.hint == hint


def test_a_key_like_no_other_gets_the_whole_list():
    error = refusal({"zzzzzzzzzzzzzzzzzzzzzzz": 1})
    assert error.hint.startswith("valid: classes, dataset, ")
    for key in RunConfig().flatten():
        assert key in error.hint


def test_a_section_is_not_a_setting():
    assert str(refusal({"model": "nano"})) == "unknown key model=nano"


@pytest.mark.parametrize(
    ("key", "bad", "expected"),
    [
        ("num-server-rounds", 0, "greater than 0"),
        ("num-server-rounds", 7.5, "expected a whole number"),
        ("num-server-rounds", "many", "expected a whole number"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**63, "less than 9223372036854775808"),
        ("seed", True, "expected a whole number"),
        ("dataset", "", "at least 1 character"),
        ("model.size", "huge", "'nano', 'tiny', 'small' or 'base'"),
        ("model.num-classes", 1, "greater than or equal to 2"),
        ("model.in-channels", 2, "1 or 3"),
        ("model.image-size", 15, "greater than or equal to 16"),
        ("model.image-size", 4097, "less than or equal to 4096"),
        ("model.patch-size", 0, "greater than 0"),
        ("model.norm", "layer", "'batch' or 'group'"),
        ("model.small-images", "crop", "'resize' or 'pad'"),
        ("model.drop-path", 1.0, "less than 1"),
        ("model.drop-path", math.nan, "less than 1"),
        ("model.depths", "2,x", "integers separated by commas, such as 2,2,4,2"),
        ("model.depths", "2,0", "positive integers"),
        ("model.dims", "16,,32", "positive integers"),
        ("training.learning-rate", 0.0, "greater than 0"),
        ("training.learning-rate", 1000.5, "less than or equal to 1000"),
        ("training.learning-rate", True, "expected a number"),
        ("training.learning-rate", "fast", "expected a number"),
        ("training.learning-rate", math.nan, "finite number"),
        ("training.learning-rate", math.inf, "finite number"),
        ("training.weight-decay", -0.1, "greater than or equal to 0"),
        ("training.schedule", "linear", "'cosine' or 'constant'"),
        ("training.batch-size", 0, "greater than 0"),
        ("training.batch-size", 1_000_001, "less than or equal to 1000000"),
        ("training.local-epochs", 0, "greater than 0"),
        ("training.local-steps", -1, "greater than or equal to 0"),
        ("training.class-weights", "balanced", "'inverse-frequency'"),
        ("training.effective-number-beta", 1.0, "less than 1"),
        ("training.focal-gamma", -1.0, "greater than or equal to 0"),
        ("training.augment", "maybe", "expected true or false"),
        ("training.augment", 1, "expected true or false"),
        ("training.augment", "yes", "expected true or false"),
        ("strategy.name", "fedsgd", "'fedavg' or 'fedprox'"),
        ("strategy.proximal-mu", -0.1, "greater than or equal to 0"),
        ("strategy.min-sites", 0, "greater than 0"),
        ("strategy.max-num-examples", 0, "greater than 0"),
        ("strategy.wait-seconds", math.inf, "finite number"),
        ("strategy.round-timeout-seconds", 0.0, "greater than 0"),
        ("strategy.selection-metric", "auroc", "'auc'"),
        ("privacy.mode", "on", "'off'"),
        ("encryption.mode", "on", "'off'"),
    ],
)
def test_a_value_out_of_bounds_is_refused_with_its_dotted_key(key, bad, expected):
    message = str(refusal({key: bad}))
    assert message.startswith(f"{key}={bad}: ")
    assert expected in message


def test_the_upper_bounds_themselves_pass():
    run = RunConfig.parse(
        {
            "model.image-size": 4096,
            "training.learning-rate": 1000,
            "training.batch-size": 1_000_000,
        }
    )
    assert run.model.image_size == 4096
    assert run.training.learning_rate == 1000
    assert run.training.batch_size == 1_000_000


def test_a_whole_number_is_a_number():
    assert RunConfig.parse({"training.weight-decay": 0, "strategy.wait-seconds": "5"})


def test_wrong_types_are_explained_in_plain_words():
    class Table(Section):
        path: Path = Field(default=Path(), strict=False)
        items: tuple[str, ...] = Field(default=(), strict=False)
        part: TrainingSection = TrainingSection()
        flag: bool = False
        count: int = 0
        rate: float = 0.0
        text: str = ""

    found = {}
    for name in Table.model_fields:
        with pytest.raises(ValidationError) as caught:
            Table.model_validate({name: None})
        found[name] = explain(caught.value)
    assert found == {
        "path": "path=None: expected a path",
        "items": "items=None: expected a list",
        "part": "part=None: expected a table",
        "flag": "flag=None: expected true or false",
        "count": "count=None: expected a whole number",
        "rate": "rate=None: expected a number",
        "text": "text=None: expected text",
    }


@pytest.mark.parametrize(
    ("text", "kind", "expected"),
    [
        ("3", int, 3),
        ("1e-3", float, 1e-3),
        ("3", float, 3),
        ("TRUE", bool, True),
        ("3", str, "3"),
        ("true", Path, "true"),
    ],
)
def test_a_text_gets_the_type_of_its_setting(text, kind, expected):
    found = natural("key", text, kind)
    assert (found, type(found)) == (expected, type(expected))


def test_true_is_not_a_number():
    numbers = [key for key, value in RunConfig().flatten().items() if type(value) in (int, float)]
    accepted = []
    for key in numbers:
        for value in (True, "true"):
            with contextlib.suppress(ConfigError):
                RunConfig.parse({key: value})
                accepted.append((key, value))
    assert accepted == []


def test_every_setting_says_what_it_is_for():
    parts = [getattr(RunConfig(), name) for name in RunConfig.model_fields]
    sections = [RunConfig, *(type(part) for part in parts if isinstance(part, Section))]
    for section in sections:
        for name, field in section.model_fields.items():
            if not isinstance(field.default, Section):
                assert field.description, f"{section.__name__}.{name}"
    assert len(sections) == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"strategy.proximal-mu": 0.1},
            "strategy: proximal-mu=0.1 has no effect with name=fedavg; use name=fedprox",
        ),
        ({"model.depths": "1,1"}, "model: depths and dims are given together or not at all"),
        ({"model.dims": "16,32"}, "model: depths and dims are given together or not at all"),
        (
            {"model.depths": "1,1", "model.dims": "16"},
            "model: depths=1,1 and dims=16 differ in length",
        ),
        (
            {"model.image-size": 31},
            "model: image-size=31 with patch-size=4 leaves no pixel after 4 stages; expected at "
            "least 32 (small-images says how smaller images get there)",
        ),
        (
            {
                "model.depths": "1,1",
                "model.dims": "16,32",
                "model.patch-size": 9,
                "model.image-size": 17,
            },
            "model: image-size=17 with patch-size=9 leaves no pixel after 2 stages; expected at "
            "least 18 (small-images says how smaller images get there)",
        ),
        (
            {"model.norm": "batch", "training.batch-size": 1},
            "training.batch-size=1 with model.norm=batch: expected at least 2",
        ),
    ],
)
def test_values_that_contradict_each_other_are_refused(values, message):
    assert str(refusal(values)) == message


def test_values_at_the_edge_of_a_cross_rule_pass():
    assert RunConfig.parse({"model.image-size": 32}).model.image_size == 32
    fedprox = RunConfig.parse({"strategy.name": "fedprox", "strategy.proximal-mu": 0.1})
    assert fedprox.strategy.proximal_mu == 0.1
    RunConfig.parse({"model.norm": "group", "training.batch-size": 1})
    RunConfig.parse({"model.norm": "batch", "training.batch-size": 2})


def test_the_architecture_is_what_the_model_is_built_from():
    named = RunConfig.parse({"model.num-classes": 5}).model.architecture
    assert named == {
        "num_classes": 5,
        "in_channels": 3,
        "patch_size": 4,
        "norm": "group",
        "drop_path": 0.1,
    }
    own = RunConfig.parse({"model.depths": "1, 2", "model.dims": "16, 32"}).model.architecture
    assert (own["depths"], own["dims"]) == ((1, 2), (16, 32))


def test_assignments_get_their_settings_type():
    words = [
        "seed=3",
        "training.learning-rate=1e-3",
        "training.augment=False",
        "model.size = nano ",
    ]
    texts = parse_assignments(words)
    assert texts["training.learning-rate"] == "1e-3"
    run = RunConfig.parse(texts)
    assert (run.seed, run.training.learning_rate) == (3, 1e-3)
    assert (run.training.augment, run.model.size) == (False, "nano")


def test_only_the_first_equals_sign_divides():
    assert parse_assignments(["g = x=y ", "f="]) == {"g": "x=y", "f": ""}


@pytest.mark.parametrize("word", ["seed", "=3", ""])
def test_an_assignment_without_key_or_value_is_refused(word):
    with pytest.raises(ConfigError, match=f"^--set {word}: expected key=value$") as caught:
        parse_assignments([word])
    assert caught.value.hint == "--set model.size=nano"


def test_a_text_setting_may_look_like_a_number_on_the_command_line():
    one_stage = ["model.depths=2", "model.dims=16", "dataset=2024"]
    run = RunConfig.parse(parse_assignments(one_stage))
    assert (run.model.depths, run.model.dims, run.dataset) == ("2", "16", "2024")


WORDS = st.text(string.ascii_lowercase + "-", min_size=1, max_size=8)
SCALARS = st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8)
TABLES = st.recursive(
    st.dictionaries(WORDS, SCALARS, min_size=1, max_size=4),
    lambda inner: st.dictionaries(WORDS, SCALARS | inner, min_size=1, max_size=4),
    max_leaves=10,
)


@given(TABLES)
def test_flattening_loses_nothing(table):
    assert unflatten(flatten(table)) == table
    assert flatten(flatten(table)) == flatten(table)


@st.composite
def run_values(draw) -> dict[str, object]:
    """Any valid run configuration, as dotted values."""
    stages = draw(st.integers(0, 4))
    patch = draw(st.integers(1, 8))
    name = draw(st.sampled_from(["fedavg", "fedprox"]))
    positive = st.floats(1e-9, 1e3)
    smallest = patch * 2 ** ((stages or 4) - 1)
    return {
        "dataset": draw(st.text(min_size=1, max_size=9)),
        "num-server-rounds": draw(st.integers(1, 10**6)),
        "seed": draw(st.integers(0, 2**63 - 1)),
        "model.size": draw(st.sampled_from(["nano", "tiny", "small", "base"])),
        "model.depths": ",".join(str(draw(st.integers(1, 9))) for _ in range(stages)),
        "model.dims": ",".join(str(draw(st.integers(1, 9))) for _ in range(stages)),
        "model.num-classes": draw(st.integers(2, 1000)),
        "model.in-channels": draw(st.sampled_from([1, 3])),
        "model.image-size": draw(st.integers(max(16, smallest), 1024)),
        "model.small-images": draw(st.sampled_from(["resize", "pad"])),
        "model.patch-size": patch,
        "model.norm": draw(st.sampled_from(["batch", "group"])),
        "model.drop-path": draw(st.floats(0, 1, exclude_max=True)),
        "training.learning-rate": draw(positive),
        "training.schedule": draw(st.sampled_from(["cosine", "constant"])),
        "training.local-steps": draw(st.integers(0, 10**6)),
        "training.augment": draw(st.booleans()),
        "strategy.name": name,
        "strategy.proximal-mu": draw(st.floats(0, 10)) if name == "fedprox" else 0.0,
        "strategy.min-sites": draw(st.integers(1, 1000)),
        "strategy.wait-seconds": draw(positive),
        "strategy.selection-metric": draw(st.sampled_from(METRIC_NAMES)),
    }


@settings(max_examples=40)
@given(run_values())
def test_a_run_config_survives_flattening(values):
    run = RunConfig.parse(values)
    flat = run.flatten()
    assert flat == {**RunConfig().flatten(), **values}
    assert RunConfig.parse(flat) == run
    assert RunConfig.parse(unflatten(flat)) == run


# --- class names


def test_class_names_are_separated_by_commas_and_may_hold_one():
    text = 'malignant, "normal, benign"'
    run = RunConfig.parse({"classes": text, "model.num-classes": 2})
    assert run.class_names == ("malignant", "normal, benign")
    assert RunConfig().class_names == ()


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("a,b", "classes=a,b names 2 classes; model.num-classes=3"),
        ("a,,b", "classes=a,,b: expected names of printable characters, none of them empty"),
        ("a, ,b", "none of them empty"),
        ("a,b\x1b[2J,c", "expected names of printable characters"),
        ("a,b,a", "classes=a,b,a: expected no name twice"),
        ("a,b, a", "expected no name twice"),
        ('a,"b,c', "expected names separated by commas: "),
        ('a,"b" d,c', "expected names separated by commas: "),
        (3, "expected text"),
    ],
)
def test_class_names_that_are_none_are_refused(classes, message):
    assert message in str(refusal({"classes": classes, "model.num-classes": 3}))


def test_class_names_stand_in_one_line():
    with pytest.raises(ConfigError, match="in one line"):
        RunConfig.parse({"classes": "a,b\nc"})


NAME = st.text(min_size=1).map(str.strip).filter(lambda name: name and name.isprintable())


@given(st.lists(NAME, min_size=2, max_size=6, unique=True))
def test_class_names_survive_being_joined(names):
    run = RunConfig.parse({"classes": join_names(names), "model.num-classes": len(names)})
    assert run.class_names == tuple(names)
