"""Where and when nodes can be had, and at what price: traces of a real market, or a Markov one."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from core.errors import ConfigError
from core.folder import read_json

# Of one V100 (AWS p3.2xlarge, us-east-1, 2023); spot at 30% of it, about what it then was.
ON_DEMAND_USD_PER_H = 3.06
SPOT_SHARE = 0.30
EGRESS_USD_PER_GB = 0.02  # between regions of one cloud (AWS)

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Market:
    """What each zone offers at each tick. On-demand nodes can be had everywhere, always.

    Shapes: T ticks, Z zones.

    Attributes:
        gap_s: Length of a tick in seconds.
        zones: Their names (Z).
        regions: Of each zone (Z); data moves between two zones of one for nothing.
        nodes: Spot nodes that can be had (T, Z).
        spot_usd_per_h: Of a node (T, Z).
        on_demand_usd_per_h: Of a node (T, Z).
        egress_usd_per_gb: Between two regions.
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
                raise ConfigError(name, values.shape, f"not {shape}", "one a tick and zone")
            if not (np.isfinite(values).all() and (values >= 0).all()):
                raise ConfigError(name, "below 0 or no number", "not possible", "correct the data")
        if not 0 < self.gap_s < math.inf:
            raise ConfigError("gap_seconds", self.gap_s, "not above 0", "correct the trace")

    @property
    def num_ticks(self) -> int:
        """How long it is."""
        return len(self.nodes)

    @property
    def gap_h(self) -> float:
        """Length of a tick in hours."""
        return self.gap_s / 3600

    def only(self, zones: Sequence[int]) -> "Market":
        """The same with these zones alone, in this order (in which those of one price are asked).

        Args:
            zones: Indices.
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
    """Reads traces, one file a zone, that begin at the same moment.

    A file is JSON as the Can't Be Late study (Wu et al., NSDI 2024) published it:
    `metadata.gap_seconds`, and `data`, the nodes at each point. `spot_usd_per_h` and
    `on_demand_usd_per_h` may stand beside `data`, as long as it. The zone is the file's name as far
    as the first underscore; its region is that without the letters at its end.

    Args:
        paths: The files.
        spot_usd_per_h: Of a node, where a file says nothing.
        on_demand_usd_per_h: Of a node, where a file says nothing.
        egress_usd_per_gb: Between two regions.

    Raises:
        ConfigError: A file is missing, is no trace, or does not fit the first.
    """
    columns: dict[str, list[Floats]] = {"data": [], "spot_usd_per_h": [], "on_demand_usd_per_h": []}
    default = {"spot_usd_per_h": spot_usd_per_h, "on_demand_usd_per_h": on_demand_usd_per_h}
    for key, value in default.items():
        if not 0 <= value < math.inf:
            raise ConfigError(key, value, "not a price", "give one of 0 or more")
    gap_s = 0.0
    for path in paths:
        content = read_json("trace", path, "see python -m launch simulate --help")
        try:
            gap, data = float(content["metadata"]["gap_seconds"]), content["data"]
            series = {key: content.get(key, [default.get(key)] * len(data)) for key in columns}
            arrays = {key: np.asarray(values, np.float64) for key, values in series.items()}
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            rule = "not a trace: it needs metadata.gap_seconds and numbers in data"
            raise ConfigError("trace", path, rule, "see python -m launch simulate --help") from e
        gap_s = gap_s or gap
        for key, array in arrays.items():
            if array.ndim != 1 or not array.size:
                raise ConfigError("trace", path, f"{key} is no list", "give one number a point")
            if not np.isfinite(array).all() or (array < 0).any():
                raise ConfigError("trace", path, f"{key} has one below 0", "correct the file")
            if key == "on_demand_usd_per_h" and not array.all():  # savings are a share of it
                raise ConfigError("trace", path, f"{key} has a 0", "correct the file")
            wanted = (gap_s, len(columns["data"][0]) if columns["data"] else len(data))
            if (gap, len(array)) != wanted:
                rule = f"{key}: {len(array)} points of {gap:g} s, not {wanted[1]} of {wanted[0]:g}"
                raise ConfigError("trace", path, rule, "give traces of one length and start")
            columns[key].append(array)
    zones = tuple(path.stem.split("_")[0] for path in paths)
    if len(set(zones)) != len(zones):
        raise ConfigError("trace", ",".join(zones), "a zone twice", "one file a zone")
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
    """A market whose zones come and go at random, each by itself.

    Args:
        seed: The same one makes the same market.
        num_ticks: T.
        up_h: Mean hours for which nodes last, one a zone (Z).
        down_h: Mean hours for which there are none (Z).
        gap_s: Length of a tick.
        num_nodes: In a zone, where there are any.
        price_change_h: Mean hours between two changes of a zone's spot price, each to a share of
            the on-demand price drawn from 0.15 to 0.6; by default it is always 0.3.
        num_regions: Over which the zones are dealt out.

    Returns:
        On-demand nodes cost one dollar.
    """
    rng = np.random.default_rng(seed)
    num_zones = len(up_h)
    gap_h = gap_s / 3600
    leave = 1 - np.exp(-gap_h / np.asarray(up_h, np.float64))  # chances in a tick (Z)
    come = 1 - np.exp(-gap_h / np.asarray(down_h, np.float64))
    up = np.empty((num_ticks, num_zones), bool)
    spot = np.full((num_ticks, num_zones), SPOT_SHARE)
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
