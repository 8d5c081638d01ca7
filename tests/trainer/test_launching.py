"""What a process does before it becomes the supervisor of its ranks."""

import sys

import pytest

from core.process.child import run
from core.process.gpus import NoAnswer
from core.process.python import ROOT, environment, python
from trainer import launching

_BECOME = """
import os, runpy, sys

def become(path, command, environment):
    torch = "torch" in sys.modules
    print(torch, environment["PYTHONPATH"].split(os.pathsep)[0], *command, flush=True)
    os._exit(0)

os.execve = become
runpy.run_module("trainer", run_name="__main__")
"""


def test_a_supervisor_needs_no_torch_and_its_programs_are_ours(tmp_path):
    words = ["experiment=stdlib", "nproc=2", f"data.cache_dir={tmp_path}"]
    done = run(python("-c", _BECOME, *words), environment(CUDA_VISIBLE_DEVICES=""))
    torch, root, *command = done.out.split()
    assert (torch, root) == ("False", str(ROOT)), done.err
    assert command[:5] == [sys.executable, "-P", "-m", "launch", "supervise"]
    rank = command[command.index("--") + 1 :]
    assert rank[:4] == [sys.executable, "-P", "-m", "trainer.rank"]


@pytest.mark.parametrize(
    ("gpus", "nproc", "code", "said"),
    [
        (["0", "1"], "3", 2, "nproc=3: this machine has 2 GPUs"),
        (NoAnswer(), "auto", 1, "nvidia-smi does not answer"),
    ],
)
def test_ranks_that_this_machine_cannot_run(gpus, nproc, code, said, trainer, small, monkeypatch):
    def visible_gpus():
        if isinstance(gpus, Exception):
            raise gpus
        return gpus

    monkeypatch.setattr(launching, "visible_gpus", visible_gpus)
    result = trainer(*small, f"nproc={nproc}")
    assert result.code == code and said in result.err, result
