"""The coordinator's command line: ``python -m server``.

``superlink`` starts Flower's hub, ``run`` trains. Only parsing and one call each; the work is in
the modules beside this one, imported when needed so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shlex
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path

from strategies import cli
from strategies.errors import ConfigError

SECRET, DATABASE = "superlink.secret", "superlink.sqlite"

EXAMPLES = """examples:
  python -m server superlink --insecure
  python -m server run --insecure --site-keys keys --output runs/first \\
      --set num-server-rounds=2 --set model.size=nano
"""


def parser() -> cli.Parser:
    """Return the command line's definition."""
    common = cli.Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    common.add_argument(
        "--state-dir",
        type=Path,
        default=Path("state/server"),
        metavar="DIR",
        help="the coordinator's secret and database (default: state/server)",
    )
    common.add_argument(
        "--port", type=int, default=8000, help="flower-superlink's port (default: 8000)"
    )
    common.add_argument(
        "--insecure", action="store_true", default=False,
        help="no TLS; for sites on this machine only (loopback)",
    )  # fmt: skip
    main = cli.Parser(
        prog="python -m server",
        description="The coordinator: connects the sites and hosts a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main.add_subparsers(dest="command", metavar="COMMAND", required=True)
    superlink = commands.add_parser(
        "superlink",
        parents=[common],
        help="start flower-superlink as this project needs it",
        description="Start flower-superlink: it passes messages and executes nothing.",
        epilog="example: python -m server superlink --insecure",
    )
    superlink.add_argument(
        "--print", action="store_true", help="print the command line instead of running it"
    )
    run = commands.add_parser(
        "run",
        parents=[common],
        help="train with the connected sites",
        description="Host a run in the foreground and write its directory.",
        epilog="example: python -m server run --insecure --site-keys keys --output runs/first",
    )
    run.add_argument(
        "--site-keys", type=Path, metavar="DIR", help="folder with the admitted sites' NAME.pub"
    )
    run.add_argument(
        "--federation", default="federation", metavar="WORD",
        help="the word all sites share (default: federation)",
    )  # fmt: skip
    run.add_argument("--run-config", type=Path, metavar="FILE", help="TOML with run settings")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments",
        help="one run setting, such as model.size=nano; may be repeated",
    )  # fmt: skip
    run.add_argument("--output", type=Path, metavar="DIR", help="new run directory")
    run.add_argument("--resume", type=Path, metavar="DIR", help="continue an interrupted run")
    return main


def command(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    options = parser().parse_args(arguments)
    if not options.insecure:
        raise ConfigError(
            f"{options.command} without --insecure needs TLS, which this version does not set up",
            hint="with all sites on this machine add --insecure",
        )
    if not 0 < options.port < 65536:
        raise ConfigError(f"--port {options.port}: expected 1 to 65535")
    return _superlink(options) if options.command == "superlink" else _run(options)


def _superlink(options: argparse.Namespace) -> int:
    from server.flower_runtime import superlink_command
    from strategies.files import make_folder, write_atomic

    state: Path = options.state_dir
    make_folder(state, secret=True)
    secret = state / SECRET
    if not secret.exists():
        write_atomic(secret, secrets.token_bytes(32), mode=0o600)
    words = superlink_command(port=options.port, secret_file=secret, database=state / DATABASE)
    if options.print:
        print(shlex.join(words))
        return 0
    if not Path(words[0]).exists():
        raise ConfigError("flower-superlink is not installed beside this Python")
    os.environ["FLWR_HOME"] = str((state / "flower").resolve())
    sys.stdout.flush()
    return os.execv(words[0], words)


def _run(options: argparse.Namespace) -> int:
    from server.command import Request, run

    if (options.output is None) == (options.resume is None):
        raise ConfigError(
            "give either --output (a new run) or --resume (an interrupted one)",
            hint="python -m server run --insecure --site-keys keys --output runs/first",
        )
    if options.site_keys is None:
        raise ConfigError("--site-keys is missing", hint="the folder with each site's NAME.pub")
    request = Request(
        address=f"127.0.0.1:{options.port}",
        secret_file=options.state_dir / SECRET,
        site_keys=options.site_keys,
        federation=options.federation,
        run_config=options.run_config,
        assignments=options.assignments,
        output=options.output,
        resume=options.resume,
        run_uuid=uuid.uuid4().hex,
    )
    return run(request)


if __name__ == "__main__":
    cli.run(command, sys.argv[1:])
