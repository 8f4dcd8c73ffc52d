"""``python -m client data``: the published data sets, listed, shown, fetched and verified.

Invariant: parsing and printing alone; facts are in the catalogue. Works without a site and asks the
network for nothing, except ``fetch``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies.errors import ConfigError

if TYPE_CHECKING:
    from client.data.catalogue import Entry

PROGRAM = "python -m client data"
EXAMPLES = f"""examples:
  {PROGRAM} list                                  the published data sets
  {PROGRAM} show kvasir                           one of them: classes, licence, layout, splits
  {PROGRAM} fetch breastmnist --data-dir DATA     download the official file and check it
  {PROGRAM} verify kvasir --data-dir DATA         compare files and counts with the published ones
"""


def add_parser(commands: Any) -> None:
    """Add ``data`` and its commands to the client's command line."""
    text = "published data sets: what they hold, how to get them, whether a copy is whole"
    data = commands.add_parser(
        "data",
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data.add_argument("--debug", action="store_true", help="show tracebacks")
    inner = data.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    _add(inner, "list", "the published data sets, one a line", "", json=True)
    show = _add(inner, "show", "all that is known of one data set", "kvasir", json=True)
    fetch = _add(
        inner,
        "fetch",
        "download the official file, continuing an earlier attempt, and check it",
        "breastmnist --data-dir DATA",
    )
    verify = _add(
        inner,
        "verify",
        "compare files, counts, patients and checksums with the published ones; exit code 1 on any "
        "difference",
        "pad-ufes-20 --data-dir DATA",
        json=True,
    )
    for command in (show, fetch, verify):
        command.add_argument("name", metavar="NAME", help="name of the data set, as in `list`")
    for command in (fetch, verify):
        command.add_argument(
            "--data-dir",
            type=Path,
            metavar="DIR",
            help="folder of the files (default: $FEDERATION_DATA, else the cache)",
        )
        command.add_argument(
            "--size",
            type=int,
            metavar="PIXELS",
            help="MedMNIST: 28, 64, 128 or 224 (28)",
        )


def _add(
    commands: Any, name: str, text: str, example: str, *, json: bool = False
) -> argparse.ArgumentParser:
    added = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example: {PROGRAM} {name} {example}".rstrip(),
    )
    added.add_argument("--debug", action="store_true", help="show tracebacks")
    if json:
        added.add_argument("--json", action="store_true", help="one JSON object, for machines")
    return added


def command(options: argparse.Namespace) -> int:
    """Run one of the commands; returns the exit code."""
    if options.data_command == "list":
        return _list(as_json=options.json)
    if options.data_command == "show":
        return _show(options.name, as_json=options.json)
    if options.data_command == "fetch":
        return _fetch(options.name, options.data_dir, options.size)
    return _verify(options.name, options.data_dir, options.size, as_json=options.json)


def _list(*, as_json: bool) -> int:
    from client.data.catalogue import catalogue

    if as_json:
        print(json.dumps({name: _facts(entry) for name, entry in catalogue().items()}))
        return 0
    heads = ("name", "images", "classes", "access", "commercial use", "reader tested on", "shows")
    rows = [
        (
            e.name,
            str(e.images),
            str(len(e.classes)),
            e.access,
            e.commercial,
            e.tested,
            e.title,
        )
        for e in catalogue().values()
    ]
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in (heads, *rows):
        print(
            "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        )
    return 0


def _show(name: str, *, as_json: bool) -> int:
    from client.data.catalogue import entry

    facts = _facts(entry(name))
    if as_json:
        print(json.dumps(facts))
        return 0
    width = max(len(key) for key in facts)
    for key, value in facts.items():
        print(f"{key:<{width}}  {_words(value)}")
    return 0


def _facts(entry: Entry) -> dict[str, Any]:
    """What the catalogue knows of a set; what nobody published says so."""
    from client.data.catalogue import NOT_PUBLISHED

    training = (
        "refused: several labels an image are not supported yet"
        if entry.multi_label
        else f'dataset = "{entry.name}"'
    )
    return {
        "name": entry.name,
        "shows": entry.title,
        "sixteen": entry.sixteen,
        "task": entry.task,
        "modality": entry.modality,
        "channels": entry.channels,
        "images": entry.images,
        "classes": entry.class_counts or list(entry.classes),
        "class-counts": "published" if entry.class_counts else NOT_PUBLISHED,
        "official-split": entry.examples or entry.official_split,
        "split": entry.split,
        "patients": entry.patients or NOT_PUBLISHED,
        "sites": entry.sites,
        "site-columns": list(entry.site_columns) or "none",
        "licence": entry.licence,
        "commercial-use": entry.commercial,
        "access": entry.access,
        "how-to-get": entry.how or f"{PROGRAM} fetch {entry.name}",
        "page": entry.url,
        "md5": entry.md5 or "none known",
        "layout": entry.layout,
        "reader-tested-on": entry.tested,
        "training": training,
        "loss": entry.loss,
        "metrics": entry.metrics,
    }


def _words(value: Any) -> str:
    if isinstance(value, dict):
        return "; ".join(f"{key}: {inner}" for key, inner in value.items())
    if isinstance(value, list):
        return "; ".join(value)
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _size(entry: Entry, size: int | None) -> int:
    """The size asked for, or the smallest; refused where there is but one."""
    if size is not None and entry.file_backed:
        raise ConfigError(
            f"--size {size} has no effect with {entry.name}", hint="only MedMNIST sets have sizes"
        )
    return 28 if size is None else size


def _fetch(name: str, data_dir: Path | None, size: int | None) -> int:
    from client.data.archives import fetch
    from client.data.catalogue import entry

    facts = entry(name)
    path, there = fetch(facts, data_dir, _size(facts, size))
    print(
        f"file={path} {'was there already' if there else 'fetched'} licence={facts.licence} "
        f"commercial-use={facts.commercial}"
    )
    return 0


def _verify(name: str, data_dir: Path | None, size: int | None, *, as_json: bool) -> int:
    from client.data.catalogue import entry
    from client.data.verify import verify

    findings = []
    for finding in verify(name, data_dir, _size(entry(name), size)):
        findings.append(finding)
        if not as_json:
            print(finding, flush=True)  # each as it comes: reading a large set takes a while
    differences = sum(finding.level == "DIFFERS" for finding in findings)
    if as_json:
        found = [finding._asdict() for finding in findings]
        print(json.dumps({"dataset": name, "differences": differences, "findings": found}))
    else:
        print(f"dataset={name} differences={differences}")
    return 1 if differences else 0
