"""Runs on machines without a shared disk, which are lost one after another."""

import pytest

from tests.hosts.cluster import Cluster, last_step, num_saved, records

pytestmark = pytest.mark.hosts

EVERY = 4  # steps between saves


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_machines_are_lost_one_after_another(bed, tmp_path, environment, strategy):
    """Both machines that a run began on are lost, and it ends on two that joined later."""
    made = bed("s", "a", "b", "c", "d", disk_mb=64)
    _, a, b, c, d = made.hosts
    steps = [f"checkpoint.interval={EVERY}", "stop.steps=1000000"]
    cluster = Cluster(made, tmp_path, environment, 2, strategy, *steps)
    cluster.join(a)
    cluster.join(b)
    cluster.wait_for(lambda: num_saved(a) and num_saved(b))
    first, second = (a, b) if last_step(a) else (b, a)  # rank 0 logs

    second.kill()
    cluster.join(c)
    lost = last_step(first)
    cluster.wait_for(lambda: last_step(first) > lost + 2 * EVERY and num_saved(c))

    before = records(first)
    first.kill()  # rank 0, whose logs go on elsewhere
    cluster.join(d)
    cluster.wait_for(lambda: max(last_step(c), last_step(d)) > before[-1]["step"] + 2 * EVERY)
    assert cluster.stop() == 33, cluster.printed
    third = c if last_step(c) > last_step(d) else d
    steps = [record["step"] for record in records(third)]
    assert steps == list(range(1, len(steps) + 1))
    starts = [event for event in records(third, "events.jsonl") if event["event"] == "start"]
    assert [start["world_size"] for start in starts][0] == 2 and starts[-1]["step"] > lost
    # What was logged before the checkpoint that was left is as it was.
    told = {r["step"]: r["loss"] for r in before if r["step"] <= starts[-1]["step"]}
    assert told == {r["step"]: r["loss"] for r in records(third) if r["step"] in told}


def test_a_machine_whose_disk_is_full_is_left_out(bed, tmp_path, environment):
    """First one that only saves, then the one that logs; the others go on without them."""
    made = bed("s", "a", "b", "c", disk_mb=64)
    steps = [f"checkpoint.interval={EVERY}", "stop.steps=1000000"]
    cluster = Cluster(made, tmp_path, environment, 3, "ddp", *steps)
    hosts = made.hosts[1:]
    for host in hosts:
        cluster.join(host)
    cluster.wait_for(lambda: all(num_saved(host) for host in hosts))
    first = max(hosts, key=last_step)
    for full in [next(host for host in hosts if host is not first), first]:
        full.fill()
        assert cluster.agents[full.name].wait(200) == 33, cluster.printed
        cluster.wait_for_line(rf"{full.address} .*goes away: .*(could not be written|is full)")
        rest = [host for host in hosts if cluster.agents[host.name].poll() is None]
        cluster.wait_for_steps(rest, 2 * EVERY)
    assert cluster.stop() == 33, cluster.printed
