"""The command line of `python -m launch catalog show` and `catalog update`."""

import argparse
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import ConfigError, ExitCode
from launch.words import add_words, settings_of

_UPDATE = """\
Copies the catalogs that SkyPilot has downloaded (to $SKY_RUNTIME_DIR/.sky/catalogs/v8 or
~/.sky/catalogs/v8) to a snapshot, which `plan` then uses. They are as old as SkyPilot's files: let
SkyPilot download them again first, e.g. with `sky show-gpus`."""


def add_verbs(commands: Any) -> None:
    """Adds `catalog` to the parsers of `python -m launch`.

    Args:
        commands: Object that `add_subparsers` returned.
    """
    catalog = commands.add_parser("catalog", help="show the prices, or update them")
    verbs = catalog.add_subparsers(dest="action", metavar="show | update", required=True)
    show = verbs.add_parser("show", help="show which prices `plan` uses")
    show.set_defaults(run=_show)
    add_words(show, "e.g. launch.catalog=F")
    update = verbs.add_parser("update", help="copy SkyPilot's prices", description=_UPDATE)
    update.set_defaults(run=_update)
    update.add_argument(
        "--from",
        dest="folder",
        metavar="DIR",
        type=Path,
        help="a folder with <cloud>/vms.csv (default: SkyPilot's)",
    )


def _show(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from dataclasses import replace

    from launch.catalog.catalog import load_catalog, today

    launch = settings_of(options, rest).launch
    catalog = load_catalog(replace(launch, max_price_age="36500d"), today())  # prices of any age
    print(f"{catalog.date}, {catalog.age_days} days old: {catalog.source}, {catalog.digest}")
    counts = Counter(offer.pool or offer.cloud for offer in catalog.offers)
    for cloud, count in sorted(counts.items()):
        spot = sum(o.is_spot for o in catalog.offers if (o.pool or o.cloud) == cloud)
        print(f"  {cloud:<18}{count:>6} offers, {spot} of them spot")
    return ExitCode.FINISHED


def _update(options: argparse.Namespace, rest: Sequence[str]) -> int:
    from launch.catalog.catalog import read_skypilot_folder, stored_dir
    from launch.catalog.snapshot import write_snapshot

    folder = options.folder or _skypilots()
    snapshot = read_skypilot_folder(folder)
    if not snapshot.offers:
        rule = "has no offer with a known GPU and a price"
        raise ConfigError("--from", folder, rule, "let SkyPilot fetch it again")
    path = stored_dir() / f"snapshot-{snapshot.date}.json"
    try:
        stored_dir().mkdir(parents=True, exist_ok=True)
        write_snapshot(path, snapshot.date, snapshot.source, snapshot.offers)
    except OSError as e:
        rule = f"cannot be written: {e.strerror or e}"
        raise ConfigError("SPOTFORGE_CACHE", path, rule, "set it to another folder") from e
    clouds = len({offer.cloud for offer in snapshot.offers})
    print(f"{len(snapshot.offers)} offers of {clouds} clouds, of {snapshot.date}: {path}")
    return ExitCode.FINISHED


def _skypilots() -> Path:
    folders = [Path(os.environ.get("SKY_RUNTIME_DIR", "~")), Path("~")]
    found = [folder.expanduser() / ".sky/catalogs/v8" for folder in folders]
    for folder in found:
        if folder.is_dir():
            return folder
    fix = "run `sky show-gpus` once, or give --from DIR"
    raise ConfigError("--from", found[-1], "has no catalogs of SkyPilot", fix)
