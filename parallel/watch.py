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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from core.errors import ExitCode, SpotforgeError

if TYPE_CHECKING:
    from parallel.world import World

# A machine counts as gone after 10 + 4 * 5 seconds without an answer.
_OPTIONS = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
_SILENCE_S = 30
_TIMEOUT_S = 10.0
_TOKEN_BYTES = 16
_POLL_S = 0.5


@contextmanager
def watching(world: World) -> Iterator[None]:
    """Watches the other machines until it is left; collective. A single machine has none.

    Raises:
        SpotforgeError: A machine cannot be connected to.
    """
    with ExitStack() as stack:
        if world.address is not None:
            _watch(world, world.address, stack)
        yield


def _watch(world: World, address: str, stack: ExitStack) -> None:
    """Connects to the machines before this one, and has those after it connect to this one."""
    token = world.from_first(secrets.token_bytes(_TOKEN_BYTES))
    is_first = world.local_rank == 0  # of its machine, for which it watches
    listener: socket.socket | None = None
    if is_first:
        family = socket.getaddrinfo(address, 0)[0][0]
        listener = stack.enter_context(socket.create_server((address, 0), family=family))
    told = world.gather(None if listener is None else (address, listener.getsockname()[1]))
    if listener is None:
        return
    watched: dict[socket.socket, str] = {}
    for peer in filter(None, told[: world.rank]):
        try:
            connection = socket.create_connection(peer, _TIMEOUT_S)
            connection.sendall(token)
        except OSError as e:
            raise SpotforgeError(f"rank {world.rank} cannot reach {peer[0]}: {e}") from e
        watched[connection] = peer[0]
    num_to_come = sum(peer is not None for peer in told[world.rank + 1 :])
    closed = threading.Event()
    thread = threading.Thread(
        target=_run, args=(world.rank, listener, token, watched, num_to_come, closed), daemon=True
    )
    thread.start()

    def close() -> None:
        closed.set()
        with suppress(OSError):  # already closed, because all have come
            listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        thread.join()

    stack.callback(close)


def _run(
    rank: int,
    listener: socket.socket,
    token: bytes,
    watched: dict[socket.socket, str],
    num_to_come: int,
    closed: threading.Event,
) -> None:
    with ExitStack() as stack, selectors.DefaultSelector() as selector:
        for connection in watched:
            stack.enter_context(connection)
        while num_to_come and not closed.is_set():
            with suppress(OSError):
                connection, (host, *_) = listener.accept()
                stack.enter_context(connection)
                connection.settimeout(_TIMEOUT_S)
                # A stranger who connected and went away would otherwise end the run.
                if hmac.compare_digest(_read(connection), token):
                    watched[connection] = host
                    num_to_come -= 1
                else:
                    connection.close()
        listener.close()
        for connection, host in watched.items():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _OPTIONS.items():
                if hasattr(socket, name):  # names differ between systems
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
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
