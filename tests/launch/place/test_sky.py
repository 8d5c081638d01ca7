"""Against the real SkyPilot, in an environment of its own: `make test-sky`.

SPOTFORGE_SKY_PYTHON names its Python. Nothing is launched: AWS is moto, on loopback.
"""

import csv
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
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
    assert main(["render", *words, "launch.skypilot.workdir=null", "-o", str(ours)]) == 0
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


@pytest.fixture
def account(tmp_path):
    """An AWS account of moto's, SkyPilot's lists for it, and an environment with both."""
    sky_bin = Path(os.environ["SPOTFORGE_SKY_PYTHON"]).parent
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {name: os.environ[name] for name in ("LANG",) if name in os.environ}
    environment |= {
        "HOME": str(tmp_path),
        "PATH": f"{sky_bin}:{os.environ['PATH']}",
        "SKYPILOT_DISABLE_USAGE_COLLECTION": "1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    catalogs = tmp_path / ".sky" / "catalogs" / "v8"
    write_catalogs(catalogs, "A100", 3)
    moto = subprocess.Popen(
        [sky_bin / "moto_server", "-H", "127.0.0.1", "-p", str(port)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for_port(port)
        yield environment
    finally:
        subprocess.run([sky_bin / "sky", "api", "stop"], env=environment, capture_output=True)
        moto.terminate()
        moto.wait()


def wait_for_port(port, seconds=60):
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.1)


# What an account has, and moto makes up: names for zones, and images of its own in each region.
FURNISH = """
import csv, sys
from pathlib import Path
import boto3
folder = Path(sys.argv[1])
rows = list(csv.DictReader((folder / "vms.csv").open()))
ids, images = {}, []
for region in sorted({row["Region"] for row in rows}):
    ec2 = boto3.client("ec2", region)
    zones = ec2.describe_availability_zones()["AvailabilityZones"]
    ids |= {zone["ZoneName"]: zone["ZoneId"] for zone in zones}
    image = ec2.register_image(Name="mine", RootDeviceName="/dev/sda1")["ImageId"]
    for tag in ("skypilot:custom-gpu-ubuntu-cuda13", "skypilot:custom-gpu-ubuntu"):
        images.append([tag, region, "ubuntu", "22.04", image, "20260101", ""])
def write(name, header, rows):
    with (folder / name).open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
known = [row | {"AvailabilityZone": ids[row["AvailabilityZone"]]}
         for row in rows if row["AvailabilityZone"] in ids]
write("vms.csv", list(rows[0]), [list(row.values()) for row in known])
header = ["Tag", "Region", "OS", "OSVersion", "ImageId", "CreationDate", "BaseImageId"]
write("images.csv", header, images)
header = ["InstanceType", "Region", "OnDemandInstanceCode", "SpotInstanceCode"]
write("instance_quota_mapping.csv", header, [])
"""


@pytest.mark.skipif(shutil.which("rsync") is None, reason="SkyPilot wants rsync")
def test_a_dry_run_begins_at_our_first_place(account, tmp_path):
    catalogs = tmp_path / ".sky" / "catalogs" / "v8"

    def run(*command, **more):
        return subprocess.run(
            command, env=account | more, capture_output=True, text=True, timeout=240
        )

    words = ["model=llama_1b", "parallel=fsdp", "precision=bf16", "stop.steps=1000"]
    words += ["run.dir=runs/mine", f"launch.catalog={catalogs}", "launch.bucket=s3://mine"]
    words += [
        "launch.nodes=[1]",
        "launch.clouds=[aws]",
        "launch.skypilot.workdir=null",
        "launch.name=mine",
    ]
    up = [sys.executable, "-m", "launch", "up", *words]

    refused = run(*up)
    assert refused.returncode == 2, refused.stderr
    assert refused.stderr.startswith("launch.clouds=['aws']: no credentials for any of aws; see")

    keys = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    furnished = run(os.environ["SPOTFORGE_SKY_PYTHON"], "-c", FURNISH, catalogs / "aws", **keys)
    assert furnished.returncode == 0, furnished.stderr
    run("sky", "api", "stop")  # it keeps what it has read
    checked = run("sky", "check", "-o", "json", "aws", **keys)
    assert "compute" in checked.stdout, checked.stdout + checked.stderr
    [names] = (catalogs / "aws").glob("az_mappings-*.csv")  # which `render` reads, too
    task = tmp_path / "mine.yaml"
    assert main(["render", *words, "-o", str(task)]) == 0
    first = yaml.safe_load(task.read_text())["resources"]["ordered"][0]
    zone = first["infra"].rpartition("/")[2]
    assert zone in names.read_text()

    dry = run("sky", "launch", "--dryrun", "--yes", str(task), **keys)
    assert dry.returncode == 0, dry.stdout + dry.stderr
    [chosen] = [line for line in dry.stdout.splitlines() if "\u2714" in line]
    assert f"({zone})" in chosen and ("[Spot]" in chosen) == first["use_spot"]
