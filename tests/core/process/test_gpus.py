"""GPUs that a process may use; stand-ins for the driver and for the device files."""

import asyncio

import pytest

from core.process import gpus
from core.process.child import run
from core.process.gpus import NoAnswer, ask_driver, has_gpu, visible_gpus, visible_gpus_async
from core.process.python import environment, python

LISTING = """\
GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0a1b)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-1c2d)
  MIG 1g.10gb     Device  0: (UUID: MIG-3e4f)
  MIG 1g.10gb     Device  1: (UUID: MIG-5f6a)
"""


@pytest.fixture
def host(tmp_path, monkeypatch):
    """A host without GPUs, to which a test gives some."""
    for name in ("CUDA", "HIP", "ROCR"):
        monkeypatch.delenv(f"{name}_VISIBLE_DEVICES", raising=False)
    (tmp_path / "bin").mkdir()
    (tmp_path / "dev/dri").mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setattr(gpus, "_DEV", tmp_path / "dev")
    monkeypatch.setattr(gpus, "_KFD", tmp_path / "kfd")
    return tmp_path


def smi(host, script):
    program = host / "bin/nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["0", "1"]),
        ("", []),
        ("-1", []),
        ("NoDevFiles", []),
        ("0", ["0"]),
        ("1, 0", ["1", "0"]),
        ("0,5,1", ["0"]),
        ("0,-1,1", ["0"]),
        ("0,0", []),
        ("GPU-1c", ["GPU-1c2d"]),
        ("GPU-1c2d,GPU-0a1b", ["GPU-1c2d", "GPU-0a1b"]),
        ("GPU-", []),  # of both
        ("GPU-1c,GPU-1c2d", []),  # the same twice
        ("GPU-ff,GPU-0a", []),
        ("MIG-3e4f", ["MIG-3e4f"]),
        ("MIG-3e4f,MIG-5f6a", ["MIG-3e4f"]),  # CUDA shows a process one of them
    ],
)
def test_gpus_that_cuda_shows(visible, expected, host, monkeypatch):
    (host / "list").write_text(LISTING)
    smi(host, f"cat {host}/list")
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == expected
    assert asyncio.run(visible_gpus_async()) == expected


def test_a_gpu_that_the_driver_has_lost(host):
    """It is asked each time; the device file of a GPU that fell off the bus is still there."""
    (host / "dev/nvidia0").touch()
    smi(host, "echo 'GPU 0: H100 (UUID: GPU-0a)'")
    assert visible_gpus() == ["0"]
    smi(host, "echo 'NVIDIA-SMI has failed'; exit 9")
    assert visible_gpus() == []


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, ["0", "1"]),
        ("", []),
        ("1", ["1"]),
        ("7", []),
        ("GPU-0a", ["GPU-0a"]),
        ("GPU-0a,GPU-0b,GPU-0c", ["GPU-0a", "GPU-0b"]),
        ("MIG-1,MIG-2", ["MIG-1"]),
    ],
)
def test_a_container_without_the_drivers_programs(visible, expected, host, monkeypatch):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (host / "dev" / name).touch()
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == expected == asyncio.run(visible_gpus_async())
    assert has_gpu() == bool(expected)


@pytest.mark.parametrize("visible", [None, "0", "GPU-0a", "MIG-1"])
def test_a_host_without_a_gpu(visible, host, monkeypatch):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert visible_gpus() == [] and not has_gpu()
    assert ask_driver("-L") is None


@pytest.mark.parametrize(
    ("torch", "variables", "expected"),
    [
        ("2.13.0+rocm7.0", {}, ["0", "1"]),
        ("2.13.0+rocm7.0", {"HIP": "1"}, ["1"]),
        ("2.13.0+rocm7.0", {"HIP": "1", "CUDA": ""}, ["1"]),
        ("2.13.0+rocm7.0", {"CUDA": "0"}, ["0"]),
        ("2.13.0+rocm7.0", {"ROCR": "1"}, ["0"]),  # what it lets through is numbered anew
        ("2.13.0+rocm7.0", {"ROCR": "1", "HIP": "1"}, []),
        ("2.13.0+cpu", {}, []),  # a graphics unit that torch does not use
    ],
)
def test_gpus_of_amd(torch, variables, expected, host, monkeypatch):
    monkeypatch.setattr(gpus.metadata, "version", lambda name: torch)
    # A processor, two GPUs of this container, and one of another.
    for node, (simds, minor) in enumerate([(0, 0), (304, 128), (304, 129), (304, 130)]):
        folder = host / f"kfd/{node}"
        folder.mkdir(parents=True)
        (folder / "properties").write_text(f"simd_count {simds}\ndrm_render_minor {minor}\n")
    for minor in (128, 129):
        (host / f"dev/dri/renderD{minor}").touch()
    for name, value in variables.items():
        monkeypatch.setenv(f"{name}_VISIBLE_DEVICES", value)
    assert visible_gpus() == expected


def test_a_driver_that_does_not_answer(host, monkeypatch):
    monkeypatch.setattr(gpus, "ANSWER_S", 0.3)
    smi(host, f"echo $$ > {host}/pid; exec sleep 1000")
    with pytest.raises(NoAnswer):
        visible_gpus()
    with pytest.raises(NoAnswer):
        asyncio.run(visible_gpus_async())


def test_torch_is_not_imported():
    program = "import sys, core.process.gpus as g; g.has_gpu(); print('torch' in sys.modules)"
    assert run(python("-c", program), environment()).out == "False\n"
