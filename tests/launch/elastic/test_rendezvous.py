"""How a generation ends, told by what its ranks are known to do."""

import time
from signal import SIGTERM

import pytest

from launch.elastic.nodes import Node
from launch.elastic.protocol import ProtocolError, RankStatus, Ready, Start, Status
from launch.elastic.rendezvous import End, Generation, StopCause


def node(address="10.0.0.1", nproc=1):
    told = []
    made = Node(address, address, nproc, told.append)
    made.receive(Ready(nproc, 4000))
    made.told = told
    return made


def gang_of(*ranks):
    """A gang that runs, with these ranks on a node each."""
    gang = Generation(1, [node() for _ in ranks])
    gang.start("10.0.0.9")
    for member, rank in zip(gang.nodes, ranks, strict=True):
        member.ranks = [rank]
    return gang


def rank(exit=None, phase="train", step=3, **fields):
    return RankStatus(0, phase, step, exit=exit, **fields)


def test_where_the_ranks_meet():
    nodes = [node("10.0.0.1", 2), node("10.0.0.2", 4)]
    Generation(3, nodes).start("10.0.0.9")
    ((first,), (second,)) = (node.told for node in nodes[:2])
    assert first == Start(3, 0, 0, 2, 6, "10.0.0.1", 4000, first.time)
    assert second == Start(3, 1, 2, 4, 6, "10.0.0.1", 4000, second.time)


@pytest.mark.parametrize("loopback", ["127.0.0.1", "::1"])
def test_the_supervisors_machine_is_met_where_the_others_see_it(loopback):
    nodes = [node(loopback), node("10.0.0.2")]
    Generation(1, nodes).start("10.0.0.9")
    assert {start.master_addr for n in nodes for start in n.told} == {"10.0.0.9"}


@pytest.mark.parametrize(
    ("exits", "end"),
    [
        ([0, 0], End.FINISHED),
        ([33, 33], End.STOPPED),
        ([0, 33], End.STOPPED),
        ([0, None], None),
        ([33, None], None),
        ([2, 1], End.REFUSED),
        ([1, 33], End.FAILED),
        ([-9, 1], End.FAILED),
        ([-SIGTERM, -SIGTERM], End.FAILED),  # not ours
        ([1, None], None),  # its echo may have come first
    ],
)
def test_how_it_ends_by_itself(exits, end):
    assert gang_of(*(rank(code) for code in exits)).end() is end


@pytest.mark.parametrize(
    ("exits", "phase", "end"),
    [
        ([33, 33], "train", End.STOPPED),
        ([0, 0], "train", End.FINISHED),
        ([0, -SIGTERM], "train", End.STOPPED),  # past its handler, when all was done
        ([-SIGTERM, -SIGTERM], None, End.STOPPED),
        ([-SIGTERM, 1], "starting", End.STOPPED),  # which wants its peer
        ([-SIGTERM, None], "starting", End.STOPPED),  # which waits for its peer
        ([-SIGTERM, None], None, None),  # none of ours: it may be saving
        ([-SIGTERM, None], "train", None),
        ([33, 1], "train", End.FAILED),
        ([33, 1], "starting", End.FAILED),
        ([33, -9], "train", End.FAILED),
    ],
)
def test_how_it_ends_when_told_to_stop(exits, phase, end):
    gang = gang_of(*(rank(code, phase) for code in exits))
    gang.stopping(StopCause.SIGNAL, grace_s=60)
    assert gang.end() is end


def test_a_rank_that_cannot_be_waited_for_is_not():
    """Ours ended before it had a handler; the other trains, which it cannot do alone."""
    gang = gang_of(rank(-SIGTERM, None), rank(None, "train"))
    gang.stopping(StopCause.GROW, grace_s=60)
    assert gang.end() is End.STOPPED


def test_a_failure_is_settled_when_the_others_had_time_to_show_theirs(monkeypatch):
    gang = gang_of(rank(1, error="echo"), rank())
    assert gang.end() is None and gang.has_failure
    later = time.monotonic() + 1.1
    monkeypatch.setattr("launch.elastic.rendezvous.time.monotonic", lambda: later)
    assert gang.end() is End.FAILED


def test_a_lost_node_matters_while_its_ranks_run():
    gang = gang_of(rank(0), rank())
    gang.nodes[0].lost = "closed the connection"
    assert gang.end() is None
    gang.nodes[1].lost = "closed the connection"
    assert gang.end() is End.LOST


def test_a_step_is_done_when_the_next_one_begins():
    gang = gang_of(rank(phase="starting", step=0))
    for phase, step, has_stepped in (
        ("data", 0, False),
        ("train", 40, False),  # resumed there
        ("evaluate", 40, False),
        ("train", 41, True),
    ):
        gang.nodes[0].ranks = [rank(phase=phase, step=step)]
        assert gang.has_stepped() is has_stepped


def test_the_newest_beat_counts(monkeypatch):
    now = 1000.0
    monkeypatch.setattr("launch.elastic.rendezvous.time.monotonic", lambda: now)
    gang = gang_of(rank(beat_at=now - 50), rank(beat_at=now - 20))
    assert gang.silence_s() == 20
    assert gang_of(rank(phase=None)).silence_s() == 0


def test_a_node_tells_of_its_own_ranks_and_its_own_clock():
    gang = gang_of(rank(), rank())
    status = [RankStatus(1, "train", 7, beat_at=90.0)]
    gang.nodes[1].start(Start(2, 1, 1, 1, 2, "10.0.0.1", 4000, 0.0))
    gang.nodes[1].receive(Status(1, 100.0, status))  # of the last generation, and late
    assert gang.nodes[1].ranks == [RankStatus(1)]
    earliest = time.monotonic() - 10
    gang.nodes[1].receive(Status(2, 100.0, status))
    assert gang.nodes[1].ranks[0].step == 7
    assert earliest <= gang.nodes[1].ranks[0].beat_at <= time.monotonic() - 10
    with pytest.raises(ProtocolError):
        gang.nodes[1].receive(Status(2, 100.0, [RankStatus(0)]))
    with pytest.raises(ProtocolError):
        gang.nodes[1].receive(Ready(-1, 4000))
