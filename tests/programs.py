"""Starts Python programs of ours as forks of a process that has imported what they import.

`python -m trainer` takes 8 CPU-seconds to import torch and transformers, which is most of what a
small run costs. `fork_programs()` replaces how `subprocess` executes a command: one that is
`python [-P] -m MODULE ...`, with MODULE in `_FORKED`, becomes a fork of a server, which each test
process has for itself from the first such command on. All other commands are executed as ever, and
so is one whose environment says something else to Python, or to a library as it is imported, than
the server's did.

A fork is a child of who asked for it, with the arguments, environment, folder, files, session and
parent's death signal of a real one, and its command and environment in /proc; `Popen` and signals
work as ever. It differs in what is imported already, in the random state of its memory layout,
in an end that takes no module apart, and in one more child of its own, `program-server`, which
forks the programs that it starts itself.

Tests with the fixture `real_programs` execute every program. Each path is executed for real here:

    trainer, one rank; two ranks under supervise   tests/test_readme.py (the first of the README's
    export; compression, and the reload of its       commands of each kind)
    compressed_tensors; a server with transformers
    ZeRO, which imports DeepSpeed                  tests/test_users_modules.py
    reload of gguf                                 tests/compression/targets/test_gguf.py
    reload of torchao                              tests/compression/test_run.py
    torchrun                                       tests/trainer/test_run.py, which starts it itself
    pipeline, guard, supervise, join               tests/launch, whose commands have `-W error`
    beside a user's modules: a cloud here, ranks,  tests/test_users_modules.py
    a pipeline, a server with text stages
    text stages; PDEATHSIG, groups, pipes          never forked: tests/serving/test_split.py,
                                                   tests/core/process
"""

from __future__ import annotations

import asyncio
import asyncio.subprocess
import atexit
import contextlib
import ctypes
import gc
import inspect
import os
import pickle
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[1])

# Programs, and whether they start programs themselves.
_FORKED = {
    "compression": True,
    "compression.reload": False,
    "launch": True,
    "serving": True,
    "serving.engines.plain_worker": False,
    "serving.engines.transformers_worker": False,
    "serving.engines.logits": False,
    "serving.text.tokenizer": False,
    "tests.ending": False,
    "tests.rank": False,
    "tests.trainer.data.builder": False,
    "trainer": True,
    "trainer.export": False,
    "trainer.rank": False,
}
# Variables that are read as something is imported, or before: a fork would not hear of them.
_READ_BEFORE = ("HF_", "LD_", "MPL", "PYTHON", "TORCH_", "TRANSFORMERS_")
_NAME = "program-server"  # in /proc, of the server of a fork
_ARGUMENT_BYTES, _ENVIRONMENT_BYTES = 16_384, 65_536  # room for what /proc shows of a fork
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # of <sys/prctl.h>

_execute_child = subprocess.Popen._execute_child
_execve = os.execve
_create = asyncio.create_subprocess_exec
_parameters = inspect.signature(_execute_child)
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass
class _Request:
    """A program to be started; its files come along as descriptors.

    Attributes:
        module: What `-m` names.
        command: All of the command.
        environment: All of its environment.
        folder: Its working directory.
        is_safe: Whether the command has `-P`.
        parent: Process id of who asks.
        dies_with_parent: Whether it is killed when its parent ends.
        new_session, process_group, umask: As `subprocess.Popen` takes them.
        passed: Numbers of the descriptors that follow standard input, output and error.
    """

    module: str
    command: list[str]
    environment: dict[str, str]
    folder: str
    is_safe: bool
    parent: int
    dies_with_parent: bool
    new_session: bool
    process_group: int
    umask: int
    passed: list[int]


class _Server:
    """What this process knows of the server that forks its programs."""

    def __init__(self) -> None:
        self.is_on = False
        self.environment: dict[str, str] = {}  # what the first server was started in
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        # Two threads' requests would mix on the socket, and one would end the other's adoption.
        self._one_at_a_time = threading.Lock()

    def use(self, connection: socket.socket) -> None:
        """Takes a server that is there."""
        self._socket, self.is_on = connection, True

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-P", "-m", "tests.program_server", str(theirs.fileno())]
        room = {"TEST_PROGRAMS_ROOM": "x" * _ENVIRONMENT_BYTES}
        path = os.pathsep.join([ROOT, self.environment.get("PYTHONPATH", "")]).rstrip(os.pathsep)
        with theirs:
            self._process = subprocess.Popen(
                [*command, "x" * _ARGUMENT_BYTES],
                env={**self.environment, **room, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        return ours

    def fork(self, request: _Request, files: list[int]) -> int:
        """Has a program started; returns its process id."""
        with self._one_at_a_time:
            return self._fork(request, files)

    def _fork(self, request: _Request, files: list[int]) -> int:
        if self._socket is None:
            self._socket = self._start()
        read, write = os.pipe()
        message = pickle.dumps(request)
        # Whoever forks it ends at once, so that it becomes a child of this process.
        _libc.prctl(_PR_SET_CHILD_SUBREAPER, 1)
        try:
            header = len(message).to_bytes(8, "little")
            socket.send_fds(self._socket, [header], [write, *files])
            os.close(write)
            self._socket.sendall(message)
            with open(read, "rb") as pipe:
                answer = pipe.read()
        finally:
            _libc.prctl(_PR_SET_CHILD_SUBREAPER, 0)
        if not answer:
            raise RuntimeError("the program server has ended")
        told = pickle.loads(answer)
        if isinstance(told, OSError):
            raise told
        return told

    def stop(self) -> None:
        """Ends the server; programs that still run are not touched."""
        self.is_on = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.wait()
            self._process = None


_server = _Server()


@contextlib.contextmanager
def fork_programs():
    """Forks programs instead of executing them, until this is left."""
    _server.environment = dict(os.environ)
    _replace()
    _server.is_on = sys.platform == "linux"  # elsewhere there is neither prctl nor /proc
    try:
        yield
    finally:
        subprocess.Popen._execute_child = _execute_child
        _server.stop()


@contextlib.contextmanager
def execute_programs():
    """Executes programs within, as users do."""
    was_on, _server.is_on = _server.is_on, False
    try:
        yield
    finally:
        _server.is_on = was_on


def children(pid: int) -> list[int]:
    """Returns the programs that a process has started, without the server that forks them."""
    found = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return [p for p in found if not Path(f"/proc/{p}/cmdline").read_text().startswith(_NAME)]


def _replace() -> None:
    def execute(popen, *given, **named):
        options = _parameters.bind(popen, *given, **named).arguments
        request = _request(**options) if _server.is_on else None
        if request is None:
            return _execute_child(popen, *given, **named)
        ends = [options[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        files = [own if own != -1 else inherited for inherited, own in enumerate(ends)]
        popen.pid = _server.fork(request, files + request.passed)
        popen._child_created = True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        popen._close_pipe_fds(*(options[name] for name in pipes))

    subprocess.Popen._execute_child = execute


def _request(
    args, executable, preexec_fn, close_fds, pass_fds, cwd, env, shell, umask, **options
) -> _Request | None:
    """Returns what to ask of the server; None where the command has to be executed."""
    if shell or executable not in (None, sys.executable) or not close_fds:
        return None
    if any(options[name] not in (None, -1) for name in ("gid", "gids", "uid")):
        return None
    if isinstance(args, (str, bytes, os.PathLike)):
        return None
    if preexec_fn is not None and preexec_fn.__module__ != "core.process.child":
        return None
    words = [os.fsdecode(word) for word in args]
    environment = dict(os.environ if env is None else env)
    module = _module(words)
    if module is None or not _can_fork_in(environment):
        return None
    return _Request(
        module,
        words,
        environment,
        os.path.abspath(os.fsdecode(cwd)) if cwd is not None else os.getcwd(),
        words[1] == "-P",
        os.getpid(),
        preexec_fn is not None,
        options["start_new_session"],
        options["process_group"],
        umask,
        list(pass_fds),
    )


def _module(words: list[str]) -> str | None:
    rest = words[2:] if words[1:2] == ["-P"] else words[1:]
    is_ours = words[0] == sys.executable and rest[:1] == ["-m"] and len(rest) > 1
    return rest[1] if is_ours and rest[1] in _FORKED else None


def _can_fork_in(environment: dict[str, str]) -> bool:
    def read_before(variables):
        found = {k: v for k, v in variables.items() if k.startswith(_READ_BEFORE)}
        places = found.pop("PYTHONPATH", "").split(os.pathsep)
        return found, [place for place in places if place not in ("", ROOT)]

    return read_before(environment) == read_before(_server.environment)


def serve(connection: socket.socket) -> tuple[_Request, list[int]]:
    """Forks a program for each request; returns in each of them, with its files."""
    while True:
        header, files, _, _ = socket.recv_fds(connection, 8, 64)
        if not header:
            os._exit(0)  # who asks is gone
        message, size = b"", int.from_bytes(header, "little")
        while len(message) < size:
            message += connection.recv(size - len(message))
        between = os.fork()
        if between == 0:
            if os.fork():
                os._exit(0)  # so that the program becomes a child of who asked
            connection.close()
            return pickle.loads(message), files
        os.waitpid(between, 0)
        for number in files:
            os.close(number)


def own_server(request: _Request, files: list[int]) -> socket.socket | None:
    """Gives a program that starts others a server, forked from it before it has threads.

    Returns:
        In that server the end that it serves; in the program None.
    """
    if not _FORKED[request.module]:
        _server.is_on = False
        return None
    ours, theirs = socket.socketpair()
    if os.fork() == 0:
        ours.close()
        for number in files:
            os.close(number)
        os.setsid()
        _show([_NAME], {})
        return theirs
    theirs.close()
    _server.use(ours)
    return None


def run(request: _Request, files: list[int]) -> None:
    """Becomes the program; ends as it does."""
    answer, *given = files
    try:
        _settle(request, given)
        told = os.getpid()
    except OSError as e:
        told = e
    os.write(answer, pickle.dumps(told))
    os.close(answer)
    if told != os.getpid():
        os._exit(1)
    _run(request.module, request.command)


def _settle(request: _Request, files: list[int]) -> None:
    while os.getppid() != request.parent:  # until whoever forked it has ended
        if not os.path.exists(f"/proc/{request.parent}"):
            os._exit(1)
        time.sleep(0.001)
    if request.dies_with_parent:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != request.parent:  # it died before we asked
            os._exit(1)
    if request.new_session:
        os.setsid()
    if request.process_group not in (None, -1):
        os.setpgid(0, request.process_group)
    if request.umask not in (None, -1):
        os.umask(request.umask)
    os.chdir(request.folder)
    high = [_above(number) for number in files]
    for number, to in zip(high, [0, 1, 2, *request.passed], strict=True):
        os.dup2(number, to)
        os.close(number)
    _show(request.command, request.environment)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = open(
        2, "w", buffering=1, errors="backslashreplace", closefd=False
    )
    # The server's threads are one; a program's as many as its environment says.
    sys.modules["torch"].set_num_threads(
        int(request.environment.get("OMP_NUM_THREADS") or os.cpu_count())
    )
    if not request.is_safe:
        sys.path.insert(0, request.folder)
    gc.enable()


def _above(number: int) -> int:
    """Moves a descriptor to where no other is wanted."""
    import fcntl

    moved = fcntl.fcntl(number, fcntl.F_DUPFD, 200)
    os.close(number)
    return moved


def _show(command: list[str], environment: dict[str, str]) -> None:
    """Takes an environment, and shows it and a command in /proc."""
    os.environ.clear()  # nothing may point into what is overwritten
    os.environ |= environment
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    start, end, environment_start, environment_end = map(int, fields[45:49])
    variables = [f"{name}={value}" for name, value in environment.items()]
    for first, last, words in (
        (start, end, command),
        (environment_start, environment_end, variables),
    ):
        size = last - first
        text = b"".join(os.fsencode(word) + b"\0" for word in words)[: size - 1]
        ctypes.memmove(first, text.ljust(size, b"\0"), size)


def _run(module: str, command: list[str]) -> None:
    """Runs a module as a program and ends the process as Python would, but takes nothing apart.

    To clear 4,500 modules costs 0.3 CPU-seconds, which is most of what a small program takes.
    """
    words = command[command.index("-m") + 2 :]
    sys.argv = [module, *words]
    sys.orig_argv = command
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning, "runpy")
    code = 1
    is_interrupted = False
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
        if e.code is not None and not isinstance(e.code, int):
            print(e.code, file=sys.stderr)
    except BaseException as e:
        is_interrupted = isinstance(e, KeyboardInterrupt)
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = 120
        if is_interrupted:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(code & 0xFF)


def _become(path: str, command: list[str], environment: dict[str, str]) -> None:
    """Replaces `os.execve` in a fork, whose next program has to be a fork, too."""
    module = _module(command) if path == sys.executable else None
    if module is None or not _can_fork_in(environment):
        _execve(path, command, environment)
    _show(command, environment)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            usual = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
            signal.signal(number, usual)
    _run(module, command)


async def _create_subprocess_exec(program, *words, **options):
    """Replaces `asyncio.create_subprocess_exec`: uvloop's does without `subprocess`."""
    loop = asyncio.get_running_loop()
    command = [program, *words]
    if isinstance(loop, asyncio.BaseEventLoop) or not _server.is_on or _module(command) is None:
        return await _create(*command, **options)
    protocol = asyncio.subprocess.SubprocessStreamProtocol(options.pop("limit", 2**16), loop)
    pipes = [options.pop(name, None) for name in ("stdin", "stdout", "stderr")]
    waiter = loop.create_future()
    transport = asyncio.unix_events._UnixSubprocessTransport(
        loop, protocol, command, False, *pipes, 0, waiter, **options
    )

    def wait() -> None:
        _, status = os.waitpid(transport.get_pid(), 0)
        code = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(transport._process_exited, code)

    threading.Thread(target=wait, daemon=True).start()
    await waiter
    return asyncio.subprocess.Process(transport, protocol, loop)


def replace_in_server() -> None:
    """Makes programs that forks start be forks themselves."""
    asyncio.create_subprocess_exec = _create_subprocess_exec
    _server.environment = {k: v for k, v in os.environ.items() if k != "TEST_PROGRAMS_ROOM"}
    _replace()
    os.execve = _become
