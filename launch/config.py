"""The settings under `launch.`: where a job may run, what it may cost, and its deadline.

They complement the trainer's settings and repeat none of them. This module imports nothing heavy,
since `--help` and the planner load it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from enum import Enum
from functools import partial

from omegaconf import MISSING

from core.errors import ConfigError
from core.settings.rules import setting

_HOURS = {"min": 1 / 60, "h": 1.0, "d": 24.0}
_MOST_HOURS = 100 * 366 * 24.0
_MOST = 1e9


def hours(key: str, text: str) -> float:
    """Returns the hours in a duration such as `90min`, `36h` or `10d`.

    Args:
        key: Key of the setting, for the error.
        text: Value of the setting.

    Raises:
        ConfigError: The text is not a number with a unit, or is 0 or more than 100 years.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(min|h|d)", text)
    found = float(match[1]) * _HOURS[match[2]] if match else 0.0
    if not 0 < found <= _MOST_HOURS:
        rule = "must be a time with its unit, above 0 and up to 100 years"
        raise ConfigError(key, text, rule, "use 90min, 36h or 10d")
    return found


# Kinds of numbers. A value above _MOST is a typing error, and sums of values below it stay finite.
_count = partial(setting, least=1, most=_MOST)
_amount = partial(setting, least=0, most=_MOST)
_above_0 = partial(setting, least=0.001, most=_MOST)
_share = partial(setting, least=0, below=1, fix="it is a share: 0.15 means 15%")


class Stage(Enum):
    """A stage of the pipeline. Each is a separate program; the members are in running order."""

    train = "train"
    compress = "compress"
    release = "release"


class Target(Enum):
    """The system on which `up` and `render` place a job."""

    local = "local"
    sky = "sky"
    slurm = "slurm"
    kubernetes = "kubernetes"


class Spot(Enum):
    """The kinds of prices that a plan may use."""

    both = "both"
    only = "only"
    never = "never"


class Currency(Enum):
    """The currency in which sums are shown. All sums are computed in US dollars."""

    usd = "usd"
    inr = "inr"


class PoolKind(Enum):
    """The system through which the machines of an owned pool are reached."""

    ssh = "ssh"
    slurm = "slurm"
    kubernetes = "kubernetes"


@dataclass
class PoolConfig:
    """Owned machines: `launch.pools.<name>.kind|gpu|gpus_per_node|nodes|usd_per_h|...`.

    Attributes:
        kind: System through which the machines are reached.
        gpu: SkyPilot's name of the accelerator, e.g. `A100-80GB`.
        gpus_per_node: Number of GPUs in one machine.
        nodes: Number of machines.
        usd_per_h: Marginal cost of one machine-hour in dollars, compared with leaving the machine
            idle: mostly power.
        country: Country code of two letters (ISO 3166), for `launch.regions`; e.g. `in`.
    """

    kind: PoolKind = MISSING
    gpu: str = MISSING
    gpus_per_node: int = _count(MISSING)
    nodes: int = _count(1)
    usd_per_h: float = _amount(0.0)
    country: str = ""


@dataclass
class SkyPilotConfig:
    """Settings under `launch.skypilot.`, for `launch.target=sky`.

    Attributes:
        workdir: Folder that is copied to the machines; null: the image contains the project.
        autostop_minutes: Idle minutes after which SkyPilot terminates a cluster.
    """

    workdir: str | None = "."
    autostop_minutes: int = _count(10)


@dataclass
class SlurmConfig:
    """Settings under `launch.slurm.`, for `launch.target=slurm`.

    Attributes:
        partition: Partition of the cluster; null: the cluster's default.
        account: Account that pays; null: the user's default.
        time_limit: Time limit of one allocation; a job that reaches it is queued again.
        save_minutes: Minutes before the end of an allocation at which the job is told to save.
    """

    partition: str | None = None
    account: str | None = None
    time_limit: str = setting("24h", check=hours)
    save_minutes: int = _count(10)

    def cross_check(self, key: str) -> None:
        """Raises ConfigError if the job would be told to save before it can train."""
        if not self.save_minutes / 60 < hours(f"{key}.time_limit", self.time_limit):
            rule = f"must be shorter than {key}.time_limit={self.time_limit}"
            raise ConfigError(f"{key}.save_minutes", self.save_minutes, rule, "leave time to train")


@dataclass
class KubernetesConfig:
    """Settings under `launch.kubernetes.`, for `launch.target=kubernetes`.

    The container image is `launch.image`.

    Attributes:
        namespace: Namespace in which the job is created.
        volume_claim: PersistentVolumeClaim that holds the run directory; several nodes need
            ReadWriteMany. Null is refused, but for several nodes with `checkpoint.upload`.
        queue: Local queue of Kueue; null: Kueue is not used.
        node_labels: Labels that a machine must have, e.g. those of a spot pool; taints of the same
            names are tolerated.
        secret: Secret that holds the values of `launch.secrets`, by their names.
    """

    namespace: str = "default"
    volume_claim: str | None = None
    queue: str | None = None
    node_labels: dict[str, str] = field(default_factory=dict)
    secret: str = "spotforge"


@dataclass
class LaunchConfig:
    """Settings under `launch.`.

    Attributes:
        target: Place of the job for `up` and `render`: this machine, machines that SkyPilot rents,
            or an owned pool that Slurm or Kubernetes manages.
        stages: Stages that `pipeline` runs, one after another.
        deadline: Time from now by which the job must be done: `36h`, `10d`; null: no deadline.
        budget_usd: Most dollars that the job may cost in all; null: no limit.
        clouds: Clouds that may be used; empty: all.
        regions: Regions that may be used, a hard limit: their names, or `india`, `eu`, `us`; empty:
            all.
        gpus: GPUs that may be used, by SkyPilot's names; empty: all.
        spot: Kinds of prices that may be used: spot, on-demand, or both.
        nodes: Numbers of nodes to try.
        catalog: Snapshot file, offers file, or folder of SkyPilot's catalogs; null: the newest
            snapshot that `catalog update` stored, else the one of this package.
        max_price_age: Age above which prices are refused.
        discounts: Share off the list price: `{aws: 0.15, gcp/spot: 0.05}`.
        quotas: Most GPUs that the account may have: `{aws/ap-south-1/H100/spot: 16, gcp/*/*/*: 0}`.
        countries: Country code of two letters (ISO 3166) for a provider whose list has no regions,
            as your contract says: `{jarvis-labs: in}`. Without it `regions` excludes the provider.
        pools: Owned machines.
        currency: Currency in which sums are shown.
        usd_inr: Rupees for a dollar.
        gst: Tax share that is added to sums in rupees (18% on imported services in India); 0: none.
        data_gb: Gigabytes of the training data at `data_region`.
        data_region: `cloud/region` of the data; null: this machine (upload costs nothing).
        checkpoint_region: `cloud/region` of the checkpoints of a run that is resumed; null: the run
            is new.
        result_region: `cloud/region` to which the export is moved; null: it stays where it is made.
        mfu: Model FLOPs utilization to expect; null: the estimate that `plan` prints.
        network_gbit: Gigabits a second between two nodes, in each direction.
        measured: Result files (globs) with measured tokens/s.
        preemption_hours: Mean hours between two losses of a spot node, by `cloud/region/zone` or a
            prefix; elsewhere `checkpoint.mean_hours_between_preemptions` is used.
        restart_minutes: Minutes from a launch to the first new step.
        wait_minutes: Mean minutes from a loss until spot is available again.
        storage_usd_per_gb_month: Dollars for a gigabyte-month of the checkpoints' bucket.
        name: Name of the placed job; null: the last part of `run.dir`.
        candidates: Number of places from the ranking among which a placed job may move.
        sky: Name or path of SkyPilot's program.
        bucket: Bucket in which SkyPilot's machines keep checkpoints and the ledger: `s3://name`,
            `gs://name` or `r2://name`. Null is refused on spot. A missing bucket is created.
        shared_dir: Folder that all of SkyPilot's nodes share, for the run directory; null: each
            node has it on its own disk.
        setup: Shell lines that run once on each node before the job; null: the target's default,
            which installs the workdir on SkyPilot's machines and does nothing elsewhere.
        image: Docker image; null: the cloud's default machine image, and refused by Kubernetes.
        env: Environment variables of the job, by name.
        secrets: Names of environment variables whose values are taken from this machine's
            environment when the job is placed; the values are written to no file.
        skypilot: See `SkyPilotConfig`.
        slurm: See `SlurmConfig`.
        kubernetes: See `KubernetesConfig`.
    """

    target: Target = Target.sky
    stages: list[Stage] = field(default_factory=lambda: [Stage.train])
    deadline: str | None = setting(None, check=hours)
    budget_usd: float | None = _above_0(None)
    clouds: list[str] = field(default_factory=list)
    regions: list[str] = field(default_factory=list)
    gpus: list[str] = field(default_factory=list)
    spot: Spot = Spot.both
    nodes: list[int] = _count(factory=lambda: [1, 2, 4, 8])
    catalog: str | None = None
    max_price_age: str = setting("30d", check=hours)
    discounts: dict[str, float] = _share(factory=dict)
    quotas: dict[str, int] = _amount(factory=dict)
    countries: dict[str, str] = field(default_factory=dict)
    pools: dict[str, PoolConfig] = field(default_factory=dict)
    currency: Currency = Currency.usd
    usd_inr: float = _above_0(85.0)
    gst: float = _share(0.18)
    data_gb: float = _amount(0.0)
    data_region: str | None = None
    checkpoint_region: str | None = None
    result_region: str | None = None
    mfu: float | None = setting(None, least=0.001, most=1, fix="it is a share: use 0.4")
    network_gbit: float = _above_0(100.0)
    measured: list[str] = field(default_factory=list)
    preemption_hours: dict[str, float] = _above_0(factory=dict)
    restart_minutes: float = _amount(6.0)
    wait_minutes: float = _amount(20.0)
    storage_usd_per_gb_month: float = _amount(0.023)
    name: str | None = None
    candidates: int = _count(8)
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
        """Hours until the deadline; infinite without one."""
        return math.inf if self.deadline is None else hours("launch.deadline", self.deadline)

    def cross_check(self, key: str) -> None:
        """Raises ConfigError for an invalid variable name, no nodes, or a repeated stage."""
        for names_key, names in ((f"{key}.env", self.env), (f"{key}.secrets", self.secrets)):
            for name in names:
                if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                    rule = "is not a valid name of an environment variable"
                    raise ConfigError(names_key, name, rule, "use letters, digits and _")
        if not self.nodes:
            rule = "must list at least one number of nodes"
            raise ConfigError(f"{key}.nodes", "[]", rule, f"use {key}.nodes=[1]")
        if not self.stages or len(set(self.stages)) != len(self.stages):
            shown = f"[{','.join(stage.value for stage in self.stages)}]"
            rule = "must name each stage once"
            raise ConfigError(f"{key}.stages", shown, rule, f"use {key}.stages=[train]")
