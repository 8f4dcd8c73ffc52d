"""Run every benchmark and write docs/benchmarks.md from what they print.

    python benchmarks/run_all.py [--quick] [--only NAME] [--render]

Each script of this folder prints one JSON object with its machine and its figures. They are kept in
``results.json`` with command, commit and date; the page is rendered from that file alone, so
``--render`` measures nothing.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
RESULTS = FOLDER / "results.json"
PAGE = FOLDER.parent / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Written by `make bench` from what the scripts in `benchmarks/` print; benchmarks report, no test
asserts a time. Ratios come from interleaved rounds in one process, medians over the rounds.

**No figure here is from a GPU.** The CUDA path (device choice, training step, memory, mamba-ssm and
our Triton kernels) has not been run by the project yet.
"""

Results = dict[str, dict[str, Any]]


def names() -> list[str]:
    """Return the benchmark scripts of this folder; the other files are their parts."""
    others = (path for path in FOLDER.glob("*.py") if path != Path(__file__).resolve())
    return sorted(path.stem for path in others if "__main__" in path.read_text(encoding="utf-8"))


def current_commit() -> str:
    """Return the checkout's commit, marked if it has changes; before any result is written."""
    return subprocess.run(
        ["git", "describe", "--always", "--dirty=+changes", "--abbrev=12"],
        cwd=FOLDER, capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip


def measure(name: str, commit: str, *, quick: bool) -> dict[str, Any] | None:
    """Run one script; returns its JSON with command, commit and date, or None: cannot run here."""
    options = ["--quick"] if quick else []
    done = subprocess.run(
        [sys.executable, FOLDER / f"{name}.py", *options, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode == os.EX_UNAVAILABLE:  # it has said why
        return None
    if done.returncode:
        sys.exit(done.returncode)
    return {
        "command": " ".join(["python", f"benchmarks/{name}.py", *options]),
        "commit": commit,
        "date": datetime.now(UTC).date().isoformat(),
        **json.loads(done.stdout),
    }


def render(results: Results) -> str:
    """Return the page."""
    parts = [HEAD]
    for name in names():
        about = ast.get_docstring(ast.parse((FOLDER / f"{name}.py").read_text(encoding="utf-8")))
        title, _, details = (about or "").partition("\n\n")
        if name not in results:
            parts.append(f"## {name}\n\n{title}\n\n**Not measured yet.**\n")
            continue
        result = results[name]
        text = "\n\n".join(p for p in details.split("\n\n") if not p.startswith("    "))
        machine = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
        rows = [f"| `{key}` | {value:.3g} |" for key, value in result["figures"].items()]
        parts.append(
            f"## {name}\n\n{title}\n\n```sh\n{result['command']}\n```\n\n{text}\n\n"
            f"{machine}; commit {result['commit']}, {result['date']}.\n\n"
            "| figure | value |\n|---|---|\n" + "\n".join(rows) + "\n"
        )
    return "\n".join(parts)


def main() -> None:
    """Measure, keep, render."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer rounds; nothing is kept")
    parser.add_argument("--only", choices=names(), help="one script; the others keep their figures")
    parser.add_argument("--render", action="store_true", help="only write the page")
    options = parser.parse_args()
    results: Results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not options.render:
        commit = current_commit()
        for name in [options.only] if options.only else names():
            result = measure(name, commit, quick=options.quick)
            if result is None:
                continue
            results[name] = result
            if not options.quick:
                RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=2) + "\n")
            for figure, value in results[name]["figures"].items():
                print(f"{name}.{figure} {value:.4g}", flush=True)
    if not options.quick:
        PAGE.write_text(render(results), encoding="utf-8")


if __name__ == "__main__":
    main()
