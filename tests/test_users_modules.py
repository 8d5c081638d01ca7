"""In a folder with a user's `trainer.py`, `launch.py`, `core/`, ... our programs find their own.

The user's own start says `-P`, as docs/surviving.md has it; all that follows is ours to get right.
"""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.small_model import save_model
from tests.words import last_of_each

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.usefixtures("real_programs")

NAMES = "compression configs core launch monitoring parallel serving trainer".split()


@pytest.fixture
def folder(tmp_path):
    """A user's working directory, with modules and packages that end whoever imports them."""
    folder = tmp_path / "work"
    folder.mkdir()
    for name in NAMES:
        path = folder / f"{name}.py" if name != "core" else folder / "core/__init__.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"raise SystemExit('the user\\'s {name} was taken for ours')")
    return folder


def start(folder, *words, **options):
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "SPOTFORGE_OPENVINO_PYTHON": ""}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", *map(str, words)],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if k[:8] != "SKYPILOT"} | environment | options,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(folder, *words, **options):
    with start(folder, *words, **options) as process:
        try:
            out, err = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 0, out + err
    return out


def test_nodes_of_a_cloud_here_run_the_users_program_with_the_users_modules(folder, tmp_path):
    """`join` is ours; the program that it runs is not, and finds what it would find alone."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/trainer.py").write_text("WORD = 'theirs'")
    (folder / "serving.py").write_text("WORD = 'beside it'")
    program = tmp_path / "work/program.py"
    program.write_text(
        "import os, serving, sys\n"
        f"sys.path.remove({str(folder)!r})  # what is beside it is found first\n"
        "import trainer\n"
        f"open({str(tmp_path)!r} + '/' + os.environ['RANK'], 'w').write(\n"
        "    f\"{serving.WORD} {trainer.WORD} {os.environ['PYTHONPATH']}\")\n"
    )
    path = f"{tmp_path}/theirs:{ROOT}"
    command = ["launch", "supervise", "--nodes", 2, "--nproc", 1, "--", sys.executable, program]
    finish(folder, *command, PYTHONPATH=path)
    assert {(tmp_path / str(rank)).read_text() for rank in (0, 1)} == {f"beside it theirs {path}"}


@pytest.mark.long
def test_two_ranks(folder, small, tmp_path):
    words = [*small, "nproc=2", "micro_batch_size=2", "parallel=zero"]
    finish(folder, "trainer", *last_of_each(words))
    records = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["step"] == 6
    started = [json.loads(x) for x in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    assert [e["world_size"] for e in started if e["event"] == "start"] == [2]


@pytest.mark.long
def test_a_pipeline(folder, small, tmp_path):
    words = [*small, "launch.stages=[train,compress]", "nproc=1", "export.at_end=true"]
    finish(folder, "launch", "pipeline", *last_of_each(words))
    done = json.loads((tmp_path / "run/pipeline.json").read_text())["stages"]
    assert list(done) == ["train", "compress"]


@pytest.mark.long
def test_a_server_with_text_stages(folder):
    save_model(folder / "model", ["notes of a user\n"])
    words = ["artifact=model", "port=0", "topology=split", "engine.name=transformers"]
    with start(folder, "serving", *words, "text.encoders=1", "text.decoders=1") as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            url = re.search(r"http://\S+", line)[0]
            asked = {"model": "model", "prompt": "notes", "max_tokens": 4}
            assert httpx.post(f"{url}/completions", json=asked, timeout=120).status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=300)
    assert process.returncode == 0
