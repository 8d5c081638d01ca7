"""The expected cost and time of a job on an offer."""

import math
from functools import lru_cache

from launch.catalog.egress import egress_usd
from launch.catalog.offer import Offer
from launch.config import LaunchConfig
from launch.plan.candidate import Candidate, Costs
from launch.plan.interruptions import Duration, Interruptions, duration
from launch.plan.speed import Speed
from launch.plan.workload import Workload
from launch.settings import Settings
from trainer.interval import Interval, optimal_interval

# Nodes that are not spot fail too. The training of Llama 3 405B had 419 unplanned interruptions in
# 54 days on 16,384 GPUs (Dubey et al. 2024, table 5): one in about 50,000 GPU-hours.
GPU_HOURS_BETWEEN_FAILURES = 50_000.0
# A checkpoint is copied from GPUs to host memory while steps wait, then written to disk while they
# go on. Assumed rates of a node: PCIe 4 x16 at half its rate, and a network disk.
COPY_GB_PER_S = 12.0
WRITE_GB_PER_S = 0.5
HOURS_PER_MONTH = 730.0


class Estimator:
    """Prices one job on offers. Results that offers share are computed once.

    Args:
        settings: Settings of the job.
        workload: Workload of the job.
    """

    def __init__(self, settings: Settings, workload: Workload) -> None:
        self._launch: LaunchConfig = settings.launch
        self._checkpoint = settings.trainer.checkpoint
        self._interval = Interval.parse(self._checkpoint.interval)
        self._workload = workload
        # A catalog has thousands of offers, but few distinct speeds, gang sizes and regions.
        self._duration = lru_cache(maxsize=None)(self._find_duration)
        self._egress = lru_cache(maxsize=None)(self._find_egress)

    def candidate(self, offer: Offer, num_nodes: int, speed: Speed, memory_gib: float) -> Candidate:
        """Returns the candidate for a number of nodes of an offer.

        Args:
            offer: Place and kind of the nodes.
            num_nodes: Number of nodes.
            speed: Speed of all nodes together.
            memory_gib: Memory that each GPU needs.
        """
        compute_h = self._workload.total_tokens / speed.tokens_per_s / 3600
        per_h = self._interruptions_per_h(offer, num_nodes)
        found = self._duration(compute_h, per_h, num_nodes, offer.is_spot)
        usd_per_h = offer.usd_per_h * num_nodes
        return Candidate(
            offer=offer,
            num_nodes=num_nodes,
            tokens_per_s=speed.tokens_per_s,
            speed_source=speed.source,
            memory_gib=memory_gib,
            usd_per_h=usd_per_h,
            compute_h=compute_h,
            preemptions=found.interruptions,
            p50_h=found.p50_h,
            p95_h=found.p95_h,
            costs=Costs(
                compute_usd=usd_per_h * compute_h,
                waste_usd=usd_per_h * (found.paid_h - compute_h),
                egress_usd=self._egress(offer.cloud, offer.region) if not offer.pool else 0.0,
                storage_usd=self._storage_usd(found.p50_h) if not offer.pool else 0.0,
            ),
        )

    def _interruptions_per_h(self, offer: Offer, num_nodes: int) -> float:
        """Returns the interruptions of the whole gang in an hour: one lost node stops all."""
        if not offer.is_spot:
            return num_nodes * offer.gpus_per_node / GPU_HOURS_BETWEEN_FAILURES
        place, hours = offer.place, self._launch.preemption_hours
        elsewhere: float = self._checkpoint.mean_hours_between_preemptions
        # The longest prefix of cloud/region/zone that has a value counts.
        while place and place not in hours:
            place = place.rpartition("/")[0]
        return num_nodes / hours.get(place, elsewhere)

    def _find_duration(
        self, compute_h: float, per_h: float, num_nodes: int, is_spot: bool
    ) -> Duration:
        gb_a_node = self._workload.checkpoint_gb / num_nodes
        save_h = gb_a_node / COPY_GB_PER_S / 3600
        write_h = gb_a_node / WRITE_GB_PER_S / 3600
        if not self._checkpoint.asynchronous:
            save_h, write_h = save_h + write_h, 0.0
        if self._interval.auto:
            best_h = optimal_interval(save_h, 1 / per_h) if per_h > 0 else compute_h
            # At most one save is written at a time.
            interval_h = max(write_h, min(best_h, compute_h))
        elif self._interval.steps is not None:
            interval_h = compute_h * self._interval.steps / self._workload.total_steps
        elif self._interval.seconds is not None:
            interval_h = self._interval.seconds / 3600
        else:
            interval_h = compute_h
        return duration(
            compute_h,
            Interruptions(
                per_h=per_h,
                restart_h=self._launch.restart_minutes / 60,
                wait_h=self._launch.wait_minutes / 60 if is_spot else 0.0,
                interval_h=min(interval_h, compute_h),
                save_h=save_h,
                write_h=write_h,
            ),
        )

    def _find_egress(self, cloud: str, region: str) -> float:
        here, launch = f"{cloud}/{region}", self._launch
        usd = 0.0
        if launch.data_region is not None:
            usd += egress_usd(launch.data_region, here, launch.data_gb)
        if launch.checkpoint_region is not None:
            usd += egress_usd(launch.checkpoint_region, here, self._workload.checkpoint_gb)
        if launch.result_region is not None:
            usd += egress_usd(here, launch.result_region, self._workload.export_gb)
        return usd

    def _storage_usd(self, wall_h: float) -> float:
        """Returns the dollars for storing the kept checkpoints and the one that is written."""
        kept: float = self._checkpoint.keep_last + 1
        # Permanent checkpoints accumulate evenly: on average over the run, half of them exist.
        if self._checkpoint.keep_every is not None:
            kept += self._workload.total_steps / self._checkpoint.keep_every / 2
        if math.isinf(wall_h):
            return math.inf
        months = wall_h / HOURS_PER_MONTH
        return kept * self._workload.checkpoint_gb * months * self._launch.storage_usd_per_gb_month
