"""The ledger: the expected and the actual cost of a job, tick by tick, over all its machines.

A ledger is a folder with one file for each start, to which only that start appends: a mounted
bucket supports neither locks nor two writers of one file. Each line is a JSON object with `time`
(Unix seconds), `entry` and `step` (the last known step of the run):

    estimate  usd, p50_h, p95_h, tokens: what the plan expects of the whole job
    start     place, usd_per_h (of all nodes), nodes, is_spot, tokens; machine, machine_s
    tick      seconds, usd: sums of this start, including the tick that now begins; tokens
    alarm     is_late, text
    end       reason; seconds, usd: the sums that were used; tokens

Sums are cumulative, so that a torn or lost line loses nothing that the next one does not have. A
start without an `end` was killed during its last tick, which is paid for.
"""

import json
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from core.errors import ConfigError, DamagedError
from core.folder import append_line
from monitoring.jsonl import encode

Entry = dict[str, object]

ESTIMATE = ("usd", "p50_h", "p95_h", "tokens")


@dataclass(frozen=True)
class Estimate:
    """The plan's expectation of the whole job; 0 for figures that the plan does not have.

    Attributes:
        time: Unix seconds when the estimate was made; the deadline counts from then.
        usd: Expected cost.
        p50_h: Median of the hours until the job is done.
        p95_h: 95th percentile of the hours until the job is done.
        tokens: Number of tokens to train on.
    """

    time: float
    usd: float = 0.0
    p50_h: float = 0.0
    p95_h: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True)
class Start:
    """One start of the job, on one set of nodes.

    Attributes:
        time: Unix seconds when the start began.
        place: Place of the nodes, e.g. `aws/us-east-1/us-east-1a`.
        usd_per_h: Price of all nodes together.
        nodes: Number of nodes.
        is_spot: True if the nodes can be preempted.
        machine: Identifier of the machine since its last boot; empty if not recorded.
        machine_s: Age of the machine in seconds when this start began to pay.
        seconds: Seconds that this start has paid for.
        usd: Dollars that this start has paid.
        step: Last known step of the run.
        first_tokens: Tokens of the run when the start began.
        tokens: Tokens of the run when it was last read.
        reason: Reason of the end; empty: the start runs, or was killed.
    """

    time: float
    place: str
    usd_per_h: float
    nodes: int
    is_spot: bool
    machine: str
    machine_s: float
    seconds: float
    usd: float
    step: int
    first_tokens: float
    tokens: float
    reason: str


@dataclass(frozen=True)
class Account:
    """The sums of a whole ledger.

    Attributes:
        estimate: Last estimate; None without one.
        starts: All starts, in order.
        alarms: All `alarm` entries, in order.
        first_sight: Time and tokens of the first entry with new tokens; None without one.
        num_torn: Number of lines that cannot be read.
    """

    estimate: Estimate | None
    starts: tuple[Start, ...]
    alarms: tuple[Entry, ...]
    first_sight: tuple[float, float] | None
    num_torn: int = 0

    @property
    def spent_usd(self) -> float:
        """Dollars that all starts have paid."""
        return math.fsum(start.usd for start in self.starts)

    @property
    def seconds(self) -> float:
        """Seconds that all starts have paid for."""
        return math.fsum(start.seconds for start in self.starts)

    @property
    def tokens(self) -> float:
        """Tokens trained on since the ledger began, less those that were lost."""
        # Stages after training report 0 tokens: the last start with tokens counts.
        last = next((start.tokens for start in reversed(self.starts) if start.tokens), 0.0)
        return max(0.0, last - self.starts[0].first_tokens) if last else 0.0

    @property
    def usd_per_million_tokens(self) -> float | None:
        """Dollars for a million tokens so far; None before the first token."""
        return self.spent_usd / self.tokens * 1e6 if self.tokens > 0 else None


class Ledger:
    """A ledger to which this start appends, in a file of its own.

    Args:
        folder: Folder of the ledger; created with the first entry.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # After those of earlier starts, whose machines' clocks may have been ahead.
        number = time.time_ns()
        with suppress(OSError):  # `account` reports it
            for path in folder.glob(f"{'[0-9]' * 20}-*.jsonl"):
                number = max(number, int(path.name[:20]) + 1)
        # The random part keeps two machines apart that start at the same time.
        self._path = folder / f"{number:020d}-{secrets.token_hex(3)}.jsonl"

    def write(self, entry: str, step: int, **details: float | int | str) -> None:
        """Appends an entry and waits until it is on disk.

        Raises:
            OSError: The entry could not be written.
        """
        line = encode({"time": time.time(), "entry": entry, "step": step, **details})
        self.folder.mkdir(parents=True, exist_ok=True)
        append_line(self._path, line)

    def account(self) -> Account:
        """Returns the account of all starts, including those of other machines.

        Raises:
            ConfigError: See `read_account`.
        """
        return read_account(self.folder)


def read_account(folder: Path) -> Account:
    """Reads the ledger in a folder; a missing folder gives an empty account.

    Raises:
        ConfigError: The folder cannot be read.
        DamagedError: The sum in an entry is negative or not a finite number.
    """
    try:
        # File names begin with a number, zero-padded: by name is by order of the starts.
        files = [_read(path) for path in sorted(folder.glob("*.jsonl"))]
    except OSError as e:
        raise ConfigError("ledger", folder, e.strerror or str(e), "check the folder") from e
    account = account_of([entries for entries, _ in files])
    return replace(account, num_torn=sum(num_torn for _, num_torn in files))


def _read(path: Path) -> tuple[list[Entry], int]:
    """Returns the entries of one start and the number of unreadable lines (a crash may tear one).

    Raises:
        DamagedError: A sum is negative or not a finite number, which no guard writes.
    """
    entries, num_torn = [], 0
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            entry = _decoded(line)
            if entry is None:
                num_torn += 1
                continue
            for name in ("usd", "seconds") if entry.get("entry") in ("tick", "end") else ():
                value = entry.get(name)
                if not isinstance(value, int | float) or not 0 <= value < math.inf:
                    rule = f"line {number}: {name}={value} is not a finite number of at least 0"
                    fix = "restore the file, or correct the line to what was spent"
                    raise DamagedError("ledger", path, rule, fix)
            entries.append(entry)
    return entries, num_torn


def _decoded(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    # A line without its newline is still being written, or was torn in the middle of a number.
    is_whole = line.endswith(b"\n") and isinstance(entry, dict) and "step" in entry
    return entry if is_whole else None


def account_of(files: Iterable[Sequence[Entry]]) -> Account:
    """Adds up the entries of all starts.

    Args:
        files: Entries of each start, in order.
    """
    estimate: Estimate | None = None
    starts: list[Start] = []
    alarms: list[Entry] = []
    first_sight: tuple[float, float] | None = None
    for entries in files:
        start: Start | None = None
        for entry in entries:
            match entry.get("entry"):
                case "estimate":
                    figures = {name: _number(entry, name) for name in ESTIMATE}
                    estimate = Estimate(time=_number(entry, "time"), **figures)
                case "alarm":
                    alarms.append(entry)
                case "start":
                    start = _opened(entry)
                case "tick" | "end" if start is not None:
                    start = _continued(start, entry)
                    if first_sight is None and start.tokens > start.first_tokens:
                        first_sight = (_number(entry, "time"), start.tokens)
        if start is not None:
            starts.append(start)
    return Account(estimate, tuple(starts), tuple(alarms), first_sight)


def _opened(entry: Entry) -> Start:
    tokens = _number(entry, "tokens")
    return Start(
        time=_number(entry, "time"),
        place=str(entry.get("place", "")),
        usd_per_h=_number(entry, "usd_per_h"),
        nodes=int(_number(entry, "nodes")),
        is_spot=bool(entry.get("is_spot", False)),
        machine=str(entry.get("machine", "")),
        machine_s=_number(entry, "machine_s"),
        seconds=0.0,
        usd=0.0,
        step=int(_number(entry, "step")),
        first_tokens=tokens,
        tokens=tokens,
        reason="",
    )


def _continued(start: Start, entry: Entry) -> Start:
    return replace(
        start,
        seconds=_number(entry, "seconds"),
        usd=_number(entry, "usd"),
        step=int(_number(entry, "step")),
        tokens=_number(entry, "tokens"),
        reason=str(entry.get("reason", "")),
    )


def _number(entry: Entry, key: str) -> float:
    """Returns a number of an entry; 0 if the entry has none of that name."""
    value = entry.get(key)
    return float(value) if isinstance(value, int | float) else 0.0
