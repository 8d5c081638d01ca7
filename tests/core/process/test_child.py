"""Programs die with who starts them, hear nothing from its terminal, and say how they ended."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from core.process.child import Child, describe_exit, exit_code, popen, run, spawn
from core.process.python import ROOT
from core.process.signals import passed_on

QUICK = [sys.executable, "-I", "-S", "-c"]  # imports nothing, so it starts in 10 ms


def is_running(pid):
    """Whether a process is there, and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("program", "code", "said", "shell"),
    [
        ("pass", 0, "ended with exit code 0", 0),
        ("raise SystemExit(33)", 33, "failed with exit code 33", 33),
        ("import os; os.kill(os.getpid(), 11)", -11, "died of SIGSEGV", 139),
        ("import os; os.kill(os.getpid(), 40)", -40, "died of signal 40", 168),
    ],
)
def test_how_a_program_ended(program, code, said, shell):
    with Child([*QUICK, program]) as child:
        assert child.wait() == code
    assert (describe_exit(code), exit_code(code)) == (said, shell)


def test_what_a_program_says():
    program = "import sys; print(sys.stdin.read()); print('a\\n\\n b \\n', file=sys.stderr)"
    done = run([*QUICK, program])
    assert (done.code, done.out, done.last_line) == (0, "\n", "b")


def test_a_program_that_takes_too_long_is_killed_with_what_it_started(tmp_path):
    program = f"sleep 1000 & echo $! > {tmp_path}/pid; sleep 1000"
    for timeout_s in (0.3, 3, 30):
        with pytest.raises(TimeoutError):
            run(["sh", "-c", program], timeout_s=timeout_s)
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text():
            break  # it had the time to start something
    wait_until(lambda: not is_running(int((tmp_path / "pid").read_text())))


def test_a_program_is_killed_where_polling_raises(tmp_path):
    def poll():
        if (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text():
            raise KeyError

    with pytest.raises(KeyError):
        run(["sh", "-c", f"echo $$ > {tmp_path}/pid; exec sleep 1000"], poll=poll)
    assert not is_running(int((tmp_path / "pid").read_text()))


def test_leaving_a_child_kills_it_and_what_it_started(tmp_path):
    with Child(["sh", "-c", f"sleep 1000 & echo $! > {tmp_path}/pid; wait"]) as child:
        wait_until(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
        assert child.wait(0) is None
    wait_until(lambda: not is_running(int((tmp_path / "pid").read_text())))
    assert child.wait() == -signal.SIGKILL


def told(child_does, tmp_path):
    """What comes of a child that signals this process, and the signals that were passed on."""
    ready = tmp_path / "ready"
    script = f"while [ ! -e {ready} ]; do sleep 0.01; done; {child_does}"
    with passed_on(lambda: Child(["sh", "-c", script])) as (child, signals):
        assert os.getsid(child.pid) != os.getsid(0)
        ready.touch()
        code = child.wait()
    ready.unlink()
    return code, signals


def test_signals_are_passed_on_and_the_terminal_is_not_shared(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    does = "trap 'exit 5' USR1; kill -USR1 $PPID; while :; do sleep 0.01; done"
    assert told(does, tmp_path) == (5, [signal.SIGUSR1])
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_signal_that_comes_during_the_start_is_passed_on():
    def start():
        signal.raise_signal(signal.SIGUSR1)
        return Child(["sleep", "1000"])

    with passed_on(start) as (child, signals):
        assert child.wait() == -signal.SIGUSR1
    assert signals == [signal.SIGUSR1]


def test_a_closed_terminal_means_stop_and_what_is_ignored_stays_so(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        does = "kill -HUP $PPID; exec sleep 1000"
        assert told(does, tmp_path) == (-signal.SIGTERM, [signal.SIGHUP])
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert told("kill -HUP $PPID", tmp_path) == (0, [])
    finally:
        signal.signal(signal.SIGHUP, before)


_PARENT = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from core.process.child import popen, spawn
{start}
print(child.pid, flush=True)
sys.stdin.read()
"""
_STARTS = {
    "popen": "child = popen(['sleep', '1000'])",
    "spawn": "child = asyncio.run(spawn(['sleep', '1000']))",
    "group": "child = popen(['sleep', '1000'], process_group=0)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux does this")
@pytest.mark.parametrize("how", _STARTS)
def test_a_child_dies_with_its_parent(how):
    program = _PARENT.format(start=_STARTS[how])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, ROOT], **pipes) as parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.kill()
        wait_until(lambda: not is_running(pid))


def test_an_unknown_program_is_an_error_of_the_system():
    for start in (popen, Child, run, lambda command: asyncio.run(spawn(command))):
        with pytest.raises(FileNotFoundError):
            start(["no-such-program"])
