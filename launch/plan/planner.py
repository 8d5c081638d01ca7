"""Ranks the candidates for a job, offers and numbers of nodes, by their expected cost.

The planner is pure: the same settings, catalog and date give the same plan, to the byte.
"""

import math
from collections import Counter
from dataclasses import dataclass

from core.errors import ConfigError
from launch.catalog.catalog import Catalog, quota_of
from launch.catalog.gpus import gpu, known_gpu
from launch.catalog.offer import Offer
from launch.catalog.regions import residency_refusal
from launch.config import LaunchConfig, Spot
from launch.plan.candidate import Candidate, Rejected
from launch.plan.cost import Estimator
from launch.plan.speed import Speed, SpeedModel
from launch.plan.workload import Workload, workload_of
from launch.rounding import rounded_up
from launch.settings import Settings

_Refusal = tuple[str, str]  # name of the rule, and explanation with figures
# Rules in reverse order of checking: the first that rejected something came closest to success.
_RULES = (
    *("budget", "deadline", "interruptions", "speed", "memory", "ranks", "quota", "nodes"),
    *("residency", "spot", "gpu", "cloud"),
)
# The setting of `launch` behind a rule, if there is one.
_SETTINGS = {
    "quota": "quotas",
    "nodes": "nodes",
    "residency": "regions",
    "spot": "spot",
    "gpu": "gpus",
    "cloud": "clouds",
}
_LESS_MEMORY = (
    "a smaller micro_batch_size, activation_checkpointing=true, parallel=fsdp, more nodes"
)


@dataclass(frozen=True)
class Plan:
    """The ranked candidates for a job, and what was rejected.

    Attributes:
        settings: Settings of the job.
        workload: Workload of the job.
        catalog: Prices that were used.
        candidates: Offers and numbers of nodes that no rule excludes, the cheapest first.
        rejected: Offers and numbers of nodes that a rule excludes, in the order of the catalog.
    """

    settings: Settings
    workload: Workload
    catalog: Catalog
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]


def make_plan(settings: Settings, catalog: Catalog) -> Plan:
    """Prices a job on every offer.

    Args:
        settings: Settings of the job, with the limits on where it may run.
        catalog: Prices to use.

    Raises:
        ConfigError: The length of the job is unknown, or the rules exclude every offer.
    """
    workload = workload_of(settings.trainer)
    speeds = SpeedModel(workload, settings.launch)
    estimator = Estimator(settings, workload)
    candidates: list[Candidate] = []
    rejected: list[Rejected] = []
    for offer in catalog.offers:
        refusal = _refused(settings.launch, offer)
        if refusal is not None:
            rejected.append(Rejected(offer, 1, *refusal))
            continue
        for num_nodes in sorted(set(settings.launch.nodes)):
            refusal, candidate = _priced(
                settings.launch, workload, speeds, estimator, offer, num_nodes
            )
            if refusal is not None:
                rejected.append(Rejected(offer, num_nodes, *refusal, candidate))
            elif candidate is not None:
                candidates.append(candidate)
    candidates.sort(key=_order)
    plan = Plan(settings, workload, catalog, tuple(candidates), tuple(rejected))
    if not candidates:
        raise _nothing_left(plan)
    return plan


def _order(candidate: Candidate) -> tuple[float, float, str, str, int, bool]:
    # The names break ties, so that the ranking does not depend on the order of the catalog.
    offer, usd = candidate.offer, candidate.costs.total_usd
    name = f"{offer.place} {offer.instance_type}"
    return usd, candidate.p95_h, name, offer.gpu, candidate.num_gpus, offer.is_spot


def _refused(launch: LaunchConfig, offer: Offer) -> _Refusal | None:
    """Returns why an offer is excluded for any number of nodes; None if it is not."""
    if launch.clouds and not offer.pool and offer.cloud not in launch.clouds:
        return "cloud", f"{offer.cloud} is not in launch.clouds"
    if launch.gpus and offer.gpu not in map(known_gpu, launch.gpus):
        return "gpu", f"{offer.gpu} is not in launch.gpus"
    if launch.spot is Spot.only and not offer.is_spot and not offer.pool:
        return "spot", "on-demand, and launch.spot=only"
    if launch.spot is Spot.never and offer.is_spot:
        return "spot", "spot, and launch.spot=never"
    refusal = residency_refusal(offer, launch.regions)
    return None if refusal is None else ("residency", refusal)


def _priced(
    launch: LaunchConfig,
    workload: Workload,
    speeds: SpeedModel,
    estimator: Estimator,
    offer: Offer,
    num_nodes: int,
) -> tuple[_Refusal | None, Candidate | None]:
    """Returns why a number of nodes of an offer is excluded, and the candidate if it was priced.

    Cheap rules come first, since a catalog has thousands of offers.
    """
    num_gpus = num_nodes * offer.gpus_per_node
    if offer.max_nodes is not None and num_nodes > offer.max_nodes:
        return ("nodes", f"{num_nodes} nodes, and at most {offer.max_nodes} together"), None
    quota = quota_of(launch, offer)
    if quota is not None and num_gpus > quota:
        return ("quota", f"{num_gpus} GPUs, and the quota is {quota}"), None
    ranks = workload.refusal(num_gpus)
    if ranks is not None:
        return ("ranks", ranks), None
    needed_gib = workload.memory_gib(num_gpus)
    has_gib = gpu(offer.gpu).memory_gib
    if needed_gib > has_gib:
        return ("memory", f"needs {needed_gib:.0f} GiB a GPU of {has_gib:.0f}"), None
    speed = speeds.of(offer, num_nodes)
    if not isinstance(speed, Speed):
        return ("speed", speed), None
    candidate = estimator.candidate(offer, num_nodes, speed, needed_gib)
    return _too_late_or_dear(launch, candidate), candidate


def _too_late_or_dear(launch: LaunchConfig, candidate: Candidate) -> _Refusal | None:
    usd = candidate.costs.total_usd
    if not candidate.p95_h < math.inf:
        return "interruptions", "interrupted too often to get from one checkpoint to the next"
    if candidate.p95_h > launch.deadline_h:
        return (
            "deadline",
            f"P95 is {candidate.p95_h:.1f} h, above the deadline of {launch.deadline_h:g} h",
        )
    if launch.budget_usd is not None and usd > launch.budget_usd:
        return "budget", f"${usd:,.2f} expected, above {launch.budget_usd:,.2f}"
    return None


def _nothing_left(plan: Plan) -> ConfigError:
    """Returns an error with the rejections by rule, and the change that would admit an offer."""
    counts = Counter(rejected.reason for rejected in plan.rejected)
    said = ", ".join(f"{reason} {count}" for reason, count in counts.most_common())
    rule = f"the rules exclude every offer ({said})"
    launch = plan.settings.launch
    if not counts:
        catalog = launch.catalog or plan.catalog.source
        return ConfigError("launch.catalog", catalog, "has no offers", "give another list")
    last = next(reason for reason in _RULES if counts[reason])
    of_last = [rejected for rejected in plan.rejected if rejected.reason == last]
    if last == "budget":
        least = min(r.priced.costs.total_usd for r in of_last if r.priced)
        fix = (
            f"the cheapest candidate that is in time costs ${rounded_up(least)}: set at least that"
        )
        return ConfigError("launch.budget_usd", launch.budget_usd, rule, fix)
    if last == "deadline":
        soonest_h = min(r.priced.p95_h for r in of_last if r.priced)
        hours = rounded_up(soonest_h, 1)
        fix = f"the fastest takes {hours} h: set {hours}h, or more launch.nodes"
        return ConfigError("launch.deadline", launch.deadline, rule, fix)
    example = f"e.g. {of_last[0].text}"
    if last == "memory":
        example += f"; try {_LESS_MEMORY}"
    name = _SETTINGS.get(last, "catalog")
    value = getattr(launch, name) or plan.catalog.source
    fix = f"the last rule to exclude an offer was {last}, {example}"
    return ConfigError(f"launch.{name}", value, rule, fix)
