"""Keeps a gang of ranks running while machines come and go.

A generation is one start of the gang on the current machines. Its end decides what follows:

    all ranks are done              exit 0
    a rank refuses                  exit 2
    a signal to the supervisor      passed on to the ranks, which save; exit 33
    a machine goes away             the ranks save; start again on the others
    a machine is lost               kill the other ranks, which wait for it; start again on them
    a machine joins                 after a step the ranks save; start again on all
    a rank fails, or all hang       kill the other ranks; start again later, or give up: exit 1
"""

import asyncio
import errno
import ipaddress
import shlex
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core.errors import ConfigError, ExitCode
from core.process.signals import call_on_stop, hold
from core.software import software
from launch.elastic.journal import Journal, say, show
from launch.elastic.machine import Machine
from launch.elastic.nodes import Listener, Node, dismiss
from launch.elastic.patience import Patience
from launch.elastic.policy import Failure, History, choose_nodes
from launch.elastic.probing import probe
from launch.elastic.protocol import (
    Dump,
    Kill,
    Message,
    Prepare,
    Stop,
    command_digest,
)
from launch.elastic.reach import Apart, Link, largest_group, slow_links
from launch.elastic.rendezvous import End, Generation, StopCause
from parallel.launcher import TOKEN_VARIABLE
from parallel.network import address_to

_TICK_S = 0.1
_ECHO_GRACE_S = 5.0  # time in which ranks that lost a peer end by themselves
_KILL_S = 30.0  # longer than a kill takes, unless the rank is stuck in a driver call
_STACKS_S = 6.0
_ELSEWHERE = "192.0.2.1"  # of no machine (RFC 5737), so the route to it is the default one


@dataclass(frozen=True)
class Settings:
    """Settings of `python -m launch supervise`; its `--help` describes them."""

    command: Sequence[str]
    nproc: int | None
    listen: tuple[str, int] | None
    token: str | None
    shows_token: bool  # in the command that joins, since nobody else knows the token
    nodes: int
    multiple_of: int
    hang_timeout_s: float
    startup_timeout_s: float
    grace_s: float
    events: Path | None


class Supervisor:
    """Runs a command on all machines until it is done, refused, stopped, or fails repeatedly."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._journal = Journal(settings.events)
        self._history = History()
        self._patience = Patience(settings.hang_timeout_s)
        self._changed = asyncio.Event()
        self._nodes: list[Node] = []  # in the order in which they joined
        self._unreliable: dict[str, Apart] = {}  # by address; machines that were lost
        self._gang: Generation | None = None  # while one runs
        self._generation = 0  # number of the running or last generation
        self._world_size = 0  # of the same generation
        self._stop: str | None = None  # name of the first signal
        self._machine: Machine | None = None
        self._listener: Listener | None = None

    async def run(self) -> ExitCode:
        """Starts the gang, and again as often as needed.

        Returns:
            The exit code of the supervisor.

        Raises:
            ConfigError: The settings do not fit this machine.
        """
        call_on_stop(self._told_to_stop)
        code: ExitCode | None = None
        try:
            await self._open()
            while code is None:
                code = await self._run_generation()
        finally:
            hold()
            await self._close(ExitCode.FAILED if code is None else code)
        return code

    # The machines

    async def _open(self) -> None:
        settings = self._settings
        if settings.nproc != 0:
            # Machine and node refer to each other: the lambda looks `node` up when it is called.
            self._machine = Machine(settings.command, settings.nproc, lambda m: node.receive(m))
            node = Node("this machine", "127.0.0.1", settings.nproc or 0, self._machine.receive)
            self._nodes.append(node)
        if settings.listen is not None:
            host, port = settings.listen
            digest = command_digest(settings.command)
            self._listener = Listener(
                digest,
                settings.token,
                software(),
                settings.nproc != 0,
                self._joined,
                self._changed,
                lambda text: self._tell("refused", text),
            )
            try:
                address = await self._listener.open(host, port)
                self._say(f"listening on {address}")
                if settings.shows_token:
                    self._say(f"machines join with: {_join_command(address, settings)}")
            except OSError as e:
                fix = "choose another port"
                if e.errno == errno.EADDRNOTAVAIL or isinstance(e, socket.gaierror):
                    fix = "give an address of this machine, or only a port"
                raise ConfigError("--listen", f"{host}:{port}", e.strerror or str(e), fix) from e

    async def _close(self, code: ExitCode) -> None:
        for node in self._nodes:
            dismiss(node, code, f"the supervisor ended with exit code {code.value}")
        if self._listener is not None:
            await self._listener.close()
        if self._machine is not None:
            self._machine.close()
        self._journal.flush()

    def _joined(self, node: Node) -> None:
        self._nodes.append(node)
        apart = self._unreliable.get(node.address)
        if apart is not None:
            node.apart = apart
        later = ""
        if apart is not None and apart.num_losses > 1:
            apart.leave_out()
            later = f"; it was lost {apart.num_losses} times: running ranks do without it for "
            later += f"{apart.wait_s:.0f} s"
        self._tell("join", f"{node.name} joined ({_count(node.nproc, 'rank')}){later}")

    async def _tick(self) -> None:
        """Waits for a change, and drops machines that are lost or leave and have no ranks."""
        try:
            await asyncio.wait_for(self._changed.wait(), _TICK_S)
        except TimeoutError:
            pass
        self._changed.clear()
        if self._machine is not None:
            self._machine.poll()
        self._journal.flush()
        # Nodes of the running gang stay until its end: `Generation.end` decides what their loss
        # means.
        running = self._gang.nodes if self._gang is not None else ()
        for node in [node for node in self._nodes if node not in running]:
            if node.lost is not None or node.leaving is not None:
                self._drop(node)

    def _drop(self, node: Node) -> None:
        self._nodes.remove(node)
        left = sum(other.nproc for other in self._nodes)
        rest = f"going on with {left}" if left else "none is left"
        who = f"{node.name} ({_count(node.nproc, 'rank')})"
        if node.lost is not None:
            # All nodes of a cloud on this machine have the same address.
            if not ipaddress.ip_address(node.address).is_loopback:
                self._unreliable[node.address] = node.apart
                node.apart.num_losses += 1
            self._tell("lost", f"lost {who}: {node.lost}; {rest}")
        else:
            self._tell("leave", f"{who} goes away: {node.leaving}; {rest}")
            dismiss(node, ExitCode.START_AGAIN, f"{node.leaving}")

    # One generation

    async def _run_generation(self) -> ExitCode | None:
        """Runs one generation; returns the exit code, or None to start another one."""
        gang = await self._assemble()
        if isinstance(gang, ExitCode):
            return gang
        self._gang, self._generation, self._world_size = gang, gang.number, gang.world_size
        self._tell(
            "start",
            f"start {gang.number}: {_count(gang.world_size, 'rank')} on "
            f"{_count(len(gang.nodes), 'node')}"
            + (f" after step {self._history.step}" if self._history.step is not None else ""),
            quiet=gang.number == 1 and self._listener is None,
        )
        self._patience.begin()
        gang.start(self._listener.address if self._listener else "127.0.0.1")
        end = await self._watch(gang)
        # Before any kill: ranks that are killed below would look like the cause.
        failure = gang.failure(end)
        if end is End.HUNG:
            self._patience.relax()
            await self._show_stacks(gang)
        # Ranks that wait for a lost or hanging peer do not react to SIGTERM. After a failure they
        # may still be writing their own errors.
        await self._end_ranks(gang, at_once=end in (End.LOST, End.OVERDUE, End.HUNG))
        self._history.reached(gang.step)
        self._gang = None
        if failure is not None:
            return await self._settle_failure(gang, failure)
        return await self._settle(gang, end)

    async def _assemble(self) -> Generation | ExitCode:
        """Waits for enough machines; returns a generation, or an exit code if it gives up."""
        asked: list[Node] = []
        missing = 0
        while self._stop is None:
            await self._tick()
            if not self._nodes and self._listener is None:
                return ExitCode.FAILED  # `_drop` has printed why this machine is gone
            # Only the first start waits for all nodes; later ones use those that are left.
            wanted = self._settings.nodes if self._generation == 0 else 1
            if len(self._nodes) < wanted:
                if missing != (missing := wanted - len(self._nodes)):
                    self._say(f"waiting for {_count(missing, 'node')} to join")
            # The same nodes have just answered that they make no gang: wait for another one, or
            # until one that was left out is due.
            elif self._nodes != asked or any(node.apart.is_due() for node in self._nodes):
                asked = list(self._nodes)
                gang = await self._prepare(asked)
                if gang is not None:
                    return gang
        return ExitCode.START_AGAIN

    async def _prepare(self, nodes: Sequence[Node]) -> Generation | ExitCode | None:
        """Asks `nodes` how many ranks they can run now; returns None if that makes no gang yet."""
        for node in nodes:
            node.ready = None
            node.send(Prepare())
        while any(node.ready is None and node.lost is None for node in nodes):
            await self._tick()
            if self._stop is not None:
                return None
        ready = [n for n in nodes if n.ready is not None and n.lost is None and n.leaving is None]
        for node in ready:
            if node.ready is not None and node.ready.problem is not None:
                self._say(f"{node.name}: {node.ready.problem}")
        there = ready
        links = await self._probe(there)
        if self._stop is not None:
            return None
        ready = [node for node in self._group(there, links) if node.lost is None]
        for link, others in slow_links(links):
            # Bytes came to the machine that has asked.
            source, target = there[link.target].name, there[link.source].name
            self._tell(
                "slow",
                f"{source} -> {target}: {link.mbit_per_s:.1f} Mbit/s, others {others:.0f}",
                source=source,
                target=target,
                mbit_per_s=link.mbit_per_s or 0.0,
                others_mbit_per_s=others,
            )
        chosen = choose_nodes([node.nproc for node in ready], self._settings.multiple_of)
        if chosen:
            return Generation(self._generation + 1, [ready[i] for i in chosen])
        nprocs = " + ".join(str(node.nproc) for node in ready if node.nproc) or "no"
        can = f"there are machines for {nprocs} ranks"
        multiple_of = self._settings.multiple_of
        if self._listener is not None:
            self._say(f"waiting for nodes to join: {can}, --multiple-of={multiple_of}")
            return None
        if self._generation == 0 and nprocs != "no":
            raise ConfigError("--multiple-of", multiple_of, can, "change it or --nproc")
        self._tell("fail", f"cannot start again: {can}, --multiple-of={multiple_of}")
        return ExitCode.FAILED

    async def _probe(self, nodes: Sequence[Node]) -> list[Link]:
        """Returns how nodes reach each other; incomplete after a signal to the supervisor."""
        if self._listener is None:
            return []
        return await probe(nodes, self._listener.address, lambda: self._stop is not None)

    def _group(self, nodes: Sequence[Node], links: Sequence[Link]) -> list[Node]:
        """Returns the largest group of nodes that reach each other, and leaves the others out."""
        group = largest_group([node.nproc for node in nodes], links)
        for i, node in enumerate(nodes):
            if i in group:
                node.apart.take_back()
                continue
            node.apart.leave_out()
            broken = [x for x in links if x.problem and i in (x.source, x.target)]
            broken = [x for x in broken if {x.source, x.target} - {i} <= set(group)] or broken
            link = broken[0]
            self._tell(
                "apart",
                f"{nodes[link.source].name} does not reach {nodes[link.target].name}: "
                f"{link.problem}; going on without {node.name}, which is tried again in "
                f"{node.apart.wait_s:.0f} s",
            )
        return [nodes[i] for i in group]

    async def _probe_again(self) -> None:
        """Probes all nodes while a gang runs on some; takes back those that can be reached."""
        nodes = [node for node in self._nodes if node.lost is None and node.leaving is None]
        links = await self._probe(nodes)
        group = largest_group([node.nproc for node in nodes], links)
        for i, node in enumerate(nodes):
            if node.apart.is_left_out:
                if i in group:
                    self._tell("apart", f"{node.name} is reached by all again")
                    node.apart.take_back()
                else:
                    node.apart.leave_out()

    async def _watch(self, gang: Generation) -> End:
        """Watches a gang until it ended or has to be ended; tells it to stop when needed."""
        probing: asyncio.Task[None] | None = None
        try:
            while True:
                await self._tick()
                end = gang.end()
                if end is not None:
                    return end
                if gang.stop_cause is None and not gang.has_failure:
                    if self._hangs(gang):
                        return End.HUNG
                    self._stop_if_needed(gang)
                if probing is not None and probing.done():
                    probing.result()
                    probing = None
                if probing is None and any(node.apart.is_due() for node in self._nodes):
                    probing = asyncio.create_task(self._probe_again())
        finally:
            if probing is not None:
                probing.cancel()

    def _hangs(self, gang: Generation) -> bool:
        # Before the first step ranks may compile, download or tokenize for a long time.
        if not gang.has_stepped():
            return gang.silence_s() > self._settings.startup_timeout_s
        patience = self._patience
        patience.observe(gang.ranks)
        if gang.silence_s() <= patience.limit_s:
            return False
        if patience.usual_s is not None:
            usual = f"usually at most {patience.usual_s:.1f} s"
            self._say(f"no rank beat for {gang.silence_s():.0f} s, {usual} in this phase")
        return True

    def _stop_if_needed(self, gang: Generation) -> None:
        leaving = [node for node in gang.nodes if node.leaving is not None]
        if self._stop is not None:
            self._stop_ranks(gang, StopCause.SIGNAL)
        elif leaving:
            self._say(f"{leaving[0].name} is about to go away: {leaving[0].leaving}")
            self._stop_ranks(gang, StopCause.LEAVE)
        elif any(rank.exit == ExitCode.START_AGAIN for rank in gang.ranks):
            self._stop_ranks(gang, StopCause.OWN_ACCORD)
        # Only after a step: machines that join one by one would otherwise restart a gang that
        # never gets to train.
        elif gang.has_stepped() and (size := self._possible_size()) > gang.world_size:
            self._tell("grow", f"stopping {_count(gang.world_size, 'rank')} to go on with {size}")
            self._stop_ranks(gang, StopCause.GROW)

    def _possible_size(self) -> int:
        there = [n for n in self._nodes if n.lost is None and n.leaving is None]
        nprocs = [node.nproc for node in there if not node.apart.is_left_out]
        return sum(nprocs[i] for i in choose_nodes(nprocs, self._settings.multiple_of))

    def _stop_ranks(self, gang: Generation, cause: StopCause) -> None:
        gang.note_leaving()  # before Stop: after it, ranks report our SIGTERM as the reason
        gang.stopping(cause, self._settings.grace_s)
        if cause is not StopCause.OWN_ACCORD:
            self._send(gang, Stop())

    async def _show_stacks(self, gang: Generation) -> None:
        self._send(gang, Dump())
        deadline = time.monotonic() + _STACKS_S
        while any(n.stacks is None for n in gang.nodes) and time.monotonic() < deadline:
            await self._tick()
        for node in gang.nodes:
            for rank, stack in zip(node.ranks, node.stacks or [], strict=False):
                where = f"rank {rank.rank} on {node.name}, {rank.phase} {rank.step}"
                self._say(f"stacks of {where}:" if stack else f"no stacks of {where}")
                show(stack)

    async def _end_ranks(self, gang: Generation, at_once: bool) -> None:
        """Ends the ranks that still run, and dismisses nodes whose ranks survive SIGKILL."""
        if gang.is_running and not at_once:
            self._send(gang, Stop())
            await self._wait_for_end(gang, _ECHO_GRACE_S)
        if gang.is_running:
            self._send(gang, Kill())
            await self._wait_for_end(gang, _KILL_S)
        for node in gang.nodes:
            if node.is_running and node.lost is None:
                dismiss(node, ExitCode.FAILED, "a rank on it cannot be killed")

    async def _wait_for_end(self, gang: Generation, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while gang.is_running and time.monotonic() < deadline:
            await self._tick()

    # What follows from it

    async def _settle(self, gang: Generation, end: End) -> ExitCode | None:
        is_local = self._listener is None
        if end is End.FINISHED:
            self._tell("finish", "all ranks are done", quiet=is_local)
            return ExitCode.FINISHED
        if end is End.REFUSED:
            self._tell("fail", "a rank refused to run (exit code 2)", quiet=is_local)
            return ExitCode.BAD_CONFIG
        if end is End.LOST:
            # After a request to stop, the lost node may have taken unsaved steps with it: that is
            # a failure. In all other cases the next generation repeats them.
            if self._stop is not None and gang.stop_cause is not None and gang.step is not None:
                self._tell("fail", "a node was lost before the ranks had saved")
                return ExitCode.FAILED
            return None
        if gang.stop_cause in (None, StopCause.OWN_ACCORD):
            gang.note_leaving()
            # Starting again without a known reason could repeat an endless stop.
            if self._stop is None and all(node.leaving is None for node in gang.nodes):
                self._tell("stop", "the ranks stopped, and none says why")
                return ExitCode.START_AGAIN
        await self._tick()  # drops the nodes that leave
        # A supervisor without ranks of its own (nproc=0) stays, since other machines may join.
        goes_on = bool(self._nodes) or self._settings.nproc == 0
        return None if goes_on and self._stop is None else ExitCode.START_AGAIN

    async def _settle_failure(self, gang: Generation, failure: Failure) -> ExitCode | None:
        if self._stop is not None:
            self._tell(failure.event, failure.text)
            return ExitCode.START_AGAIN if gang.stop_cause is None else ExitCode.FAILED
        self._history.failed(failure.error, failure.step)
        why = self._history.crash_loop()
        if why is not None:
            self._tell(failure.event, failure.text, quiet=True)
            if failure.traceback is not None:
                show(failure.traceback)
            self._tell("crash_loop", f"{failure.text}; giving up: {why}")
            return ExitCode.FAILED
        wait_s = self._history.backoff_s()
        num_failures = _count(self._history.num_failures, "failure")
        self._tell(
            failure.event,
            f"{failure.text}; starting again in {wait_s:.1f} s ({num_failures} without progress)",
        )
        deadline = time.monotonic() + wait_s
        while time.monotonic() < deadline and self._stop is None:
            await self._tick()
        return None

    # Words

    def _told_to_stop(self, signal_name: str) -> None:
        if self._stop is not None:
            return  # already stopping
        self._stop = signal_name
        if self._gang is None:
            self._tell("stop", f"{signal_name} while no rank runs: stopping")
        else:
            ranks = _count(self._world_size, "rank")
            grace = f"{self._settings.grace_s:g} s to save"
            self._tell("stop", f"{signal_name}: stopping {ranks}, with {grace}")
        self._changed.set()

    def _send(self, gang: Generation, message: Message) -> None:
        for node in gang.nodes:
            node.send(message)

    def _say(self, text: str) -> None:
        say("supervise", text)

    def _tell(self, event: str, text: str, quiet: bool = False, **details: float | str) -> None:
        """Writes an event, and prints its text unless `quiet`."""
        if not quiet:
            self._say(text)
        step = self._gang.step if self._gang is not None else None
        step = step if step is not None else self._history.step
        self._journal.write(event, self._generation, self._world_size, step, text, **details)


def _join_command(address: str, settings: Settings) -> str:
    host, _, port = address.rpartition(":")
    if host in ("0.0.0.0", "::"):
        try:
            host = address_to(_ELSEWHERE)
        except OSError:
            host = socket.gethostname()
    where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    join = shlex.join(["python", "-m", "launch", "join", where, "--", *settings.command])
    return f"{TOKEN_VARIABLE}={settings.token} {join}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"
