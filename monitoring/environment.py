"""What a run ran on: enough to explain a number later, nothing that names a person or a host."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

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
    """Code, software and hardware, as plain JSON values for `environment.json`.

    Returns:
        `git` (commit and dirty, or None outside a checkout), `python`, `platform`, `packages`
        (installed ones only), `cpu`, `memory_bytes`, `gpus`, `cuda`.
    """
    return {
        "git": _git(Path(__file__).resolve().parents[1]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": _packages(),
        "cpu": {
            "model": _cpu_model(Path("/proc/cpuinfo")),
            "num_cores": os.cpu_count(),
            "num_cores_usable": _num_cores_usable(),
        },
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        **_gpus(),
    }


def _git(root: Path) -> dict[str, object] | None:
    """Commit of the source tree, or None when it is not a checkout of its own.

    An installed package may lie in a virtual environment inside somebody else's repository; that
    repository's commit says nothing about us.
    """
    top = _run_git(root, "rev-parse", "--show-toplevel")
    commit = _run_git(root, "rev-parse", "HEAD")
    if top is None or commit is None or Path(top).resolve() != root:
        return None
    return {"commit": commit, "dirty": _run_git(root, "status", "--porcelain") != ""}


def _run_git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=30
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _cpu_model(cpuinfo: Path) -> str:
    """The processor's marketing name, or its architecture where the kernel gives no name (Arm)."""
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _num_cores_usable() -> int | None:
    """Cores that this process may run on; None where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _gpus() -> dict[str, object]:
    import torch  # seconds to import; only a run that trains asks

    if not torch.cuda.is_available():
        return {"gpus": [], "cuda": None}
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "gpus": [{"name": d.name, "memory_bytes": d.total_memory} for d in devices],
        "cuda": torch.version.cuda or torch.version.hip,
    }
