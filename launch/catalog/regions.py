"""The countries of cloud regions, for residency rules."""

from collections.abc import Sequence

from core.errors import ConfigError
from launch.catalog.gpus import nearest
from launch.catalog.offer import Offer

_EU = "at be bg cz de dk ee es fi fr gr hr hu ie it lt lu lv nl pl pt ro se si sk"
GROUPS: dict[str, frozenset[str]] = {
    "india": frozenset({"in"}),
    "eu": frozenset(_EU.split()),
    "us": frozenset({"us"}),
}

# Regions of AWS, GCP and Azure, from their public lists. No name occurs in two clouds, so that one
# table serves all three.
_REGIONS = {
    "in": "ap-south-1 ap-south-2 asia-south1 asia-south2 centralindia southindia westindia",
    "us": "us-east-1 us-east-2 us-west-1 us-west-2 us-central1 us-east1 us-east4 us-east5 "
    "us-south1 us-west1 us-west2 us-west3 us-west4 eastus eastus2 westus westus2 westus3 centralus "
    "northcentralus southcentralus westcentralus",
    "ca": "ca-central-1 ca-west-1 northamerica-northeast1 northamerica-northeast2 canadacentral "
    "canadaeast",
    "mx": "mx-central-1 northamerica-south1 mexicocentral",
    "br": "sa-east-1 southamerica-east1 brazilsouth brazilsoutheast",
    "cl": "southamerica-west1 chilecentral",
    "ie": "eu-west-1 northeurope",
    "gb": "eu-west-2 europe-west2 uksouth ukwest",
    "fr": "eu-west-3 europe-west9 francecentral francesouth",
    "de": "eu-central-1 europe-west3 europe-west10 germanywestcentral germanynorth",
    "ch": "eu-central-2 europe-west6 switzerlandnorth switzerlandwest",
    "se": "eu-north-1 europe-north2 swedencentral swedensouth",
    "it": "eu-south-1 europe-west8 europe-west12 italynorth",
    "es": "eu-south-2 europe-southwest1 spaincentral",
    "be": "europe-west1 belgiumcentral",
    "nl": "europe-west4 westeurope",
    "fi": "europe-north1 finlandcentral",
    "pl": "europe-central2 polandcentral",
    "at": "austriaeast",
    "no": "norwayeast norwaywest",
    "jp": "ap-northeast-1 ap-northeast-3 asia-northeast1 asia-northeast2 japaneast japanwest",
    "kr": "ap-northeast-2 asia-northeast3 koreacentral koreasouth",
    "hk": "ap-east-1 asia-east2 eastasia",
    "tw": "ap-east-2 asia-east1",
    "sg": "ap-southeast-1 asia-southeast1 southeastasia",
    "au": "ap-southeast-2 ap-southeast-4 australia-southeast1 australia-southeast2 australiaeast "
    "australiasoutheast australiacentral",
    "id": "ap-southeast-3 asia-southeast2 indonesiacentral",
    "my": "ap-southeast-5 malaysiawest",
    "th": "ap-southeast-7",
    "nz": "ap-southeast-6 newzealandnorth",
    "ae": "me-central-1 uaenorth uaecentral",
    "bh": "me-south-1",
    "qa": "me-central1 qatarcentral",
    "sa": "me-central2",
    "il": "il-central-1 me-west1 israelcentral",
    "za": "af-south-1 africa-south1 southafricanorth southafricawest",
}
COUNTRIES = {region: country for country, names in _REGIONS.items() for region in names.split()}


def check_regions(wanted: Sequence[str], offered: set[str]) -> None:
    """Checks that each name is a group, a known region, or a region of the catalog.

    Args:
        wanted: Value of `launch.regions`.
        offered: Regions in the catalog.

    Raises:
        ConfigError: A name is unknown; the error lists similar names.
    """
    for name in wanted:
        if name not in GROUPS and name not in COUNTRIES and name not in offered:
            fix = nearest(name, {*GROUPS, *COUNTRIES, *offered})
            raise ConfigError("launch.regions", name, "no such region or group", fix)


def residency_refusal(offer: Offer, wanted: Sequence[str]) -> str | None:
    """Returns why an offer does not satisfy `launch.regions`; None if it does.

    A place in an unknown country satisfies no group: residency is a legal promise, so that an
    assumption is not enough.

    Args:
        offer: Offer to check.
        wanted: Names of regions and groups; empty: anywhere.
    """
    if not wanted or offer.region in wanted:
        return None
    country = offer.country or COUNTRIES.get(offer.region, "")
    if any(country in GROUPS.get(name, ()) for name in wanted):
        return None
    unknown = "in an unknown country (set launch.countries)"
    where = f"in {country.upper()}" if country else unknown
    return f"{offer.place} is {where}, not in {', '.join(wanted)}"
