import sys

import pytest

from monitoring.throughput import (
    PEAK_FLOPS,
    Throughput,
    flops_per_token,
    mfu,
    peak_flops,
    peak_memory_bytes,
)


def test_flops_per_token_by_hand():
    # 6 * 100 + 12 * 2 * 8 * 16
    assert flops_per_token(100, 2, 8, 16) == 3672


def test_mfu_by_hand():
    # 100k tokens/s * 7.8 GFLOP a token = 780 TFLOP/s, of 8 * 312
    assert mfu(1e5, 7.8e9, "NVIDIA A100-SXM4-80GB", "bf16", 8) == pytest.approx(780 / 2496)


@pytest.mark.parametrize(
    "device_name, bf16",
    [
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H200 NVL", 835.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756.5e12),
        ("NVIDIA H100 NVL", 835.5e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362.05e12),
        ("NVIDIA GeForce RTX 3090", 71e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA B200", 2250e12),
        ("AMD Instinct MI300X", 1307.4e12),
    ],
)
def test_known_devices(device_name, bf16):
    assert peak_flops(device_name, "bf16") == bf16


@pytest.mark.parametrize(
    "device_name, fp16",
    [
        ("Tesla T4", 65e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla V100-SXM3-32GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("Tesla V100S-PCIE-32GB", 130e12),
    ],
)
def test_old_devices_have_no_bf16(device_name, fp16):
    assert peak_flops(device_name, "fp16") == fp16
    assert peak_flops(device_name, "bf16") is None


@pytest.mark.parametrize(
    "device_name",
    [
        "cpu",
        "NVIDIA A10",
        "NVIDIA L40",
        "NVIDIA GH200 480GB",
        "NVIDIA GB200",
        "NVIDIA T400",
        "NVIDIA GeForce RTX 3090 Ti",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA RTX A1000",
    ],
)
def test_devices_that_only_look_known(device_name):
    assert mfu(1e5, 1e9, device_name, "bf16", 1) is None


def test_peaks_grow_with_less_precision():
    for peaks in PEAK_FLOPS.values():
        assert peaks["fp16"] >= peaks.get("tf32", 0) and peaks["fp16"] > peaks["fp32"] > 1e12


def test_throughput_leaves_out_pauses_and_starts_again_at_every_window():
    now = [100.0]
    throughput = Throughput(clock=lambda: now[0])
    for _ in range(4):
        now[0] += 0.5
        throughput.step(1000, data_wait_s=0.1)
    with throughput.paused():
        now[0] += 30
    assert throughput.window() == pytest.approx(
        {"tokens_per_s": 2000, "step_s": 0.5, "data_wait_s": 0.1}
    )
    now[0] += 1
    throughput.step(500, data_wait_s=0)
    assert throughput.window() == {"tokens_per_s": 500, "step_s": 1, "data_wait_s": 0}
    assert throughput.window() == {}


def test_throughput_goes_on_after_an_error_in_a_pause():
    now = [0.0]
    throughput = Throughput(clock=lambda: now[0])
    with pytest.raises(OSError), throughput.paused():
        now[0] += 5
        raise OSError
    now[0] += 1
    throughput.step(10, 0)
    assert throughput.window()["step_s"] == 1


def test_peak_memory_of_a_cpu():
    assert 2**20 < peak_memory_bytes("cpu") < 2**40
    assert "torch" not in sys.modules or peak_memory_bytes("cpu") > 2**26
