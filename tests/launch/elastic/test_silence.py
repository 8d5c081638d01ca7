"""A peer that says nothing for ten seconds is gone; here for half of one."""

import asyncio

import pytest

from core.errors import SpotforgeError
from core.software import software
from launch.elastic.agent import Agent, Membership
from launch.elastic.nodes import Listener
from launch.elastic.protocol import (
    VERSION,
    Challenge,
    Hello,
    Pong,
    Welcome,
    command_digest,
    encode,
    receive,
)

COMMAND = ["true"]
SILENCE_S = 0.5


def test_a_silent_machine_is_lost(monkeypatch):
    monkeypatch.setattr("launch.elastic.nodes.SILENCE_S", SILENCE_S)

    async def join_and_say_no_more():
        nodes, changed = [], asyncio.Event()
        digest, own = command_digest(COMMAND), software()
        listener = Listener(digest, None, own, False, nodes.append, changed, print)
        port = int((await listener.open("127.0.0.1", 0)).rpartition(":")[2])
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        assert (await receive(reader)).version == VERSION
        writer.write(encode(Hello(VERSION, 4, digest, "10.0.0.7", "", "", own)))
        assert await receive(reader) == Welcome("")
        (node,) = nodes
        assert (node.nproc, node.address, node.lost) == (4, "10.0.0.7", None)
        async with asyncio.timeout(120):
            await changed.wait()
        assert node.lost.startswith("silent for")
        assert await reader.read() == b""  # it hung up
        writer.close()
        await listener.close()

    asyncio.run(join_and_say_no_more())


def test_a_silent_supervisor_is_lost(monkeypatch, capsys):
    monkeypatch.setattr("launch.elastic.agent.SUPERVISOR_SILENCE_S", SILENCE_S)
    # The signals of this process are pytest's.
    monkeypatch.setattr("launch.elastic.agent.call_on_stop", lambda stop: None)
    monkeypatch.setattr("launch.elastic.agent.hold", lambda: None)

    async def welcome_and_say_no_more():
        async def serve(reader, writer):
            server.close()  # none to come back to
            writer.write(encode(Challenge(VERSION, "")))
            assert (await receive(reader)).nproc == 2
            writer.write(encode(Welcome("")) + encode(Pong()))
            await reader.read()
            writer.close()

        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(SpotforgeError, match=f"no supervisor at 127.0.0.1:{port}"):
            await Agent(Membership("127.0.0.1", port, COMMAND, 2, 1.0, 0.0, None)).run()

    asyncio.run(welcome_and_say_no_more())
    assert "lost the supervisor: silent for" in capsys.readouterr().err
