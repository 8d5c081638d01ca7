"""Reads the catalogs that SkyPilot downloads: `catalogs/v8/<cloud>/vms.csv`.

Format: SkyPilot 0.14, sky/catalog/common.py. A row has the price of one node in `Price` and
`SpotPrice`; an empty cell means that the node is not offered. On GCP the machine and its GPUs are
separate rows, and a node costs their sum.
"""

import csv
import math
from collections.abc import Iterator
from pathlib import Path

from core.errors import ConfigError
from launch.catalog.gpus import gpu_of
from launch.catalog.offer import Offer

_COLUMNS = {
    *("InstanceType", "AcceleratorName", "AcceleratorCount", "vCPUs", "MemoryGiB"),
    *("Price", "SpotPrice", "Region"),
}
# Clouds on which SkyPilot refuses several nodes.
SINGLE_NODE_CLOUDS = {"runpod", "vast"}

# The GCP machine types for a GPU and its count (cloud.google.com/compute/docs/gpus), the same as in
# SkyPilot (sky/catalog/gcp_catalog.py). Other GPUs are attached to an n1 machine.
_GCP_MACHINES: dict[str, dict[int, tuple[str, ...]]] = {
    "A100": {
        **{n: (f"a2-highgpu-{n}g",) for n in (1, 2, 4, 8)},
        16: ("a2-megagpu-16g",),
    },
    "A100-80GB": {n: (f"a2-ultragpu-{n}g",) for n in (1, 2, 4, 8)},
    "L4": {
        1: tuple(f"g2-standard-{cpus}" for cpus in (4, 8, 12, 16, 32)),
        2: ("g2-standard-24",),
        4: ("g2-standard-48",),
        8: ("g2-standard-96",),
    },
    "H100": {n: (f"a3-highgpu-{n}g",) for n in (1, 2, 4, 8)},
    "H100-MEGA": {8: ("a3-megagpu-8g",)},
    "H200": {8: ("a3-ultragpu-8g",)},
    "B200": {8: ("a4-highgpu-8g",)},
    "RTXPRO6000": {n: (f"g4-standard-{48 * n}",) for n in (1, 2, 4, 8)},
}
# Least vCPUs of the n1 machine by number of GPUs, for a GPU or "" for the others; each vCPU needs
# 4 GiB of memory, as on other clouds.
_GCP_VCPUS = {
    "T4": {1: 4, 2: 8, 4: 48},
    "": {1: 8, 2: 16, 4: 32, 8: 64, 16: 128},
}

_FETCH_AGAIN = "let SkyPilot fetch it again"
_Row = dict[str, str]


def read_skypilot(folder: Path) -> list[Offer]:
    """Reads the catalogs of all clouds in a folder.

    Args:
        folder: Folder that contains `<cloud>/vms.csv`.

    Returns:
        Spot and on-demand nodes with known GPUs, in the order of the files.

    Raises:
        ConfigError: There is no such file, or a file lacks a column or has an invalid number.
    """
    files = sorted(folder.glob("*/vms.csv"))
    if not files:
        rule = "has no <cloud>/vms.csv"
        raise ConfigError("launch.catalog", folder, rule, "give SkyPilot's catalogs/v8")
    return [offer for path in files for offer in _read_cloud(path)]


def _read_cloud(path: Path) -> Iterator[Offer]:
    cloud = path.parent.name
    rows = [row for row in _rows(path, _COLUMNS) if row["Region"]]
    if cloud == "aws":
        rows = _with_zone_names(path.parent, rows)
    machines = _gcp_machines(path, rows) if cloud == "gcp" else {}
    for row in rows:
        name = gpu_of(row["AcceleratorName"]) if row["AcceleratorName"] else None
        if name is None or row["AcceleratorName"].startswith("tpu"):
            continue
        for is_spot in (False, True):
            if cloud == "gcp":
                offer = _gcp_offer(path, row, name, is_spot, machines)
            else:
                usd_per_h = _number(path, row, "SpotPrice" if is_spot else "Price")
                offer = _offer(path, row, name, is_spot, row, usd_per_h)
            if offer is not None:
                yield offer


def _rows(path: Path, columns: set[str]) -> list[_Row]:
    """Reads the rows of a file; raises ConfigError if it lacks one of the columns."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            missing = sorted(columns - set(reader.fieldnames or ()))
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as e:
        rule = f"cannot be read ({e})"
        raise ConfigError("launch.catalog", path, rule, _FETCH_AGAIN) from e
    if missing:
        rule = f"has no column {', '.join(missing)}"
        raise ConfigError("launch.catalog", path, rule, _FETCH_AGAIN)
    return rows


def _with_zone_names(folder: Path, rows: list[_Row]) -> list[_Row]:
    """Replaces AWS's zone IDs (`use1-az1`) by the names that they have in the user's account.

    SkyPilot stores the account's names in a separate file. Zones that the file lacks are dropped,
    since the account cannot use them. SkyPilot writes the file once it has credentials; without it
    the IDs stay.
    """
    files = sorted(folder.glob("az_mappings-*.csv"), key=lambda path: path.stat().st_mtime)
    if not files:
        return rows
    key, name = "AvailabilityZone", "AvailabilityZoneName"
    names = {row[key]: row[name] for row in _rows(files[-1], {key, name})}
    return [row | {key: names[row[key]]} for row in rows if row.get(key) in names]


def _offer(
    path: Path, row: _Row, name: str, is_spot: bool, machine: _Row, usd_per_h: float | None
) -> Offer | None:
    count = _number(path, row, "AcceleratorCount")
    # A count below 1 is a slice of a GPU, for which the planner has no speed.
    if usd_per_h is None or count is None or count < 1:
        return None
    if count != int(count):
        rule = f"{row['Region']} {row['InstanceType']}: AcceleratorCount={count} is not an integer"
        raise ConfigError("launch.catalog", path, rule, _FETCH_AGAIN)
    return Offer(
        cloud=path.parent.name,
        region=row["Region"],
        zone=row.get("AvailabilityZone") or "",
        instance_type=machine["InstanceType"],
        gpu=name,
        gpus_per_node=int(count),
        usd_per_h=usd_per_h,
        is_spot=is_spot,
        vcpus=_number(path, machine, "vCPUs"),
        memory_gib=_number(path, machine, "MemoryGiB"),
        max_nodes=1 if path.parent.name in SINGLE_NODE_CLOUDS else None,
    )


def _gcp_machines(path: Path, rows: list[_Row]) -> dict[tuple[str, str], list[_Row]]:
    """Returns the machines without GPUs, by zone and family."""
    found: dict[tuple[str, str], list[_Row]] = {}
    for row in rows:
        if row["InstanceType"] and not row["AcceleratorName"]:
            name = row["InstanceType"]
            family = "n1" if name.startswith("n1-") else name
            found.setdefault((row.get("AvailabilityZone") or "", family), []).append(row)
    return found


def _gcp_offer(
    path: Path,
    row: _Row,
    name: str,
    is_spot: bool,
    machines: dict[tuple[str, str], list[_Row]],
) -> Offer | None:
    """Returns the offer of GPUs with the cheapest machine for them in their zone, if any."""
    zone, column = row.get("AvailabilityZone") or "", "SpotPrice" if is_spot else "Price"
    count = int(_number(path, row, "AcceleratorCount") or 0)
    accelerator = row["AcceleratorName"]
    if accelerator in _GCP_MACHINES:
        types = _GCP_MACHINES[accelerator].get(count, ())
        hosts = [host for kind in types for host in machines.get((zone, kind), ())]
    else:
        vcpus = _GCP_VCPUS.get(accelerator, _GCP_VCPUS[""]).get(count, math.inf)
        hosts = [
            host
            for host in machines.get((zone, "n1"), ())
            if (_number(path, host, "vCPUs") or 0) >= vcpus
            and (_number(path, host, "MemoryGiB") or 0) >= 4 * vcpus
        ]
    priced = [(usd, host) for host in hosts if (usd := _number(path, host, column)) is not None]
    gpus_usd = _number(path, row, column)
    if not priced or gpus_usd is None:
        return None
    # The name breaks ties, so that the plan does not depend on the order of the rows.
    usd, host = min(priced, key=lambda item: (item[0], item[1]["InstanceType"]))
    return _offer(path, row, name, is_spot, host, usd + gpus_usd)


def _number(path: Path, row: _Row, column: str) -> float | None:
    """Returns the number in a cell; None for an empty cell or NaN."""
    text = row[column]
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if math.isnan(value):
        return None
    if not 0 <= value < math.inf:
        where = f"{row['Region']} {row['InstanceType'] or row['AcceleratorName']}"
        rule = f"{where}: {column}={text} is not a number of at least 0"
        raise ConfigError("launch.catalog", path, rule, _FETCH_AGAIN)
    return value
