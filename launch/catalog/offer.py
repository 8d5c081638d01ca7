"""One row of a price list: nodes of one kind, at one place, at one price."""

from dataclasses import dataclass

from core.errors import ConfigError

_MOST_USD_PER_H = 1_000_000.0  # of a node: more is a slip


@dataclass(frozen=True, slots=True)
class Offer:
    """Nodes that can be rented, or are one's own.

    Attributes:
        cloud: As SkyPilot writes it (`aws`, `gcp`, `azure`, `lambda`, `runpod`, ...), a provider's
            name, or for an owned pool its kind (`ssh`, `slurm`, `kubernetes`).
        region: The cloud's name of it; empty where the list does not say.
        zone: Empty: any zone of the region.
        instance_type: The cloud's name of the machine; empty where it has none.
        gpu: SkyPilot's name of the accelerator, e.g. `H100` or `A100-80GB`; see `gpus.py`.
        gpus_per_node: Of one node.
        usd_per_h: Of one node, before taxes; for an owned pool its marginal cost.
        is_spot: Whether it can be taken away.
        vcpus: Of one node, where known.
        memory_gib: Host memory of one node, where known.
        pool: Name of an owned pool; empty for what is rented.
        max_nodes: That can be had together; None: no limit is known. 1: never more than one.
        country: Two letters, where the region does not tell it.
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
    max_nodes: int | None = None
    country: str = ""

    def __post_init__(self) -> None:
        fix = "correct the list"
        for name in ("cloud", "region", "zone", "instance_type", "gpu", "pool"):
            text = getattr(self, name)
            if not text.isprintable() or (name == "cloud" and not text):
                raise ConfigError(name, ascii(text), "is no name that can be shown", fix)
        is_free = self.pool and self.usd_per_h == 0
        if not (0 < self.usd_per_h < _MOST_USD_PER_H or is_free):
            rule = f"{self.place} {self.gpu}: must be above 0 and below {_MOST_USD_PER_H:,.0f}"
            raise ConfigError("price", self.usd_per_h, rule, fix)
        for name in ("gpus_per_node", "max_nodes"):
            count = getattr(self, name)
            if count is not None and (count < 1 or count != int(count)):
                rule = f"{self.place}: is no whole number from 1"
                raise ConfigError(name, count, rule, fix)

    @property
    def place(self) -> str:
        """`aws/ap-south-1/ap-south-1a`, as far as it is known; a pool by its name."""
        parts = (self.pool or self.cloud, self.region, self.zone)
        return "/".join(part for part in parts if part)
