"""What an hour costs where this job runs: SkyPilot says where, the launcher says how much."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from core.errors import ConfigError
from core.process.gpus import NoAnswer, ask_driver
from launch.catalog.gpus import gpu_of

_FIX = "give a JSON list of {cloud, region, zone, gpu, gpus_per_node, is_spot, usd_per_h}"


@dataclass(frozen=True)
class Price:
    """Of one node.

    Attributes:
        cloud: As SkyPilot writes it, in any case.
        region: Empty: any.
        zone: Empty: any of the region.
        gpu: SkyPilot's name of the accelerator.
        gpus_per_node: 0: not said.
        is_spot: Whether it can be taken away.
        usd_per_h: Of one node.
    """

    cloud: str
    region: str
    zone: str
    gpu: str
    gpus_per_node: int
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
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError) as e:
        raise ConfigError(source, _short(text), "is not a list of prices", _FIX) from e
    if not prices:
        raise ConfigError(source, "[]", "has no price", _FIX)
    return prices


def price_here(
    prices: list[Price], environment: Mapping[str, str], gpu: str | None = None
) -> tuple[Price, str | None]:
    """The price of a node where this job runs.

    The place, the number of GPUs and their name tell prices apart, as far as they are known and one
    of the list has them. Nothing says whether the node is spot: of what is left the dearest counts,
    and the dearest of all where no price is of this place.

    Args:
        prices: At least one.
        environment: As SkyPilot sets it on each node: SKYPILOT_CLUSTER_INFO (`{"cloud": "AWS",
            "region": ..., "zone": ...}`) and SKYPILOT_NUM_GPUS_PER_NODE.
        gpu: See `gpu_here`.

    Returns:
        The price, and a remark where it is a guess.
    """
    where = _where(environment.get("SKYPILOT_CLUSTER_INFO"))
    fitting = [price for price in prices if _fits(price, where)]
    dearest = max(fitting or prices, key=lambda price: price.usd_per_h)
    if fitting:
        count = environment.get("SKYPILOT_NUM_GPUS_PER_NODE")
        fitting = _narrowed(fitting, lambda price: str(price.gpus_per_node) == count)
        fitting = _narrowed(fitting, lambda price: price.gpu == gpu)
        dearest = max(fitting, key=lambda price: price.usd_per_h)
    if len({price.usd_per_h for price in fitting}) == 1:
        return dearest, None
    here = "/".join(value for value in where.values() if value) or "an unknown place"
    found = f"{len(fitting)} prices" if fitting else "no price"
    remark = f"{found} for {here}: reckoning with the dearest, ${dearest.usd_per_h:g}/h a node"
    return dearest, f"{remark} ({dearest.place} {dearest.gpu})"


def gpu_here() -> str | None:
    """SkyPilot's name of this machine's GPUs, as the driver says; None where it cannot."""
    try:
        listing = ask_driver("-L")
    except NoAnswer:  # a GPU that has fallen off the bus; supervise says so
        return None
    name = re.match(r"GPU 0: (.+?) \(UUID", listing or "")
    return name and gpu_of(name[1])


def _narrowed(prices: list[Price], fits: Callable[[Price], bool]) -> list[Price]:
    """Those that fit; all where none does, since a list, too, may leave something out."""
    return [price for price in prices if fits(price)] or prices


def _price(row: Any) -> Price:
    usd_per_h = float(row["usd_per_h"])
    if not 0 <= usd_per_h < math.inf:
        raise ValueError(usd_per_h)
    names = {key: str(row.get(key) or "") for key in ("cloud", "region", "zone", "gpu")}
    return Price(
        **names,
        gpus_per_node=int(row.get("gpus_per_node") or 0),
        is_spot=bool(row.get("is_spot", False)),
        usd_per_h=usd_per_h,
    )


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
