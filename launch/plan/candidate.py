"""What the planner says of an offer: what the job costs there and when it is done, or why not."""

from dataclasses import dataclass

from launch.catalog.offer import Offer


@dataclass(frozen=True, slots=True)
class Costs:
    """Expected, in dollars, before taxes.

    Attributes:
        compute_usd: The hours that the job computes.
        waste_usd: Starts, lost steps and time spent in saving.
        egress_usd: Of data, checkpoints and the result.
        storage_usd: Of checkpoints.
    """

    compute_usd: float
    waste_usd: float
    egress_usd: float
    storage_usd: float

    @property
    def total_usd(self) -> float:
        """All of it."""
        return self.compute_usd + self.waste_usd + self.egress_usd + self.storage_usd


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to run the job.

    Attributes:
        offer: Where, and on which nodes.
        num_nodes: How many of them.
        tokens_per_s: Of all GPUs together.
        speed_source: Where that number comes from, in words.
        memory_gib: That one GPU needs, by the trainer's memory plan.
        usd_per_h: Of all nodes, after discounts.
        compute_h: Without any interruption.
        preemptions: Expected.
        p50_h: Hours until it is done, half of the time.
        p95_h: Hours until it is done, 19 times of 20.
        costs: Expected.
    """

    offer: Offer
    num_nodes: int
    tokens_per_s: float
    speed_source: str
    memory_gib: float
    usd_per_h: float
    compute_h: float
    preemptions: float
    p50_h: float
    p95_h: float
    costs: Costs

    @property
    def num_gpus(self) -> int:
        """Of all nodes."""
        return self.offer.gpus_per_node * self.num_nodes


@dataclass(frozen=True, slots=True)
class Rejected:
    """A way that cannot be taken.

    Attributes:
        offer: Where, and on which nodes.
        num_nodes: How many of them.
        reason: In a word: `memory`, `quota`, `residency`, `deadline`, `budget`, ...
        text: With figures.
        priced: What it would have cost, where that was known.
    """

    offer: Offer
    num_nodes: int
    reason: str
    text: str
    priced: Candidate | None = None
