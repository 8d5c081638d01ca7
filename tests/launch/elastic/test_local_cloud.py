"""Nodes that are process groups here are taken away and come back, and the gang goes on."""

import os
import re
import signal

import pytest

from tests.launch.elastic.conftest import is_running, wait_until


def groups(cloud, node):
    return [
        int(pid) for pid in re.findall(rf"node {node} is up: process group (\d+)", cloud.printed)
    ]


def pids(site):
    return [start["pid"] for start in site.starts()]


def test_a_node_that_is_killed_is_replaced(site):
    cloud = site.supervise("--nodes", 2, "--away", 0.2, toy=["--steps", 100000])
    cloud.wait_for_line("start 1: 2 ranks on 2 nodes")
    site.wait_for_step(3)
    os.killpg(groups(cloud, 1)[0], signal.SIGKILL)
    cloud.wait_for_line("node 1 is gone: died of SIGKILL; another comes in 0.2 s")
    cloud.wait_for_line("start [23]: 2 ranks on 2 nodes")
    assert len(groups(cloud, 1)) == 2 and len(groups(cloud, 0)) == 1
    cloud.send()
    assert cloud.end() == 33  # nobody said that it was done
    wait_until(lambda: not any(map(is_running, pids(site))), lambda: cloud.printed)
    assert not any(map(is_running, groups(cloud, 0) + groups(cloud, 1)))


@pytest.mark.parametrize(
    ("notice_s", "said"), [(20, "is gone: it left in time"), (0, "is gone: killed")]
)
def test_a_run_outlives_interruptions(site, notice_s, said):
    # Half of the time in which a slow machine starts nodes and ranks; until it has been interrupted
    # the run has no end, and each step is saved, so that any start makes it come nearer.
    options = ["--interrupt-every", 3, "--notice", notice_s, "--away", 0.1, "--seed", 5]
    cloud = site.supervise("--nodes", 2, *options, toy=["--steps", 100000, "--saves-each-step"])
    site.wait_for_step(10)
    cloud.wait_for_line(said)
    last = site.checkpoint() + 60
    (site.folder / "last.part").write_text(str(last))
    (site.folder / "last.part").replace(site.folder / "last")
    assert cloud.end() == 0
    assert ("has notice" in cloud.printed) == (notice_s > 0)
    assert site.checkpoint() == last
    wait_until(lambda: not any(map(is_running, pids(site))), lambda: cloud.printed)


def test_a_supervisor_that_is_killed_takes_its_cloud_with_it(site):
    cloud = site.supervise("--nodes", 2, toy=["--steps", 100000])
    site.wait_for_step(2)
    cloud.send(signal.SIGKILL)
    cloud.end()
    everyone = pids(site) + groups(cloud, 0) + groups(cloud, 1)
    wait_until(lambda: not any(map(is_running, everyone)), lambda: cloud.printed)
    assert len(everyone) == 4  # two ranks, two nodes


def test_each_node_has_gpus_of_its_own(site, tmp_path):
    """`nvidia-smi -L` is a stand-in here; the ranks see what they may use."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text('#!/bin/sh\nfor i in 0 1 2; do echo "GPU $i: H100 (UUID: GPU-$i)"; done\n')
    smi.chmod(0o755)
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    few = site.supervise("--nodes", 2, "--nproc", 2, env=path)
    assert few.end() == 2
    assert "--nproc=2: 2 nodes need 4 GPUs" in few.printed
    code = (
        f"import os; print(os.environ['CUDA_VISIBLE_DEVICES'], file=open('{tmp_path}/seen', 'a'))"
    )
    cloud = site.launch("supervise", "--nodes", 3, "--", "python3", "-c", code, env=path)
    assert cloud.end() == 0
    assert sorted((tmp_path / "seen").read_text().split()) == ["0", "1", "2"]
