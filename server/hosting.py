"""What a federation remembers of its runs: that one is hosted, the last order, where a run is kept.

Sites follow the newest order alone, so a federation hosts one run at a time, and of two orders the
later has the larger number even if this machine's clock was set back meanwhile.

Invariant: the number of an order is on disk before the order exists.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from server.federation import Federation
from strategies.code import code_sha256
from strategies.errors import ConfigError
from strategies.files import held, write_atomic
from strategies.orders import CLOCK_TOLERANCE_SECONDS, LONGEST_SECONDS, Order, RunManifest
from strategies.run_config import RunConfig

LOCK, LAST_ORDER, CURRENT_RUN = "run.lock", "last-order.json", "current-run.json"
# `server status` shares the lock for a moment to learn whether somebody holds it.
PATIENCE_SECONDS = 1.0


@dataclass(frozen=True)
class CurrentRun:
    """The run that was hosted last.

    Attributes:
        directory: Its run directory, absolute.
        started: When it was last begun or resumed, ISO 8601, UTC.
    """

    run_uuid: str
    directory: str
    started: str


@contextmanager
def hosting(federation: Federation) -> Generator[None]:
    """Be the one process that hosts a run of this federation.

    Raises:
        ConfigError: Another process is.
    """
    refusal = ConfigError(
        f"federation={federation.name} hosts a run already; its sites follow one at a time",
        hint="`python -m server status` shows it; wait for it or stop it",
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(held(federation.state_dir / LOCK, refusal))
                break
            except ConfigError:
                if time.monotonic() >= deadline:
                    raise
                time.sleep(PATIENCE_SECONDS / 10)
        yield


def is_hosting(federation: Federation) -> bool:
    """Say whether some process hosts a run of this federation."""
    path = federation.state_dir / LOCK
    if not path.exists():
        return False
    with path.open("rb") as file:
        try:  # shared: of two that ask at once, neither takes the other for a host
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def issue_order(
    federation: Federation, run_uuid: str, run: RunConfig, cohort: Sequence[str]
) -> Order:
    """Sign a run's manifest; it replaces every order before it.

    Args:
        federation: Whose order key signs.
        run_uuid: The run's.
        run: Its settings.
        cohort: Its sites.

    Raises:
        ConfigError: The last order's time is so far ahead that sites would refuse the next one.
    """
    now = time.time_ns() // 1_000_000
    issued = max(now, _last_issued(federation.state_dir / LAST_ORDER) + 1)
    if issued - now > CLOCK_TOLERANCE_SECONDS * 1000:
        raise ConfigError(
            f"the last order was issued {(issued - now) / 3_600_000:.1f} h ahead of this machine's "
            "clock: sites would refuse one of now as older and one of then as of the future",
            hint=f"set the clock; if it is right now, remove {LAST_ORDER} from the state folder",
        )
    write_atomic(federation.state_dir / LAST_ORDER, json.dumps({"issued_ms": issued}) + "\n")
    manifest = RunManifest(
        federation=federation.id,
        run_uuid=run_uuid,
        run_config=run.flatten(),
        cohort=tuple(sorted(cohort)),
        code_sha256=code_sha256(),
        issued_ms=issued,
        expires_ms=issued + round(min(longest_seconds(run), LONGEST_SECONDS) * 1000),
    )
    order = Order.issue(federation.order_key, manifest)
    federation.audit.append(
        "order-issued",
        run_uuid=run_uuid,
        order=order.sha256,
        cohort=",".join(manifest.cohort),
        code_sha256=manifest.code_sha256,
        expires=_iso(manifest.expires_ms / 1000),
    )
    return order


def longest_seconds(run: RunConfig) -> float:
    """Return how long a run can take by its own deadlines; its order lives no longer.

    Each round, and each of the two evaluations that close the run, waits for its sites and for
    their replies; one more of both is for what no deadline bounds, such as a restarted superlink.
    """
    settings = run.strategy
    phase = settings.wait_seconds + settings.round_timeout_seconds
    return (run.num_server_rounds + 3) * phase + CLOCK_TOLERANCE_SECONDS


def record_run(federation: Federation, run_uuid: str, directory: Path) -> None:
    """Remember which run is hosted, for ``server status``."""
    current = CurrentRun(run_uuid, str(directory.resolve()), _iso(time.time()))
    path = federation.state_dir / CURRENT_RUN
    write_atomic(path, json.dumps(asdict(current), indent=2) + "\n")


def current_run(federation: Federation) -> CurrentRun | None:
    """Return the run that was hosted last; None when there was none.

    Raises:
        ConfigError: The file that says so is damaged.
    """
    path = federation.state_dir / CURRENT_RUN
    if not path.exists():
        return None
    try:
        return CurrentRun(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"{path} is damaged", hint="remove it; it only serves status") from error


def _last_issued(path: Path) -> int:
    if not path.exists():
        return 0
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["issued_ms"])
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} is damaged: the next order could be older than one the sites follow",
            hint="remove it if this machine's clock is right",
        ) from error


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
