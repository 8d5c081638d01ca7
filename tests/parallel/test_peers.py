"""Disks that ranks share or do not, and files that they read from each other."""

import socket
import urllib.error
import urllib.request
from pathlib import Path

import pytest

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
    """Ranks 0 and 2 are on one disk, 1 and 3 on others; nothing is created."""
    disks = [tmp_path / name for name in "abac"]
    for disk in set(disks):
        disk.mkdir()
    found = run_distributed(leaders, 4, [disk / "runs" / "name" for disk in disks], apart=True)
    assert [f[0] for f in found] == [[0, 1, 0, 3]] * 4
    assert [f[1] for f in found] == [[0, 2], [1], [0, 2], [3]]
    assert all(list(disk.iterdir()) == [] for disk in disks)


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
