"""The interface that a rank uses, and the probes between machines."""

import json
import os
import socket
import threading
from types import SimpleNamespace

import psutil
import pytest

from core.errors import ConfigError, SpotforgeError
from parallel import network


class Store:
    """A store in this process, whose `get` waits as torch's does."""

    def __init__(self):
        self._values, self._changed = {}, threading.Condition()

    def set(self, key, value):
        with self._changed:
            self._values[key] = value.encode()
            self._changed.notify_all()

    def get(self, key):
        with self._changed:
            assert self._changed.wait_for(lambda: key in self._values, 60), key
            return self._values[key]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")  # restored afterwards, also where it is set meanwhile
        monkeypatch.delenv(name)


def loopback():
    addresses = psutil.net_if_addrs()
    return next(n for n in addresses if "127.0.0.1" in (a.address for a in addresses[n]))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.1.1", "localhost"])
def test_the_interface_of_a_loopback_address(host):
    assert network.interface_of(network.address_to(host)) == loopback()


def test_no_interface_has_an_address_of_elsewhere():
    assert network.interface_of("192.0.2.1") is None
    assert network.interface_variables("192.0.2.1", {}) == {}


def test_what_the_user_has_set_stays():
    given = {"GLOO_SOCKET_IFNAME": "eth7"}
    assert network.interface_variables("127.0.0.1", given) == {"NCCL_SOCKET_IFNAME": loopback()}


def test_link_local_addresses_come_with_their_scope(monkeypatch):
    address = SimpleNamespace(family=socket.AF_INET6, address="fe80::1%eth3")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"eth3": [address]})
    assert network.interface_of("fe80::1") == "eth3"


def test_a_master_whose_name_is_loopback_learns_its_address_from_the_others(monkeypatch):
    """As on Debian, where a machine's name resolves to 127.0.1.1."""
    routes = {"master": "127.0.1.1", "10.0.0.2": "10.0.0.1"}
    monkeypatch.setattr(network, "address_to", routes.__getitem__)
    monkeypatch.setattr(network, "interface_of", {"10.0.0.1": "eth0", "127.0.1.1": "lo"}.get)
    store = Store()
    store.set("address/1", "")  # the master's second rank
    store.set("address/2", "10.0.0.2")
    assert network.choose_interface(store, 0, 3, "master") == "10.0.0.1"
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "eth0"


def test_nodes_of_one_machine_use_loopback():
    store = Store()
    store.set("address/1", "")
    assert network.choose_interface(store, 0, 2, "127.0.0.1") == "127.0.0.1"
    assert os.environ["GLOO_SOCKET_IFNAME"] == loopback()


def test_an_interface_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "^lo,docker")  # NCCL's syntax
    store = Store()
    store.set("address/1", "")
    with pytest.raises(ConfigError) as refused:
        network.choose_interface(store, 0, 2, "127.0.0.1")
    assert (refused.value.key, refused.value.value) == ("GLOO_SOCKET_IFNAME", "^lo")


def errors_of(store, ranks):
    """What `check_reachable` says on each rank: of (rank, local rank, address)."""
    errors = {}

    def check(rank, local_rank, address):
        try:
            network.check_reachable(store, rank, local_rank, len(ranks), address)
            errors[rank] = None
        except SpotforgeError as e:
            errors[rank] = e

    threads = [threading.Thread(target=check, args=rank) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def test_machines_that_reach_each_other():
    ranks = [(0, 0, "127.0.0.1"), (1, 1, "127.0.0.1"), (2, 0, "127.0.0.2"), (3, 0, "127.0.0.3")]
    assert errors_of(Store(), ranks) == dict.fromkeys(range(4))


def test_another_machine_with_the_same_address_is_told_from_the_right_one(monkeypatch):
    """As with docker0: every machine that connects to it meets itself."""
    store = Store()
    get = store.get

    def get_of_a_stranger(key):
        value = get(key)
        if key != "machine/1" or threading.current_thread() is not first:
            return value
        return json.dumps(network.Machine(*json.loads(value))._replace(token="0" * 32)).encode()

    store.get = get_of_a_stranger
    errors = {}

    def check(rank):
        try:
            network.check_reachable(store, rank, 0, 2, "127.0.0.1")
        except SpotforgeError as e:
            errors[rank] = e

    first, second = (threading.Thread(target=check, args=(rank,)) for rank in (0, 1))
    first.start()
    second.start()
    first.join()
    second.join()
    assert sorted(errors) == [0, 1] and str(errors[0]) == str(errors[1])
    assert all(e.seen_by_all and e.exit_code == 1 for e in errors.values())
    assert str(errors[0]).startswith("rank 0 on ") and "rank 1 on " in str(errors[0])


def test_a_port_at_which_nobody_answers(monkeypatch):
    monkeypatch.setattr(network, "_TIMEOUT_S", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        assert network.probe("127.0.0.1", port, "0" * 32).problem is not None
    assert network.probe("127.0.0.1", port, "0" * 32).problem is not None  # refused


def test_bytes_tell_the_speed():
    token = network.new_token()
    with network.answering("127.0.0.1", token, num_bytes=2**20) as port:
        reach = network.probe("127.0.0.1", port, token, num_bytes=2**20)
    assert reach.problem is None and reach.mbit_per_s > 1
    with pytest.raises(OSError), network.answering("192.0.2.1", token):
        pass
