"""The cost of moving data from one place to another.

List prices of 2025, from the clouds' public pages. A cloud that is not listed here charges nothing
for outgoing data, as is true of Lambda, RunPod and most GPU clouds. Incoming data is free
everywhere.
"""

import math
from collections.abc import Iterable

from core.errors import ConfigError
from launch.catalog.gpus import nearest
from launch.catalog.offer import Offer
from launch.catalog.regions import COUNTRIES

# (upper limit in GB of a month's total, dollars a GB). Each rate applies only to the part above the
# limit of the tier before, so that more data never costs less.
_Tiers = tuple[tuple[float, float], ...]
_INTERNET: dict[str, _Tiers] = {
    # aws.amazon.com/ec2/pricing/on-demand, "Data transfer out to internet"
    "aws": ((100, 0.0), (10_240, 0.09), (51_200, 0.085), (153_600, 0.07), (math.inf, 0.05)),
    # cloud.google.com/vpc/network-pricing, premium tier, to worldwide destinations
    "gcp": ((1024, 0.12), (10_240, 0.11), (math.inf, 0.08)),
    # azure.microsoft.com/pricing/details/bandwidth, from North America and Europe
    "azure": ((100, 0.0), (10_340, 0.087), (51_300, 0.083), (153_700, 0.07), (math.inf, 0.05)),
}
# Tiers of countries with a higher price, by cloud and country.
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
# Dollars a GB between two regions of one cloud: (by country of the source, for other countries).
_BETWEEN_REGIONS: dict[str, tuple[dict[str, float], float]] = {
    "aws": ({"us": 0.02, "in": 0.086, "br": 0.138, "za": 0.147, "sg": 0.09, "jp": 0.09}, 0.02),
    "gcp": ({"us": 0.02, "in": 0.08, "br": 0.08, "au": 0.10, "sg": 0.08, "jp": 0.08}, 0.02),
    "azure": ({"in": 0.08, "br": 0.16, "za": 0.16, "sg": 0.08, "jp": 0.08, "au": 0.08}, 0.02),
}


def check_place(key: str, place: str, offers: Iterable[Offer]) -> None:
    """Checks that the egress of a place is known.

    Args:
        key: Key of the setting, for the error.
        place: Place as `cloud/region`.
        offers: Offers of the catalog.

    Raises:
        ConfigError: Neither the catalog nor the lists above have the place; names similar ones.
    """
    cloud, _, region = place.partition("/")
    regions: dict[str, set[str]] = {name: set(COUNTRIES) for name in _INTERNET}
    for offer in offers:
        regions.setdefault(offer.cloud, set()).add(offer.region)
    if cloud not in regions:
        raise ConfigError(key, place, "no such cloud", nearest(cloud, regions))
    if region not in regions[cloud]:
        named = regions[cloud] - {""}
        fix = nearest(region, named) if named else f"its offers have no regions: write {cloud}"
        raise ConfigError(key, place, f"no such region of {cloud}", fix)


def egress_usd(source: str, destination: str, gb: float) -> float:
    """Returns the dollars for moving data once.

    Args:
        source: Place of the data, as `cloud/region`.
        destination: Place to which it is moved, as `cloud/region`.
        gb: Decimal gigabytes, at least 0.
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
