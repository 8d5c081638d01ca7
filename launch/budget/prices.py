"""The price of an hour where this job runs: SkyPilot gives the place, the launcher the prices."""

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
    """The price of one node.

    Attributes:
        cloud: SkyPilot's name of the cloud, in any case.
        region: Region of the cloud; empty: any.
        zone: Zone of the region; empty: any.
        gpu: SkyPilot's name of the accelerator.
        gpus_per_node: Number of GPUs; 0: unknown.
        is_spot: True if the node can be preempted.
        usd_per_h: Price of one node.
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
        """Name of the place, as far as it is known: `aws/ap-south-1/ap-south-1a`."""
        return "/".join(part for part in (self.cloud.lower(), self.region, self.zone) if part)


def parse_prices(source: str, text: str) -> list[Price]:
    """Reads the price list that the launcher sends with a job.

    Args:
        source: Origin of the text, for errors.
        text: JSON list of prices.

    Raises:
        ConfigError: The text is not such a list, or the list is empty.
    """
    try:
        rows = json.loads(text)
        prices = [_price(row) for row in rows]
    except (ValueError, RecursionError, TypeError, AttributeError, KeyError) as e:
        raise ConfigError(source, _short(text), "is not a list of prices", _FIX) from e
    if not prices:
        raise ConfigError(source, "[]", "must have at least one price", _FIX)
    return prices


def price_here(
    prices: list[Price], environment: Mapping[str, str], gpu: str | None = None
) -> tuple[Price, str | None]:
    """Returns the price of a node where this job runs.

    Prices are selected by place, then by number of GPUs, then by GPU name; a criterion that is
    unknown or that no price matches is skipped. A node cannot tell whether it is spot, so the
    highest of the remaining prices counts, and the highest of all if none matches the place.

    Args:
        prices: Prices to choose from, at least one.
        environment: Environment that SkyPilot sets on each node: SKYPILOT_CLUSTER_INFO
            (`{"cloud": "AWS", "region": ..., "zone": ...}`) and SKYPILOT_NUM_GPUS_PER_NODE.
        gpu: Name of the GPU; see `gpu_here`.

    Returns:
        The price, and a remark for the user if the price is a guess.
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
    remark = f"{found} for {here}: using the highest, ${dearest.usd_per_h:g}/h a node"
    return dearest, f"{remark} ({dearest.place} {dearest.gpu})"


def gpu_here() -> str | None:
    """Returns SkyPilot's name of this machine's GPUs, by the driver; None if it is unknown."""
    try:
        listing = ask_driver("-L")
    except NoAnswer:  # e.g. a GPU has fallen off the bus; supervise reports it
        return None
    name = re.match(r"GPU 0: (.+?) \(UUID", listing or "")
    return name and gpu_of(name[1])


def _narrowed(prices: list[Price], fits: Callable[[Price], bool]) -> list[Price]:
    """Returns the prices that fit; all if none does, since the list may omit the field."""
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
    """Returns whether a price applies to a place; an unknown region or zone matches any."""
    if not where.get("cloud") or where["cloud"].lower() != price.cloud.lower():
        return False
    pairs = ((where["region"], price.region), (where["zone"], price.zone))
    return all(here == there or not here or not there for here, there in pairs)


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:60]}..."
