"""Offers for tests."""

from launch.catalog.offer import Offer


def offer(**fields):
    """Eight H100 of AWS for $20 an hour, but for what is given."""
    given = {
        "cloud": "aws",
        "region": "us-east-1",
        "zone": "",
        "instance_type": "p5.48xlarge",
        "gpu": "H100",
        "gpus_per_node": 8,
        "usd_per_h": 20.0,
        "is_spot": False,
    }
    return Offer(**(given | fields))
