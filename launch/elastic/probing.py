"""Asks machines how they reach each other; `reach.py` draws the conclusions."""

import asyncio
from collections.abc import Callable, Sequence

from launch.elastic.nodes import Node
from launch.elastic.protocol import Listen, Peer, Probe
from launch.elastic.reach import Link

_TICK_S = 0.1


async def probe(
    nodes: Sequence[Node], supervisor: str, is_stopped: Callable[[], bool]
) -> list[Link]:
    """Has each node connect to each other one, and receive a megabyte from it.

    Args:
        nodes: Nodes to probe.
        supervisor: Address of the supervisor's machine for the others.
        is_stopped: Function that ends the waiting, at once.

    Returns:
        Both directions of every pair whose nodes have answered.
    """

    async def until(condition: Callable[[], bool]) -> None:
        while not (condition() or is_stopped()):
            await asyncio.sleep(_TICK_S)

    if len(nodes) < 2:
        return []
    for node in nodes:
        node.open = node.probed = None
        node.send(Listen(node.address_seen_from(supervisor)))
    await until(lambda: all(node.open or node.lost for node in nodes))
    # Nobody answers at port 1, and so nobody reaches a machine that could not listen.
    peers = {
        i: Peer(node.address_seen_from(supervisor), node.open.port or 1, node.open.token)
        for i, node in enumerate(nodes)
        if node.open is not None
    }
    for i in peers:
        nodes[i].send(Probe([peer for j, peer in peers.items() if j != i]))
    await until(lambda: all(nodes[i].probed or nodes[i].lost for i in peers))
    links = []
    for i in peers:
        probed = nodes[i].probed
        others = [j for j in peers if j != i]
        for j, way in zip(others, probed.ways if probed is not None else [], strict=False):
            links.append(Link(i, j, way.problem, way.mbit_per_s))
    return links
