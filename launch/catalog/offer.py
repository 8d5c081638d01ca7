"""One row of a price list: nodes of one kind, in one place, at one price."""

from dataclasses import asdict, dataclass
from typing import Any

from core.errors import ConfigError

_MOST_USD_PER_H = 1_000_000.0  # for a node; a higher price is a typing error


@dataclass(frozen=True, slots=True)
class Offer:
    """Nodes that can be rented, or an owned pool of nodes.

    Attributes:
        cloud: SkyPilot's name of the cloud (`aws`, `gcp`, `azure`, `lambda`, `runpod`, ...), or the
            name of another provider; empty for an owned pool.
        region: Name of the region; empty if the list has none.
        zone: Name of the zone; empty: any zone of the region.
        instance_type: The cloud's name of the machine; empty if it has none.
        gpu: SkyPilot's name of the accelerator, e.g. `H100` or `A100-80GB`; see `gpus.py`.
        gpus_per_node: Number of GPUs in one node.
        usd_per_h: Price of one node before taxes; for an owned pool its marginal cost.
        is_spot: True if nodes can be preempted.
        vcpus: Virtual CPUs of one node; None: unknown.
        memory_gib: Host memory of one node; None: unknown.
        pool: Name of an owned pool; empty for rented nodes.
        pool_kind: System through which the pool is reached (`ssh`, `slurm`, `kubernetes`); empty
            for rented nodes.
        max_nodes: Most nodes that one job can have together; None: no limit is known.
        country: Country code, if the region does not imply it; empty: by the region.
    """

    cloud: str
    region: str
    zone: str
    instance_type: str
    gpu: str
    gpus_per_node: int
    usd_per_h: float
    is_spot: bool
    vcpus: float | None = None
    memory_gib: float | None = None
    pool: str = ""
    pool_kind: str = ""
    max_nodes: int | None = None
    country: str = ""

    def __post_init__(self) -> None:
        fix = "correct the list"
        for name in ("cloud", "region", "zone", "instance_type", "gpu", "pool", "pool_kind"):
            text = getattr(self, name)
            if not text.isprintable() or (name == "cloud" and not (text or self.pool_kind)):
                raise ConfigError(name, ascii(text), "must be a printable name", fix)
        is_free = self.pool and self.usd_per_h == 0
        if not (0 < self.usd_per_h < _MOST_USD_PER_H or is_free):
            rule = f"{self.place} {self.gpu}: must be above 0 and below {_MOST_USD_PER_H:,.0f}"
            raise ConfigError("price", self.usd_per_h, rule, fix)
        for name in ("gpus_per_node", "max_nodes"):
            count = getattr(self, name)
            if count is not None and (count < 1 or count != int(count)):
                rule = f"{self.place}: must be a whole number of at least 1"
                raise ConfigError(name, count, rule, fix)

    @property
    def place(self) -> str:
        """Name of the place, as far as it is known (`aws/ap-south-1/ap-south-1a`), or the pool."""
        parts = (self.pool or self.cloud, self.region, self.zone)
        return "/".join(part for part in parts if part)

    def as_row(self) -> dict[str, Any]:
        """Returns the fields as price lists hold them: the kind of a pool is its `cloud`."""
        row = asdict(self)
        kind = row.pop("pool_kind")
        return row | {"cloud": kind or self.cloud}
