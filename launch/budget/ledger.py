"""The ledger: what a job was to cost, and what it did cost, tick by tick, on whichever machines.

A folder with one file a start, which that start alone appends to: machines follow one another, and
a mounted bucket can neither lock a file nor let two write to it. Each line is a JSON object with
`time` (Unix seconds), `entry` and `step` (of the run, as far as it is known):

    estimate  usd, p50_h, p95_h, tokens: what the plan expects of the whole job
    start     place, usd_per_h (of all nodes), nodes, is_spot, tokens; machine, machine_s
    tick      seconds, usd: of this start so far, the tick that now begins included; tokens
    alarm     is_late, text
    end       reason; seconds, usd: those that were used; tokens

Sums in it only grow, so a line that is torn or lost takes nothing with it. A start without an end
was killed in its last tick, which is paid for.
"""

import json
import math
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from core.errors import ConfigError, DamagedError
from core.folder import append_line
from monitoring.jsonl import encode

Entry = dict[str, object]

ESTIMATE = ("usd", "p50_h", "p95_h", "tokens")


@dataclass(frozen=True)
class Estimate:
    """What the plan expects of the whole job; 0 where it does not say.

    Attributes:
        time: When it was made, in Unix seconds; a deadline counts from then.
        usd: What it costs.
        p50_h: Hours until it is done, half of the time.
        p95_h: Hours until it is done, 19 times of 20.
        tokens: To be trained on.
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
        time: When it began, in Unix seconds.
        place: Where.
        usd_per_h: Of all nodes.
        nodes: How many.
        is_spot: Whether they can be taken away.
        machine: A name for this life of the machine; empty where it has none.
        machine_s: How old the machine was when it began to pay.
        seconds: That it has paid for.
        usd: Paid.
        step: The last that is known.
        first_tokens: Of the run, when it began.
        tokens: Of the run, when it was last seen.
        reason: Why it ended; empty: it runs, or was killed.
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
    """The whole ledger.

    Attributes:
        estimate: The last one, if any.
        starts: In order.
        alarms: `alarm` entries, in order.
        first_sight: Time and tokens of the first entry that saw tokens come, if one did.
        num_torn: Lines that cannot be read.
    """

    estimate: Estimate | None
    starts: tuple[Start, ...]
    alarms: tuple[Entry, ...]
    first_sight: tuple[float, float] | None
    num_torn: int = 0

    @property
    def spent_usd(self) -> float:
        """By all starts."""
        return math.fsum(start.usd for start in self.starts)

    @property
    def seconds(self) -> float:
        """Paid for, in all starts."""
        return math.fsum(start.seconds for start in self.starts)

    @property
    def tokens(self) -> float:
        """Trained on since the ledger began, less those that were lost."""
        # A stage after training sees none.
        last = next((start.tokens for start in reversed(self.starts) if start.tokens), 0.0)
        return max(0.0, last - self.starts[0].first_tokens) if last else 0.0

    @property
    def usd_per_million_tokens(self) -> float | None:
        """What they cost; None where none was seen."""
        return self.spent_usd / self.tokens * 1e6 if self.tokens > 0 else None


class Ledger:
    """A folder of files, one of which is this start's own.

    Args:
        folder: Made when the first entry is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / f"{time.time_ns():020d}-{secrets.token_hex(3)}.jsonl"

    def write(self, entry: str, step: int, **details: float | int | str) -> None:
        """Appends an entry, and waits until the disk has it.

        Raises:
            OSError: It could not be written.
        """
        line = encode({"time": time.time(), "entry": entry, "step": step, **details})
        self.folder.mkdir(parents=True, exist_ok=True)
        append_line(self._path, line)

    def account(self) -> Account:
        """What all files say, of other machines too.

        Raises:
            ConfigError: See `read_account`.
        """
        return read_account(self.folder)


def read_account(folder: Path) -> Account:
    """The ledger in a folder; an empty one where there is none.

    Raises:
        ConfigError: The folder cannot be read.
        DamagedError: An entry has a sum that cannot be.
    """
    try:
        # Names begin with the time, in digits of one length.
        files = [_read(path) for path in sorted(folder.glob("*.jsonl"))]
    except OSError as e:
        raise ConfigError("ledger", folder, e.strerror or str(e), "check the folder") from e
    account = account_of([entries for entries, _ in files])
    return replace(account, num_torn=sum(num_torn for _, num_torn in files))


def _read(path: Path) -> tuple[list[Entry], int]:
    """The entries of one start, and the number of lines that are none: a crash may tear the last.

    Raises:
        DamagedError: A sum in it is negative or no number, which no guard has written.
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
                    rule = f"line {number}: {name}={value} cannot be"
                    fix = "restore the file, or correct the line to what was spent"
                    raise DamagedError("ledger", path, rule, fix)
            entries.append(entry)
    return entries, num_torn


def _decoded(line: bytes) -> Entry | None:
    try:
        entry = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    is_whole = line.endswith(b"\n") and isinstance(entry, dict) and "step" in entry
    return entry if is_whole else None


def account_of(files: Iterable[Sequence[Entry]]) -> Account:
    """Adds entries up.

    Args:
        files: The entries of each start, in order.
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
    """A number of an entry; 0 where there is none."""
    value = entry.get(key)
    return float(value) if isinstance(value, int | float) else 0.0
