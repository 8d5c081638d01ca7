"""Ends this process when another machine of the run no longer answers, though none has said so.

A machine that loses its power or its network closes no connection. gloo and NCCL would wait for it,
for half an hour or longer. So each machine has a connection to each other one, on which nothing is
sent. The kernels try it every few seconds (TCP keepalive): one whose processes are busy or stopped
still answers, one that is gone does not.
"""

from __future__ import annotations

import hmac
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Protocol, TypeVar

from core.errors import ExitCode, SpotforgeError

T = TypeVar("T")
# A machine counts as gone after 10 + 4 * 5 seconds without an answer.
_OPTIONS = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
_SILENCE_S = 30
_TIMEOUT_S = 10.0
_TOKEN_BYTES = 16
_POLL_S = 0.5
_MEETING_S = 60.0  # in which all have connected, unless a process has ended


class World(Protocol):
    """The parts of `parallel.world.World` that are needed here; it imports this module."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def local_rank(self) -> int: ...

    @property
    def local_world_size(self) -> int: ...

    @property
    def address(self) -> str: ...

    def gather(self, value: T) -> list[T]: ...

    def from_first(self, value: T) -> T: ...


@contextmanager
def watching(world: World) -> Iterator[None]:
    """Watches the other machines until it is left; collective. A single machine has none.

    Raises:
        SpotforgeError: A machine cannot be connected to.
    """
    with ExitStack() as stack:
        if world.world_size > world.local_world_size:
            _watch(world, stack)
        yield


def _watch(world: World, stack: ExitStack) -> None:
    """Connects to the machines before this one, and has those after it connect to this one."""
    token = world.from_first(secrets.token_bytes(_TOKEN_BYTES))
    listener: socket.socket | None = None
    if world.local_rank == 0:  # which watches for all ranks of its machine
        family = socket.getaddrinfo(world.address, 0)[0][0]
        listener = socket.create_server((world.address, 0), family=family)
    own = None if listener is None else (world.address, listener.getsockname()[1])
    told = world.gather(own)
    if listener is None:
        return
    watched: dict[socket.socket, str] = {}
    with listener:
        for peer in filter(None, told[: world.rank]):
            try:
                connection = stack.enter_context(socket.create_connection(peer, _TIMEOUT_S))
                connection.sendall(token)
            except OSError as e:
                raise SpotforgeError(f"rank {world.rank} cannot reach {peer[0]}: {e}") from e
            watched[connection] = peer[0]
        num_watched = len(list(filter(None, told))) - 1
        deadline = time.monotonic() + _MEETING_S
        while len(watched) < num_watched:
            if (left_s := deadline - time.monotonic()) <= 0:
                missing = f"{num_watched - len(watched)} machines"
                raise SpotforgeError(f"rank {world.rank}: {missing} did not connect to it")
            listener.settimeout(left_s)
            with suppress(OSError):
                connection, (host, *_) = listener.accept()
                stack.enter_context(connection)
                connection.settimeout(_TIMEOUT_S)
                # A stranger who connected and went away would otherwise end the run.
                if hmac.compare_digest(_read(connection), token):
                    watched[connection] = host
                else:
                    connection.close()
    for connection in watched:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _OPTIONS.items():
            if hasattr(socket, name):  # names differ between systems
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    closed = threading.Event()
    thread = threading.Thread(target=_run, args=(world.rank, watched, closed), name="watch")
    thread.daemon = True
    thread.start()
    stack.callback(thread.join)
    stack.callback(closed.set)


def _run(rank: int, watched: Mapping[socket.socket, str], closed: threading.Event) -> None:
    with selectors.DefaultSelector() as selector:
        for connection, host in watched.items():
            selector.register(connection, selectors.EVENT_READ, host)
        while not closed.is_set():
            for key, _ in selector.select(_POLL_S):
                assert isinstance(key.fileobj, socket.socket)
                try:
                    key.fileobj.recv(1)
                    selector.unregister(key.fileobj)  # its process has ended, which gloo sees, too
                except OSError:
                    _end(rank, key.data)


def _read(connection: socket.socket) -> bytes:
    data = b""
    while len(data) < _TOKEN_BYTES and (more := connection.recv(_TOKEN_BYTES - len(data))):
        data += more
    return data


def _end(rank: int, host: str) -> None:
    text = f"rank {rank}: the machine {host} has not answered for {_SILENCE_S} s: ending"
    # Not print: this thread must not wait for a lock of another one.
    os.write(sys.stderr.fileno(), f"{text}, since no step can be done without it\n".encode())
    os._exit(ExitCode.FAILED)
