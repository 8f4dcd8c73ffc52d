"""What every command line shares: one-line errors, exit codes, suggestions, progress.

Invariant: a person sees ``error:`` and ``hint:``, never a traceback unless ``--debug`` asks for
one; exit code 2 is a configuration to fix, 1 a failure while running, 130 an interrupt, 141 a
reader of the output who left.
"""

from __future__ import annotations

import argparse
import ctypes
import difflib
import logging
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from strategies.errors import ConfigError, FederationError

# Whoever read standard output, as `head` does, has seen enough: what a shell makes of SIGPIPE.
READER_LEFT = 141
# Of mallopt(3) in glibc; a person who sets one of these in the environment has decided.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
MALLOC_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


class Parser(argparse.ArgumentParser):
    """``argparse`` whose mistakes read like every other error of this project.

    Options are written in full: an abbreviation that works today means another option, or none,
    once an option is added. Subparsers are of this class and so have the same rule.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{"allow_abbrev": False, **options})

    def error(self, message: str) -> NoReturn:
        """Report a wrong command line as a :class:`ConfigError`."""
        raise ConfigError(message, hint=f"`{self.prog} --help` shows the options and an example")


def run(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> NoReturn:
    """Run a command and leave the process with its exit code.

    Args:
        command: Takes the arguments, returns the exit code.
        arguments: The command line without the program's name; ``--debug`` anywhere in it turns
            tracebacks and debug logging on.
    """
    debug = "--debug" in arguments
    # Python has none where the caller closed them.
    sys.stdout = sys.stdout or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    # Set before PyTorch loads its OpenMP runtime (GNU's): a thread that waits spins briefly, then
    # sleeps. Long spinning slows the many small steps of a scan tenfold on shared cores, none slows
    # them threefold on free ones.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if not any(name in os.environ for name in MALLOC_VARIABLES):
        keep_freed_memory()
    # Flower and its HTTP stack ask the internet for news and updates unless told not to.
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO, format="%(message)s", stream=sys.stderr
    )
    for noisy in (
        "httpx",
        "httpcore",
        "matplotlib",
        "fontTools",
        "datasets",
        "fsspec",
        "urllib3",
        "alembic",
    ):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        code = command([argument for argument in arguments if argument != "--debug"])
    except FederationError as error:
        if debug:
            raise
        report(error)
        code = error.exit_code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        if debug:
            raise
        code = READER_LEFT
    except PermissionError as error:
        if debug:
            raise
        hint = "does it belong to another user, as after `sudo`? Give it back to this one"
        report(ConfigError(f"{error.filename}: permission denied", hint))
        code = ConfigError.exit_code
    except Exception as error:
        if debug:
            raise
        # medmamba stands alone, so its ModelError is told by its hint, not by its class.
        hint = getattr(error, "hint", None)
        if isinstance(error, ValueError) and isinstance(hint, str):
            report(ConfigError(str(error), hint))
            code = ConfigError.exit_code
        else:
            kind = type(error).__name__
            report(FederationError(f"{kind}: {error}", "run again with --debug for the traceback"))
            code = FederationError.exit_code
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # so that Python does not try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def keep_freed_memory() -> None:
    """Have the next training step reuse what the last one freed; does nothing without glibc.

    glibc returns large blocks to the kernel, which clears every page that a step asks for again:
    32,000 page faults and a twentieth of a step's time. The peak stays what it was.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        if not mallopt(M_MMAP_THRESHOLD, 2**30):
            mallopt(M_MMAP_THRESHOLD, 2**25)  # the most that older versions take
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def report(error: FederationError) -> None:
    """Print a failure as one ``error:`` line and, where there is one, a ``hint:`` line."""
    print(f"error: {one_line(str(error))}", file=sys.stderr)
    if error.hint:
        print(f"hint: {one_line(error.hint)}", file=sys.stderr)


def one_line(text: str, limit: int | None = None) -> str:
    r"""Join a text's lines without control characters, whatever a library or a stranger wrote.

    >>> one_line("two\nlines\x1b[2J", limit=10)
    'two lines…'
    """
    if limit is not None:
        text = text[: 10 * limit]  # a stranger's text may be of any length
    shown = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return shown if limit is None or len(shown) <= limit else f"{shown[: limit - 1]}…"


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return a hint that names the closest valid spelling, or all of them.

    >>> nearest("quik", ["quick", "breastmnist"])
    'did you mean quick?'
    >>> nearest("zzz", ["quick", "breastmnist"])
    'valid: breastmnist, quick'
    """
    known = sorted(choices)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]}?" if close else f"valid: {', '.join(known)}"


def progress(*, enabled: bool | None = None) -> Progress:
    """Return a progress display on standard error; silent when that is not a terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not (console.is_terminal if enabled is None else enabled),
    )
