"""The GPUs that a process may use, found without torch, whose import alone takes seconds.

NVIDIA's driver is asked each time, since it no longer lists a GPU that fell off the bus. Containers
without the driver's `utility` capability have no `nvidia-smi`; there the device files count, of
which a container is given only its own. CUDA_VISIBLE_DEVICES then chooses, as CUDA reads it: the
first name that is none hides itself and all that follow, `-1` and nothing at all are such names,
and a GPU that is named twice hides all. A process sees one MIG instance at most; such count only
where CUDA_VISIBLE_DEVICES names them, which a machine with whole GPUs beside MIG instances needs.

AMD's GPUs are those that the kernel driver lists and whose render node is there, as containers get
no other; HIP chooses of what ROCR_VISIBLE_DEVICES lets through. They count where the torch that is
installed is a build for ROCm: any other does not use the graphics unit of an AMD processor.
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
_KILL_S = 1.0
_DEV, _KFD = Path("/dev"), Path("/sys/class/kfd/kfd/topology/nodes")


class NoAnswer(Exception):
    """The driver does not answer."""

    def __str__(self) -> str:
        return f"nvidia-smi does not answer within {ANSWER_S:.0f} s"


def has_gpu() -> bool:
    """Whether a process may use a GPU, without asking the driver whether it works."""
    return bool(_visible(None))


def visible_gpus() -> list[str]:
    """Returns the GPUs that a process may use, as CUDA_VISIBLE_DEVICES can name them.

    Raises:
        NoAnswer: The driver does not answer.
    """
    return _visible(ask_driver("-L"))


async def visible_gpus_async() -> list[str]:
    """Returns what `visible_gpus` does, while the event loop goes on."""
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
    """Returns what `nvidia-smi` prints; None where it is not installed.

    Args:
        words: Its arguments.

    Raises:
        NoAnswer: It does not answer.
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
    """Returns the GPUs that a process may use.

    Args:
        listing: Lines as `GPU 0: NVIDIA H100 (UUID: GPU-0a1b...)`; None: nobody makes such a list.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listing is None and _is_rocm():
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
    """Returns what a list as CUDA_VISIBLE_DEVICES lets through.

    Args:
        chosen: Indices or (starts of) UUIDs, with commas between; None lets all GPUs through.
        indices: All GPUs.
        uuids: Those of each; None where nobody tells, so that any is believed.
        instances: The UUIDs of MIG instances.
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
        if len(those) != 1:  # there is none, or nobody knows which is meant
            break
        found += those
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
    """Returns the indices of the GPUs that AMD's kernel driver lists."""
    count = 0
    for node in _KFD.glob("*/properties"):
        found = dict(re.findall(r"^(\w+) (\d+)$", node.read_text(), re.MULTILINE))
        # A processor is a node, too, without compute units.
        if found.get("simd_count", "0") != "0":
            count += (_DEV / f"dri/renderD{found.get('drm_render_minor')}").exists()
    return [str(i) for i in range(count)]
