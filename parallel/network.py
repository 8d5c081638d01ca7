"""Finds the network interface by which the machines of a run reach each other, and tries it.

gloo binds to the address that the machine's own name resolves to, which on Debian, Ubuntu and in
pods is a loopback address, and NCCL takes any interface that is up, among them `docker0`, which has
the same address on every machine. So both are told which interface to use: the one by which this
machine reaches the run's master. It imports no torch, because the supervisor uses it as well.
"""

from __future__ import annotations

import ipaddress
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import NamedTuple, Protocol

import psutil

from core.errors import ConfigError, SpotforgeError

_GLOO, _NCCL = "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"
_TIMEOUT_S = 10.0
_TOKEN_BYTES = 16
_MAX_CONNECTIONS = 32  # of one machine at once
_FIX = (
    f"let the machines connect to each other at all TCP ports, or set {_GLOO} and {_NCCL} to the "
    "interface of a network in which they can"
)


class Store(Protocol):
    """Keys that all ranks can write and read; `get` waits until a key is there."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


class Machine(NamedTuple):
    """Describes the machine of a rank to the others.

    Attributes:
        rank: Number of the rank.
        host: Host name.
        address: Address of the interface that the rank uses.
        port: Port at which the rank answers probes; None: another rank of its machine does.
        token: Random text that a probe must get, since another machine may have the same address.
    """

    rank: int
    host: str
    address: str
    port: int | None
    token: str

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host} ({self.address})"


def address_to(host: str) -> str:
    """Returns the address of this machine from which packets to `host` leave; sends none.

    Raises:
        OSError: The name cannot be resolved, or there is no route to it.
    """
    family, _, _, _, peer = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as s:
        s.connect(peer)
        address: str = s.getsockname()[0]
    return address


def interface_of(address: str) -> str | None:
    """Returns the name of the interface that has an address; None if none has."""
    if ipaddress.ip_address(address).is_loopback:
        address = "127.0.0.1" if "." in address else "::1"  # all of 127.0.0.0/8 is one interface
    name: str
    for name, addresses in psutil.net_if_addrs().items():
        # Link-local addresses of IPv6 come with their interface: fe80::1%eth0.
        if address in (found.address.partition("%")[0] for found in addresses):
            return name
    return None


def interface_variables(
    address: str, environment: Mapping[str, str] = os.environ
) -> dict[str, str]:
    """Returns the variables that make gloo and NCCL use the interface of an address.

    Variables that the environment has already are left out, since the user knows better.
    """
    name = interface_of(address)
    return {} if name is None else {v: name for v in (_GLOO, _NCCL) if not environment.get(v)}


def choose_interface(store: Store, rank: int, world_size: int, master: str) -> str:
    """Chooses the interface of this rank, and sets it in the environment where the user has not.

    Args:
        store: Store of all ranks; every rank must call this.
        rank: Number of this rank.
        world_size: Number of all ranks.
        master: Host of rank 0, by which the ranks have found the store.

    Returns:
        The address of the interface.

    Raises:
        ConfigError: The user's GLOO_SOCKET_IFNAME is not an interface with an address.
    """
    address = address_to(master)
    is_loopback = ipaddress.ip_address(address).is_loopback
    store.set(f"address/{rank}", "" if is_loopback else address)
    if is_loopback:
        # This is the master's machine, and its name resolves to a loopback address. Machines
        # elsewhere have told the addresses from which they reach it.
        told = (store.get(f"address/{other}").decode() for other in range(world_size))
        elsewhere = next(filter(None, told), None)
        address = address if elsewhere is None else address_to(elsewhere)
    os.environ.update(interface_variables(address))
    chosen = os.environ.get(_GLOO, "").split(",")[0]
    return address if chosen in ("", interface_of(address)) else _address_of(chosen)


def check_reachable(
    store: Store, rank: int, local_rank: int, world_size: int, address: str
) -> None:
    """Connects each machine with each other one, before anything waits for such a connection.

    Args:
        store: Store of all ranks; every rank must call this.
        rank: Number of this rank.
        local_rank: Number of this rank on its machine; rank 0 of it connects.
        world_size: Number of all ranks.
        address: Address of this rank's interface.

    Raises:
        SpotforgeError: Some cannot reach others; the same error is raised on all ranks.
    """
    token = new_token()
    with answering(address, token) if local_rank == 0 else _silent() as port:
        own = Machine(rank, socket.gethostname(), address, port, token)
        store.set(f"machine/{rank}", json.dumps(own))
        ranks = (Machine(*json.loads(store.get(f"machine/{i}"))) for i in range(world_size))
        machines = [machine for machine in ranks if machine.port is not None]
        if local_rank == 0:
            others = [machine for machine in machines if machine.rank != rank]
            with ThreadPoolExecutor(_MAX_CONNECTIONS) as pool:
                probed = pool.map(
                    lambda other: probe(other.address, other.port, other.token), others
                )
                problems = [
                    f"{own} cannot reach {other}: {reach.problem}"
                    for other, reach in zip(others, probed, strict=True)
                    if reach.problem is not None
                ]
            store.set(f"problems/{rank}", json.dumps(problems))
        # Nobody stops to answer before all have tried.
        found = [p for m in machines for p in json.loads(store.get(f"problems/{m.rank}"))]
    if found:
        store.set(f"told/{rank}", "")
        if rank == 0:  # its process has the store, which the others still read
            for other in range(world_size):
                store.get(f"told/{other}")
        more = f", and {len(found) - 1} more" if len(found) > 1 else ""
        error = SpotforgeError(f"{found[0]}{more}; {_FIX}")
        error.seen_by_all = True
        raise error


@contextmanager
def _silent() -> Iterator[None]:
    yield None


class Reach(NamedTuple):
    """Says how a machine reaches another one.

    Attributes:
        problem: Reason why it does not; None if it does.
        mbit_per_s: Speed at which bytes came, in Mbit/s; None if none were asked for, or came.
    """

    problem: str | None = None
    mbit_per_s: float | None = None


def new_token() -> str:
    """Returns a random token, by which a probe knows that the right machine answers."""
    return secrets.token_hex(_TOKEN_BYTES)


@contextmanager
def answering(address: str, token: str, num_bytes: int = 0) -> Iterator[int]:
    """Answers everyone who connects with the token and so many bytes, and yields the port.

    It reads nothing from anyone.

    Raises:
        OSError: This machine does not have the address.
    """
    family = socket.getaddrinfo(address, 0)[0][0]
    text = token.encode() + bytes(num_bytes)
    with socket.create_server((address, 0), family=family) as listener:

        def answer(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                connection.settimeout(_TIMEOUT_S)
                connection.sendall(text)

        def accept() -> None:
            # Machines are answered at once, since one that is slow takes seconds.
            with ThreadPoolExecutor(_MAX_CONNECTIONS) as pool:
                while listener.fileno() != -1:
                    with suppress(OSError):
                        pool.submit(answer, listener.accept()[0])

        thread = threading.Thread(target=accept, name="probes", daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            # Closing alone does not wake a thread that waits in `accept`.
            listener.shutdown(socket.SHUT_RDWR)


def probe(address: str, port: int | None, token: str, num_bytes: int = 0) -> Reach:
    """Connects to a machine that is `answering`, and reads what it sends, for 10 s at most."""
    began = time.monotonic()
    received = 0
    try:
        with socket.create_connection((address, port), _TIMEOUT_S) as s:
            with s.makefile("rb") as answer:
                if answer.read(2 * _TOKEN_BYTES).decode(errors="replace") != token:
                    return Reach("another machine has the same address")
                if not num_bytes:
                    return Reach()
                while received < num_bytes and time.monotonic() < began + _TIMEOUT_S:
                    chunk = answer.read1(num_bytes - received)
                    if not chunk:
                        break
                    received += len(chunk)
    except TimeoutError:
        if not received:
            return Reach(f"no answer in {_TIMEOUT_S:g} s")
    except OSError as e:
        return Reach(e.strerror or str(e))
    return Reach(None, received * 8e-6 / (time.monotonic() - began))


def _address_of(interface: str) -> str:
    known = psutil.net_if_addrs()
    kinds: Sequence[socket.AddressFamily] = (socket.AF_INET, socket.AF_INET6)
    for kind in kinds:
        for found in known.get(interface, ()):
            if found.family == kind:
                return str(found.address)
    rule = f"must be an interface of this machine with an address: {', '.join(sorted(known))}"
    raise ConfigError(_GLOO, interface, rule, "unset it, or name one of them")
