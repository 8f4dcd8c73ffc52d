"""``RunConfig``'s defaults and pyproject's ``[tool.flwr.app.config]`` are one list."""

from __future__ import annotations

import json
import tomllib

from medmamba.scan import BACKENDS
from strategies.run_config import SCAN_BACKENDS, RunConfig, flatten


def as_toml(config: RunConfig) -> str:
    """The table to paste: JSON spells these scalars as TOML does."""
    values = config.model_dump(by_alias=True)
    lines = ["[tool.flwr.app.config]"]
    lines += [f"{key} = {json.dumps(v)}" for key, v in values.items() if not isinstance(v, dict)]
    for section, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[tool.flwr.app.config.{section}]"]
            lines += [f"{key} = {json.dumps(value)}" for key, value in table.items()]
    return "\n".join(lines)


def test_the_defaults_are_those_that_flower_reads(repository):
    document = tomllib.loads((repository / "pyproject.toml").read_text())
    shipped = flatten(document["tool"]["flwr"]["app"]["config"])
    expected = RunConfig().flatten()
    # 1 == 1.0 == True in Python; Flower keeps the types apart, so they are compared too.
    typed = {key: (type(value), value) for key, value in shipped.items()}
    assert typed == {key: (type(value), value) for key, value in expected.items()}, (
        f"paste this into pyproject.toml:\n\n{as_toml(RunConfig())}\n"
    )


def test_the_printed_table_is_the_one_to_paste():
    table = tomllib.loads(as_toml(RunConfig()))["tool"]["flwr"]["app"]["config"]
    assert flatten(table) == RunConfig().flatten()


def test_every_value_is_of_a_kind_that_flower_carries():
    kinds = {type(value) for value in RunConfig().flatten().values()}
    assert kinds <= {bool, int, float, str}


def test_the_scan_backends_of_a_run_are_those_of_the_model():
    assert SCAN_BACKENDS == BACKENDS
