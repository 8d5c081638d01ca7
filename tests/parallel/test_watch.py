"""Machines watch each other; what happens when one is gone silently is in tests/hosts."""

import errno
import socket
import struct
import threading
from types import SimpleNamespace

import pytest

from core.errors import SpotforgeError
from parallel import watch
from parallel.watch import watching
from tests.launch.elastic.conftest import wait_until

TOKEN = b"0123456789abcdef"


def break_off(connection):
    """Closes it without a word, so that the other side gets an error."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Machines:
    """Each is a thread with a world of its own, from `enter` to `leave`."""

    def __init__(self, monkeypatch, count):
        self.lost = []  # what would have ended the process: the rank, and the host it misses
        self.connections = []
        monkeypatch.setattr(watch, "_end", lambda rank, host, _: self.lost.append((rank, host)))
        monkeypatch.setattr(watch.secrets, "token_bytes", lambda size: TOKEN)
        connect = socket.create_connection

        def connecting(*args):
            self.connections.append(connect(*args))
            return self.connections[-1]

        monkeypatch.setattr(watch.socket, "create_connection", connecting)
        self._told, self._all_there = {}, threading.Barrier(count)
        self._leave = [threading.Event() for _ in range(count)]
        self._inside = [threading.Event() for _ in range(count)]
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(count)]
        for thread in self._threads:
            thread.start()
        for inside in self._inside:
            assert inside.wait(60)

    @property
    def ports(self):
        return [port for _, port in self._told.values()]

    def leave(self, *ranks):
        for rank in ranks:
            self._leave[rank].set()
            self._threads[rank].join()

    def _run(self, rank):
        def gather(value):
            self._told[rank] = value
            self._all_there.wait(60)
            return [self._told[i] for i in range(len(self._threads))]

        world = SimpleNamespace(
            rank=rank,
            world_size=len(self._threads),
            local_rank=0,
            local_world_size=1,
            address="127.0.0.1",
            from_first=lambda value: value,
            gather=gather,
        )
        with watching(world):
            self._inside[rank].set()
            self._leave[rank].wait()


@pytest.fixture
def machines(monkeypatch):
    return lambda count: Machines(monkeypatch, count)


def test_who_leaves_is_not_missed(machines):
    made = machines(3)
    assert len(made.connections) == 3  # each pair
    made.leave(0, 2, 1)
    assert made.lost == []


def test_a_connection_that_breaks_ends_both(machines):
    made = machines(2)
    # As if the other machine had been started again: it knows nothing of the connection.
    (connection,) = made.connections
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    made.leave(1)  # closes it
    wait_until(lambda: made.lost, lambda: "nobody missed it", 60)
    assert made.lost[0] == (0, "127.0.0.1")
    made.leave(0)


def test_a_stranger_is_not_missed(monkeypatch):
    """It connects before the other machine does, and breaks its connection or says nothing."""
    # One after another, the silent ones would not leave the other machine enough time.
    monkeypatch.setattr(watch, "_MEETING_S", 4 * watch._TIMEOUT_S)
    lost, told, silent = [], [], []
    monkeypatch.setattr(watch, "_end", lambda rank, host, _: lost.append((rank, host)))
    strangers = []

    def gather(value):
        told.append(value)
        strangers.append(socket.create_connection(value))
        strangers[0].sendall(TOKEN[::-1])
        for _ in range(8):
            silent.append(socket.create_connection(value))
        machine = socket.create_connection(value)
        machine.sendall(TOKEN[:5])
        machine.sendall(TOKEN[5:])
        strangers.append(machine)
        return [value, ("127.0.0.1", 1)]

    world = SimpleNamespace(
        rank=0,
        world_size=2,
        local_rank=0,
        local_world_size=1,
        address="127.0.0.1",
        from_first=lambda value: TOKEN,
        gather=gather,
    )
    with watching(world):
        stranger, machine = strangers
        assert all(s.recv(1) == b"" for s in [stranger, *silent])  # they were hung up on
        for each in (stranger, *silent):
            break_off(each)
        assert lost == []
        break_off(machine)
        wait_until(lambda: lost, lambda: "the machine was not watched", 60)
    assert set(lost) == {(0, "127.0.0.1")}


def test_a_machine_that_does_not_come_is_said(monkeypatch):
    monkeypatch.setattr(watch, "_MEETING_S", 0.2)
    world = SimpleNamespace(
        rank=0,
        world_size=2,
        local_rank=0,
        local_world_size=1,
        address="127.0.0.1",
        from_first=lambda value: TOKEN,
        gather=lambda value: [value, ("127.0.0.1", 1)],
    )
    with pytest.raises(SpotforgeError, match="rank 0: 1 machine"), watching(world):
        pass


@pytest.mark.parametrize(
    "error, is_silence",
    [(TimeoutError(errno.ETIMEDOUT, "timed out"), True), (ConnectionResetError(), False)],
)
def test_what_is_said_of_a_lost_machine_is_true(error, is_silence, monkeypatch):
    said = []
    monkeypatch.setattr(watch.sys, "stderr", SimpleNamespace(fileno=lambda: 2))
    monkeypatch.setattr(
        watch, "os", SimpleNamespace(write=lambda _, text: said.append(text), _exit=said.append)
    )
    watch._end(1, "10.0.0.2", error)
    assert (b"has not answered" in said[0]) == is_silence and b"10.0.0.2" in said[0]
    assert said[1:] == [1]
