"""Accelerators by SkyPilot's names, and the other spellings that price lists use."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache

from core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Gpu:
    """The properties of an accelerator that the planner uses.

    Attributes:
        memory_gib: Memory, roughly as `torch.cuda` reports it; datasheets call the number GB.
        device_name: Device name under which `monitoring.throughput.peak_flops` knows the peak;
            empty: no peak is known.
        has_nvlink: True if a link faster than PCIe connects the GPUs of one node.
    """

    memory_gib: float
    device_name: str = ""
    has_nvlink: bool = False


# Sizes from the datasheets. A card that is sold in two sizes has two names, as in SkyPilot.
GPUS: dict[str, Gpu] = {
    "A10": Gpu(24),
    "A100": Gpu(40, "NVIDIA A100", True),
    "A100-80GB": Gpu(80, "NVIDIA A100", True),
    "A100-PCIE": Gpu(40, "NVIDIA A100"),
    "A100-80GB-PCIE": Gpu(80, "NVIDIA A100"),
    "A10G": Gpu(24, "NVIDIA A10G"),
    "A16": Gpu(16),
    "A30": Gpu(24),
    "A40": Gpu(48),
    "B200": Gpu(180, "NVIDIA B200", True),
    "B300": Gpu(268, "", True),
    "GH200": Gpu(96),
    "H100": Gpu(80, "NVIDIA H100 80GB HBM3", True),
    "H100-NVL": Gpu(94, "NVIDIA H100 NVL"),
    "H100-PCIE": Gpu(80, "NVIDIA H100 PCIe"),
    "H200": Gpu(141, "NVIDIA H200", True),
    "H200-NVL": Gpu(141, "NVIDIA H200 NVL"),
    "L4": Gpu(24, "NVIDIA L4"),
    "L40": Gpu(48),
    "L40S": Gpu(48, "NVIDIA L40S"),
    "MI300X": Gpu(192, "AMD Instinct MI300X", True),
    "P100": Gpu(16),
    "RTX3090": Gpu(24, "NVIDIA GeForce RTX 3090"),
    "RTX4090": Gpu(24, "NVIDIA GeForce RTX 4090"),
    "RTX5090": Gpu(32, "NVIDIA GeForce RTX 5090"),
    "RTX6000-Ada": Gpu(48),
    "RTXA4000": Gpu(16),
    "RTXA5000": Gpu(24),
    "RTXA6000": Gpu(48),
    "RTXPRO6000": Gpu(96),
    "T4": Gpu(16, "Tesla T4"),
    "V100": Gpu(16, "Tesla V100-SXM2-16GB", True),
    "V100-32GB": Gpu(32, "Tesla V100-SXM2-32GB", True),
}

_BY_FOLDED = {re.sub(r"[^a-z0-9]", "", name.lower()): name for name in GPUS}
_SHOWN = 20
_MAKER = re.compile(r"\b(nvidia|amd|tesla|geforce|quadro|hgx|instinct)\b")
_FORM = re.compile(r"\b(sxm\d?|nvlink|pcie|nvl|hbm\d?e?)\b")
_SIZE = re.compile(r"\(?\b(\d+)\s*g(?:b|ib)?\b\)?")
# Cards that are sold in two sizes: from this size on, SkyPilot's name includes it.
_SIZES = {"a100": 80, "v100": 32}


def gpu(name: str) -> Gpu:
    """Returns the properties of an accelerator.

    Args:
        name: SkyPilot's name, in any case.

    Raises:
        ConfigError: No accelerator has that name.
    """
    return GPUS[known_gpu(name)]


@lru_cache(maxsize=4096)
def known_gpu(name: str, key: str = "launch.gpus") -> str:
    """Returns a name in SkyPilot's spelling.

    Args:
        name: Name in any case, with or without its dashes.
        key: Key of the setting, for the error.

    Raises:
        ConfigError: No accelerator has that name; the error lists similar names.
    """
    if name in GPUS:
        return name
    folded = re.sub(r"[^a-z0-9]", "", name.lower())
    if folded in _BY_FOLDED:
        return _BY_FOLDED[folded]
    raise ConfigError(key, name, "is not a known GPU", nearest(name, GPUS))


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns the fix for an unknown name: similar names, or else the first of all names."""
    known = sorted(set(names) - {""})
    folded = {item.lower(): item for item in known}
    found = [folded[item] for item in get_close_matches(name.lower(), folded, n=3, cutoff=0.5)]
    if found:
        return f"did you mean {', '.join(found)}?"
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return f"there are {', '.join(known[:_SHOWN])}{more}"


@lru_cache(maxsize=4096)
def gpu_of(written: str, memory_gib: float | None = None) -> str | None:
    """Finds SkyPilot's name for a price list's, e.g. `NVIDIA A100 SXM4 80GB` or `A100 (40 GB)`.

    Args:
        written: Name in the list.
        memory_gib: Memory size, if the list has it in a column of its own.

    Returns:
        SkyPilot's name; None for an unknown accelerator, or one of another size.
    """
    text = _MAKER.sub(" ", written.lower().replace("-", " "))
    size = _SIZE.search(text)
    if size is not None:
        text, memory_gib = text.replace(size[0], " "), float(size[1])
    # SXM, HBM and NVLink are the default form of a data-centre card and not part of its name; PCIe
    # and NVL cards have names of their own, as their speed differs.
    forms = set(_FORM.findall(text))
    base = re.sub(r"[^a-z0-9]", "", _FORM.sub(" ", text))
    if base in _SIZES and memory_gib is not None and memory_gib >= _SIZES[base]:
        base += f"{_SIZES[base]}gb"
    if "nvl" in forms:
        base += "nvl"
    elif "pcie" in forms and f"{base}pcie" in _BY_FOLDED:
        base += "pcie"
    name = _BY_FOLDED.get(base)
    if name is None or memory_gib is None:
        return name
    # Lists give sizes in GB or GiB, often rounded: hence the 10%.
    return name if 0.9 <= memory_gib / GPUS[name].memory_gib <= 1.1 else None
