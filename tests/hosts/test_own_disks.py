"""Runs on machines without a shared disk, which are lost one after another."""

import pytest

from tests.hosts.cluster import Cluster, copies, last_step, records

pytestmark = pytest.mark.hosts

EVERY = 4  # steps between saves


def is_copied(host, writer):
    """Whether a host has a copy of what a rank wrote at some step."""
    names = [path.name for path in host.path("run/checkpoints").glob("step-*")]
    return any(copies(host, int(name.removeprefix("step-")), writer) for name in names)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_machines_are_lost_one_after_another(bed, tmp_path, environment, strategy):
    """Both machines that a run began on are lost, and it ends on two that joined later."""
    made = bed("s", "a", "b", "c", "d", disk_mb=64)
    _, a, b, c, d = made.hosts
    steps = [f"checkpoint.interval={EVERY}", "stop.steps=1000000"]
    cluster = Cluster(made, tmp_path, environment, 2, strategy, *steps)
    cluster.join(a)
    cluster.join(b)
    cluster.wait_for(lambda: is_copied(a, 1) and is_copied(b, 0))

    lost = last_step(a)
    b.kill()
    cluster.join(c)
    cluster.wait_for_line(r"start \d+: 2 ranks on 2 nodes: .*\n(.*\n)*.*resuming after step")
    since = len(cluster.printed)
    cluster.wait_for(lambda: last_step(a) > lost + 2 * EVERY)
    cluster.wait_for(lambda: is_copied(c, 0))

    before = records(a)
    a.kill()  # rank 0, whose logs go on elsewhere
    cluster.join(d)
    cluster.wait_for(lambda: last_step(c) > before[-1]["step"] + EVERY)
    assert "resuming after step" in cluster.printed[since:]
    assert cluster.stop() == 33, cluster.printed
    steps = [record["step"] for record in records(c)]
    assert steps == list(range(1, len(steps) + 1))
    # What was logged before the newest checkpoint then was not computed again.
    resumed = [e["step"] for e in records(c, "events.jsonl") if e["event"] == "start"][-1]
    told = {r["step"]: r["loss"] for r in before if r["step"] < resumed}
    assert told == {r["step"]: r["loss"] for r in records(c) if r["step"] in told}
