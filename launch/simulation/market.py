"""Markets of nodes: availability and prices over time, from real traces or a Markov process."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.errors import ConfigError
from core.folder import read_json

# Price of one V100 (AWS p3.2xlarge, us-east-1, 2023). Spot then cost about 30% of it.
ON_DEMAND_USD_PER_H = 3.06
SPOT_SHARE = 0.30
EGRESS_USD_PER_GB = 0.02  # between regions of one cloud (AWS)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Market:
    """The offers of each zone at each tick. On-demand nodes are always available everywhere.

    Shapes: T ticks, Z zones.

    Attributes:
        gap_s: Length of a tick in seconds.
        zones: Names of the zones (Z).
        regions: Region of each zone (Z); moving data within a region is free.
        nodes: Number of available spot nodes (T, Z).
        spot_usd_per_h: Price of a spot node (T, Z).
        on_demand_usd_per_h: Price of an on-demand node (T, Z).
        egress_usd_per_gb: Price of moving data between two regions.
    """

    gap_s: float
    zones: tuple[str, ...]
    regions: tuple[str, ...]
    nodes: Ints
    spot_usd_per_h: Floats
    on_demand_usd_per_h: Floats
    egress_usd_per_gb: float = EGRESS_USD_PER_GB

    def __post_init__(self) -> None:
        shape = (len(self.nodes), len(self.zones))
        for name in ("nodes", "spot_usd_per_h", "on_demand_usd_per_h"):
            values = getattr(self, name)
            if values.shape != shape:
                raise ConfigError(name, values.shape, f"must be {shape}", "a value a tick and zone")
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ConfigError(name, "data", "must be finite and at least 0", "correct the data")
        if not 0 < self.gap_s < math.inf:
            raise ConfigError("gap_seconds", self.gap_s, "must be above 0", "correct the trace")

    @property
    def num_ticks(self) -> int:
        """Number of ticks."""
        return len(self.nodes)

    @property
    def gap_h(self) -> float:
        """Length of a tick in hours."""
        return self.gap_s / 3600

    def only(self, zones: Sequence[int]) -> "Market":
        """Returns the market of some zones; policies request zones of equal price in their order.

        Args:
            zones: Indices of the zones, in the new order.
        """
        chosen = list(zones)
        return replace(
            self,
            zones=tuple(self.zones[z] for z in chosen),
            regions=tuple(self.regions[z] for z in chosen),
            nodes=self.nodes[:, chosen],
            spot_usd_per_h=self.spot_usd_per_h[:, chosen],
            on_demand_usd_per_h=self.on_demand_usd_per_h[:, chosen],
        )


def read_market(
    paths: Sequence[Path],
    spot_usd_per_h: float = ON_DEMAND_USD_PER_H * SPOT_SHARE,
    on_demand_usd_per_h: float = ON_DEMAND_USD_PER_H,
    egress_usd_per_gb: float = EGRESS_USD_PER_GB,
) -> Market:
    """Reads traces that begin at the same moment, one file for each zone.

    A file is JSON in the format of the Can't Be Late study (Wu et al., NSDI 2024):
    `metadata.gap_seconds`, and `data`, the number of nodes at each point. It may also have
    `spot_usd_per_h` and `on_demand_usd_per_h`, of the same length as `data`. The zone is the file
    name up to the first underscore; the region is the zone without the letters at its end.

    Args:
        paths: Files of the traces.
        spot_usd_per_h: Price of a spot node, for files without prices.
        on_demand_usd_per_h: Price of an on-demand node, for files without prices.
        egress_usd_per_gb: Price of moving data between two regions.

    Raises:
        ConfigError: A file is missing, is not a trace, or differs from the first in length or tick.
    """
    columns: dict[str, list[Floats]] = {"data": [], "spot_usd_per_h": [], "on_demand_usd_per_h": []}
    default = {"spot_usd_per_h": spot_usd_per_h, "on_demand_usd_per_h": on_demand_usd_per_h}
    for key, value in default.items():
        if not 0 <= value < math.inf:
            raise ConfigError(key, value, "must be finite and at least 0", "give a price")
    gap_s = 0.0
    for path in paths:
        content = read_json("trace", path, "see python -m launch simulate --help")
        try:
            gap, data = float(content["metadata"]["gap_seconds"]), content["data"]
            series = {key: content.get(key, [default.get(key)] * len(data)) for key in columns}
            arrays = {key: np.asarray(values, np.float64) for key, values in series.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            rule = "is not a trace: it must have metadata.gap_seconds and numbers in data"
            raise ConfigError("trace", path, rule, "see python -m launch simulate --help") from e
        gap_s = gap_s or gap
        for key, array in arrays.items():
            if array.ndim != 1 or not array.size:
                raise ConfigError("trace", path, f"{key} must be a list", "give a number a point")
            if not np.isfinite(array).all() or (array < 0).any():
                raise ConfigError(
                    "trace", path, f"{key} must be finite and at least 0", "correct the file"
                )
            # Savings are shares of the on-demand cost, so that it must not be 0.
            if key == "on_demand_usd_per_h" and not array.all():
                raise ConfigError("trace", path, f"{key} must be above 0", "correct the file")
            wanted = (gap_s, len(columns["data"][0]) if columns["data"] else len(data))
            if (gap, len(array)) != wanted:
                rule = f"{key}: {len(array)} points of {gap:g} s, not {wanted[1]} of {wanted[0]:g}"
                raise ConfigError("trace", path, rule, "give traces of one length and start")
            columns[key].append(array)
    zones = tuple(path.stem.split("_")[0] for path in paths)
    if len(set(zones)) != len(zones):
        raise ConfigError("trace", ",".join(zones), "has a zone twice", "give one file a zone")
    return Market(
        gap_s=gap_s,
        zones=zones,
        regions=tuple(zone.rstrip("abcdefghijklmnopqrstuvwxyz") or zone for zone in zones),
        nodes=np.stack(columns["data"], 1).astype(np.int64),
        spot_usd_per_h=np.stack(columns["spot_usd_per_h"], 1),
        on_demand_usd_per_h=np.stack(columns["on_demand_usd_per_h"], 1),
        egress_usd_per_gb=egress_usd_per_gb,
    )


def markov_market(
    seed: int,
    num_ticks: int,
    up_h: Sequence[float],
    down_h: Sequence[float],
    gap_s: float = 300.0,
    num_nodes: int = 1,
    price_change_h: float = math.inf,
    num_regions: int = 1,
) -> Market:
    """Makes a market whose zones gain and lose spot nodes at random, independently of each other.

    Args:
        seed: Seed of the random process; equal seeds make equal markets.
        num_ticks: Number of ticks (T).
        up_h: Mean hours for which spot lasts, for each zone (Z).
        down_h: Mean hours of an outage, for each zone (Z).
        gap_s: Length of a tick in seconds.
        num_nodes: Number of nodes in a zone that has spot.
        price_change_h: Mean hours between two changes of a zone's spot price, each to a share of
            the on-demand price drawn from 0.15 to 0.6; infinite: the share is always 0.3.
        num_regions: Number of regions, to which zones are assigned in turn.

    Returns:
        The market; on-demand nodes cost one dollar an hour.
    """
    rng = np.random.default_rng(seed)
    num_zones = len(up_h)
    gap_h = gap_s / 3600
    leave = 1 - np.exp(-gap_h / np.asarray(up_h, np.float64))  # probabilities in a tick (Z)
    come = 1 - np.exp(-gap_h / np.asarray(down_h, np.float64))
    up = np.empty((num_ticks, num_zones), bool)
    spot = np.full((num_ticks, num_zones), SPOT_SHARE)
    # The market begins in its stationary distribution, so that its start is like any moment.
    state = rng.random(num_zones) < come / (come + leave)
    for tick in range(num_ticks):
        up[tick] = state
        change = rng.random(num_zones)
        state = np.where(state, change >= leave, change < come)
        if tick and price_change_h < math.inf:
            changes = rng.random(num_zones) < 1 - math.exp(-gap_h / price_change_h)
            spot[tick] = np.where(changes, rng.uniform(0.15, 0.6, num_zones), spot[tick - 1])
    return Market(
        gap_s=gap_s,
        zones=tuple(f"zone-{z}" for z in range(num_zones)),
        regions=tuple(f"region-{z % num_regions}" for z in range(num_zones)),
        nodes=up.astype(np.int64) * num_nodes,
        spot_usd_per_h=spot,
        on_demand_usd_per_h=np.ones((num_ticks, num_zones)),
    )
