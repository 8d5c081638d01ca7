"""Finds the GPUs that a process may use without torch, whose import alone takes seconds.

NVIDIA's driver is asked each time, because it stops listing a GPU that fell off the bus. Containers
without the driver's `utility` capability have no `nvidia-smi`; there the device files are counted,
of which a container has only its own. CUDA_VISIBLE_DEVICES is applied as CUDA does: the first name
that is not valid hides itself and all that follow, `-1` and the empty string are such names, and a
GPU that is named twice hides all. A process sees at most one MIG instance. MIG instances count only
where CUDA_VISIBLE_DEVICES names them, as a machine with whole GPUs beside MIG instances needs.

AMD's GPUs are those that the kernel driver lists and whose render node exists, since containers get
only the render nodes of their own GPUs. ROCR_VISIBLE_DEVICES filters first, then
HIP_VISIBLE_DEVICES. They count only if the installed torch is a ROCm build: other builds cannot use
the integrated graphics unit of an AMD processor.
"""

import asyncio
import contextlib
import os
import re
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from core.process.child import kill_group, popen, spawn

ANSWER_S = 30.0  # a driver with a broken GPU may never answer
_KILL_S = 1.0  # time that a killed nvidia-smi gets to end
_DEV, _KFD = Path("/dev"), Path("/sys/class/kfd/kfd/topology/nodes")


class NoAnswer(Exception):
    """Reports that the driver does not answer."""

    def __str__(self) -> str:
        return f"nvidia-smi does not answer within {ANSWER_S:.0f} s"


def has_gpu() -> bool:
    """Returns whether a process may use a GPU, without asking the driver whether it works."""
    return bool(_visible(None))


def visible_gpus() -> list[str]:
    """Returns the GPUs that a process may use, under names that CUDA_VISIBLE_DEVICES accepts.

    Raises:
        NoAnswer: The driver does not answer.
    """
    return _visible(ask_driver("-L"))


async def visible_gpus_async() -> list[str]:
    """Returns the same as `visible_gpus` without blocking the event loop."""
    try:
        process = await spawn(["nvidia-smi", "-L"], **_PIPES)
    except OSError:
        return _visible(None)
    try:
        listing, _ = await asyncio.wait_for(process.communicate(), ANSWER_S)
    except TimeoutError:
        raise NoAnswer from None
    finally:
        if process.returncode is None:
            kill_group(process.pid)
            with contextlib.suppress(TimeoutError):  # it may be stuck in the driver
                await asyncio.wait_for(process.wait(), _KILL_S)
    return _visible(listing.decode(errors="replace"))


def ask_driver(*words: str) -> str | None:
    """Returns the output of `nvidia-smi`, or None if it is not installed.

    Args:
        words: Arguments of `nvidia-smi`.

    Raises:
        NoAnswer: The driver does not answer within `ANSWER_S`.
    """
    try:
        process = popen(["nvidia-smi", *words], encoding="utf-8", errors="replace", **_PIPES)
    except OSError:
        return None
    try:
        return str(process.communicate(timeout=ANSWER_S)[0])
    except subprocess.TimeoutExpired:
        raise NoAnswer from None
    finally:
        if process.returncode is None:
            kill_group(process.pid)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_S)
        assert process.stdout is not None
        process.stdout.close()


_PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}


def _visible(listing: str | None) -> list[str]:
    """Returns the GPUs that a process may use, after the environment's filters.

    Args:
        listing: Lines such as `GPU 0: NVIDIA H100 (UUID: GPU-0a1b...)`; None if there is no
            `nvidia-smi`.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listing is None and _is_rocm():
        # HIP counts within what ROCR lets through, from 0; the older CUDA name works on ROCm too.
        chosen = os.environ.get("HIP_VISIBLE_DEVICES", chosen)
        there = choose(os.environ.get("ROCR_VISIBLE_DEVICES"), _amd_gpus())
        return choose(chosen, [str(i) for i in range(len(there))])
    if listing is None:
        return choose(chosen, [str(i) for i in range(len(list(_DEV.glob("nvidia[0-9]*"))))])
    uuids = re.findall(r"^GPU \d+: .*\(UUID: ([^)]+)\)", listing, re.MULTILINE)
    instances = re.findall(r"^ +MIG .*\(UUID: (MIG-[^)]+)\)", listing, re.MULTILINE)
    return choose(chosen, [str(i) for i in range(len(uuids))], uuids, instances)


def choose(
    chosen: str | None,
    indices: Sequence[str],
    uuids: Sequence[str] | None = None,
    instances: Sequence[str] = (),
) -> list[str]:
    """Returns the GPUs that a list in CUDA_VISIBLE_DEVICES syntax selects.

    Args:
        chosen: Indices or prefixes of UUIDs, separated by commas; None selects all GPUs.
        indices: Indices of all GPUs.
        uuids: UUID of each GPU; None if they are unknown, so that any UUID is accepted.
        instances: UUIDs of MIG instances.
    """
    if chosen is None or not indices:
        return list(indices)
    found: list[str] = []
    for name in chosen.replace(" ", "").split(","):
        if name.isdecimal():
            those = [index for index in indices if int(index) == int(name)]
        elif not name.startswith(("GPU-", "MIG-")):
            break
        elif uuids is None:
            those = [name]
        else:
            those = [uuid for uuid in (*uuids, *instances) if uuid.startswith(name)]
        if len(those) != 1:  # no GPU has this name, or the prefix is ambiguous
            break
        found += those
    # CUDA hides every GPU if one is named twice, and shows a process one MIG instance at most.
    if len(set(found)) < len(found):
        return []
    if any(name.startswith("MIG-") for name in found):
        return found[:1]
    return found if uuids is not None else found[: len(indices)]


def _is_rocm() -> bool:
    try:
        return _KFD.exists() and "rocm" in metadata.version("torch")
    except metadata.PackageNotFoundError:
        return False


def _amd_gpus() -> list[str]:
    """Returns the indices of the GPUs that AMD's kernel driver lists and this process may open."""
    count = 0
    for node in _KFD.glob("*/properties"):
        found = dict(re.findall(r"^(\w+) (\d+)$", node.read_text(), re.MULTILINE))
        # A CPU is a node as well, with no compute units.
        if found.get("simd_count", "0") != "0":
            count += (_DEV / f"dri/renderD{found.get('drm_render_minor')}").exists()
    return [str(i) for i in range(count)]
