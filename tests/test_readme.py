"""The README's commands run as they stand there, on small things of the names they use."""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import httpx
import pytest

from tests.programs import execute_programs
from tests.small_model import save_model

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line for line in LINES if line.startswith("python -m")]

# What makes them small. The model's own keys are left alone where it is a pretrained one.
SHORT = [
    "stop.steps={steps}",
    "schedule=constant",
    "data.max_seq_len=32",
    "global_batch_size=8",
    "micro_batch_size=4",
    "evaluation.max_samples=4",
    "data.validation_fraction=0.3",
]
SMALL = ["data.tokenizer_vocab_size=300", "model.config.hidden_size=48"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user's working directory."""
    folder = tmp_path_factory.mktemp("user")
    texts = [f"note {i}: {i * i} apples and {i % 7} pears\n" * 20 for i in range(60)]
    (folder / "notes.txt").write_text("\n".join(texts * 4))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    save_model(folder / "path" / "to" / "model", texts)
    return folder


def test_it_has_commands():
    assert len(COMMANDS) >= 4


def test_commands_run_in_their_order(folder):
    """The first of each kind is executed for real: `tests/programs.py` forks the rest."""
    kinds = set()
    for number, command in enumerate(COMMANDS):
        arguments = shlex.split(command)
        kind = arguments[2], "nproc=2" in arguments
        as_a_user = contextlib.nullcontext() if kind in kinds else execute_programs()
        kinds.add(kind)
        with as_a_user:
            run(number, command, arguments, folder)
    resumed = (folder / "runs" / "notes" / "metrics.jsonl").read_text()
    assert '"resumed": true' in resumed, "the third command did not go on with the first one's run"


def run(number, command, arguments, folder):
    if arguments[2] == "trainer":
        arguments += [s.format(steps=3 + 2 * number) for s in SHORT]
        arguments += [] if "model=pretrained" in arguments else SMALL
    if arguments[2] == "compression":
        arguments += ["evaluation.num_samples=4", "evaluation.new_tokens=2"]
    if arguments[2] == "serving":
        serve(arguments, folder)
        return
    result = subprocess.run(
        [sys.executable, *arguments[1:]],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}{result.stderr}"


def serve(arguments, folder):
    """Starts a server, asks it once, and tells it to stop."""
    process = subprocess.Popen(
        [sys.executable, *arguments[1:], "port=0"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        url = process.stdout.readline().split()[-1]
        answer = httpx.post(f"{url}/completions", json={"model": "notes", "prompt": "note 1:"})
        process.terminate()
    assert answer.status_code == 200 and process.returncode == 0


def test_make_targets_and_extras_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", "\n".join(LINES), re.M):
        assert re.search(rf"^{target}:", makefile, re.M), target
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extra in re.search(r"\.\[([\w,]+)\]", README)[1].split(","):
        assert extra in extras["optional-dependencies"], extra


def test_what_it_names_is_there():
    for path in re.findall(r"`((?:trainer|parallel|compression|docs|tests)/[\w./-]+)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path
