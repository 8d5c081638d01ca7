"""Disks that ranks share or do not, and files that they read from each other."""

import contextlib
import http.client
import os
import socket
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest

from parallel import disks, peers
from parallel.disks import find_disks
from parallel.peers import PeerFiles
from parallel.world import join_world
from tests.distributed import run_distributed


def leaders(folders):
    with join_world() as world:
        folder = Path(folders[world.rank])
        disks = find_disks(world, folder)
        return list(disks.leader_of), disks.sharers


def test_ranks_that_see_the_same_files_share_a_disk(tmp_path):
    """Ranks 0 and 2 are on one disk, 1 and 3 on others; nothing is left, not by others either."""
    disks = [tmp_path / name for name in "abac"]
    for disk in set(disks):
        disk.mkdir()
        left = disk / f".disk-{'0a' * 8}"
        left.touch()
        os.utime(left, (0, 0))
    found = run_distributed(leaders, 4, [disk / "runs" / "name" for disk in disks], apart=True)
    assert [f[0] for f in found] == [[0, 1, 0, 3]] * 4
    assert [f[1] for f in found] == [[0, 2], [1], [0, 2], [3]]
    assert all(list(disk.iterdir()) == [] for disk in disks)


def test_a_file_of_another_machine_may_be_seen_late(tmp_path, monkeypatch):
    other = tmp_path / ".disk-other"
    monkeypatch.setattr(disks.time, "sleep", lambda _: other.touch())
    told = iter([lambda token: [other.name, token], lambda own: [(0, "a"), own]])
    world = SimpleNamespace(
        rank=1,
        world_size=2,
        local_rank=0,
        local_world_size=1,
        together=contextlib.nullcontext,
        gather=lambda own: next(told)(own),
    )
    assert find_disks(world, tmp_path).is_shared


def read_from_each_other(folder):
    with join_world() as world:
        own = Path(folder) / str(world.rank)
        own.mkdir()
        (own / "inside.bin").write_bytes(bytes(range(200)) * (world.rank + 1))
        (Path(folder) / "outside").write_text("secret")
        other = 1 - world.rank
        disks = find_disks(world, own)
        with PeerFiles(world, disks, {"files": own}) as peers:
            size = peers.size_of(other, "files", "inside.bin")
            part = peers.read(other, "files", "inside.bin", 150, 50)
            refused = []
            for name, path in (("files", "missing"), ("files", "../outside"), ("other", "x")):
                try:
                    peers.read(other, name, path, 0, 1)
                except FileNotFoundError:
                    refused.append(path)
            try:
                peers.read(other, "files", "inside.bin", size - 10, 20)
            except OSError as e:
                refused.append("beyond")
                assert "10 of 20" in str(e)
            host, port, _ = peers._addresses[other]
            try:
                urllib.request.urlopen(f"http://{host}:{port}/files/inside.bin", timeout=60)
            except urllib.error.HTTPError as e:
                refused.append(e.code)
        world.barrier()
        with pytest.raises(OSError):
            socket.create_connection((host, port), 5)
        return size, part, refused


def test_a_rank_reads_parts_of_files_on_another_disk(tmp_path):
    found = run_distributed(read_from_each_other, 2, str(tmp_path), apart=True)
    for rank, (size, part, refused) in enumerate(found):
        assert size == 200 * (2 - rank)
        assert part == bytes(range(150, 200))
        assert refused == ["missing", "../outside", "x", "beyond", 403]


@pytest.fixture
def server(tmp_path, monkeypatch):
    def ask(*_):
        raise AssertionError("the name of the machine was asked for")

    monkeypatch.setattr(socket, "getfqdn", ask)
    (tmp_path / "file").write_bytes(b"content")
    server = peers._Server("127.0.0.1", "token", {"files": tmp_path})
    yield server
    server.close()


def as_rank(server):
    """A connection that is kept after it has shown the token."""
    rank = http.client.HTTPConnection(*server.server_address, timeout=60)
    assert read_as(rank) == b"content"
    return rank


def read_as(rank):
    rank.request("GET", "/files/file", headers={"Authorization": "token"})
    return rank.getresponse().read()


def test_a_stranger_is_hung_up_on_and_a_rank_is_not(server, monkeypatch):
    with contextlib.closing(as_rank(server)) as rank:
        monkeypatch.setattr(peers, "_STRANGER_S", 0.0)
        with socket.create_connection(server.server_address, 60) as stranger:
            stranger.sendall(b"GET")
            assert stranger.recv(1) == b""
        assert read_as(rank) == b"content"
    assert server._strangers == {}


def test_of_too_many_strangers_the_oldest_leave(server, monkeypatch):
    monkeypatch.setattr(peers, "_STRANGER_S", 1e9)
    monkeypatch.setattr(peers, "_MAX_STRANGERS", 2)
    with contextlib.ExitStack() as stack:
        address = server.server_address
        strangers = [stack.enter_context(socket.create_connection(address, 60)) for _ in range(5)]
        assert [stranger.recv(1) for stranger in strangers[:3]] == [b""] * 3
        stack.enter_context(contextlib.closing(as_rank(server)))
        assert len(server._strangers) <= 2
