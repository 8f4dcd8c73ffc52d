"""Every option of every command is explained once, in the table of its role's page."""

from __future__ import annotations

import argparse
import re

import pytest

import client.__main__
import server.__main__
import simulation.run

PAGES = {
    "hospital": client.__main__.parser,
    "coordinator": server.__main__.parser,
    "researcher": simulation.run.parser,
}


def options(parser: argparse.ArgumentParser) -> set[str]:
    """The options of a parser and of its commands."""
    found: set[str] = set()
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found |= {name for command in action.choices.values() for name in options(command)}
        found |= {name for name in action.option_strings if name.startswith("--")}
    return found - {"--help"}


@pytest.mark.parametrize("page", PAGES)
def test_each_option_has_one_row(repository, page):
    text = (repository / "docs" / f"{page}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(--[a-z-]+)", text, re.MULTILINE)
    assert sorted(rows) == sorted(options(PAGES[page]()))
