"""vLLM as a child process in its own environment: started, watched, and started again.

Its libraries conflict with ours, so SPOTFORGE_VLLM_PYTHON names a Python that has vLLM. The server
listens on a Unix socket in a folder that only its user can read, and is used like a remote server.
Known of 0.32: without the flags set here, admission is unbounded and SIGTERM aborts running
requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

from core.errors import ConfigError, MissingExtraError, SpotforgeError
from core.process import gpus
from core.process.child import describe_exit, kill_group, spawn
from core.process.keep_up import keep_up
from serving.artifact import Artifact, Format
from serving.config import EngineConfig
from serving.engine import (
    EngineError,
    EngineInfo,
    EngineStats,
    Prove,
    TokenChunk,
    TokenRequest,
    Unproven,
)
from serving.engines.process import Watch
from serving.engines.remote import RemoteEngine

_log = logging.getLogger("spotforge.serving")
PYTHON = "SPOTFORGE_VLLM_PYTHON"
FORMATS = {Format.huggingface, Format.torchao, Format.compressed_tensors}
_KEY = "engine.name"
_SHUTDOWN_TIMEOUT_S = 10  # short, since the gateway has drained before
_KILL_AFTER_S = _SHUTDOWN_TIMEOUT_S + 5.0
_LEAST_TORCHAO_CAPABILITY = 7.5
_LOOKS_EVERY_S = 0.25
# A shell that waits for the end of its input, which comes however the gateway ends, and then kills
# vLLM's process group: vLLM's workers would outlive its server.
_REAPER = ("sh", "-c", 'cat; kill -9 "-$0"')
# An exception as Python or vLLM writes it: (Worker pid=7) ERROR 11-25 09:38 [a.py:1] KeyError: 1
_CAUSE = re.compile(r"^(?:\(.*? pid=\d+\) )?(?:ERROR .*?\] )?([\w.]*(?:Error|Exception): \S.*)")


def why_not(artifact: Artifact) -> str | None:
    """Returns why vLLM cannot load an artifact on this host; None: it may be able to."""
    if artifact.format not in FORMATS:
        return f"vLLM does not load {artifact.format.value}"
    if artifact.format is Format.torchao:
        if not gpus.has_gpu():
            return "vLLM loads torchao only on a GPU"
        capability = _capability()
        if capability is not None and capability < _LEAST_TORCHAO_CAPABILITY:
            least = _LEAST_TORCHAO_CAPABILITY
            return f"vLLM needs compute capability {least} for torchao; this GPU has {capability}"
    return None


def _capability() -> float | None:
    """Returns the least compute capability of this host's GPUs; None: unknown."""
    try:
        answer = gpus.ask_driver("--query-gpu=compute_cap", "--format=csv,noheader")
    except gpus.NoAnswer:
        return None  # vLLM does not start then, and its error says why
    told = re.findall(r"^\d+\.\d+$", answer or "", re.MULTILINE)
    return min(map(float, told), default=None)


def command(
    artifact: Artifact, config: EngineConfig, max_context: int, max_batch_tokens: int, dtype: str
) -> list[str]:
    """Returns the command line of `vllm serve`, without the address.

    Args:
        artifact: Artifact that vLLM runs.
        config: Settings of the engine.
        max_context: Tokens of prompt and answer together, at most.
        max_batch_tokens: Tokens in a step, at most.
        dtype: Type that is computed in; by default vLLM would use float16 for float32 weights.

    Raises:
        ConfigError: vLLM cannot run the artifact with these settings; MissingExtraError if no vLLM
            is given.
    """
    if (why := why_not(artifact)) is not None:
        raise ConfigError(_KEY, "vllm", why, "leave engine.name out")
    if max_batch_tokens < config.max_running:
        rule = f"must be at least engine.max_running ({config.max_running}) with vLLM"
        raise ConfigError("engine.max_batch_tokens", max_batch_tokens, rule, "give more")
    fix = "make one: python -m venv DIR && DIR/bin/pip install vllm, and set it to DIR/bin/python"
    if not (named := os.environ.get(PYTHON)):
        rule = "vLLM needs its own environment, and the variable is not set"
        raise MissingExtraError(PYTHON, named, rule, fix)
    if (python := shutil.which(named)) is None:
        raise ConfigError(PYTHON, named, "there is no such program", fix)
    arguments = {
        "--served-model-name": artifact.version,
        "--max-model-len": max_context,
        "--dtype": dtype,
        "--max-num-seqs": config.max_running,
        "--max-num-batched-tokens": max_batch_tokens,
        # Counts running and waiting requests. The gateway admits no more than run; but cancelled
        # requests stay for another step, and a probe comes on top.
        "--max-num-queued-reqs": 2 * config.max_running + 1,
        "--shutdown-timeout": _SHUTDOWN_TIMEOUT_S,
        # By default the model's generation_config.json would change how requests sample.
        "--generation-config": "vllm",
        "--seed": 0,
    }
    if config.kv_cache_mb is not None:
        arguments["--kv-cache-memory-bytes"] = config.kv_cache_mb * 10**6
    # -I: modules come from vLLM's environment, not from the working directory.
    words = [python, "-I", "-m", "vllm.entrypoints.cli.main", "serve", str(artifact.folder)]
    for flag, value in arguments.items():
        words += [flag, str(value)]
    return [*words, "--no-enable-log-requests", "--disable-uvicorn-access-log"]


class VllmEngine:
    """An `Engine` that runs vLLM as a child process.

    Args:
        command: Command line of the server, to which `--uds` is added.
        connect: Function that returns the client for a socket.
        watch: Limits beyond which the server counts as hung.
    """

    def __init__(
        self, command: Sequence[str], connect: Callable[[str], RemoteEngine], watch: Watch
    ) -> None:
        # A short name, since the path of a Unix socket may have only about 100 bytes.
        self._folder = tempfile.mkdtemp(prefix="spotforge-vllm-")
        self._socket = f"{self._folder}/s"
        self._command = [*command, "--uds", self._socket]
        self._remote, self._watch = connect(self._socket), watch
        self._process: asyncio.subprocess.Process | None = None
        self._reaper: asyncio.subprocess.Process | None = None
        self._said: deque[str] = deque(maxlen=500)  # lines; vLLM's tracebacks are long
        self._reading: asyncio.Task[None] | None = None
        self._supervising: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        """See `Engine`."""
        return self._remote.info

    @property
    def is_ready(self) -> bool:
        """See `Engine`."""
        process = self._process
        return process is not None and process.returncode is None and self._remote.is_ready

    @property
    def pid(self) -> int | None:
        """Id of the process that runs now; None: there is no process."""
        return None if self._process is None else self._process.pid

    async def start(self, prove: Prove | None = None) -> EngineInfo:
        """See `Engine`."""
        try:
            await self._launch()
            info = await self._remote.start()
            if prove is not None:
                await prove(self)
        except (Unproven, EngineError) as e:
            await self.close()
            raise Unproven(str(e)) from None
        except SpotforgeError as e:
            cause = self._cause()
            await self.close()
            raise (SpotforgeError(f"vllm: {cause}") if cause else e) from e
        except BaseException:
            await self.close()
            raise
        self._supervising = asyncio.create_task(
            keep_up("vllm", _log, self._until_lost, self._end_lost, self._launch_again)
        )
        return info

    def submit(self, request: TokenRequest) -> AsyncIterator[TokenChunk]:
        """See `Engine`."""
        return self._remote.submit(request)

    async def embed(
        self, id: str, inputs: list[list[int]], adapter: str | None = None
    ) -> list[list[float]]:
        """See `Engine`."""
        return await self._remote.embed(id, inputs, adapter)

    def stats(self) -> EngineStats:
        """See `Engine`."""
        return self._remote.stats()

    async def close(self) -> None:
        """See `Engine`."""
        if self._supervising is not None:
            self._supervising.cancel()
            await asyncio.gather(self._supervising, return_exceptions=True)
        await self._remote.close()
        await self._end(_KILL_AFTER_S)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _launch(self) -> None:
        """Starts a process and waits until it listens, which is after it has loaded the model."""
        self._said.clear()
        # A killed server leaves its socket behind, which the next one could not bind.
        Path(self._socket).unlink(missing_ok=True)
        self._process = await spawn(
            self._command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"VLLM_NO_USAGE_STATS": "1"},
        )
        self._reaper = await spawn(
            [*_REAPER, str(self._process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=None,  # must outlive this process, to kill what vLLM has started
        )
        self._reading = asyncio.create_task(self._read(self._process))
        try:
            async with asyncio.timeout(self._watch.start_timeout_s):
                while not await self._listens():
                    if self._process.returncode is not None:
                        await self._reading
                        raise SpotforgeError(f"vllm: {self._last_words()}")
                    await asyncio.sleep(_LOOKS_EVERY_S)
        except TimeoutError as e:
            timeout_s = self._watch.start_timeout_s
            raise SpotforgeError(f"vllm: did not listen within {timeout_s:g} s") from e

    async def _listens(self) -> bool:
        try:
            _, writer = await asyncio.open_unix_connection(self._socket)
        except OSError:
            return False
        writer.close()
        return True

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        with contextlib.suppress(ValueError):  # a line longer than asyncio's limit
            while line := await process.stdout.readline():
                self._said.append(line.decode(errors="replace").rstrip())

    async def _end_lost(self, why: str) -> None:
        # Streams break when the server ends: their requests wait until the next one is up.
        self._remote.doubt()
        await self._end(grace_s=0)

    async def _launch_again(self) -> None:
        self._remote.stats().restarts += 1
        try:
            await self._launch()
        except SpotforgeError:
            await self._end(grace_s=0)
            raise

    async def _until_lost(self) -> str:
        """Watches the process until it must be replaced; returns why."""
        process, has_been_ready = self._process, False
        assert process is not None
        began_s = time.monotonic()
        while True:
            if process.returncode is not None:
                return self._last_words()
            if self._remote.is_ready:
                has_been_ready = True
            elif has_been_ready or time.monotonic() - began_s > self._watch.probe_timeout_s:
                return f"generates no tokens: {self._cause() or 'it gives no reason'}"
            await asyncio.sleep(_LOOKS_EVERY_S)

    def _last_words(self) -> str:
        assert self._process is not None
        said = self._cause() or next((line for line in reversed(self._said) if line), None)
        assert self._process.returncode is not None
        ended = describe_exit(self._process.returncode)
        return f"{ended}: {said}" if said else f"{ended} without a message"

    def _cause(self) -> str | None:
        """Returns the first exception in the log; later ones are mostly consequences of it."""
        return next((m[1][:400] for m in map(_CAUSE.match, self._said) if m), None)

    async def _end(self, grace_s: float) -> None:
        """Ends the process and all that it has started, which would outlive it."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            if grace_s > 0:
                process.terminate()
                async with asyncio.timeout(grace_s):
                    await process.wait()
        kill_group(process.pid)
        await process.wait()
        if self._reading is not None:
            await self._reading
        if self._reaper is not None:
            with contextlib.suppress(ProcessLookupError):
                self._reaper.kill()
            await self._reaper.wait()
