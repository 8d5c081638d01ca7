"""Ranks on machines of their own find each other, or say who cannot reach whom."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.launch.elastic.conftest import wait_until

pytestmark = pytest.mark.hosts

HERE = Path(__file__).parent
MEET = [str(HERE / "meet.py")]


@pytest.fixture
def start_ranks(environment, tmp_path):
    """Starts ranks as torchrun does, one on each host; returns the processes and their logs."""

    def start(hosts, *words, masters=None):
        started = []
        for rank, host in enumerate(hosts):
            place = {"RANK": rank, "WORLD_SIZE": len(hosts), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
            place["MASTER_ADDR"] = (masters or {}).get(host, hosts[0].address)
            place["MASTER_PORT"] = 29500
            env = {**environment, **{name: str(value) for name, value in place.items()}}
            log = tmp_path / f"rank-{rank}"
            with log.open("w") as output:
                started.append((host.start(sys.executable, *words, output=output, env=env), log))
        return started

    return start


@pytest.fixture
def meet(start_ranks):
    return lambda hosts, seconds=0, **more: start_ranks(hosts, *MEET, str(seconds), **more)


def ends(started):
    """The exit code of each, and what it printed."""
    return [(process.wait(400), log.read_text()) for process, log in started]


def test_machines_whose_names_are_loopback_find_each_other(bed, meet):
    hosts = bed("a", "b", "c").hosts
    for code, printed in ends(meet(hosts)):
        assert code == 0 and "met eth0 eth0 eth0" in printed, printed


def test_machines_with_addresses_of_ipv6_only(bed, meet):
    hosts = bed("a", "b", is_ipv6=True).hosts
    for code, printed in ends(meet(hosts)):
        assert code == 0 and "met eth0 eth0" in printed, printed


def test_a_master_that_is_known_by_its_name(bed, meet):
    """On the master's own machine the name is 127.0.1.1."""
    a, b = bed("a", "b").hosts
    for code, printed in ends(meet([a, b], masters={a: "a"})):
        assert code == 0 and "met eth0 eth0" in printed, printed


def test_who_cannot_reach_whom_is_said_at_once(bed, meet):
    """The master is reached by both, and they do not reach each other."""
    made = bed("master", "a", "b")
    master, a, b = made.hosts
    made.part(a, b)
    started = time.monotonic()
    results = ends(meet([master, a, b]))
    took_s = time.monotonic() - started
    assert [code for code, _ in results] == [1, 1, 1]
    for _, printed in results:
        (said,) = [line for line in printed.splitlines() if "cannot reach" in line]
        assert a.address in said and b.address in said and master.address not in said
    # gloo alone waits for half an hour.
    assert took_s < 90


def test_ranks_that_never_met_end_when_told(bed, meet):
    a, b = bed("a", "b").hosts
    (first, log), (second, _) = meet([a, b], seconds=600)
    second.kill()
    wait_until(lambda: "ready" in log.read_text(), log.read_text)
    time.sleep(2)  # it waits for the other one, in C++
    first.send_signal(signal.SIGTERM)
    assert first.wait(120) == 33, log.read_text()  # and not after half an hour, as gloo would


def test_bfloat16_halves_what_a_slow_link_carries(bed, start_ranks):
    hosts = bed("a", "b").hosts
    for host in hosts:
        host.slow("20mbit")
    trained = {}
    for dtype in ("float32", "bfloat16"):
        results = ends(start_ranks(hosts, str(HERE / "train.py"), dtype))
        assert [code for code, _ in results] == [0, 0], results
        trained[dtype] = json.loads(results[0][1].splitlines()[-1])
    for loss, expected in zip(
        trained["bfloat16"]["losses"], trained["float32"]["losses"], strict=True
    ):
        assert loss == pytest.approx(expected, rel=1e-2)
    ratio = trained["bfloat16"]["num_bytes"] / trained["float32"]["num_bytes"]
    assert 0.45 < ratio < 0.6
