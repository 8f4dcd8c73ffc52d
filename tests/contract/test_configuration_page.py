"""docs/configuration.md says what the schemas say."""

from __future__ import annotations

import importlib.util
from pathlib import Path


def test_the_configuration_page_is_generated_from_the_schemas(repository: Path) -> None:
    source = repository / "docs" / "build_configuration.py"
    spec = importlib.util.spec_from_file_location("build_configuration", source)
    assert spec is not None
    assert spec.loader is not None
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    assert builder.PAGE.read_text(encoding="utf-8") == builder.page(), (
        "run: python docs/build_configuration.py"
    )
    assert "None |" not in builder.page(), "every setting has a description"
