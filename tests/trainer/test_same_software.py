"""Ranks with other software than the first one are refused, on all ranks alike."""

import threading
from types import SimpleNamespace

import pytest

from core.errors import ConfigError
from trainer import same_software
from trainer.same_software import check_same_software


def check_all(monkeypatch, versions, local_world_size):
    """What each rank raised; every rank of a machine would tell the same versions."""
    gathered, all_there = {}, threading.Barrier(len(versions))
    mine = threading.local()
    monkeypatch.setattr(same_software, "software", lambda: versions[mine.rank])
    raised = {}

    def run(rank):
        mine.rank = rank

        def gather(value):
            gathered[rank] = value
            all_there.wait(60)
            return [gathered[i] for i in range(len(versions))]

        world = SimpleNamespace(
            world_size=len(versions),
            local_world_size=local_world_size,
            local_rank=rank % local_world_size,
            gather=gather,
        )
        try:
            check_same_software(world)
        except ConfigError as e:
            raised[rank] = str(e)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(versions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


NEW, OLD = {"torch": "2.13.0"}, {"torch": "2.12.0"}


@pytest.mark.parametrize("local_world_size", [1, 2])
def test_all_ranks_say_which_machine_differs(monkeypatch, local_world_size):
    raised = check_all(monkeypatch, [NEW, NEW, OLD, OLD], local_world_size)
    assert set(raised) == {0, 1, 2, 3} and len(set(raised.values())) == 1
    assert "rank 2 has torch 2.12.0, rank 0 on " in raised[0] and raised[0].count("\n") == 0


def test_equal_machines_and_a_single_one_pass(monkeypatch):
    assert check_all(monkeypatch, [NEW, NEW], 1) == {}
    assert check_all(monkeypatch, [NEW, NEW], 2) == {}
