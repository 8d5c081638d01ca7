"""The settings of `launch.*`: where a job may run, what it may cost, and by when it must be done.

They stand beside the trainer's, of which none is repeated here. Imports nothing heavy: `--help` and
the planner read it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from core.errors import ConfigError

_HOURS = {"min": 1 / 60, "h": 1.0, "d": 24.0}
_MOST_HOURS = 100 * 366 * 24.0
# No setting that is meant is above this, and no sum of such ones is beyond what a float can hold.
_MOST = 1e9


class Stage(Enum):
    """A step of the pipeline, each a program of its own; in the order in which they run."""

    train = "train"
    compress = "compress"
    release = "release"


class Target(Enum):
    """Where `up` and `render` place a job."""

    local = "local"
    sky = "sky"
    slurm = "slurm"
    kubernetes = "kubernetes"


class Spot(Enum):
    """Which prices count."""

    both = "both"
    only = "only"
    never = "never"


class Currency(Enum):
    """In which sums are shown; all is computed in US dollars."""

    usd = "usd"
    inr = "inr"


class PoolKind(Enum):
    """How an owned pool is reached."""

    ssh = "ssh"
    slurm = "slurm"
    kubernetes = "kubernetes"


@dataclass
class PoolConfig:
    """Machines of one's own: `launch.pools.<name>.kind|gpu|gpus_per_node|nodes|usd_per_h|...`.

    Attributes:
        kind: How they are reached.
        gpu: SkyPilot's name of the accelerator, e.g. `A100-80GB`.
        gpus_per_node: Of one machine.
        nodes: Machines.
        usd_per_h: What an hour of one machine costs more than leaving it idle: power, mostly.
        country: Two letters (ISO 3166), for `launch.regions`; e.g. `in`.
    """

    kind: PoolKind = MISSING
    gpu: str = MISSING
    gpus_per_node: int = MISSING
    nodes: int = 1
    usd_per_h: float = 0.0
    country: str = ""


@dataclass
class SkyPilotConfig:
    """`launch.skypilot.*`, for `launch.target=sky`.

    Attributes:
        workdir: Folder that is sent along; null: the image has the project.
        autostop_minutes: Idle minutes after which a cluster goes down.
    """

    workdir: str | None = "."
    autostop_minutes: int = 10


@dataclass
class SlurmConfig:
    """`launch.slurm.*`, for `launch.target=slurm`.

    Attributes:
        partition: Null: the cluster's default.
        account: Who pays; null: the user's default.
        time_limit: Of one allocation; a job that is stopped by it is queued again.
        save_minutes: Before the end of an allocation in which the job is told to save.
    """

    partition: str | None = None
    account: str | None = None
    time_limit: str = "24h"
    save_minutes: int = 10


@dataclass
class KubernetesConfig:
    """`launch.kubernetes.*`, for `launch.target=kubernetes`; its image is `launch.image`.

    Attributes:
        namespace: Where the job is made.
        volume_claim: A PersistentVolumeClaim on which the run directory is; of several nodes
            ReadWriteMany.
        queue: A Kueue local queue; null: none.
        node_labels: Only machines with these labels, e.g. of a spot pool; taints of the same names
            are tolerated.
        secret: The Secret that has the values of `launch.secrets`, by their names.
    """

    namespace: str = "default"
    volume_claim: str | None = None
    queue: str | None = None
    node_labels: dict[str, str] = field(default_factory=dict)
    secret: str = "spotforge"


@dataclass
class LaunchConfig:
    """`launch.*`.

    Attributes:
        target: Where `up` and `render` place the job: on this machine, by SkyPilot on what is
            rented, or on an owned pool that Slurm or Kubernetes runs.
        stages: What `pipeline` runs, one after another.
        deadline: By when it must be done, from now: `36h`, `10d`; null: any time.
        budget_usd: What it may cost in all; null: no limit.
        clouds: Only these; empty: all.
        regions: Only these, a hard limit: names of regions, or `india`, `eu`, `us`; empty: all.
        gpus: Only these, by SkyPilot's names; empty: all.
        spot: Which prices count.
        nodes: Numbers of nodes to try.
        catalog: A snapshot file, an offers file, or a folder of SkyPilot's catalogs; null: what
            `catalog update` stored last, else the snapshot of this package.
        max_price_age: Older prices are refused.
        discounts: Share off the list price: `{aws: 0.15, gcp/spot: 0.05}`.
        quotas: Most GPUs that one may have: `{aws/ap-south-1/H100/spot: 16, gcp/*/*/*: 0}`.
        countries: Two letters (ISO 3166) for a provider whose list names no regions, as your
            contract says: `{jarvis-labs: in}`. Without it such a provider passes no `regions`.
        pools: Machines of one's own.
        currency: In which sums are shown.
        usd_inr: Rupees for a dollar.
        gst: Share that is added to sums in rupees (18% on imported services in India); 0: none.
        data_gb: Of the training data, at `data_region`.
        data_region: `cloud/region` where the data is; null: on this machine (upload costs nothing).
        checkpoint_region: `cloud/region` where a run that goes on has its checkpoints; null: it is
            new.
        result_region: `cloud/region` to which the export goes; null: it stays where it was made.
        mfu: Model FLOPs utilization to expect; null: the model's that `plan` states.
        network_gbit: Between two nodes, in each direction.
        measured: Result files (globs) with tokens/s that were measured.
        preemption_hours: Mean hours between two losses of a spot node, by `cloud/region/zone` or
            a part of it; elsewhere `checkpoint.mean_hours_between_preemptions`.
        restart_minutes: From a launch to the first new step.
        wait_minutes: Mean time until spot can be had again after a loss.
        storage_usd_per_gb_month: Of the checkpoints' bucket.
        name: Of the job, where it is placed; null: the last part of `run.dir`.
        candidates: How many places of the ranking a placed job may fall back on.
        sky: SkyPilot's program: its name or path.
        bucket: `s3://name`, `gs://name` or `r2://name`: where SkyPilot's machines keep checkpoints
            and the ledger; null is refused on spot. Made where it is not there yet.
        shared_dir: A folder that all of SkyPilot's nodes share; null is refused for several.
        setup: Shell lines that run once on each node before the job; null: the target's default,
            which installs the workdir on SkyPilot's machines and does nothing elsewhere.
        image: Docker image; null: the cloud's default machine image, and refused by Kubernetes.
        env: Environment variables of the job.
        secrets: Names of environment variables whose values are taken from this machine's
            environment when the job is placed; they are written to no file.
        skypilot: For `target=sky`.
        slurm: For that target.
        kubernetes: For that target.
    """

    target: Target = Target.sky
    stages: list[Stage] = field(default_factory=lambda: [Stage.train])
    deadline: str | None = None
    budget_usd: float | None = None
    clouds: list[str] = field(default_factory=list)
    regions: list[str] = field(default_factory=list)
    gpus: list[str] = field(default_factory=list)
    spot: Spot = Spot.both
    nodes: list[int] = field(default_factory=lambda: [1, 2, 4, 8])
    catalog: str | None = None
    max_price_age: str = "30d"
    discounts: dict[str, float] = field(default_factory=dict)
    quotas: dict[str, int] = field(default_factory=dict)
    countries: dict[str, str] = field(default_factory=dict)
    pools: dict[str, PoolConfig] = field(default_factory=dict)
    currency: Currency = Currency.usd
    usd_inr: float = 85.0
    gst: float = 0.18
    data_gb: float = 0.0
    data_region: str | None = None
    checkpoint_region: str | None = None
    result_region: str | None = None
    mfu: float | None = None
    network_gbit: float = 100.0
    measured: list[str] = field(default_factory=list)
    preemption_hours: dict[str, float] = field(default_factory=dict)
    restart_minutes: float = 6.0
    wait_minutes: float = 20.0
    storage_usd_per_gb_month: float = 0.023
    name: str | None = None
    candidates: int = 8
    sky: str = "sky"
    bucket: str | None = None
    shared_dir: str | None = None
    setup: str | None = None
    image: str | None = None
    env: dict[str, str] = field(default_factory=dict)
    secrets: list[str] = field(default_factory=list)
    skypilot: SkyPilotConfig = field(default_factory=SkyPilotConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    kubernetes: KubernetesConfig = field(default_factory=KubernetesConfig)

    @property
    def deadline_h(self) -> float:
        """Hours; infinite where there is none."""
        return math.inf if self.deadline is None else hours("launch.deadline", self.deadline)

    def __post_init__(self) -> None:
        hours("launch.max_price_age", self.max_price_age)
        self._check_slurm()
        self._check_names_of_variables()
        self._check_numbers()
        self._check_shares()
        if not self.stages or len(set(self.stages)) != len(self.stages):
            shown = f"[{','.join(stage.value for stage in self.stages)}]"
            raise ConfigError("launch.stages", shown, "names each stage once", "use [train]")

    def _check_names_of_variables(self) -> None:
        for key, names in (("launch.env", self.env), ("launch.secrets", self.secrets)):
            for name in names:
                if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                    rule = "is no name of an environment variable"
                    raise ConfigError(key, name, rule, "use letters, digits and _")

    def _check_slurm(self) -> None:
        limit = hours("launch.slurm.time_limit", self.slurm.time_limit)
        if not self.slurm.save_minutes / 60 < limit:
            rule = f"is not shorter than launch.slurm.time_limit={self.slurm.time_limit}"
            raise ConfigError(
                "launch.slurm.save_minutes", self.slurm.save_minutes, rule, "leave time to train"
            )

    def _check_numbers(self) -> None:
        _ = self.deadline_h
        above_0 = {
            "launch.budget_usd": self.budget_usd,
            "launch.usd_inr": self.usd_inr,
            "launch.network_gbit": self.network_gbit,
        }
        above_0 |= {f"launch.preemption_hours.{k}": v for k, v in self.preemption_hours.items()}
        counts = {
            "launch.candidates": self.candidates,
            "launch.skypilot.autostop_minutes": self.skypilot.autostop_minutes,
            "launch.slurm.save_minutes": self.slurm.save_minutes,
            "launch.nodes": min(self.nodes, default=0),
        }
        from_0 = {
            f"launch.{name}": getattr(self, name)
            for name in ("data_gb", "restart_minutes", "wait_minutes", "storage_usd_per_gb_month")
        }
        from_0 |= {f"launch.quotas.{k}": v for k, v in self.quotas.items()}
        for name, pool in self.pools.items():
            counts[f"launch.pools.{name}.nodes"] = pool.nodes
            counts[f"launch.pools.{name}.gpus_per_node"] = pool.gpus_per_node
            from_0[f"launch.pools.{name}.usd_per_h"] = pool.usd_per_h
        for values, least in ((above_0, 0.001), (counts, 1), (from_0, 0)):
            for key, value in values.items():
                if value is not None and not least <= value <= _MOST:
                    rule = f"must be from {least:g} to {_MOST:g}"
                    raise ConfigError(key, value, rule, "give a number that is")

    def _check_shares(self) -> None:
        shares = {"launch.gst": self.gst}
        shares |= {f"launch.discounts.{k}": v for k, v in self.discounts.items()}
        for key, value in shares.items():
            if not 0 <= value < 1:
                raise ConfigError(key, value, "is a share, from 0 to below 1", "0.15 means 15%")
        if self.mfu is not None and not 0.001 <= self.mfu <= 1:
            raise ConfigError("launch.mfu", self.mfu, "is a share, from 0.001 to 1", "use 0.4")


def hours(key: str, text: str) -> float:
    """Hours of a length of time such as `90min`, `36h` or `10d`.

    Args:
        key: Of the setting, for the error.
        text: Its value.

    Raises:
        ConfigError: For anything else.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(min|h|d)", text)
    found = float(match[1]) * _HOURS[match[2]] if match else 0.0
    if not 0 < found <= _MOST_HOURS:
        rule = "is a time with its unit, of up to 100 years"
        raise ConfigError(key, text, rule, "use 90min, 36h or 10d")
    return found
