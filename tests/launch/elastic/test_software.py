"""A machine with other software is refused, and disturbs no job that runs."""

import os

import pytest

from tests.launch.elastic.conftest import ROOT

LONG = ["--steps", 100000]


@pytest.fixture
def other_numpy(tmp_path):
    """Environment in which numpy seems to have version 1.0."""
    folder = tmp_path / "installed" / "numpy-1.0.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 1.0\n")
    return {"PYTHONPATH": os.pathsep.join([str(folder.parent), str(ROOT)])}


@pytest.mark.parametrize(("nproc", "who"), [(1, "the supervisor"), (0, "the others")])
def test_a_machine_with_another_version_is_refused_by_name(site, other_numpy, nproc, who):
    supervisor, port = site.listen("--nproc", nproc, toy=LONG)
    if not nproc:  # it trains nothing, so the first machine tells
        site.join(port, "--nproc", 1, toy=LONG)
    site.wait_for_step(3)
    other = site.join(port, "--nproc", 1, toy=LONG, env=other_numpy)
    assert other.end() == 2
    (said,) = [line for line in other.printed.splitlines() if "other software" in line]
    assert f"it has numpy 1.0, {who} numpy 2" in said
    supervisor.wait_for_line("refused 127.0.0.1: other software: it has numpy 1.0")
    (refused,) = [event for event in site.events() if event["event"] == "refused"]
    assert "numpy 1.0" in refused["reason"]
    last = len(list(site.folder.glob("gang-*/*-0")))
    site.wait_for_step(last + 5)  # of the same start
    assert "start 2" not in supervisor.printed
    supervisor.send()
    assert supervisor.end() == 33


def test_a_supervisor_that_trains_nothing_may_have_others(site, other_numpy):
    supervisor, port = site.listen("--nproc", 0, env=other_numpy)
    joined = site.join(port, "--nproc", 1)
    assert (supervisor.end(), joined.end()) == (0, 0)
