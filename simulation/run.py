"""The researcher's command line: ``python simulation/run.py``.

One experiment: the scenario ``quick`` when nothing is said. Makes one run directory with
``report.html``.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):
    # `python simulation/run.py` puts simulation/ on the path, not the folder it lies in.
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from strategies import cli
from strategies.errors import ConfigError
from strategies.run_config import Scalar, flatten, parse_assignments

EXAMPLES = """examples:
  python simulation/run.py
  python simulation/run.py --scenario breastmnist --data-dir DATA --output runs/breast
  python simulation/run.py --set num-server-rounds=3 --set federation.num-sites=5
  python simulation/run.py --resume runs/breast
"""


def parser() -> cli.Parser:
    """Return the command line's definition."""
    main = cli.Parser(
        prog="python simulation/run.py",
        description="Train MedMamba across simulated hospitals on this machine.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main.add_argument("--scenario", metavar="NAME", help="shipped scenario or a .toml file (quick)")
    main.add_argument("--data-dir", type=Path, metavar="DIR", help="folder with the data files")
    main.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments",
        help="one setting, such as training.batch-size=32; may be repeated",
    )  # fmt: skip
    main.add_argument("--seed", type=int, help="root of all random choices (scenario's, else 0)")
    main.add_argument("--output", type=Path, metavar="DIR", help="new run directory")
    main.add_argument("--resume", type=Path, metavar="DIR", help="continue an interrupted run")
    main.add_argument("--debug", action="store_true", help="show tracebacks")
    return main


def command(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    options = parser().parse_args(arguments)
    from server.console import finish
    from server.run_directory import RunDirectory, require_new
    from simulation import experiment
    from simulation.scenario import parse_scenario, read_scenario

    if options.resume is not None:
        given = (options.scenario, options.seed, options.output)
        if any(value is not None for value in given) or options.assignments:
            raise ConfigError(
                "--resume takes everything but --data-dir from the run's own config.json",
                hint="leave the other options out",
            )
        directory = RunDirectory.open(options.resume)
        finished = directory.summary()
        if finished is not None:  # only the report is missing
            return finish(directory.path, finished)
        scenario = parse_scenario(
            {
                **flatten(directory.stored("scenario", dict)),
                **flatten({"run": directory.stored("run_config", dict)}),
                **_data_dir(options),
            }
        )
        data = experiment.prepare(scenario)
    else:
        name = "quick" if options.scenario is None else options.scenario
        scenario = read_scenario(name, _changes(options))
        stamp = time.strftime("%Y%m%d-%H%M%S")
        path = options.output or Path("runs") / f"{Path(name).stem}-{stamp}"
        require_new(path)
        data = experiment.prepare(scenario)
        directory = experiment.create(path, scenario, data, uuid.uuid4().hex)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_server_lines)
    with (
        directory.session(),
        cli.progress() as bar,
    ):
        task = bar.add_task("training", total=experiment.num_messages(scenario))
        summary = experiment.execute(
            directory, scenario, data, on_reply=lambda site: bar.advance(task)
        )
    return finish(directory.path, summary)


def _changes(options: argparse.Namespace) -> dict[str, Scalar]:
    changes = parse_assignments(options.assignments)
    if options.seed is not None:
        changes["seed"] = options.seed
    return {**changes, **_data_dir(options)}


def _data_dir(options: argparse.Namespace) -> dict[str, Scalar]:
    if options.data_dir is None:
        return {}
    if not options.data_dir.is_dir():
        raise ConfigError(f"--data-dir {options.data_dir} is not a folder")
    return {"data.data-dir": str(options.data_dir)}


def _server_lines(record: logging.LogRecord) -> bool:
    """Keep one line a round on the screen; each site's own lines are in log.txt."""
    return not record.name.startswith("client.") or record.levelno > logging.INFO


if __name__ == "__main__":
    cli.run(command, sys.argv[1:])
