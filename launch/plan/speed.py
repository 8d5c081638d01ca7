"""The speed of a job on an offer: measured, or estimated by a model."""

import math
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from core.errors import ConfigError
from core.folder import read_json
from launch.catalog.gpus import gpu, known_gpu
from launch.catalog.offer import Offer
from launch.config import LaunchConfig
from launch.plan.workload import Workload
from monitoring.throughput import peak_flops
from parallel.config import DdpConfig, FsdpConfig, ZeroConfig

# Model FLOPs utilization without waiting for the network: an assumption, not a measurement.
# torchtitan (Liang et al. 2024, arXiv 2410.06511) reports 33 to 42% for Llama 3.1 8B on 8 to 128
# H100 in bf16.
BASE_MFU = 0.35
# Assumed bytes a second that a collective moves through one GPU.
NVLINK_BYTES_PER_S = 200e9
PCIE_BYTES_PER_S = 12e9


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of a job.

    Attributes:
        tokens_per_s: Tokens a second of all GPUs together.
        source: Origin of the number: a file, or the model with its MFU.
    """

    tokens_per_s: float
    source: str


@dataclass(frozen=True, slots=True)
class _Measurement:
    path: str
    tokens_per_s: float
    num_gpus: int


class SpeedModel:
    """The speeds of one job on all offers.

    Args:
        workload: Workload of the job.
        launch: Settings with `mfu`, `network_gbit` and `measured`.

    Raises:
        ConfigError: A result file cannot be read.
    """

    def __init__(self, workload: Workload, launch: LaunchConfig) -> None:
        self._workload, self._mfu = workload, launch.mfu
        self._network_bytes_per_s = launch.network_gbit * 1e9 / 8
        self._measured = _read_measured(workload, launch.measured)
        self._found: dict[tuple[str, int, int], Speed | str] = {}

    def of(self, offer: Offer, num_nodes: int) -> Speed | str:
        """Returns the speed on a number of nodes of an offer, or why it is unknown.

        Args:
            offer: Place and kind of the nodes.
            num_nodes: Number of nodes.
        """
        key = offer.gpu, offer.gpus_per_node, num_nodes
        if key not in self._found:
            self._found[key] = self._find(*key)
        return self._found[key]

    def _find(self, name: str, gpus_per_node: int, num_nodes: int) -> Speed | str:
        num_gpus = gpus_per_node * num_nodes
        for measured in self._measured.get(name, ()):
            if measured.num_gpus == num_gpus:
                return Speed(measured.tokens_per_s, f"measured: {measured.path}")
        precision = self._workload.precision
        device = gpu(name).device_name
        if not device:
            return f"{name} has no known peak FLOP/s and no measurement (launch.measured)"
        peak = peak_flops(device, precision)
        if peak is None:
            return f"{name} does not support {precision}"
        mfu = self._mfu if self._mfu is not None else BASE_MFU
        compute_s = (
            self._workload.tokens_per_step
            * self._workload.flops_per_token
            / (peak * mfu * num_gpus)
        )
        # Communication overlaps with computation, so a step takes the longer of the two. An MFU
        # that the user gives already includes the network.
        network_s = 0.0
        if self._mfu is None and num_gpus > 1:
            bytes_per_s = NVLINK_BYTES_PER_S if gpu(name).has_nvlink else PCIE_BYTES_PER_S
            if num_nodes > 1:
                bytes_per_s = min(bytes_per_s, self._network_bytes_per_s)
            network_s = _bytes_per_step(self._workload, num_gpus) / bytes_per_s
        step_s = max(compute_s, network_s)
        share = mfu * compute_s / step_s
        why = ", held up by the network" if network_s > compute_s else ""
        return Speed(self._workload.tokens_per_step / step_s, f"model: MFU {share:.2f}{why}")


def _bytes_per_step(workload: Workload, num_gpus: int) -> float:
    """Returns the bytes that ring collectives move through each GPU in one optimizer step."""
    config, n = workload.config, float(workload.shape.num_parameters)
    parallel = config.parallel
    compute_bytes = 2 if workload.precision == "bf16" else 4
    ring = (num_gpus - 1) / num_gpus
    # Parameters are gathered for the forward pass, and again for the backward pass if they were
    # freed in between.
    gathers_a_micro_batch = 0
    if isinstance(parallel, FsdpConfig):
        gathers_a_micro_batch = 2 if parallel.reshard_after_forward else 1
    elif isinstance(parallel, ZeroConfig) and parallel.stage == 3:
        gathers_a_micro_batch = 2
    micro_batches = config.grad_accum_steps(num_gpus)
    gathered = gathers_a_micro_batch * micro_batches * compute_bytes * n
    if isinstance(parallel, DdpConfig):
        return ring * 8 * n  # an all-reduce of float32 gradients moves them twice
    if gathers_a_micro_batch == 0:
        gathered = 4 * n  # ZeRO 1 and 2 gather the updated float32 weights once
    return ring * (gathered + 4 * n)  # plus a reduce-scatter of float32 gradients


def _read_measured(workload: Workload, patterns: list[str]) -> dict[str, list[_Measurement]]:
    """Reads the measurements of this model, by GPU.

    A result file is JSON: `gpu`, `num_gpus`, `tokens_per_s`, `num_parameters`, `seq_len`,
    `precision`, `strategy`. Results of other jobs, and files without `gpu`, are skipped.

    Raises:
        ConfigError: A pattern matches no result file, or a result lacks a field or has no valid
            speed.
    """
    shape, found = workload.shape, dict[str, list[_Measurement]]()
    wanted = {
        "num_parameters": shape.num_parameters,
        "seq_len": workload.config.data.max_seq_len,
        "precision": workload.precision,
        "strategy": strategy_of(workload),
    }
    for pattern in patterns:
        paths = sorted(glob(str(Path(pattern).expanduser()), recursive=True))
        if not paths:
            raise ConfigError("launch.measured", pattern, "no such file", "check the pattern")
        rows = {p: read_json("launch.measured", Path(p), "give result files") for p in paths}
        rows = {p: row for p, row in rows.items() if isinstance(row, dict) and "gpu" in row}
        if not rows:
            rule = "no file that matches has the field `gpu`"
            raise ConfigError("launch.measured", pattern, rule, "see docs/launch.md")
        for path, row in rows.items():
            try:
                is_of_this_job = all(row[name] == value for name, value in wanted.items())
                name, count = known_gpu(str(row["gpu"]), "gpu"), int(row["num_gpus"])
                measured = _Measurement(path, float(row["tokens_per_s"]), count)
            except (KeyError, TypeError, ValueError) as e:
                rule = f"must have gpu, num_gpus, tokens_per_s, {', '.join(wanted)}"
                raise ConfigError("launch.measured", path, rule, "measure again") from e
            if not 0 < measured.tokens_per_s < math.inf:
                rule = f"tokens_per_s={measured.tokens_per_s} must be finite and above 0"
                raise ConfigError("launch.measured", path, rule, "measure again")
            if is_of_this_job:
                found.setdefault(name, []).append(measured)
    return found


def strategy_of(workload: Workload) -> str:
    """Returns the name of the strategy: `ddp`, `fsdp`, `zero1`, `zero2` or `zero3`."""
    parallel = workload.config.parallel
    if isinstance(parallel, ZeroConfig):
        return f"zero{parallel.stage}"
    return "fsdp" if isinstance(parallel, FsdpConfig) else "ddp"
