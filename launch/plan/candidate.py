"""The planner's results for an offer: a candidate with its cost and time, or a rejection."""

from dataclasses import dataclass

from launch.catalog.offer import Offer


@dataclass(frozen=True, slots=True)
class Costs:
    """Expected costs in dollars, before taxes.

    Attributes:
        compute_usd: Cost of the hours in which the job computes.
        waste_usd: Cost of starts, lost steps and saving.
        egress_usd: Cost of moving data, checkpoints and the result.
        storage_usd: Cost of storing checkpoints.
    """

    compute_usd: float
    waste_usd: float
    egress_usd: float
    storage_usd: float

    @property
    def total_usd(self) -> float:
        """Sum of all costs."""
        return self.compute_usd + self.waste_usd + self.egress_usd + self.storage_usd


@dataclass(frozen=True, slots=True)
class Candidate:
    """A number of nodes of an offer on which the job may run, with its cost and time.

    Attributes:
        offer: Place and kind of the nodes.
        num_nodes: Number of nodes.
        tokens_per_s: Speed of all GPUs together.
        speed_source: Origin of the speed, in words.
        memory_gib: Memory that each GPU needs, by the trainer's memory plan.
        usd_per_h: Price of all nodes, after discounts.
        compute_h: Hours that the job takes without any interruption.
        preemptions: Expected number of interruptions.
        p50_h: Median of the hours until the job is done.
        p95_h: 95th percentile of the hours until the job is done.
        costs: Expected costs.
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
        """Number of GPUs in all nodes."""
        return self.offer.gpus_per_node * self.num_nodes


@dataclass(frozen=True, slots=True)
class Rejected:
    """A number of nodes of an offer that a rule excludes.

    Attributes:
        offer: Place and kind of the nodes.
        num_nodes: Number of nodes.
        reason: Name of the rule: `memory`, `quota`, `residency`, `deadline`, `budget`, ...
        text: Explanation with figures.
        priced: Candidate with its cost and time, if the rule is about them.
    """

    offer: Offer
    num_nodes: int
    reason: str
    text: str
    priced: Candidate | None = None
