"""The real trainer on machines of their own."""

import os

import pytest

from tests.hosts import real_trainer

pytestmark = pytest.mark.hosts


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "shared"
    folder.mkdir()
    return folder


def test_ranks_with_other_software_end_with_one_line_each(bed, folder, environment):
    """As torchrun starts them, without a supervisor that would have refused the machine."""
    hosts = bed("a", "b").hosts
    installed = folder / "installed" / "numpy-9.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 9.1\n")
    other = {"PYTHONPATH": os.pathsep.join([str(installed.parent), environment["PYTHONPATH"]])}
    started = []
    for rank, (host, more) in enumerate(zip(hosts, ({}, other), strict=True)):
        env = {**environment, **real_trainer.place(rank, hosts), **more}
        log = folder / f"rank-{rank}"
        with log.open("w") as output:
            words = real_trainer.command(folder)
            started.append((host.start(*words, output=output, env=env), log))
    for process, log in started:
        assert process.wait(120) == 2, log.read_text()
        (said,) = [line for line in log.read_text().splitlines() if "machine=b" in line]
        assert "Traceback" not in log.read_text(), log.read_text()
        assert "rank 1 has numpy 9.1, rank 0 on a numpy 2" in said
    assert not (folder / "run").exists()
