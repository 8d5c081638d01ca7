"""What an hour costs where this job runs: SkyPilot says where, the launcher says how much."""

import json
import math
from dataclasses import dataclass
from typing import Any

from monitoring.errors import ConfigError

_FIX = "give a JSON list of {cloud, region, zone, gpu, is_spot, usd_per_h}"


@dataclass(frozen=True)
class Price:
    """Of one node.

    Attributes:
        cloud: As SkyPilot writes it, in any case.
        region: Empty: any.
        zone: Empty: any of the region.
        gpu: SkyPilot's name of the accelerator.
        is_spot: Whether it can be taken away.
        usd_per_h: Of one node.
    """

    cloud: str
    region: str
    zone: str
    gpu: str
    is_spot: bool
    usd_per_h: float

    @property
    def place(self) -> str:
        """`aws/ap-south-1/ap-south-1a`, as far as it is known."""
        return "/".join(part for part in (self.cloud.lower(), self.region, self.zone) if part)


def parse_prices(source: str, text: str) -> list[Price]:
    """The list that the launcher sends along with a job.

    Args:
        source: Where it comes from, for errors.
        text: JSON.

    Raises:
        ConfigError: It is none, or empty.
    """
    try:
        rows = json.loads(text)
        prices = [_price(row) for row in rows]
    except (ValueError, TypeError, AttributeError, KeyError) as e:
        raise ConfigError(source, _short(text), "is not a list of prices", _FIX) from e
    if not prices:
        raise ConfigError(source, "[]", "has no price", _FIX)
    return prices


def price_here(prices: list[Price], cluster_info: str | None) -> tuple[Price, str | None]:
    """The price of a node where this job runs.

    Neither SkyPilot nor the machine says whether it is spot, nor of which row of the list: where
    several fit, the dearest of them counts, and so does the dearest of all where none does.

    Args:
        prices: At least one.
        cluster_info: SKYPILOT_CLUSTER_INFO, `{"cloud": "AWS", "region": ..., "zone": ...}`.

    Returns:
        The price, and a remark where it is a guess.
    """
    where = _where(cluster_info)
    fitting = [price for price in prices if _fits(price, where)]
    dearest = max(fitting or prices, key=lambda price: price.usd_per_h)
    if len({price.usd_per_h for price in fitting}) == 1:
        return dearest, None
    here = "/".join(value for value in where.values() if value) or "an unknown place"
    found = f"{len(fitting)} prices" if fitting else "no price"
    remark = f"{found} for {here}: reckoning with the dearest, ${dearest.usd_per_h:g}/h a node"
    return dearest, f"{remark} ({dearest.place} {dearest.gpu})"


def _price(row: Any) -> Price:
    usd_per_h = float(row["usd_per_h"])
    if not 0 <= usd_per_h < math.inf:
        raise ValueError(usd_per_h)
    names = {key: str(row.get(key) or "") for key in ("cloud", "region", "zone", "gpu")}
    return Price(**names, is_spot=bool(row.get("is_spot", False)), usd_per_h=usd_per_h)


def _where(cluster_info: str | None) -> dict[str, str]:
    try:
        found = json.loads(cluster_info or "{}")
        return {key: str(found.get(key) or "") for key in ("cloud", "region", "zone")}
    except (ValueError, AttributeError):
        return {}


def _fits(price: Price, where: dict[str, str]) -> bool:
    """Whether a price is of that place, as far as both are known."""
    if not where.get("cloud") or where["cloud"].lower() != price.cloud.lower():
        return False
    pairs = ((where["region"], price.region), (where["zone"], price.zone))
    return all(here == there or not here or not there for here, there in pairs)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."
