"""Against the real SkyPilot, in an environment of its own: `make test-sky`.

SPOTFORGE_SKY_PYTHON names its Python. Nothing is launched, and nothing but local files is read.
"""

import csv
import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import yaml

from launch.__main__ import main

pytestmark = [
    pytest.mark.sky,
    pytest.mark.skipif("SPOTFORGE_SKY_PYTHON" not in os.environ, reason="SPOTFORGE_SKY_PYTHON"),
]
OPTIMUM = Path(__file__).with_name("sky_optimum.py")
MEMORY_MIB = {"A100": 40960, "A100-80GB": 81920, "H100": 81920}
AWS = (
    "InstanceType,AcceleratorName,AcceleratorCount,vCPUs,MemoryGiB,GpuInfo,Price,SpotPrice,"
    "Region,AvailabilityZone,Arch"
).split(",")
GCP = (
    "InstanceType,vCPUs,MemoryGiB,AcceleratorName,AcceleratorCount,GpuInfo,Region,"
    "AvailabilityZone,Price,SpotPrice"
).split(",")
# SkyPilot knows which machine carries which accelerator there.
AWS_MACHINES = {"A100": "p4d.24xlarge", "A100-80GB": "p4de.24xlarge", "H100": "p5.48xlarge"}
GCP_MACHINES = {"A100": "a2-highgpu-8g", "A100-80GB": "a2-ultragpu-8g", "H100": "a3-highgpu-8g"}


def price(rng):
    return round(rng.uniform(4, 60), 4)


def write_catalogs(folder, gpu, seed):
    """Eight of `gpu` at random places of AWS and GCP, at random prices; spot is cheaper mostly."""
    rng = random.Random(seed)
    info = str({"Gpus": [{"Name": gpu, "MemoryInfo": {"SizeInMiB": MEMORY_MIB[gpu]}}]})
    aws, gcp = [], []
    for region in rng.sample(["us-east-1", "us-west-2", "ap-south-1", "eu-west-1"], 3):
        list_price = price(rng)
        for zone in rng.sample("abc", rng.randint(1, 3)):
            spot = round(list_price * rng.uniform(0.2, 1.1), 4)
            cells = [AWS_MACHINES[gpu], gpu, 8, 96, 1152, info, list_price, spot]
            aws.append([*cells, region, f"{region}{zone}", "x86_64"])
    for region in rng.sample(["us-east4", "us-central1", "asia-south1", "europe-west4"], 2):
        host, cards = price(rng), price(rng)
        for zone in rng.sample("abc", rng.randint(1, 2)):
            where, share = [region, f"{region}-{zone}"], rng.uniform(0.2, 1.0)
            host_prices = [host, round(host * share, 4)]
            gcp.append([GCP_MACHINES[gpu], 96, 680, "", "", "", *where, *host_prices])
            card_prices = [cards, round(cards * share, 4)]
            gcp.append(["", "", "", gpu, 8, info, *where, *card_prices])
    for cloud, header, rows in (("aws", AWS, aws), ("gcp", GCP, gcp)):
        write_rows(folder / cloud / "vms.csv", header, rows)
    known = [[name, "['AWS', 'GCP']"] for name in MEMORY_MIB]
    write_rows(folder / "common" / "accelerators.csv", ["AcceleratorName", "Clouds"], known)


def write_rows(path, header, rows):
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def optimum_of(runtime, *tasks):
    """What SkyPilot takes for each task."""
    names = ("PATH", "LANG")
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment |= {"SKY_RUNTIME_DIR": str(runtime), "HOME": str(runtime)}
    environment |= {"SKYPILOT_DISABLE_USAGE_COLLECTION": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [os.environ["SPOTFORGE_SKY_PYTHON"], OPTIMUM, *tasks],
        env=environment,
        cwd=runtime,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"cloud"')]


@pytest.mark.parametrize("seed", range(30))
def test_our_cheapest_is_skypilots(tmp_path, seed):
    """Of one GPU, without egress and interruptions, the cheapest place is the cheapest hour."""
    gpu = random.Random(seed).choice(sorted(MEMORY_MIB))
    catalogs = tmp_path / ".sky" / "catalogs" / "v8"
    write_catalogs(catalogs, gpu, seed)
    ours, free = tmp_path / "ours.yaml", tmp_path / "free.yaml"
    words = ["model=llama_1b", "parallel=fsdp", "precision=bf16", "stop.steps=1000"]
    words += ["run.dir=runs/mine", f"launch.catalog={catalogs}", "launch.bucket=s3://mine"]
    words += ["launch.nodes=[1]", "launch.restart_minutes=0", "launch.wait_minutes=0"]
    words += ["checkpoint.mean_hours_between_preemptions=1000000"]
    assert main(["render", *words, "launch.workdir=null", "-o", str(ours)]) == 0
    task = yaml.safe_load(ours.read_text())
    del task["file_mounts"]  # a bucket needs credentials
    ours.write_text(yaml.safe_dump(task))
    anywhere = {"accelerators": f"{gpu}:8", "any_of": [{"use_spot": True}, {"use_spot": False}]}
    free.write_text(yaml.safe_dump({"resources": anywhere, "run": "true"}))
    of_ours, of_free = optimum_of(tmp_path, ours, free)
    prices = json.loads(task["envs"]["SPOTFORGE_PRICES"])
    assert prices[0]["usd_per_h"] == pytest.approx(of_free["usd_per_h"], abs=1e-3)
    assert of_ours["usd_per_h"] == pytest.approx(of_free["usd_per_h"], abs=1e-3)
    assert (prices[0]["cloud"], prices[0]["region"]) == (of_free["cloud"], of_free["region"])
    assert prices[0]["is_spot"] == of_free["is_spot"]
