"""Machines of their own on one kernel: network and mount namespaces on a bridge.

Each host has its own address, host name, loopback, and a disk (tmpfs) that no other host sees. As
on many rented machines, its host name resolves to 127.0.1.1, and it has a `docker0` with the same
address as everybody's. Everything else is shared: files outside the disk, clocks, processes.

A holder process keeps the namespaces of a host alive; programs enter them with `nsenter`, which
replaces itself by the program, so that a host's processes are ordinary children of the test. The
bridge has a namespace of its own, so that this machine's network stays as it is.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

_DOCKER = "172.17.0.1/16"
# A neighbour that does not exist: what is sent to it is lost without an error, as on a bad link.
_NOBODY = "02:00:00:00:00:fe"
_PROGRAMS = ("unshare", "nsenter", "setpriv", "ip", "tc")


def missing() -> str | None:
    """Returns why hosts cannot be made on this machine; None if they can."""
    for program in _PROGRAMS:
        if shutil.which(program) is None:
            return f"needs {program}: apt install iproute2 util-linux"
    for command in (
        "mount -t tmpfs none /mnt",
        "ip link add one type bridge",
        "ip link add one type veth peer name two",
        "tc qdisc replace dev lo root tbf rate 1mbit burst 256kb latency 200ms",
    ):
        words = ["unshare", "--net", "--mount", "--uts", *command.split()]
        if subprocess.run(words, capture_output=True).returncode != 0:
            return f"needs root, and a kernel that allows `{command}` in a namespace"
    return None


def _hold(*namespaces: str) -> subprocess.Popen[bytes]:
    """Starts a process that keeps new namespaces alive; returns once they are there."""
    # Ends with the test, even with one that is killed.
    words = ["setpriv", "--pdeathsig", "KILL", "unshare", *namespaces, "sleep", "infinity"]
    holder = subprocess.Popen(words)
    deadline_s = time.monotonic() + 60
    # `unshare` becomes `sleep` only after it has left its namespaces.
    while Path(f"/proc/{holder.pid}/comm").read_text().strip() != "sleep":
        assert time.monotonic() < deadline_s and holder.poll() is None
        time.sleep(0.01)
    return holder


class Host:
    """One machine; made by `Bed.add`.

    Attributes:
        name: Host name.
        address: Address on the bridge.
        disk: Path of the host's own disk, valid in its programs only; see `path`.
        processes: Programs that `start` started.
    """

    def __init__(self, bed: Bed, name: str, number: int, disk_mb: int) -> None:
        self.name, self.address, self.disk = name, bed.address(number), bed.folder / "disk"
        self.processes: list[subprocess.Popen[str]] = []
        self._bed, self._link = bed, f"port{number}"
        self._holder = _hold("--net", "--mount", "--uts")
        hosts = bed.folder / f"hosts.{name}"
        hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {name}\n")
        pid = self._holder.pid
        bed.switch(f"ip link add {self._link} type veth peer name eth0 netns {pid}")
        bed.switch(f"ip link set {self._link} master bridge up")
        for command in (
            # Without the second in which an address of IPv6 may not be used yet.
            f"ip address add {self.address}/{bed.prefix} dev eth0" + bed.is_ipv6 * " nodad",
            "ip link set eth0 up",
            "ip link set lo up",
            "ip link add docker0 type bridge",
            f"ip address add {_DOCKER} dev docker0",
            "ip link set docker0 up",
            f"hostname {name}",
            f"mount --bind {hosts} /etc/hosts",
            f"mount -t tmpfs -o size={disk_mb}m none {self.disk}",
        ):
            self.run(*command.split())

    def start(
        self,
        *command: str,
        output: IO[str] | int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[str]:
        """Starts a program on this host, in a process group of its own.

        Args:
            command: Words of the command.
            output: File of what it prints; None: the test's own.
            env: Environment; None: the test's own.
        """
        process = subprocess.Popen(
            self._entering(command),
            stdout=output,
            stderr=subprocess.STDOUT if output is not None else None,
            env=env,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def run(self, *command: str) -> str:
        """Runs a program on this host to its end; returns what it printed."""
        return _run(*self._entering(command))

    def path(self, name: str) -> Path:
        """Returns a path of this host's disk that the test can open."""
        return Path(f"/proc/{self._holder.pid}/root") / (self.disk / name).relative_to("/")

    def cut(self) -> None:
        """Cuts this host off from all others; nobody is told."""
        self._bed.switch(f"ip link set {self._link} down")

    def heal(self) -> None:
        """Undoes `cut`."""
        self._bed.switch(f"ip link set {self._link} up")

    def lose(self, other: Host) -> None:
        """Loses all that this host sends to `other`, which still reaches this one."""
        neighbour = f"{other.address} lladdr {_NOBODY} nud permanent dev eth0"
        self.run(*f"ip neigh replace {neighbour}".split())

    def find(self, other: Host) -> None:
        """Undoes `lose`."""
        self.run(*f"ip neigh del {other.address} dev eth0".split())

    def slow(self, rate: str) -> None:
        """Limits what this host sends and receives, each, e.g. to `20mbit`."""
        shape = f"root tbf rate {rate} burst 256kb latency 200ms"
        self.run(*f"tc qdisc replace dev eth0 {shape}".split())
        self._bed.switch(f"tc qdisc replace dev {self._link} {shape}")

    def fast(self) -> None:
        """Undoes `slow`."""
        self.run(*"tc qdisc del dev eth0 root".split())
        self._bed.switch(f"tc qdisc del dev {self._link} root")

    def fill(self) -> None:
        """Fills the disk."""
        with self.path("filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(b"\0" * 2**12)
            except OSError:
                pass

    def clear(self) -> None:
        """Undoes `fill`."""
        self.path("filler").unlink()

    def kill(self) -> None:
        """Kills all processes of this host at once; its disk is lost, and it does not come back."""
        if self._holder.poll() is not None:
            return
        self._bed.switch(f"ip link del {self._link}")
        while pids := [pid for pid in self._pids() if pid != self._holder.pid]:
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            time.sleep(0.02)
        for process in self.processes:
            process.wait()
        self._holder.kill()
        self._holder.wait()

    def ranks(self) -> list[int]:
        """Returns the process ids of ranks that an agent started on this host, and that run."""
        found = []
        for pid in self._pids():
            try:
                if b"SPOTFORGE_RANK_DIR=" in Path(f"/proc/{pid}/environ").read_bytes():
                    found.append(pid)
            except OSError:
                pass
        return found

    def _entering(self, command: Sequence[str]) -> list[str]:
        enter = ["nsenter", "-t", str(self._holder.pid), "--net", "--mount", "--uts"]
        # Entering a mount namespace moves the working directory to its root.
        return [*enter, f"--wdns={os.getcwd()}", "--", *command]

    def _pids(self) -> list[int]:
        mine = os.readlink(f"/proc/{self._holder.pid}/ns/net")
        found = []
        for entry in Path("/proc").iterdir():
            try:
                # A zombie has no namespaces any more, and needs no kill.
                if entry.name.isdecimal() and os.readlink(entry / "ns/net") == mine:
                    found.append(int(entry.name))
            except OSError:
                pass
        return found


class Bed:
    """Hosts on one bridge.

    Args:
        folder: Empty folder for what the hosts need.
        names: Names of the first hosts.
        disk_mb: Size of each host's disk, in MiB.
        is_ipv6: True: hosts have addresses of IPv6 only, besides those of `docker0`.
    """

    def __init__(
        self, folder: Path, *names: str, disk_mb: int = 256, is_ipv6: bool = False
    ) -> None:
        self.folder, self.is_ipv6 = folder, is_ipv6
        self._subnet, self.prefix = ("fd00:77::", 64) if is_ipv6 else ("10.77.0.", 24)
        self.hosts: list[Host] = []
        (folder / "disk").mkdir()
        self._disk_mb, self._number = disk_mb, 0
        self._switch = _hold("--net")
        self.switch("ip link add bridge type bridge")
        self.switch("ip link set bridge up")
        for name in names:
            self.add(name)

    def switch(self, command: str) -> None:
        """Runs a command in the namespace of the bridge."""
        _run("nsenter", "-t", str(self._switch.pid), "--net", "--", *command.split())

    def close(self) -> None:
        """Ends all hosts."""
        for host in self.hosts:
            host.kill()
        self._switch.kill()
        self._switch.wait()

    def __getitem__(self, name: str) -> Host:
        """Returns the newest host of a name."""
        return next(host for host in reversed(self.hosts) if host.name == name)

    def address(self, number: int) -> str:
        """Returns the address of the host of a number, from 1."""
        return f"{self._subnet}{number}"

    def add(self, name: str) -> Host:
        """Adds a host with an empty disk and an address that none had before."""
        self._number += 1
        host = Host(self, name, self._number, self._disk_mb)
        self.hosts.append(host)
        return host

    def part(self, one: Host, other: Host) -> None:
        """Cuts two hosts off from each other only; both still reach the rest."""
        one.lose(other)
        other.lose(one)

    def join(self, one: Host, other: Host) -> None:
        """Undoes `part`."""
        one.find(other)
        other.find(one)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
