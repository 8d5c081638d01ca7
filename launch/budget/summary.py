"""The text that `python -m launch cost` prints about a ledger."""

import math
from itertools import groupby
from pathlib import Path

from core.errors import ConfigError
from launch.budget.ledger import Account, Start, read_account
from monitoring.units import compact, duration


def dollars(usd: float) -> str:
    """Formats a sum: `$12.34`."""
    return f"${usd:,.2f}"


def summary(ledger: Path) -> str:
    """Returns the spent, expected and forecast cost, the cost of tokens, and a table by place.

    Args:
        ledger: Folder of a ledger.

    Raises:
        ConfigError: The folder has no ledger.
    """
    account = read_account(ledger)
    if not account.starts:
        raise ConfigError("ledger", ledger, "has no entry", "name the folder that guard writes to")
    last = account.starts[-1]
    num_starts = f"{len(account.starts)} start" + ("s" if len(account.starts) > 1 else "")
    hours = duration(account.seconds)
    lines = [
        f"spent      {dollars(account.spent_usd)} in {num_starts}, {hours} paid",
        *_expected(account),
        *_by_tokens(account),
        f"last       step {last.step}, {last.reason or 'running, or killed'}",
    ]
    if account.alarms:
        lines.append(f"alarm      {account.alarms[-1].get('text', '')}")
    if account.num_torn:
        num_lines = f"{account.num_torn} line" + ("s" if account.num_torn > 1 else "")
        lines.append(f"unreadable {num_lines}, as a crash leaves them; the others have all sums")
    return "\n".join([*lines, "", *_by_place(account)])


def forecast_usd(account: Account) -> float | None:
    """Returns the cost of the whole job at the cost per token so far; None if it is unknown."""
    rate = account.usd_per_million_tokens
    if rate is None or account.estimate is None or not account.estimate.tokens:
        return None
    left = max(0.0, account.estimate.tokens - account.tokens)
    return account.spent_usd + rate * left / 1e6


def _expected(account: Account) -> list[str]:
    estimate, lines = account.estimate, []
    if estimate is not None and estimate.usd:
        times = [duration(hours * 3600) for hours in (estimate.p50_h, estimate.p95_h) if hours]
        when = f", done in {' to '.join(times)}" if times else ""
        lines.append(f"estimate   {dollars(estimate.usd)}{when}")
    forecast = forecast_usd(account)
    if forecast is not None:
        off = ""
        if estimate is not None and estimate.usd:
            off = f" ({forecast / estimate.usd - 1:+.0%} of the estimate)"
        lines.append(f"forecast   {dollars(forecast)}{off}")
    return lines


def _by_tokens(account: Account) -> list[str]:
    rate = account.usd_per_million_tokens
    if rate is None:
        return ["tokens     none yet"]
    expected = ""
    if account.estimate is not None and account.estimate.usd and account.estimate.tokens:
        planned = account.estimate.usd / account.estimate.tokens * 1e6
        expected = f", expected {dollars(planned)}"
    return [f"tokens     {compact(account.tokens)}, {dollars(rate)} a million{expected}"]


def _by_place(account: Account) -> list[str]:
    def key(start: Start) -> tuple[str, bool, int]:
        return (start.place, start.is_spot, start.nodes)

    rows = [("place", "nodes", "starts", "hours", "$/h", "spent")]
    for (place, is_spot, nodes), group in groupby(sorted(account.starts, key=key), key):
        starts = list(group)
        hours = math.fsum(start.seconds for start in starts) / 3600
        usd = math.fsum(start.usd for start in starts)
        rows.append(
            (
                f"{place} spot" if is_spot else place,
                f"{nodes}",
                f"{len(starts)}",
                f"{hours:.2f}",
                f"{starts[-1].usd_per_h:.2f}",
                dollars(usd),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        f"{row[0]:<{widths[0]}}"
        + "".join(f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        for row in rows
    ]
