"""Describes the environment of a run, without names of people or hosts."""

import os
import platform
from pathlib import Path

from core.software import installed_versions
from core.version import checkout

PACKAGES = (
    "spotforge",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "accelerate",
    "safetensors",
    "huggingface-hub",
    "deepspeed",
    "torchao",
    "compressed-tensors",
    "gguf",
    "flash-attn",
    "triton",
    "wandb",
    "hydra-core",
    "omegaconf",
    "numpy",
)


def describe_environment() -> dict[str, object]:
    """Returns code, software and hardware as plain JSON values for `environment.json`.

    Returns:
        `git` (commit and dirty, or None outside a checkout), `python`, `platform`, `packages`
        (installed ones only), `cpu`, `memory_bytes`, `gpus`, `cuda`.
    """
    return {
        "git": checkout(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": installed_versions(PACKAGES),
        "cpu": {
            "model": _cpu_model(Path("/proc/cpuinfo")),
            "num_cores": os.cpu_count(),
            "num_cores_usable": _num_cores_usable(),
        },
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **_gpus(),
    }


def _cpu_model(cpuinfo: Path) -> str:
    """Returns the processor's marketing name, or its architecture if it has none (Arm)."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _num_cores_usable() -> int | None:
    """Returns the number of cores that this process may run on, or None if unknown (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _gpus() -> dict[str, object]:
    import torch  # takes seconds to import, and is needed only by a run that trains

    if not torch.cuda.is_available():
        return {"gpus": [], "cuda": None}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": [{"name": d.name, "memory_bytes": d.total_memory} for d in devices],
        "cuda": torch.version.cuda or torch.version.hip,
    }
