"""Fixtures of tests on machines of their own; `make test-hosts` runs them."""

import os
import sys
from pathlib import Path

import pytest

from tests.hosts.bed import Bed, missing

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bed(tmp_path):
    """Makes hosts with the given names."""
    if why := missing():
        pytest.skip(why)
    beds = []

    def make(*names, **settings):
        bed = Bed(tmp_path, *names, **settings)
        beds.append(bed)
        return bed

    yield make
    for bed in beds:
        bed.close()


@pytest.fixture
def environment():
    return environment_of_hosts()


def environment_of_hosts():
    """Environment of programs on hosts: nothing tells them which interface to use."""
    given = {k: v for k, v in os.environ.items() if not k.endswith("_SOCKET_IFNAME")}
    return {**given, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
