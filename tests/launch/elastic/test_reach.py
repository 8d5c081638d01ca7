"""The largest group of machines that all reach each other, and when the others are tried again."""

import itertools

import pytest

from launch.elastic import reach
from launch.elastic.reach import Apart, Link, largest_group, slow_links


def links_of(num, *broken):
    """All links of `num` machines; those in `broken` (source, target) do not work."""
    return [
        Link(i, j, "no answer", None) if (i, j) in broken else Link(i, j, None, 900.0)
        for i, j in itertools.permutations(range(num), 2)
    ]


def test_all_that_reach_each_other():
    assert largest_group([4, 4, 4], links_of(3)) == [0, 1, 2]
    assert largest_group([1], []) == [0]


@pytest.mark.parametrize("broken", [[(1, 2)], [(2, 1)], [(1, 2), (2, 1)]])
def test_a_link_that_is_broken_in_one_direction_is_broken(broken):
    assert largest_group([1, 1, 4], links_of(3, *broken)) == [0, 2]


def test_the_group_with_the_most_ranks_not_the_most_machines():
    broken = [(3, 0), (3, 1), (3, 2)]
    assert largest_group([2, 2, 2, 8], links_of(4, *broken)) == [3]
    assert largest_group([2, 2, 2, 4], links_of(4, *broken)) == [0, 1, 2]


def test_two_halves_of_a_network():
    broken = itertools.product((0, 1), (2, 3, 4))
    assert largest_group([1] * 5, links_of(5, *broken)) == [2, 3, 4]


def test_a_chain_has_no_group_of_three():
    assert len(largest_group([1] * 3, links_of(3, (0, 2)))) == 2


def test_a_link_far_slower_than_the_others_is_named():
    links = links_of(3)
    links[0] = links[0]._replace(mbit_per_s=0.9)
    assert slow_links(links) == [(links[0], 900.0)]
    assert slow_links(links_of(3)) == []
    assert slow_links([Link(0, 1, None, 1.0), Link(1, 0, None, 900.0)]) == []  # which is usual?


def test_a_slow_machine_of_three_has_most_of_the_links():
    links = [x if 2 not in x[:2] else x._replace(mbit_per_s=20.0) for x in links_of(3)]
    assert [link for link, _ in slow_links(links)] == [x for x in links if 2 in x[:2]]


def test_a_machine_is_tried_again_after_a_minute_then_two(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(reach.time, "monotonic", lambda: now[0])
    apart = Apart()
    assert not apart.is_due()
    waits = []
    for _ in range(8):
        apart.leave_out()
        began = now[0]
        while not apart.is_due():
            now[0] += 1
        waits.append(now[0] - began)
        apart.take_back()  # a link that comes and goes must not stop the gang each minute
        assert not apart.is_due()
    assert waits == [60, 120, 240, 480, 960, 1800, 1800, 1800]
