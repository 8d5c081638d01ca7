"""Reads the catalogs that SkyPilot downloads: `catalogs/v8/<cloud>/vms.csv`.

Format: SkyPilot 0.14, sky/catalog/common.py. A row has the price of one node in `Price` and
`SpotPrice`; an empty one is not offered. On GCP the machine and its GPUs are rows of their own, and
a node costs the sum.
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
# One machine only: SkyPilot refuses several nodes there.
_SINGLE_NODE = {"runpod", "vast"}

# Which GCP machine carries which GPUs (cloud.google.com/compute/docs/gpus); SkyPilot knows the same
# (sky/catalog/gcp_catalog.py). Others hang on an n1 machine.
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
# Least vCPUs of the n1 machine for so many GPUs; memory is 4 GiB each, as on other clouds.
_GCP_VCPUS = {
    "T4": {1: 4, 2: 8, 4: 48},
    "": {1: 8, 2: 16, 4: 32, 8: 64, 16: 128},
}

_FETCH_AGAIN = "let SkyPilot fetch it again"
_Row = dict[str, str]


def read_skypilot(folder: Path) -> list[Offer]:
    """Reads every cloud's catalog in a folder.

    Args:
        folder: That has `<cloud>/vms.csv`.

    Returns:
        Nodes with GPUs that are known, spot and on-demand, in the files' order.

    Raises:
        ConfigError: There is no such file, or one lacks a column or has a bad number.
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
    """The rows of a file that has these columns."""
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
    """AWS lists zones by an ID (`use1-az1`), and each account has names of its own for them.

    SkyPilot keeps the account's names beside its list, and so leaves out what the account cannot
    use; it has none before it has seen credentials, and then the IDs stay.
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
    if usd_per_h is None or count is None or count < 1:  # GPUs by the slice are none
        return None
    if count != int(count):
        rule = f"{row['Region']} {row['InstanceType']}: AcceleratorCount={count} is not whole"
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
        max_nodes=1 if path.parent.name in _SINGLE_NODE else None,
    )


def _gcp_machines(path: Path, rows: list[_Row]) -> dict[tuple[str, str], list[_Row]]:
    """Machines without GPUs, by zone and family."""
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
    """GPUs with the cheapest machine that can carry them in their zone."""
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
    usd, host = min(priced, key=lambda item: (item[0], item[1]["InstanceType"]))
    return _offer(path, row, name, is_spot, host, usd + gpus_usd)


def _number(path: Path, row: _Row, column: str) -> float | None:
    """A cell; None where it is empty."""
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
        rule = f"{where}: {column}={text} is not a number from 0"
        raise ConfigError("launch.catalog", path, rule, _FETCH_AGAIN)
    return value
