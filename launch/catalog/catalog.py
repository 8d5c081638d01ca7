"""The prices for a plan: read, checked for age, and adapted to the user's settings."""

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

from core.errors import ConfigError
from launch.catalog.countries import country_of
from launch.catalog.egress import check_place
from launch.catalog.gpus import GPUS, known_gpu, nearest
from launch.catalog.offer import Offer
from launch.catalog.regions import COUNTRIES, check_regions
from launch.catalog.skypilot import read_skypilot
from launch.catalog.snapshot import Snapshot, digest_of, read_snapshot
from launch.config import LaunchConfig, PoolConfig, PoolKind, hours

_SHIPPED = Path(__file__).parent


@dataclass(frozen=True)
class Catalog:
    """The offers that are available to this user.

    Attributes:
        source: Origin of the price list.
        date: Date on which the prices were collected.
        age_days: Age of the prices on the day of the plan.
        digest: Digest of the list, before discounts and pools.
        offers: Offers after discounts, with the user's own pools at the end.
    """

    source: str
    date: datetime.date
    age_days: int
    digest: str
    offers: tuple[Offer, ...]


def stored_dir() -> Path:
    """Returns the folder in which `catalog update` stores its snapshots."""
    cache = os.environ.get("SPOTFORGE_CACHE", "~/.cache/spotforge")
    return Path(cache).expanduser() / "catalogs"


def today() -> datetime.date:
    """Returns the current date in UTC."""
    return datetime.datetime.now(datetime.UTC).date()


def load_catalog(launch: LaunchConfig, date: datetime.date) -> Catalog:
    """Reads the prices that `launch.catalog` names, or else the newest stored ones.

    Args:
        launch: Settings of the user.
        date: Date from which the age of the prices is counted.

    Raises:
        ConfigError: The prices cannot be read or are too old, or `launch` has an unknown name.
    """
    snapshot = _read(launch.catalog)
    age_days = (date - snapshot.date).days
    most_days = hours("launch.max_price_age", launch.max_price_age) / 24
    if age_days > most_days:
        raise ConfigError(
            "launch.max_price_age",
            launch.max_price_age,
            f"the prices are of {snapshot.date}, {age_days} days old ({snapshot.source})",
            "run `python -m launch catalog update` where SkyPilot is installed, or set "
            f"launch.max_price_age={age_days}d to use them anyway",
        )
    if age_days < 0:
        rule = f"its prices are of {snapshot.date}, and today is {date}"
        fix = "correct its date, or --today"
        raise ConfigError("launch.catalog", launch.catalog or snapshot.source, rule, fix)
    _check_names(launch, [offer for offer in snapshot.offers if not offer.pool])
    rented = (_as_the_users(launch, offer) for offer in snapshot.offers)
    offers = (*rented, *_owned(launch))
    return Catalog(snapshot.source, snapshot.date, age_days, snapshot.digest, offers)


def owned_catalog(launch: LaunchConfig, kind: PoolKind, date: datetime.date) -> Catalog:
    """Returns a catalog of the user's own pools of one kind, whose prices do not age.

    Args:
        launch: Settings of the user.
        kind: Kind of the pools.
        date: Date of the plan.

    Raises:
        ConfigError: There is no pool of that kind, or a pool has an invalid setting.
    """
    offers = tuple(offer for offer in _owned(launch) if offer.pool_kind == kind.value)
    if not offers:
        example = f"{{hpc:{{kind:{kind.value},gpu:A100-80GB,gpus_per_node:8,nodes:2}}}}"
        rule = "launch.pools has no pool of that kind"
        raise ConfigError("launch.target", kind.value, rule, f"set launch.pools={example}")
    return Catalog("launch.pools", date, 0, digest_of(offers), offers)


def _owned(launch: LaunchConfig) -> tuple[Offer, ...]:
    return tuple(_pool(name, pool) for name, pool in sorted(launch.pools.items()))


def _read(catalog: str | None) -> Snapshot:
    if catalog is None:
        paths = [*_SHIPPED.glob("snapshot-*.json"), *stored_dir().glob("snapshot-*.json")]
        # Names end with the date, so the greatest name is the newest. The path breaks a tie, so
        # that the choice does not depend on the order in which files are listed.
        return read_snapshot(max(paths, key=lambda path: (path.name, str(path))))
    path = Path(catalog).expanduser()
    return read_skypilot_folder(path) if path.is_dir() else read_snapshot(path)


def read_skypilot_folder(folder: Path) -> Snapshot:
    """Reads SkyPilot's catalogs as one snapshot, with the date of the oldest file.

    Args:
        folder: Folder that contains `<cloud>/vms.csv`.

    Raises:
        ConfigError: See `read_skypilot`.
    """
    offers = tuple(read_skypilot(folder))
    seconds = min(path.stat().st_mtime for path in folder.glob("*/vms.csv"))
    date = datetime.datetime.fromtimestamp(seconds, datetime.UTC).date()
    return Snapshot(date, f"SkyPilot catalogs {folder}", digest_of(offers), offers)


def _check_names(launch: LaunchConfig, offers: Sequence[Offer]) -> None:
    """Raises ConfigError for a name that no rented offer has, which would have no effect."""
    clouds, regions = {offer.cloud for offer in offers}, {offer.region for offer in offers}
    named = {"launch.clouds": launch.clouds, "launch.countries": launch.countries}
    named["launch.discounts"] = [key.partition("/")[0] for key in launch.discounts]
    for key, names in named.items():
        for name in names:
            if name not in clouds:
                raise ConfigError(key, name, "no such cloud in the catalog", nearest(name, clouds))
    for key in launch.discounts:
        kind = key.partition("/")[2]
        if kind not in ("", "spot", "on-demand"):
            raise ConfigError("launch.discounts", key, f"unknown kind {kind}", "use aws/spot")
    for name in launch.gpus:
        known_gpu(name)
    check_regions(launch.regions, regions - {""})
    for key in ("data_region", "checkpoint_region", "result_region"):
        if (place := getattr(launch, key)) is not None:
            check_place(f"launch.{key}", place, offers)
    names_of = {"cloud": clouds, "region": regions | set(COUNTRIES)}
    for key in launch.preemption_hours:
        for name, (what, known) in zip(key.split("/"), names_of.items(), strict=False):
            if name not in known:
                fix = nearest(name, known)
                raise ConfigError("launch.preemption_hours", key, f"no such {what}", fix)
    names_of |= {"GPU": set(GPUS), "kind": {"spot", "on-demand"}}
    for key in launch.quotas:
        for pattern, (what, known) in zip(key.split("/"), names_of.items(), strict=False):
            if not any(fnmatchcase(name, pattern) for name in known):
                fix = nearest(pattern, known)
                raise ConfigError("launch.quotas", key, f"no such {what}", fix)


def _as_the_users(launch: LaunchConfig, offer: Offer) -> Offer:
    kind = "spot" if offer.is_spot else "on-demand"
    share = launch.discounts.get(f"{offer.cloud}/{kind}", launch.discounts.get(offer.cloud, 0.0))
    country = launch.countries.get(offer.cloud, offer.country)
    country = country_of(f"launch.countries.{offer.cloud}", country)
    if not share and country == offer.country:
        return offer
    return replace(offer, usd_per_h=offer.usd_per_h * (1 - share), country=country)


def _pool(name: str, pool: PoolConfig) -> Offer:
    return Offer(
        cloud="",
        region="",
        zone="",
        instance_type="",
        gpu=known_gpu(pool.gpu, f"launch.pools.{name}.gpu"),
        gpus_per_node=pool.gpus_per_node,
        usd_per_h=pool.usd_per_h,
        is_spot=False,
        pool=name,
        pool_kind=pool.kind.value,
        max_nodes=pool.nodes,
        country=country_of(f"launch.pools.{name}.country", pool.country),
    )


def quota_of(launch: LaunchConfig, offer: Offer) -> int | None:
    """Returns the most GPUs of an offer's kind that the user may have; None without a quota.

    Args:
        launch: Settings with `quotas`, by `cloud/region/gpu/spot|on-demand`. `*` matches any text,
            and parts that are left off at the end match anything. The smallest match counts.
        offer: Offer to look up.
    """
    if not launch.quotas or offer.pool:
        return None
    kind = "spot" if offer.is_spot else "on-demand"
    # As a tuple, since the cache needs hashable arguments: a catalog repeats few such names.
    return _quota(tuple(launch.quotas.items()), f"{offer.cloud}/{offer.region}/{offer.gpu}/{kind}")


@cache
def _quota(quotas: tuple[tuple[str, int], ...], name: str) -> int | None:
    fitting = (
        most
        for pattern, most in quotas
        if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*")
    )
    return min(fitting, default=None)
