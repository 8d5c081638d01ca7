"""The agent behind `python -m launch join`: runs ranks for a supervisor on another machine."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from core.errors import ConfigError, ExitCode, SpotforgeError
from core.process.signals import call_on_stop, hold
from core.software import software
from launch.elastic.journal import say
from launch.elastic.machine import Machine
from launch.elastic.protocol import (
    MAX_LINE_BYTES,
    SUPERVISOR_SILENCE_S,
    VERSION,
    Challenge,
    Dismiss,
    Hello,
    Leaving,
    Message,
    ProtocolError,
    Refused,
    Stop,
    Welcome,
    command_digest,
    encode,
    receive,
    said_in,
)
from launch.elastic.token import is_proof, new_challenge, proof_of
from parallel.launcher import TOKEN_VARIABLE

_POLL_S = 0.1
_MAX_BACKOFF_S = 10.0
_LONE_SILENCE_S = 50.0  # with the time that a kill takes, they are gone within a minute


@dataclass(frozen=True)
class Membership:
    """Settings of `python -m launch join`; its `--help` describes them."""

    host: str
    port: int
    command: Sequence[str]
    nproc: int | None
    grace_s: float
    wait_s: float
    token: str | None


class Agent:
    """Joins a supervisor, follows its messages, and joins again after losing it."""

    def __init__(self, membership: Membership) -> None:
        self._membership = membership
        self._stop: str | None = None  # name of the first signal
        self._stop_by = 0.0
        self._changed = asyncio.Event()

    async def run(self) -> int:
        """Serves a supervisor, and its successors, until one dismisses this machine.

        Returns:
            The exit code that the supervisor sends, or 33 if this machine leaves earlier.

        Raises:
            ConfigError: The supervisor refuses this machine, or the peer is not a supervisor.
            SpotforgeError: No supervisor answers, or the GPU driver does not.
        """
        call_on_stop(self._told_to_stop)
        try:
            while True:
                connection = await self._connect()
                if connection is None:
                    return ExitCode.START_AGAIN
                code = await self._serve(*connection)
                if code is not None:
                    return code
        finally:
            hold()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """Connects, with retries for `wait_s`; returns None if a signal came."""
        host, port = self._membership.host, self._membership.port
        wait_s = self._membership.wait_s
        deadline, backoff_s = time.monotonic() + wait_s, 0.25
        while self._stop is None:
            try:
                opening = asyncio.open_connection(host, port, limit=MAX_LINE_BYTES)
                return await asyncio.wait_for(opening, SUPERVISOR_SILENCE_S)
            except (OSError, TimeoutError) as e:
                if time.monotonic() > deadline:
                    raise SpotforgeError(
                        f"no supervisor at {host}:{port} for {wait_s:.0f} s: {e}"
                    ) from e
                if backoff_s == 0.25:
                    self._say(f"no supervisor at {host}:{port} yet; trying for {wait_s:.0f} s")
            backoff_s = min(_MAX_BACKOFF_S, 2 * backoff_s)
            # The random factor spreads the machines that lost one supervisor together.
            try:
                await asyncio.wait_for(self._changed.wait(), backoff_s * random.uniform(0.5, 1.5))
            except TimeoutError:
                pass
        return None

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> int | None:
        """Serves one supervisor; returns the exit code, or None if the connection is lost."""

        def send(message: Message) -> None:
            if not writer.is_closing():
                writer.write(encode(message))

        machine = Machine(self._membership.command, self._membership.nproc, send)
        try:
            await self._introduce(machine, reader, writer)
            return await self._obey(machine, reader, send)
        except (ProtocolError, EOFError, OSError, TimeoutError) as e:
            lost, running = f"lost the supervisor: {_reason(e)}", machine.is_running
            if running and _is_dead(e):
                self._say(f"{lost}; its ranks save")
                writer.close()
                running = not await self._let_save(machine)
            else:
                self._say(f"{lost}; killing its ranks" if running else lost)
            if self._stop is not None:
                return ExitCode.FAILED if running else ExitCode.START_AGAIN
            return None
        finally:
            # Ranks of a lost supervisor must end before this machine joins its successor, which
            # starts others: two generations must not write to one run directory.
            machine.close()
            writer.close()

    async def _let_save(self, machine: Machine) -> bool:
        """Tells the ranks to save and end; returns whether they did.

        They have the grace period, unless they beat no more: their peers are lost, too.
        """
        deadline = time.monotonic() + self._membership.grace_s
        machine.receive(Stop())
        while machine.is_running:
            if machine.silence_s > _LONE_SILENCE_S:
                self._say(f"its ranks did not beat for {_LONE_SILENCE_S:.0f} s: killed")
                return False
            if time.monotonic() > (deadline if self._stop is None else self._stop_by):
                self._say(f"its ranks did not end within {self._membership.grace_s:g} s: killed")
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def _introduce(
        self, machine: Machine, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nproc, problem = await machine.offer()
        if problem is not None:
            raise SpotforgeError(problem)
        where = f"{self._membership.host}:{self._membership.port}"
        try:
            challenge = await asyncio.wait_for(receive(reader), SUPERVISOR_SILENCE_S)
            if not isinstance(challenge, Challenge):
                raise ProtocolError("expected Challenge")
            if challenge.version != VERSION:
                rule = f"its protocol has version {challenge.version}, this machine's {VERSION}"
                fix = "start the same version of spotforge on both"
                raise ConfigError("HOST:PORT", where, rule, fix)
            hello = self._hello(challenge, nproc, writer.get_extra_info("sockname")[0])
            writer.write(encode(hello))
            answer = await asyncio.wait_for(receive(reader), SUPERVISOR_SILENCE_S)
        except ProtocolError as e:
            raise ConfigError(
                "HOST:PORT", where, "is not a supervisor", "see its line `listening on`"
            ) from e
        if isinstance(answer, Refused):
            raise ConfigError(
                "HOST:PORT",
                where,
                f"the supervisor refuses this machine: {answer.reason}",
                "start the same COMMAND with the same token and software on both",
            )
        if not isinstance(answer, Welcome):
            raise ProtocolError("expected Welcome or Refused")
        challenges = (hello.challenge, challenge.challenge)
        if not is_proof(answer.proof, self._membership.token, "supervisor", *challenges):
            rule = "the supervisor there lacks this machine's token"
            raise ConfigError("HOST:PORT", where, rule, f"give it the same {TOKEN_VARIABLE}")
        self._say(f"joined {where} with {nproc} {'rank' if nproc == 1 else 'ranks'}")

    def _hello(self, challenge: Challenge, nproc: int, address: str) -> Hello:
        digest = command_digest(self._membership.command)
        hello = Hello(VERSION, nproc, digest, address, new_challenge(), "", software())
        proof = proof_of(self._membership.token, "machine", challenge.challenge, *said_in(hello))
        return replace(hello, proof=proof)

    async def _obey(
        self, machine: Machine, reader: asyncio.StreamReader, send: Callable[[Message], None]
    ) -> int:
        """Follows the supervisor's messages until it dismisses this machine."""
        reading = asyncio.ensure_future(receive(reader))
        heard_at = time.monotonic()
        has_told = False
        try:
            while True:
                # The read goes on after the timeout, so that no message is lost.
                await asyncio.wait({reading}, timeout=_POLL_S)
                machine.poll()
                now = time.monotonic()
                if reading.done():
                    message, heard_at = reading.result(), now
                    if isinstance(message, Dismiss):
                        self._say(f"dismissed: {message.reason}")
                        return message.code
                    machine.receive(message)
                    reading = asyncio.ensure_future(receive(reader))
                elif now > heard_at + SUPERVISOR_SILENCE_S:
                    raise TimeoutError(f"silent for {SUPERVISOR_SILENCE_S:.0f} s")
                if self._stop is not None and not has_told:
                    self._say(f"{self._stop}: telling the supervisor that this machine goes away")
                    send(Leaving(self._stop))
                    has_told = True
                elif self._stop is not None and now > self._stop_by:
                    grace = f"{self._membership.grace_s:g} s"
                    if machine.is_running:
                        self._say(f"its ranks did not end within {grace}: killed")
                        return ExitCode.FAILED
                    self._say(f"not dismissed within {grace}, but its ranks have ended: leaving")
                    return ExitCode.START_AGAIN
        finally:
            reading.cancel()

    def _told_to_stop(self, signal_name: str) -> None:
        if self._stop is None:
            self._stop = signal_name
            self._stop_by = time.monotonic() + self._membership.grace_s
            self._changed.set()

    def _say(self, text: str) -> None:
        say("join", text)


def _is_dead(error: Exception) -> bool:
    """Returns whether the supervisor has ended, so that nobody else starts ranks of this run.

    If it only is silent, this machine may be cut off from it, and the others may be started again
    in a moment.
    """
    return isinstance(error, EOFError | ConnectionResetError | BrokenPipeError)


def _reason(error: Exception) -> str:
    return "it closed the connection" if isinstance(error, EOFError) else str(error)
