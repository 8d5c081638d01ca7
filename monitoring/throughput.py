"""Measures how fast a run trains, and how much of the hardware's peak that is.

Symbols: N parameters used in matrix products, L layers, H hidden size, T sequence length.
"""

import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Peak FLOP/s of one device by precision: dense, without structured sparsity (datasheets often print
# the sparse figure, which is twice as large), for matrix products with fp32 accumulation. `tf32` is
# fp32 through tensor cores, `fp32` is without them. A precision that the hardware lacks is absent.
# Each key is searched in the name that `torch.cuda.get_device_name()` returns; the first match
# counts, so more specific names come first.
PEAK_FLOPS: dict[str, dict[str, float]] = {
    # NVIDIA Blackwell datasheet (2025), column HGX B200: 4.5 PF bf16 and 2.2 PF tf32 with sparsity
    "B200": {"bf16": 2250e12, "fp16": 2250e12, "tf32": 1100e12, "fp32": 75e12},
    # NVIDIA H200 datasheet, H200 NVL: 1,671 and 835 TF with sparsity
    "H200 NVL": {"bf16": 835.5e12, "fp16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12},
    # NVIDIA H200 datasheet, H200 SXM: 1,979 and 989 TF with sparsity
    "H200": {"bf16": 989.5e12, "fp16": 989.5e12, "tf32": 494.5e12, "fp32": 67e12},
    # NVIDIA H100 datasheet, H100 NVL: 1,671 and 835 TF with sparsity
    "H100 NVL": {"bf16": 835.5e12, "fp16": 835.5e12, "tf32": 417.5e12, "fp32": 60e12},
    # NVIDIA H100 datasheet (2023), H100 PCIe: 1,513 and 756 TF with sparsity
    "H100 PCIe": {"bf16": 756.5e12, "fp16": 756.5e12, "tf32": 378e12, "fp32": 51e12},
    # NVIDIA H100 datasheet, H100 SXM: 1,979 and 989 TF with sparsity; named "H100 80GB HBM3"
    "H100 80GB HBM3": {"bf16": 989.5e12, "fp16": 989.5e12, "tf32": 494.5e12, "fp32": 67e12},
    # NVIDIA A100 datasheet (SXM and PCIe alike)
    "A100": {"bf16": 312e12, "fp16": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    # NVIDIA A10G datasheet for AWS G5 (2022); not the A10, whose tensor cores are faster
    "A10G": {"bf16": 70e12, "fp16": 70e12, "tf32": 35e12, "fp32": 35e12},
    # NVIDIA L40S datasheet
    "L40S": {"bf16": 362.05e12, "fp16": 362.05e12, "tf32": 183e12, "fp32": 91.6e12},
    # NVIDIA L4 datasheet: 242 and 120 TF with sparsity
    "L4": {"bf16": 121e12, "fp16": 121e12, "tf32": 60e12, "fp32": 30.3e12},
    # NVIDIA T4 datasheet; Turing computes neither bf16 nor tf32 in tensor cores
    "T4": {"fp16": 65e12, "fp32": 8.1e12},
    # NVIDIA V100 datasheet (2020), columns V100S, PCIe, SXM2; Volta has neither bf16 nor tf32
    "V100S": {"fp16": 130e12, "fp32": 16.4e12},
    "V100-PCIE": {"fp16": 112e12, "fp32": 14e12},
    "V100-SXM": {"fp16": 125e12, "fp32": 15.7e12},
    # NVIDIA Ampere GA102 whitepaper, appendix A
    "RTX 3090": {"bf16": 71e12, "fp16": 71e12, "tf32": 35.6e12, "fp32": 35.6e12},
    # NVIDIA Ada whitepaper, appendix A
    "RTX 4090": {"bf16": 165.2e12, "fp16": 165.2e12, "tf32": 82.6e12, "fp32": 82.6e12},
    # NVIDIA RTX Blackwell whitepaper, appendix A
    "RTX 5090": {"bf16": 209.5e12, "fp16": 209.5e12, "tf32": 104.8e12, "fp32": 104.8e12},
    # AMD Instinct MI300X datasheet; fp32 is the matrix figure
    "MI300X": {"bf16": 1307.4e12, "fp16": 1307.4e12, "tf32": 653.7e12, "fp32": 163.4e12},
}

# Parts of a device, and cards that only share a number with one in the table: no peak is known.
_OTHER_DEVICE = re.compile(r"\bMIG\b|\b(Ti|SUPER|D|Laptop|Max-Q|VF|vGPU)\b")


def peak_flops(device_name: str, precision: str) -> float | None:
    """Returns the peak dense FLOP/s of a device, or None if it is not in `PEAK_FLOPS`.

    Args:
        device_name: Name as `torch.cuda.get_device_name()` returns it.
        precision: Precision of the matrix products: `bf16`, `fp16`, `tf32` or `fp32`.
    """
    if _OTHER_DEVICE.search(device_name):
        return None
    for name, peaks in PEAK_FLOPS.items():
        # Whole words only: "L4" must not match L40, nor "B200" GB200; "V100-SXM" may end in "2".
        if re.search(rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z]|(?<!SXM)\d)", device_name):
            return peaks.get(precision)
    return None


def flops_per_token(
    num_parameters_in_matmuls: int, num_layers: int, hidden_size: int, seq_len: int
) -> float:
    """Returns the model FLOPs of training on one token, forward and backward: 6N + 12 L H T.

    Source: Chowdhery et al. 2022, "PaLM", appendix B. Attention is counted in full, as if it were
    not causal; this convention makes runs comparable. Recomputed activations do not count.

    Args:
        num_parameters_in_matmuls: N, which includes the embedding only if it is also the output
            layer.
        num_layers: L.
        hidden_size: H, heads times head size.
        seq_len: T.
    """
    return 6.0 * num_parameters_in_matmuls + 12.0 * num_layers * hidden_size * seq_len


def mfu(
    tokens_per_s: float, flops_per_token: float, device_name: str, precision: str, num_devices: int
) -> float | None:
    """Returns the model FLOPs utilization, 0 to 1, or None if the device's peak is not known.

    Args:
        tokens_per_s: Throughput of all devices together.
        flops_per_token: FLOPs per token, see the function of that name.
        device_name: Name as `torch.cuda.get_device_name()` returns it.
        precision: Precision of the matrix products: `bf16`, `fp16`, `tf32` or `fp32`.
        num_devices: Number of devices that train together.
    """
    peak = peak_flops(device_name, precision)
    return None if peak is None else tokens_per_s * flops_per_token / (peak * num_devices)


class Throughput:
    """Times training alone: evaluation, sampling and saving are excluded by pauses.

    A GPU runs behind the program. Call `window()` after something that waits for the device, as
    fetching the loss does; otherwise the last steps are not counted in full.

    Args:
        clock: Function that returns seconds from any origin.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._paused_at: float | None = None
        self._reset(clock())

    def step(self, num_tokens: int, data_wait_s: float) -> None:
        """Counts one step.

        Args:
            num_tokens: Number of tokens in the global batch.
            data_wait_s: Time that the step waited for its batch, in seconds.
        """
        self._num_steps += 1
        self._num_tokens += num_tokens
        self._data_wait_s += data_wait_s

    def window(self) -> dict[str, float]:
        """Returns means since the last call: `tokens_per_s`, `step_s` and `data_wait_s`.

        Returns:
            Means by name; an empty dict if there was no step.
        """
        assert self._paused_at is None, "window() while paused"
        now = self._clock()
        busy_s = now - self._since - self._paused_s
        num_steps, num_tokens, data_wait_s = self._num_steps, self._num_tokens, self._data_wait_s
        self._reset(now)
        if num_steps == 0 or busy_s <= 0:
            return {}
        return {
            "tokens_per_s": num_tokens / busy_s,
            "step_s": busy_s / num_steps,
            "data_wait_s": data_wait_s / num_steps,
        }

    def pause(self) -> None:
        """Stops the clock."""
        assert self._paused_at is None, "already paused"
        self._paused_at = self._clock()

    def resume(self) -> None:
        """Starts the clock again."""
        assert self._paused_at is not None, "not paused"
        self._paused_s += self._clock() - self._paused_at
        self._paused_at = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time that is spent in the block."""
        self.pause()
        try:
            yield
        finally:
            self.resume()

    def _reset(self, now: float) -> None:
        self._since = now
        self._paused_s = 0.0
        self._num_steps = 0
        self._num_tokens = 0
        self._data_wait_s = 0.0


def peak_memory_bytes(device: str) -> int:
    """Returns the peak memory so far: allocated by torch on a GPU, resident on a CPU.

    Args:
        device: Name of a torch device such as `cuda:0` or `cpu`.
    """
    if not device.startswith("cuda"):
        unit = 1 if sys.platform == "darwin" else 1024  # Linux reports KiB, macOS bytes
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    import torch  # takes seconds to import, and is needed only on a GPU

    return int(torch.cuda.max_memory_allocated(device))
