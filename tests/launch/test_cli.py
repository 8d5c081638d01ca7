"""`python -m launch`: its help, and what it refuses."""

import os
import subprocess
import sys

import pytest

from launch.__main__ import main
from tests.launch.elastic.conftest import ROOT

NEVER = {"torch", "transformers", "hydra", "numpy"}


def test_help_lists_the_commands():
    page = subprocess.run(
        [sys.executable, "-m", "launch", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert page.returncode == 0
    assert "supervise" in page.stdout and "join" in page.stdout


def test_it_imports_no_heavy_library():
    code = (
        "import sys, launch.__main__, launch.elastic.supervisor, launch.elastic.agent\n"
        f"print({NEVER} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert result.stdout == "set()\n"


@pytest.mark.parametrize("verb", ["supervise", "join"])
def test_each_command_explains_itself(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main([verb, "--help"])
    assert not exit_.value.code
    assert "-- python -m trainer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "supervise | join"),
        (["supervise"], "-- COMMAND"),
        (["supervise", "--"], "-- COMMAND"),
        (["supervise", "true"], "unrecognized arguments: true"),
        (["supervise", "--nproc", "two", "--", "true"], "argument --nproc: 'two'"),
        (["supervise", "--nproc", "0", "--", "true"], "--nproc 0 without --listen"),
        (
            ["supervise", "--interrupt-every", "9", "--", "true"],
            "--interrupt-every is for --nodes 2",
        ),
        (["supervise", "--nodes", "2", "--nodes=3", "--", "true"], "--nodes: is given twice"),
        (["supervise", "--nodes", "0", "--", "true"], "argument --nodes: '0'"),
        (["supervise", "--grace", "-1", "--", "true"], "argument --grace: '-1'"),
        (["supervise", "--grace", "nan", "--", "true"], "argument --grace: 'nan'"),
        (["supervise", "--listen", "host", "--", "true"], "argument --listen: 'host'"),
        (["supervise", "--listen", "1:99999", "--", "true"], "argument --listen: '1:99999'"),
        (["supervise", "--multiple-of", "4", "--nproc", "2", "--", "true"], "--multiple-of=4"),
        (["supervise", "--", "no-such-program"], "COMMAND=no-such-program: no such program"),
        (["supervise", "--listen", "192.0.2.1:0", "--", "true"], "--listen=192.0.2.1:0"),
        (["join", ":1", "--", "true"], "argument HOST:PORT: ':1'"),
        (["join", "host:1", "--nproc", "0", "--", "true"], "argument --nproc: '0'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments, said):
    result = subprocess.run(
        [sys.executable, "-m", "launch", *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert result.stdout == ""


def test_a_reader_that_goes_away_ends_it_quietly():
    command = [sys.executable, "-m", "launch", "catalog", "show"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_without_a_gpu_there_is_one_rank(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "launch", "supervise", "--", "sh", "-c", 'echo "$WORLD_SIZE"'],
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "1\n", "")
