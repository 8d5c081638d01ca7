"""What it costs to move data, by where it comes from and where it goes.

List prices as of 2025, of the clouds' public pages. A cloud that is not here charges nothing for
what leaves it, as Lambda, RunPod and most GPU clouds do. What arrives is free everywhere.
"""

import math
from collections.abc import Iterable

from core.errors import ConfigError
from launch.catalog.gpus import nearest
from launch.catalog.offer import Offer
from launch.catalog.regions import COUNTRIES

# Dollars a GB by how much of a month's total it is: each rate holds for what lies above the tier
# before, so that more data never costs less. (GB up to, $ a GB).
_Tiers = tuple[tuple[float, float], ...]
_INTERNET: dict[str, _Tiers] = {
    # aws.amazon.com/ec2/pricing/on-demand, "Data transfer out to internet"
    "aws": ((100, 0.0), (10_240, 0.09), (51_200, 0.085), (153_600, 0.07), (math.inf, 0.05)),
    # cloud.google.com/vpc/network-pricing, premium tier, to worldwide destinations
    "gcp": ((1024, 0.12), (10_240, 0.11), (math.inf, 0.08)),
    # azure.microsoft.com/pricing/details/bandwidth, from North America and Europe
    "azure": ((100, 0.0), (10_340, 0.087), (51_300, 0.083), (153_700, 0.07), (math.inf, 0.05)),
}
# The same from regions that cost more.
_INTERNET_FROM: dict[tuple[str, str], _Tiers] = {
    ("aws", "in"): (
        (100, 0.0),
        (10_240, 0.1093),
        (51_200, 0.085),
        (153_600, 0.082),
        (math.inf, 0.08),
    ),
    ("azure", "in"): (
        (100, 0.0),
        (10_340, 0.12),
        (51_300, 0.085),
        (153_700, 0.082),
        (math.inf, 0.08),
    ),
}
# Between two regions of one cloud: (from a country, elsewhere).
_BETWEEN_REGIONS: dict[str, tuple[dict[str, float], float]] = {
    "aws": ({"us": 0.02, "in": 0.086, "br": 0.138, "za": 0.147, "sg": 0.09, "jp": 0.09}, 0.02),
    "gcp": ({"us": 0.02, "in": 0.08, "br": 0.08, "au": 0.10, "sg": 0.08, "jp": 0.08}, 0.02),
    "azure": ({"in": 0.08, "br": 0.16, "za": 0.16, "sg": 0.08, "jp": 0.08, "au": 0.08}, 0.02),
}


def check_place(key: str, place: str, offers: Iterable[Offer]) -> None:
    """Refuses a place whose egress cannot be known.

    Args:
        key: Of the setting, for the error.
        place: `cloud/region`.
        offers: Of the catalog.

    Raises:
        ConfigError: Neither the catalog nor the lists above have it; says which names come near.
    """
    cloud, _, region = place.partition("/")
    regions: dict[str, set[str]] = {name: set(COUNTRIES) for name in _INTERNET}
    for offer in offers:
        regions.setdefault(offer.cloud, set()).add(offer.region)
    if cloud not in regions:
        raise ConfigError(key, place, "no such cloud", nearest(cloud, regions))
    if region not in regions[cloud]:
        named = regions[cloud] - {""}
        fix = nearest(region, named) if named else f"its list names none: write {cloud}"
        raise ConfigError(key, place, f"no such region of {cloud}", fix)


def egress_usd(source: str, destination: str, gb: float) -> float:
    """Dollars for moving data once.

    Args:
        source: `cloud/region` where it is.
        destination: `cloud/region` where it goes.
        gb: Decimal gigabytes, from 0.
    """
    cloud, _, region = source.partition("/")
    to_cloud, _, to_region = destination.partition("/")
    if cloud == to_cloud and region == to_region:
        return 0.0
    country = COUNTRIES.get(region, "")
    if cloud == to_cloud and cloud in _BETWEEN_REGIONS:
        rates, elsewhere = _BETWEEN_REGIONS[cloud]
        return gb * rates.get(country, elsewhere)
    tiers = _INTERNET_FROM.get((cloud, country), _INTERNET.get(cloud, ()))
    usd = below = 0.0
    for up_to, rate in tiers:
        usd += max(0.0, min(gb, up_to) - below) * rate
        below = up_to
    return usd
