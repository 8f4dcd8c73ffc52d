"""Every word that a site refuses with is explained in the hospital's page, and no other."""

from __future__ import annotations

import ast
import re

# Given to a reply by the ClientApp itself.
OF_THE_APP = {"bad-instruction", "no-data", "out-of-memory", "failed"}


def refusals(source: str) -> set[str]:
    """The first words of all calls that refuse."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return {
        call.args[0].value
        for call in calls
        if isinstance(call.func, ast.Name)
        and call.func.id in ("RefusalError", "_refuse")
        and isinstance(call.args[0], ast.Constant)
    }


def test_each_word_is_explained_once(repository):
    files = [*(repository / "client").rglob("*.py"), *(repository / "strategies").rglob("*.py")]
    words = OF_THE_APP.union(*(refusals(path.read_text("utf-8")) for path in files))
    assert len(words) > 20
    page = (repository / "docs" / "hospital.md").read_text("utf-8")
    section = page.partition("### Why this site refuses")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (`.*?) \|", section, re.MULTILINE)
    explained = [word for row in rows for word in re.findall(r"`([a-z-]+)`", row)]
    assert sorted(explained) == sorted(words)
