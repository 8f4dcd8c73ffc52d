"""The hospital's command line: ``python -m client``.

``--site NAME`` alone connects the site and stays up; the commands prepare it or look at it. Only
parsing and one call each: the work is in the modules beside this one, imported when needed so that
``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from client import data_command
from strategies import cli
from strategies.errors import ConfigError

if TYPE_CHECKING:
    from client.site_config import SiteConfig

EXAMPLES = """examples:
  python -m client init --site A               make the site's file, keys and enrolment request
  python -m client join A.join.json --site A   take what the coordinator sent back
  python -m client check --site A              try everything that the site needs
  python -m client --site A                    connect and train when asked
  python -m client audit --site A --verify     check the tamper-evident log
  python -m client data list                   the published data sets
"""


def parser() -> cli.Parser:
    """Return the command line's definition."""
    common = cli.Parser(add_help=False, argument_default=argparse.SUPPRESS)
    common.add_argument("--site", metavar="NAME", help="the site's name")
    common.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="its file (client/sites/NAME.toml)",
    )
    common.add_argument("--debug", action="store_true", help="show tracebacks")
    main = cli.Parser(
        prog="python -m client",
        description="The program at a hospital: trains on local images, sends signed updates.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        parents=[common],
    )
    main.add_argument(
        "--print-systemd",
        action="store_true",
        help="print a systemd unit for the site's node instead of running it",
    )
    commands = main.add_subparsers(dest="command", metavar="COMMAND")
    init = _add(
        commands,
        "init",
        [common],
        "make the site's file, keys and enrolment request",
        "--site A",
    )
    init.add_argument(
        "--allow-unprotected",
        action="store_true",
        help="write a file that admits runs without differential privacy and encryption",
    )
    join = _add(
        commands,
        "join",
        [common],
        "take the join document that the coordinator sent",
        "A.join.json --site A",
    )
    join.add_argument("file", type=Path, metavar="FILE", help="the coordinator's NAME.join.json")
    join.add_argument(
        "--fingerprint",
        metavar="F",
        help="the coordinator's fingerprint as told by telephone; another one is refused",
    )
    _add(
        commands,
        "check",
        [common],
        "try everything that the site needs, one line each; exit code 1 if any fails",
        "--site A",
    )
    audit = _add(commands, "audit", [common], "look at the site's audit log", "--site A --verify")
    audit.add_argument("--verify", action="store_true", help="check the hash chain")
    data_command.add_parser(commands)
    return main


def _add(
    commands: Any, name: str, parents: list[cli.Parser], text: str, example: str
) -> argparse.ArgumentParser:
    return commands.add_parser(
        name,
        parents=parents,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example: python -m client {name} {example}",
    )


def command(arguments: Sequence[str]) -> int:
    """Run one command line; returns the exit code."""
    options = parser().parse_args(arguments)
    if options.command == "data":
        return data_command.command(options)
    site = getattr(options, "site", None)
    if site is None:
        raise ConfigError("--site is missing", hint="python -m client --site A")
    from client.site_config import site_file

    path = site_file(site, getattr(options, "config", None))
    if options.print_systemd and options.command:
        raise ConfigError(f"--print-systemd goes without {options.command}")
    if options.command == "init":
        return _init(site, path, unprotected=options.allow_unprotected)
    if options.command == "join":
        return _join(site, path, options.file, options.fingerprint)
    if options.command == "check":
        return _check(site, path)
    if options.command == "audit":
        return _audit(site, path, verify=options.verify)
    if options.print_systemd:
        return _print_systemd(site, path)
    return _run(site, path)


def _init(site: str, path: Path, *, unprotected: bool) -> int:
    from client.enrol import initialise

    print(initialise(site, path, unprotected=unprotected))
    return 0


def _join(site: str, path: Path, file: Path, fingerprint: str | None) -> int:
    from client.membership import join

    print(join(_config(site, path), file, fingerprint))
    return 0


def _check(site: str, path: Path) -> int:
    from client.check import findings

    failed = False
    for finding in findings(_config(site, path)):
        print(finding, flush=True)  # each as it comes: reading images takes a while
        failed = failed or finding.level == "FAIL"
    return 1 if failed else 0


def _print_systemd(site: str, path: Path) -> int:
    from client.systemd import unit

    print(unit(_config(site, path), path), end="")
    return 0


def _audit(site: str, path: Path, *, verify: bool) -> int:
    from client.site_config import AUDIT_LOG
    from strategies.audit import AuditLog

    log = AuditLog(_config(site, path).state_dir / AUDIT_LOG)
    if verify:
        entries, head = log.verify()
        print(f"audit log intact entries={entries} head={head}")
    elif log.path.exists():
        print(log.path.read_text(), end="")
    else:
        log.verify()  # says that it is missing
    return 0


def _run(site: str, path: Path) -> int:
    from client.membership import read_membership

    config = _config(site, path)
    membership = read_membership(config)
    import torch

    from client.data.labels import unmapped_error
    from client.data.registry import load
    from client.flower_runtime import run_node
    from client.site import Site
    from medmamba.scan import active_backend

    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    runtime = Site(config, lambda: load(config.data, [site], config.state_dir), membership)
    # What can fail is tried before anybody relies on this site: key, log, data, device, scan.
    fingerprint = runtime.key_fingerprint
    runtime.audit.verify()
    unmapped = runtime.match_classes(config.task_classes)
    if unmapped:
        raise unmapped_error(unmapped, config.task_classes)
    counts = runtime.class_counts()
    print(
        f"site={site} dataset={config.run_dataset} training_examples={counts.sum()} "
        f"device={runtime.device.type} scan_backend={active_backend(runtime.device)} "
        f"public_key={fingerprint} superlink={membership.address} "
        f"federation={cli.one_line(membership.name, 80)}",
        flush=True,
    )
    run_node(runtime)
    return 0


def _config(site: str, path: Path) -> SiteConfig:
    """Read a site's file and refuse one that belongs to another site."""
    from client.site_config import read_site_config

    config = read_site_config(path)
    if config.site != site:
        raise ConfigError(
            f"--site {site} but the file says site={config.site}",
            hint="name the right file with --config, or correct `site` in it",
        )
    return config


if __name__ == "__main__":
    cli.run(command, sys.argv[1:])
