"""The coordinator's command line: ``python -m server``.

``init`` makes a federation, ``admit`` and ``revoke`` say who is in it, ``superlink`` starts
Flower's hub, ``run`` trains, ``status`` and ``audit`` look. Only parsing and one call each; the
work is in the modules beside this one, imported when needed so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from strategies import cli
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from server.federation import Federation

STATE_DIR = Path("state/server")

EXAMPLES = """examples:
  python -m server init --demo                            three sites on this machine
  python -m server init --name lungs --address hub.example.org:443
  python -m server admit A.enroll.json                    let hospital A take part
  python -m server superlink                              connect the sites
  python -m server run --output runs/first --set model.size=nano
  python -m server status                                 who is there, how far the run is
"""


def parser() -> cli.Parser:
    """Return the command line's definition."""
    common = cli.Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    common.add_argument(
        "--state-dir",
        type=Path,
        default=STATE_DIR,
        metavar="DIR",
        help=f"the coordinator's folder: keys, sites, database (default: {STATE_DIR})",
    )
    main = cli.Parser(
        prog="python -m server",
        description="The coordinator: admits and connects the sites and hosts a run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_init(commands, common)
    admit = _add(commands, common, "admit", "let a site take part", "A.enroll.json --fingerprint F")
    admit.add_argument("file", type=Path, metavar="FILE", help="the site's NAME.enroll.json")
    admit.add_argument(
        "--fingerprint",
        metavar="F",
        help="the site's fingerprint as told by telephone; another one is refused",
    )
    admit.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help="what to send back to the site (default: NAME.join.json beside its file)",
    )
    revoke = _add(commands, common, "revoke", "take a site out, from its next message on", "A")
    revoke.add_argument("site", metavar="SITE", help="the site's name")
    superlink = _add(commands, common, "superlink", "start flower-superlink, hardened", "--print")
    superlink.add_argument(
        "--print", action="store_true", help="print the command line instead of running it"
    )
    superlink.add_argument(
        "--executor",
        action="store_true",
        help="also execute what `flwr run . hospitals` submits from this machine",
    )
    _add_run(commands, common)
    status = _add(commands, common, "status", "show the sites and the run's progress", "--json")
    status.add_argument("--json", action="store_true", help="one JSON object, for machines")
    audit = _add(commands, common, "audit", "look at the coordinator's audit log", "--verify")
    audit.add_argument("--verify", action="store_true", help="check the hash chain")
    return main


def _add(
    commands: Any, common: cli.Parser, name: str, text: str, example: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        parents=[common],
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example: python -m server {name} {example}",
    )


def _add_init(commands: Any, common: cli.Parser) -> None:
    init = _add(
        commands,
        common,
        "init",
        "make a federation, or show the one there is",
        "--name lungs --address hub.example.org:443",
    )
    init.add_argument("--name", metavar="WORD", help="for people (default: federation)")
    init.add_argument("--address", metavar="HOST:PORT", help="where sites connect")
    init.add_argument(
        "--san",
        action="append",
        default=[],
        metavar="NAME",
        dest="sans",
        help="another name or address of that host, for the certificate; may be repeated",
    )
    init.add_argument(
        "--port", type=int, metavar="N", help="flower-superlink's, on loopback (default: 8000)"
    )
    init.add_argument(
        "--min-cohort", type=int, metavar="N", help="fewest sites of any run (default: 2)"
    )
    init.add_argument(
        "--renew", action="store_true", help="issue a new certificate from the same authority"
    )
    init.add_argument(
        "--demo", action="store_true", help="a federation of three sites on this machine"
    )


def _add_run(commands: Any, common: cli.Parser) -> None:
    run = _add(commands, common, "run", "train with the connected sites", "--output runs/first")
    run.add_argument("--run-config", type=Path, metavar="FILE", help="TOML with run settings")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", dest="assignments",
        help="one run setting, such as model.size=nano; may be repeated",
    )  # fmt: skip
    run.add_argument("--output", type=Path, metavar="DIR", help="new run directory")
    run.add_argument("--resume", type=Path, metavar="DIR", help="continue an interrupted run")


def command(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    options = parser().parse_args(arguments)
    _reach_loopback_directly()
    if options.command == "init":
        return _init(options)
    from server.federation import Federation

    federation = Federation.open(options.state_dir)
    _warn(federation)
    actions = {
        "admit": _admit,
        "revoke": _revoke,
        "superlink": _superlink,
        "run": _run,
        "status": _status,
        "audit": _audit,
    }
    return actions[options.command](federation, options)


def _reach_loopback_directly() -> None:
    """Keep the environment's proxy out of the way between this machine's own processes."""
    for name in ("NO_PROXY", "no_proxy"):
        hosts = [host for host in os.environ.get(name, "").split(",") if host]
        os.environ[name] = ",".join(dict.fromkeys([*hosts, "127.0.0.1"]))


def _init(options: argparse.Namespace) -> int:
    from server.federation import Federation
    from server.provisioning import InitOptions, initialise

    if options.demo:
        return _demo(options)
    told = initialise(
        options.state_dir,
        InitOptions(
            name=options.name,
            address=options.address,
            port=options.port,
            min_cohort=options.min_cohort,
            sans=options.sans,
            renew=options.renew,
        ),
    )
    _warn(Federation.open(options.state_dir))
    print(told)
    return 0


def _demo(options: argparse.Namespace) -> int:
    from server.demo import demonstrate

    given = [
        name
        for name in ("name", "address", "sans", "min_cohort", "renew")
        if getattr(options, name)
    ]
    if given:
        raise ConfigError(
            f"--demo with --{given[0].replace('_', '-').replace('sans', 'san')}: the demo decides "
            "that itself",
            hint="--demo takes --port and --state-dir alone",
        )
    typed = options.state_dir != STATE_DIR
    words = ["--state-dir", str(options.state_dir)] if typed else []
    print(demonstrate(options.state_dir, options.port, words))
    return 0


def _admit(federation: Federation, options: argparse.Namespace) -> int:
    from server.provisioning import admit, tell_superlink

    print(admit(federation, options.file, options.fingerprint, options.output), flush=True)
    print(tell_superlink(federation))
    return 0


def _revoke(federation: Federation, options: argparse.Namespace) -> int:
    from server.provisioning import revoke, tell_superlink

    print(revoke(federation, options.site), flush=True)
    print(tell_superlink(federation))
    return 0


def _superlink(federation: Federation, options: argparse.Namespace) -> int:
    from server.gateway import needs_gateway, write_nginx_configuration
    from server.superlink import described, serve

    federation.certificates().require_valid()
    if needs_gateway(federation):
        path = write_nginx_configuration(federation)
        print(f"gateway: nginx -e stderr -c {shlex.quote(str(path))}", file=sys.stderr)
    if options.print:
        print(described(federation, executor=options.executor))
        return 0
    return serve(federation, executor=options.executor)


def _run(federation: Federation, options: argparse.Namespace) -> int:
    from server.command import Request, run

    if (options.output is None) == (options.resume is None):
        raise ConfigError(
            "give either --output (a new run) or --resume (an interrupted one)",
            hint="python -m server run --output runs/first",
        )
    return run(
        Request(
            federation=federation,
            run_config=options.run_config,
            assignments=options.assignments,
            output=options.output,
            resume=options.resume,
        )
    )


def _status(federation: Federation, options: argparse.Namespace) -> int:
    from server.status import status

    return status(federation, options.json)


def _audit(federation: Federation, options: argparse.Namespace) -> int:
    log = federation.audit
    if options.verify or not log.path.exists():  # one that is missing is an error, too
        entries, head = log.verify()
        print(f"audit log intact entries={entries} head={head}")
    else:
        print(log.path.read_text(encoding="utf-8", errors="backslashreplace"), end="")
    return 0


def _warn(federation: Federation) -> None:
    """Say which certificate needs attention; damaged ones stop the commands that need them."""
    try:
        warnings = federation.certificates().warnings()
    except ConfigError as error:
        warnings = [str(error)]
    for line in warnings:
        print(f"warning: {line}", file=sys.stderr)


if __name__ == "__main__":
    cli.run(command, sys.argv[1:])
