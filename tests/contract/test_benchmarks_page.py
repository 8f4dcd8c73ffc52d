"""docs/benchmarks.md shows what was measured: it is rendered from benchmarks/results.json."""

from __future__ import annotations

import importlib.util
import json


def test_the_page_is_what_the_results_render_to(repository):
    path = repository / "benchmarks" / "run_all.py"
    spec = importlib.util.spec_from_file_location("run_all", path)
    assert spec is not None
    assert spec.loader is not None
    run_all = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(run_all)
    results = json.loads(run_all.RESULTS.read_text())
    needs_a_gpu = {"scan_gpu"}
    assert set(run_all.names()) - set(results) <= needs_a_gpu
    assert set(results) <= set(run_all.names())
    assert run_all.PAGE.read_text(encoding="utf-8") == run_all.render(results)
    assert not [name for name, result in results.items() if "+changes" in result["commit"]]
