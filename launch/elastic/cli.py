"""The command line of `python -m launch supervise` and `python -m launch join`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.process.child import check_program
from core.process.signals import exit_at_once
from core.settings.options import count, number

_SUPERVISE = """\
Starts COMMAND once for each rank, on this machine and on those that join it, and starts all of them
again when one fails, hangs or is lost, when a machine goes away and when one joins. COMMAND finds
its rank in RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, ... as under torchrun, and resumes from its
last checkpoint by itself. Several --nodes without --listen are process groups on this machine: a
simulated cloud, where `kill -TERM -PGID` is a notice and `kill -KILL -PGID` a loss."""

_SUPERVISE_EXAMPLES = """\
two ranks here:
  python -m launch supervise --nproc 2 -- python -m trainer experiment=stdlib

all GPUs of this machine and of each that joins, from the second machine on:
  python -m launch supervise --listen 29400 --nodes 2 -- python -m trainer experiment=stdlib
  python -m launch join 10.0.0.1:29400 -- python -m trainer experiment=stdlib

a cloud on this machine, whose two nodes last two minutes on average and have 30 s of notice:
  python -m launch supervise --nodes 2 --interrupt-every 120 --notice 30 -- \\
      python -m trainer experiment=stdlib

A machine joins only if it has the supervisor's token: SPOTFORGE_TOKEN, or --token-file. A
supervisor that listens beyond loopback and was given none makes one, and prints the command that
joins with it. What the machines then send each other, gradients among it, is not encrypted: see
docs/surviving.md.

exit codes: 0 finished; 33 stopped, with all steps saved, start it again; 2 refused; 1 failed
"""

_JOIN = """\
Runs COMMAND on this machine as ranks of a supervisor elsewhere, for as long as there is one. On
SIGTERM all ranks save, and the others go on without this machine."""

_JOIN_EXAMPLES = """\
example:
  python -m launch join 10.0.0.1:29400 -- python -m trainer experiment=stdlib

COMMAND must be the supervisor's, word for word: it is never sent, only its digest is compared. So
must be the token, in SPOTFORGE_TOKEN or --token-file: it is never sent either, only proved. The
machine must have the versions of the code, Python, torch, ... that the others have.

exit codes: the supervisor's; 33 if this machine left; 1 if no supervisor answered in time
"""


def add_verbs(commands: Any) -> None:
    """Adds `supervise` and `join` to the parsers of `python -m launch`.

    Args:
        commands: Object that `add_subparsers` returned.
    """
    _add_supervise(commands)
    _add_join(commands)


def _add_supervise(commands: Any) -> None:
    supervise = commands.add_parser(
        "supervise",
        help="start ranks here and on machines that join, and restart them",
        usage="python -m launch supervise [options] -- COMMAND...",
        description=_SUPERVISE,
        epilog=_SUPERVISE_EXAMPLES,
    )
    supervise.set_defaults(run=_supervise, refuse=supervise.error)
    _add_nproc(supervise, "; 0: this machine only supervises", least=0)
    supervise.add_argument(
        "--listen",
        metavar="[HOST:]PORT",
        type=_address,
        help="address at which machines can join (default: none; HOST: 0.0.0.0)",
    )
    _add_token(supervise, "; made if it does not exist")
    supervise.add_argument(
        "--nodes",
        metavar="N",
        type=count(),
        default=1,
        help="machines to wait for before the first start, with this one (default: 1)",
    )
    supervise.add_argument(
        "--multiple-of",
        metavar="M",
        type=count(),
        default=1,
        help="number that must divide the number of ranks (default: 1)",
    )
    for name, default_s, what in (
        (
            "hang-timeout",
            600,
            "without a heartbeat of any rank that count as a hang, at most: after 20 steps, ten "
            "times the longest usual silence counts, or 20 s if that is longer",
        ),
        ("startup-timeout", 1800, "that count as a hang before the first step is done"),
        ("grace", 600, "for ranks to save before they are killed"),
    ):
        supervise.add_argument(
            f"--{name}",
            metavar="S",
            type=number(),
            default=float(default_s),
            help=f"seconds {what} (default: {default_s})",
        )
    supervise.add_argument(
        "--events",
        metavar="FILE",
        type=Path,
        help="append events to FILE, as JSON lines, once its folder exists",
    )
    cloud = supervise.add_argument_group("the cloud on this machine: --nodes without --listen")
    cloud.add_argument(
        "--interrupt-every",
        metavar="S",
        type=number(),
        help="mean seconds after which a node is preempted (default: never)",
    )
    for name, default_s, what in (
        ("notice", 0, "from its SIGTERM to SIGKILL; 0: no notice"),
        ("away", 10, "until another node replaces it"),
    ):
        cloud.add_argument(
            f"--{name}",
            metavar="S",
            type=number(0),
            default=float(default_s),
            help=f"seconds {what} (default: {default_s})",
        )
    cloud.add_argument(
        "--seed", metavar="N", type=int, default=0, help="seed of the times (default: 0)"
    )


def _add_join(commands: Any) -> None:
    join = commands.add_parser(
        "join",
        help="run ranks here for a supervisor on another machine",
        usage="python -m launch join HOST:PORT [options] -- COMMAND...",
        description=_JOIN,
        epilog=_JOIN_EXAMPLES,
    )
    join.add_argument(
        "supervisor", metavar="HOST:PORT", type=_peer, help="address of the supervisor"
    )
    join.set_defaults(run=_join, refuse=join.error)
    _add_token(join, "")
    _add_nproc(join, "", least=1)
    join.add_argument(
        "--grace",
        metavar="S",
        type=number(),
        default=600.0,
        help="seconds after SIGTERM within which this machine leaves (default: 600)",
    )
    join.add_argument(
        "--wait",
        metavar="S",
        type=number(),
        default=300.0,
        help="seconds to wait for a supervisor, at the start or after losing it (default: 300)",
    )


def _add_nproc(parser: argparse.ArgumentParser, more: str, least: int) -> None:
    def nproc(text: str) -> int | None:
        return None if text == "auto" else count(least)(text)

    parser.add_argument(
        "--nproc",
        metavar="N",
        type=nproc,
        default=None,
        help=f"ranks on this machine; auto: one for each GPU, else 1 (default: auto){more}",
    )


def _add_token(parser: argparse.ArgumentParser, more: str) -> None:
    parser.add_argument(
        "--token-file",
        metavar="FILE",
        type=Path,
        help=f"file with the token of the run{more} (default: the variable SPOTFORGE_TOKEN)",
    )


def _supervise(options: argparse.Namespace, command: Sequence[str]) -> int:
    if options.listen is None and options.nproc == 0:
        options.refuse("--nproc 0 without --listen leaves no machine to run on")
    is_local_cloud = options.listen is None and options.nodes > 1
    if options.interrupt_every is not None and not is_local_cloud:
        options.refuse("--interrupt-every is for --nodes 2 or more, without --listen")
    if options.token_file is not None and options.listen is None:
        options.refuse("--token-file is for machines that join: it needs --listen")
    _check(options, command)
    import asyncio  # imported here, with what needs it, so that --help is fast

    from launch.elastic.local_cloud import free_port
    from launch.elastic.supervisor import Settings, Supervisor
    from launch.elastic.token import new_token, read_token

    token = read_token(options.token_file, makes=True)
    makes_token = token is None and options.listen is not None and _is_open(options.listen[0])
    settings = Settings(
        command=command,
        # In a local cloud only the nodes have ranks, so that any of them can be lost.
        nproc=0 if is_local_cloud else options.nproc,
        listen=("127.0.0.1", free_port()) if is_local_cloud else options.listen,
        token=new_token() if makes_token else token,
        shows_token=makes_token,
        nodes=options.nodes,
        multiple_of=options.multiple_of,
        hang_timeout_s=options.hang_timeout,
        startup_timeout_s=options.startup_timeout,
        grace_s=options.grace,
        events=options.events,
    )
    if is_local_cloud:
        return asyncio.run(_run_cloud(settings, options))
    return asyncio.run(Supervisor(settings).run())


async def _run_cloud(settings: Any, options: argparse.Namespace) -> int:
    """Runs the supervisor and a local cloud with its nodes; returns the exit code."""
    import asyncio

    from launch.elastic.local_cloud import Interruptions, LocalCloud
    from launch.elastic.supervisor import Supervisor

    cloud = LocalCloud(
        settings.command,
        settings.nodes,
        options.nproc or 1,
        settings.listen[1],
        Interruptions(options.interrupt_every, options.notice, options.away, options.seed),
    )
    supervising = asyncio.create_task(Supervisor(settings).run())
    keeping_up = asyncio.create_task(cloud.run())
    try:
        await asyncio.wait([supervising, keeping_up], return_when=asyncio.FIRST_COMPLETED)
        if keeping_up.done():  # it ends only with an error
            supervising.cancel()
            await keeping_up
        return await supervising
    finally:
        keeping_up.cancel()
        await cloud.close()


def _join(options: argparse.Namespace, command: Sequence[str]) -> int:
    _check(options, command)
    import asyncio

    from launch.elastic.agent import Agent, Membership
    from launch.elastic.token import read_token

    host, port = options.supervisor
    token = read_token(options.token_file)
    membership = Membership(host, port, command, options.nproc, options.grace, options.wait, token)
    return asyncio.run(Agent(membership).run())


def _is_open(host: str) -> bool:
    """Returns whether other machines may reach an address at which this one listens."""
    import ipaddress

    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host != "localhost"  # a name


def _check(options: argparse.Namespace, command: Sequence[str]) -> None:
    if not command:
        options.refuse("say what to run: -- COMMAND...")
    exit_at_once()
    check_program(command)


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} has no valid port; write 10.0.0.1:29400")
    return host.strip("[]") or "0.0.0.0", int(port)


def _peer(text: str) -> tuple[str, int]:
    if text.startswith(":"):
        raise argparse.ArgumentTypeError(f"{text!r} has no host; write 10.0.0.1:29400")
    return _address(text)
