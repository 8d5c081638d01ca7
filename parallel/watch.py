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
    """The parts of `parallel.world.World` that are needed here.

    They are not imported, since that module imports this one.
    """

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
        num_missing = len(list(filter(None, told))) - 1 - len(watched)
        for connection, host in _accepted(listener, token, num_missing, world.rank):
            watched[stack.enter_context(connection)] = host
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


def _accepted(
    listener: socket.socket, token: bytes, count: int, rank: int
) -> Iterator[tuple[socket.socket, str]]:
    """Yields connections that have shown the token, with their hosts.

    Strangers may connect, too, and say nothing: nobody waits for them, and they are not watched.
    """
    deadline = time.monotonic() + _MEETING_S
    listener.settimeout(_TIMEOUT_S)
    shown: dict[socket.socket, bytes] = {}  # what those who were accepted have sent so far
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while count > 0 and (left_s := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left_s):
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is listener:
                    with suppress(OSError):
                        connection, (host, *_) = listener.accept()
                        connection.settimeout(_TIMEOUT_S)
                        selector.register(connection, selectors.EVENT_READ, host)
                        shown[connection] = b""
                    continue
                connection = key.fileobj
                more = _read(connection, _TOKEN_BYTES - len(shown[connection]))
                shown[connection] += more
                if more and len(shown[connection]) < _TOKEN_BYTES:
                    continue
                selector.unregister(connection)
                if hmac.compare_digest(shown.pop(connection), token):
                    count -= 1
                    yield connection, key.data
                else:
                    connection.close()
    for connection in shown:
        connection.close()
    if count > 0:
        raise SpotforgeError(f"rank {rank}: {count} machines did not connect to it")


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
                except OSError as e:
                    _end(rank, key.data, e)


def _read(connection: socket.socket, size: int) -> bytes:
    """Returns what is there, at most `size` bytes; nothing if the connection has ended."""
    try:
        return connection.recv(size)
    except OSError:
        return b""


def _end(rank: int, host: str, error: OSError) -> None:
    what = f"cannot be reached any more ({error.strerror or type(error).__name__})"
    if isinstance(error, TimeoutError):
        what = f"has not answered for {_SILENCE_S} s"
    text = f"rank {rank}: the machine {host} {what}: ending"
    # Not print: this thread must not wait for a lock of another one.
    os.write(sys.stderr.fileno(), f"{text}, since no step can be done without it\n".encode())
    os._exit(ExitCode.FAILED)
