"""A forked program is what an executed one would be, as its parent and it itself can see."""

import os
import pickle
import signal
import subprocess
import sys
import time
from multiprocessing.connection import Pipe
from pathlib import Path

import pytest

from core.process.python import environment, python
from tests import programs

ROOT = Path(__file__).parents[1]


def facts():
    """What a program knows of itself; what it prints goes where its parent said."""
    print("out")
    print("err", file=sys.stderr)
    return {
        "folder": os.getcwd(),
        "variable": os.environ.get("OF_A_TEST"),
        "leads": (os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()),
        "parent": os.getppid(),
        "arguments": sys.argv[1:],
        "stdin": sys.stdin.read(),
        "environ": "OF_A_TEST=1" in Path("/proc/self/environ").read_text().split("\0"),
        "shown": Path("/proc/self/cmdline").read_text().rstrip("\0").split("\0")[:4],
        "handlers": [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)],
        "code": sys.orig_argv[1:4],
    }


def end(code):
    os._exit(code)


def start(function, *arguments, **options):
    """A program that calls a function, and the end at which what it returns comes out."""
    told, tells = Pipe(duplex=False)
    command = python("-m", "tests.rank", str(tells.fileno()))
    env = environment(OF_A_TEST="1")
    pipes = {"stdin": subprocess.PIPE, "pass_fds": [tells.fileno()]}
    process = subprocess.Popen(command, env=env, **pipes, **options)
    tells.close()
    process.stdin.write(pickle.dumps((function, arguments)))
    process.stdin.flush()
    return process, told


def found(tmp_path, **options):
    with open(tmp_path / "out", "w+") as out, open(tmp_path / "err", "w+") as err:
        process, told = start(facts, stdout=out, stderr=err, cwd=tmp_path, **options)
        with process:
            process.stdin.close()
            known, error = told.recv()
        told.close()
        assert error is None, error
        assert (process.returncode, known.pop("parent")) == (0, os.getpid())
        known["arguments"] = len(known["arguments"])  # a number that differs
        return known, (tmp_path / "out").read_text(), (tmp_path / "err").read_text()


@pytest.mark.parametrize("options", [{}, {"start_new_session": True}, {"process_group": 0}])
def test_a_fork_is_started_as_it_was_asked(tmp_path, options):
    forked = found(tmp_path, **options)
    with programs.execute_programs():
        assert found(tmp_path, **options) == forked
    assert forked[0]["folder"] == str(tmp_path) and forked[1:] == ("out\n", "err\n")


def test_its_end_is_told():
    process, told = start(end, 7)
    with process, told:
        assert process.wait(60) == 7
    process, told = start(time.sleep, 300)
    with process, told:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM


@pytest.mark.parametrize("how", ["done", "33", "text", "error", "interrupt"])
def test_a_fork_ends_as_an_executed_program_does(how):
    def ended():
        command = [sys.executable, "-m", "tests.ending", how]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr.splitlines()[-1:]

    forked = ended()
    with programs.execute_programs():
        assert ended() == forked
    assert forked[1] == "thread\nexit\n"
