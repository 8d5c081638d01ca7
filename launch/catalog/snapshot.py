"""The format of a stored price list: a JSON file with a date and a digest of its offers.

    {"date": "2026-05-24", "source": "...", "digest": "sha256:...", "offers": [{...}, ...]}

An offer is a row of `Offer.as_row`; fields with a default may be left out. A file written by hand
needs no digest.
"""

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from core.errors import ConfigError, DamagedError
from core.folder import read_json, write_file
from launch.catalog.countries import country_of
from launch.catalog.gpus import known_gpu
from launch.catalog.offer import Offer
from monitoring.units import printable

_FIELDS = {field.name: field for field in fields(Offer) if field.name != "pool_kind"}
_NEEDED = {name for name, field in _FIELDS.items() if field.default is MISSING}
_TEXT = {"cloud", "region", "zone", "instance_type", "gpu", "pool", "country"}


@dataclass(frozen=True)
class Snapshot:
    """The prices of one day.

    Attributes:
        date: Date on which the prices were collected.
        source: Collector and origin of the prices.
        digest: Digest of the offers: `sha256:...`.
        offers: Offers of nodes.
    """

    date: datetime.date
    source: str
    digest: str
    offers: tuple[Offer, ...]


def digest_of(offers: Sequence[Offer]) -> str:
    """Returns the SHA-256 of offers in their order: `sha256:...`."""
    text = json.dumps([offer.as_row() for offer in offers], sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def read_snapshot(path: Path) -> Snapshot:
    """Reads a snapshot.

    Args:
        path: JSON file.

    Raises:
        ConfigError: The file does not exist, lacks a field, or has an unknown or invalid one.
        DamagedError: The offers do not match the digest.
    """
    content = read_json("launch.catalog", path, "give a snapshot")
    if not isinstance(content, dict) or not {"date", "offers"} <= set(content):
        rule = "is not a snapshot: the fields `date` and `offers` are required"
        raise ConfigError("launch.catalog", path, rule, "see docs/launch.md")
    try:
        date = datetime.date.fromisoformat(content["date"])
    except (TypeError, ValueError) as e:
        rule = f"date={content['date']!r} is not a date"
        raise ConfigError("launch.catalog", path, rule, "write 2026-05-24") from e
    rows = content["offers"]
    if not isinstance(rows, list):
        raise ConfigError("launch.catalog", path, "offers is not a list", "see docs/launch.md")
    offers = tuple(_offer(path, number, row) for number, row in enumerate(rows))
    digest = digest_of(offers)
    if content.get("digest", digest) != digest:
        rule = f"its offers have the digest {digest[:19]}, not {str(content['digest'])[:19]}"
        raise DamagedError("launch.catalog", path, rule, "copy it from its origin again")
    return Snapshot(date, printable(str(content.get("source", path.name))), digest, offers)


def write_snapshot(path: Path, date: datetime.date, source: str, offers: Sequence[Offer]) -> None:
    """Writes a snapshot; leaves out fields that have their default.

    Args:
        path: File to write; its folder must exist.
        date: Date on which the prices were collected.
        source: Collector and origin of the prices.
        offers: Offers of nodes.
    """
    rows = [
        {
            name: value
            for name, value in offer.as_row().items()
            if name in _NEEDED or value != _FIELDS[name].default
        }
        for offer in offers
    ]
    head = {"date": date.isoformat(), "source": source, "digest": digest_of(offers)}
    lines = ",\n".join(json.dumps(row) for row in rows)
    # One offer a line, so that a diff of two snapshots shows the prices that changed.
    text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "offers": [\n{lines}\n ]\n}}\n'
    write_file(path, text)


def _offer(path: Path, number: int, row: Any) -> Offer:
    def refuse(rule: str) -> ConfigError:
        return ConfigError("launch.catalog", path, f"offer {number}: {rule}", "correct the file")

    if not isinstance(row, dict):
        raise refuse("is not an object")
    missing, unknown = sorted(_NEEDED - set(row)), sorted(set(row) - set(_FIELDS))
    if missing or unknown:
        raise refuse(
            f"lacks the field {', '.join(missing)}"
            if missing
            else f"has the unknown field {', '.join(unknown)}"
        )
    for name, value in row.items():
        if name in _TEXT and not isinstance(value, str):
            raise refuse(f"{name}={value!r} is not a string")
        if name == "is_spot" and not isinstance(value, bool):
            raise refuse(f"is_spot={value!r} must be true or false")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)  # bool is an int
        if name not in _TEXT | {"is_spot"} and value is not None and not is_number:
            raise refuse(f"{name}={value!r} is not a number")
    if row["usd_per_h"] is None:
        raise refuse("usd_per_h=null is not a price")
    if not isinstance(row["gpus_per_node"], int):
        raise refuse(f"gpus_per_node={row['gpus_per_node']} is not an integer")
    try:
        row["gpu"] = known_gpu(row["gpu"], "gpu")
        row["country"] = country_of("country", row.get("country", ""))
        if row.get("pool"):
            row |= {"cloud": "", "pool_kind": row["cloud"]}
        return Offer(**row)
    except ConfigError as e:
        raise refuse(str(e)) from e
