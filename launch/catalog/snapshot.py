"""A price list of ours: a JSON file, dated, with a digest of its offers.

    {"date": "2026-05-24", "source": "...", "digest": "sha256:...", "offers": [{...}, ...]}

An offer has the fields of `Offer`; those with a default may be left out. A file written by hand
needs no digest.
"""

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from core.errors import ConfigError, DamagedError
from core.folder import read_json, write_file
from launch.catalog.countries import country_of
from launch.catalog.gpus import known_gpu
from launch.catalog.offer import Offer
from monitoring.units import printable

_FIELDS = {field.name: field for field in fields(Offer)}
_NEEDED = {name for name, field in _FIELDS.items() if field.default is MISSING}
_TEXT = {"cloud", "region", "zone", "instance_type", "gpu", "pool", "country"}


@dataclass(frozen=True)
class Snapshot:
    """Prices of one day.

    Attributes:
        date: When they were collected.
        source: Who collected them, and from where.
        digest: `sha256:` of the offers.
        offers: Of nodes.
    """

    date: datetime.date
    source: str
    digest: str
    offers: tuple[Offer, ...]


def digest_of(offers: Sequence[Offer]) -> str:
    """`sha256:...` of offers, in their order."""
    text = json.dumps([asdict(offer) for offer in offers], sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def read_snapshot(path: Path) -> Snapshot:
    """Reads a file.

    Args:
        path: JSON.

    Raises:
        ConfigError: It is not there, lacks a field, or has one that cannot be.
        DamagedError: Its offers are not those of its digest.
    """
    content = read_json("launch.catalog", path, "give a snapshot")
    if not isinstance(content, dict) or not {"date", "offers"} <= set(content):
        rule = "is no snapshot: it needs date and offers"
        raise ConfigError("launch.catalog", path, rule, "see docs/launch.md")
    try:
        date = datetime.date.fromisoformat(content["date"])
    except (TypeError, ValueError) as e:
        rule = f"date={content['date']!r} is no date"
        raise ConfigError("launch.catalog", path, rule, "write 2026-05-24") from e
    rows = content["offers"]
    if not isinstance(rows, list):
        raise ConfigError("launch.catalog", path, "offers is no list", "see docs/launch.md")
    offers = tuple(_offer(path, number, row) for number, row in enumerate(rows))
    digest = digest_of(offers)
    if content.get("digest", digest) != digest:
        rule = f"its offers have the digest {digest[:19]}, not {str(content['digest'])[:19]}"
        raise DamagedError("launch.catalog", path, rule, "take it from where it came once more")
    return Snapshot(date, printable(str(content.get("source", path.name))), digest, offers)


def write_snapshot(path: Path, date: datetime.date, source: str, offers: Sequence[Offer]) -> None:
    """Writes a file; what `Offer` has by default is left out.

    Args:
        path: Where; its folder must be there.
        date: When they were collected.
        source: Who collected them, and from where.
        offers: Of nodes.
    """
    rows = [
        {
            name: value
            for name, value in asdict(offer).items()
            if name in _NEEDED or value != _FIELDS[name].default
        }
        for offer in offers
    ]
    head = {"date": date.isoformat(), "source": source, "digest": digest_of(offers)}
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "offers": [\n{lines}\n ]\n}}\n'
    write_file(path, text)


def _offer(path: Path, number: int, row: Any) -> Offer:
    def refuse(rule: str) -> ConfigError:
        return ConfigError("launch.catalog", path, f"offer {number}: {rule}", "correct the file")

    if not isinstance(row, dict):
        raise refuse("is no object")
    missing, unknown = sorted(_NEEDED - set(row)), sorted(set(row) - set(_FIELDS))
    if missing or unknown:
        raise refuse(f"lacks {', '.join(missing)}" if missing else f"has {', '.join(unknown)}")
    for name, value in row.items():
        if name in _TEXT and not isinstance(value, str):
            raise refuse(f"{name}={value!r} is no text")
        if name == "is_spot" and not isinstance(value, bool):
            raise refuse(f"is_spot={value!r} is neither true nor false")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if name not in _TEXT | {"is_spot"} and value is not None and not is_number:
            raise refuse(f"{name}={value!r} is no number")
    if row["usd_per_h"] is None:
        raise refuse("usd_per_h=null is no price")
    if not isinstance(row["gpus_per_node"], int):
        raise refuse(f"gpus_per_node={row['gpus_per_node']} is no whole number")
    try:
        country = country_of("country", row.get("country", ""))
        return Offer(**(row | {"gpu": known_gpu(row["gpu"], "gpu"), "country": country}))
    except ConfigError as e:
        raise refuse(str(e)) from e
