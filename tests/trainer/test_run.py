"""Whole runs through the command line: what a user sees and finds."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from core.process.child import run
from core.process.python import environment, python
from tests.words import last_of_each
from trainer.checkpoint import committed, read_state

ROOT = Path(__file__).parents[2]
KEYS = {
    "step",
    "loss",
    "grad_norm",
    "lr",
    "num_tokens",
    "tokens_per_s",
    "peak_memory_bytes",
    "data_wait_s",
    "step_s",
    "checkpoint_blocking_s",
}


def metrics(run_dir):
    whole, _, _ = (run_dir / "metrics.jsonl").read_text().rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def losses(run_dir):
    return [(r["step"], r["loss"], r["grad_norm"]) for r in metrics(run_dir)]


def command(*arguments, launcher=()):
    """Starts `python -m trainer` as a program of its own."""
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "trainer", *map(str, last_of_each(arguments))],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process, code=0, timeout=600):
    out, _ = process.communicate(timeout=timeout)
    assert process.returncode == code, out
    return out


def test_what_a_finished_run_leaves(trainer, small, tmp_path):
    run_dir = tmp_path / "run"
    words = ["evaluation.every_steps=3", "evaluation.sample_prompt=line 3"]
    result = trainer(*small, *words, "export.at_end=true", "monitoring.report=true")
    assert result.code == 0, result
    records = metrics(run_dir)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    for record in records:
        assert KEYS <= record.keys()
        assert record["num_tokens"] == record["step"] * 8 * 32
    assert [r["step"] for r in records if "validation_loss" in r] == [3, 6]
    assert "validation_bits_per_byte" in records[-1]
    samples = [json.loads(x) for x in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [3, 6] and samples[0]["prompt"] == "line 3"
    data = json.loads((run_dir / "data.json").read_text())
    files = data["sources"][0]["files"]
    assert len(files) == 40 and all(len(f["sha256"]) == 64 and f["size_bytes"] for f in files)
    assert data["order"] == read_state(committed(run_dir / "checkpoints")[0]).order == "exact"
    assert "<svg" in (run_dir / "report.html").read_text()
    for name in ("config.yaml", "environment.json", "export/lineage.json"):
        assert (run_dir / name).is_file(), name
    for said in ("checkpoint", "export", "report.html", "try it"):
        assert said in result.out
    # A text ends where one of the data does, not where one of Llama's does.
    end = AutoTokenizer.from_pretrained(run_dir / "export").eos_token_id
    for name in ("config.json", "generation_config.json"):
        assert json.loads((run_dir / "export" / name).read_text())["eos_token_id"] == end, name


@pytest.mark.parametrize("goes_on", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_failed_sample_costs_no_step(trainer, small, tmp_path, monkeypatch, goes_on):
    """Saved first, evaluated then; an empty prompt begins a text, and step 0 can be evaluated."""
    from trainer import loop

    asked = []

    def breaks_at_the_third(*arguments):
        asked.append(generate(*arguments))
        assert len(asked) < 3, "a sampler that breaks"
        return asked[-1]

    generate = loop.generate
    monkeypatch.setattr(loop, "generate", breaks_at_the_third)
    run_dir = tmp_path / "run"
    overrides = [
        *("evaluation.at_start=true", "evaluation.every_steps=2", "checkpoint.interval=2"),
        *("evaluation.sample_prompt=''", "evaluation.sample_tokens=4"),
    ]
    result = trainer(*small, *overrides, "stop.steps=4")
    assert result.code == 1 and "a sampler that breaks" in result.err
    assert "step-00000004 is complete" in result.err
    assert all(isinstance(text, str) for text in asked)
    records = metrics(run_dir)
    assert [r["step"] for r in records] == [0, 1, 2, 3, 4]
    assert [r["step"] for r in records if "validation_loss" in r] == [0, 2]
    assert "loss" not in records[0] and records[0]["num_tokens"] == 0
    assert read_state(committed(run_dir / "checkpoints")[0]).step == 4
    if not goes_on:
        return
    assert trainer(*small, *overrides, "stop.steps=4").code == 0
    assert len(asked) == 3 and [r["step"] for r in metrics(run_dir)] == [0, 1, 2, 3, 4]


def test_a_finished_run_says_so_and_changes_nothing(trainer, small, trained):
    before = losses(trained)
    result = trainer(*small)
    assert result.code == 0 and "resuming after step 6" in result.out
    assert losses(trained) == before


def test_export_gives_the_training_models_logits(trainer, small, tmp_path):
    assert trainer(*small, "checkpoint.interval=3", "export.at_end=true").code == 0
    run_dir = tmp_path / "run"
    exported = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    assert exported.dtype is torch.float32
    state = _checkpoint_tensors(committed(run_dir / "checkpoints")[0])
    for name, parameter in exported.named_parameters():
        assert torch.equal(parameter, state[name]), name
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "export")
    assert tokenizer.decode(tokenizer.encode("the quick brown fox")) == "the quick brown fox"
    lineage = json.loads((run_dir / "export" / "lineage.json").read_text())
    assert lineage["checkpoint"]["step"] == 6
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= lineage["files"].keys()

    out = tmp_path / "older"
    step_3 = ["checkpoint=step-00000003", f"out={out}", "dtype=bfloat16"]
    done = subprocess.run(
        [sys.executable, "-m", "trainer.export", f"run={run_dir}", *step_3],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype is torch.bfloat16
    assert json.loads((out / "lineage.json").read_text())["checkpoint"]["step"] == 3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run=/no/such/run"], ["run=/no/such/run"]),
        (["rum=x"], ["rum"]),
        (["run={run}", "checkpoint=step-9"], ["checkpoint=step-9", "step-00000006"]),
        (["run={run}", "dtype=int4"], ["int4", "bfloat16"]),
    ],
)
def test_export_refuses_in_one_line(trained, capfd, arguments, words):
    from trainer.export import main

    capfd.readouterr()
    assert main([a.format(run=trained) for a in arguments]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and all(word in lines[0] for word in words), lines
    assert not (trained / "export").exists()


def test_export_replaces_exports_only(trained, tmp_path, capfd):
    from trainer.export import main

    run_dir = trained
    assert main([f"run={run_dir}"]) == 0
    assert main([f"run={run_dir}"]) == 0, "an export of ours is replaced"
    for out in (run_dir, tmp_path, run_dir / "metrics.jsonl"):
        before = sorted(tmp_path.rglob("*"))
        assert main([f"run={run_dir}", f"out={out}"]) == 2
        assert f"out={out}" in capfd.readouterr().err.splitlines()[-1]
        assert sorted(tmp_path.rglob("*")) == before, "something was deleted"


def test_stop_by_tokens_and_by_minutes(trainer, small, tmp_path):
    result = trainer(*small, "stop.steps=null", f"stop.tokens={8 * 32 * 4}")
    assert result.code == 0
    assert metrics(tmp_path / "run")[-1]["step"] == 4
    result = trainer(
        *small,
        "stop.steps=null",
        "stop.minutes=0.02",
        "schedule=constant",
        f"run.dir={tmp_path / 'clock'}",
    )
    assert result.code == 0
    assert committed(tmp_path / "clock" / "checkpoints")


@pytest.mark.parametrize(
    "overrides",
    [
        ["deterministic=true", "activation_checkpointing=true"],
        ["schedule=wsd", "schedule.decay_steps=2", "data.mask_documents=true"],
        ["model.fused_loss=false", "checkpoint.asynchronous=false", "precision=bf16"],
        ["parallel=fsdp", "checkpoint.interval=2"],
    ],
    ids=lambda overrides: overrides[0],
)
def test_a_stopped_run_goes_on_bit_for_bit(trainer, small, tmp_path, monkeypatch, overrides):
    """A stop signal after step 3, then the same command again, against a run left alone."""
    whole, stopped = f"run.dir={tmp_path / 'whole'}", f"run.dir={tmp_path / 'stopped'}"
    assert trainer(*small, *overrides, whole).code == 0
    assert losses(tmp_path / "whole")[-1][1] < losses(tmp_path / "whole")[0][1]

    from trainer.reporter import Reporter

    log = Reporter.log

    def log_then_stop(self, record):
        log(self, record)
        if record["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "log", log_then_stop)
        result = trainer(*small, *overrides, stopped, "export.at_end=true")
    assert result.code == 33, result
    assert "step-00000003" in result.out
    assert not (tmp_path / "stopped" / "export").exists()
    assert trainer(*small, *overrides, stopped).code == 0
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    resumed = [r["step"] for r in metrics(tmp_path / "stopped") if r.get("resumed")]
    assert resumed == [4]


def test_a_damaged_checkpoint_is_passed_over(trainer, small, tmp_path):
    more = [*small, "checkpoint.interval=2", "checkpoint.keep_last=3"]
    assert trainer(*more).code == 0
    before = losses(tmp_path / "run")
    newest = committed(tmp_path / "run" / "checkpoints")[0]
    shard = newest / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    result = trainer(*more)
    assert result.code == 0
    assert "passed over" in result.out and "__0_0.distcp" in result.out
    assert "resuming after step 4" in result.out
    assert losses(tmp_path / "run") == before
    for checkpoint in committed(tmp_path / "run" / "checkpoints"):
        (checkpoint / "manifest.json").unlink()
    result = trainer(*more)
    assert result.code == 2 and "manifest.json" in result.err


def test_multirun_gives_each_job_a_run_of_its_own(trainer, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = [s for s in small if not s.startswith("run.dir")]
    result = trainer("--multirun", *small, "run.name=sweep", "optim.lr=1e-3,1e-2")
    assert result.code == 0, result
    runs = sorted(p.parent for p in (tmp_path / "runs" / "sweep").rglob("metrics.jsonl"))
    assert len(runs) == 2
    assert losses(runs[0]) != losses(runs[1])


def test_wandb_offline(trainer, small, tmp_path):
    result = trainer(*small, "monitoring=wandb")
    assert result.code == 0, result
    assert list((tmp_path / "run" / "wandb").rglob("*.wandb"))


def test_a_full_disk_keeps_the_last_good_checkpoint(small, tmp_path):
    """On a real, small file system."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    try:
        small = [s for s in small if not s.startswith("run.dir")]
        process = command(
            *small,
            f"run.dir={disk / 'run'}",
            "checkpoint.interval=1",
            "stop.steps=60",
            "checkpoint.keep_last=50",
            "log.every_steps=1",
        )
        out = finish(process, code=2)
        assert "run.dir=" in out and "complete and stays" in out and "Traceback" not in out
        good = committed(disk / "run" / "checkpoints")
        assert good and not list((disk / "run" / "checkpoints").glob(".staging*"))
        assert read_state(good[0]).step == len(good)
    finally:
        subprocess.run(["umount", disk], check=True)


LAUNCHERS = {
    "nproc": ([], ["nproc=2", "parallel=zero"]),
    "torchrun": (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
        ["parallel=fsdp"],
    ),
}


@pytest.mark.parametrize("launcher", ["nproc", pytest.param("torchrun", marks=pytest.mark.long)])
def test_sigterm_on_two_ranks_saves_and_resumes(small, tmp_path, launcher):
    """As a spot machine goes: SIGTERM to the launcher in mid-run, then the same command again."""
    prefix, extra = LAUNCHERS[launcher]
    # More steps than any machine does before it is told.
    more = [*small, *extra, "stop.steps=100000", "checkpoint.interval=end", "micro_batch_size=2"]
    process = command(*more, launcher=prefix)
    wait_for_step(tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    out = finish(process, code=1 if launcher == "torchrun" else 33)  # torchrun says 1 for all
    assert "stopped after saving" in out, out
    saved = committed(tmp_path / "run" / "checkpoints")
    assert len(saved) == 1 and read_state(saved[0]).step >= 3
    stopped_at = read_state(saved[0]).step
    assert losses(tmp_path / "run")[-1][0] == stopped_at
    process = command(*more, launcher=prefix)
    wait_for_step(tmp_path / "run", stopped_at + 2)
    process.send_signal(signal.SIGTERM)
    out = finish(process, code=1 if launcher == "torchrun" else 33)
    assert f"resuming after step {stopped_at}" in out
    steps = [step for step, *_ in losses(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1)), "a step was lost or repeated"


def test_skypilot_nodes_meet(small, tmp_path, monkeypatch, supervisor_port):
    """Two `nodes` of one rank each, as SkyPilot describes them."""
    monkeypatch.setenv("SPOTFORGE_TOKEN", "what the nodes share")
    more = [*small, "micro_batch_size=2"]
    processes = []
    for rank in range(2):
        os.environ |= {
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NODE_RANK": str(rank),
            "SKYPILOT_NODE_IPS": "127.0.0.1\n127.0.0.1",
        }
        processes.append(command(*more))
    for name in [n for n in os.environ if n.startswith("SKYPILOT_")]:
        del os.environ[name]
    outs = [finish(process) for process in processes]
    assert "2 x cpu" in outs[0] + outs[1]
    assert metrics(tmp_path / "run")[-1]["step"] == 6


def test_skypilot_nodes_without_a_token_are_refused(small, trainer, monkeypatch):
    for name, value in (("NUM_NODES", "2"), ("NODE_RANK", "1"), ("NODE_IPS", "127.0.0.1\n::1")):
        monkeypatch.setenv(f"SKYPILOT_{name}", value)
    refused = trainer(*small, "nproc=1", "micro_batch_size=2")
    assert refused.code == 2 and refused.err.startswith("SPOTFORGE_TOKEN=")


def test_a_launcher_that_contradicts_nproc_is_refused(trainer, small, tmp_path, monkeypatch):
    told = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("trainer.launching.run_rank", lambda *_: 0)  # would wait for the other
    result = trainer(*small, "nproc=3")
    assert result.code == 2 and "nproc=3: the launcher started 2 ranks" in result.err
    assert not (tmp_path / "run").exists()


def ranks_of(process):
    """Process ids of the ranks that a supervisor has started, by rank."""
    found = subprocess.run(
        ["pgrep", "-f", "-P", str(process.pid), "trainer.rank"], capture_output=True, text=True
    ).stdout.split()
    environments = {int(pid): Path(f"/proc/{pid}/environ").read_text() for pid in found}
    by_rank = {
        int(dict(x.split("=", 1) for x in text.split("\0") if "=" in x)["RANK"]): pid
        for pid, text in environments.items()
    }
    return [by_rank[rank] for rank in sorted(by_rank)]


def run_with_a_rank_lost(words, number, folder):
    """Has a run whose rank 1 gets a signal after step 8.

    Where this process is late, the run is over before that; it has another run of more steps then.

    Returns:
        Its folder, its number of steps, and what it printed.
    """
    for num_steps in (120, 1200, 12000):
        run_dir = folder / f"run-{num_steps}"
        process = command(*words, f"run.dir={run_dir}", "nproc=2", f"stop.steps={num_steps}")
        wait_for_step(run_dir, 8)
        ranks = ranks_of(process)
        last = metrics(run_dir)[-1]["step"]
        if len(ranks) == 2 and last < num_steps:
            with suppress(ProcessLookupError):
                os.kill(ranks[1], number)
        out = finish(process)
        if "resuming after step" in out:
            return run_dir, num_steps, out
    raise AssertionError("each time the run was over too soon")


def test_a_rank_that_dies_is_started_again(small, tmp_path):
    more = [*small, "micro_batch_size=2", "checkpoint.interval=5"]
    run_dir, num_steps, out = run_with_a_rank_lost(more, signal.SIGKILL, tmp_path)
    assert "rank 1 died of SIGKILL" in out, out
    steps = [step for step, *_ in losses(run_dir)]
    assert steps == list(range(1, num_steps + 1)), "a step was lost or repeated"
    events = [json.loads(x) for x in (run_dir / "events.jsonl").read_text().splitlines()]
    starts = [e for e in events if e["event"] == "start"]
    assert [e["world_size"] for e in starts] == [2, 2]
    assert 0 <= starts[1]["lost_steps"] <= 10 and starts[1]["step"] % 5 == 0
    assert events[-1]["event"] == "finish"
    supervisor = (run_dir / "supervisor.jsonl").read_text()
    assert [json.loads(x)["event"] for x in supervisor.splitlines()] == [
        "start",
        "fail",
        "start",
        "finish",
    ]


@pytest.mark.long
def test_a_rank_that_hangs_is_found_with_stacks(small, tmp_path):
    """Stopped by SIGSTOP, as a GPU that fell silent would stop it."""
    more = [*small, "micro_batch_size=2", "checkpoint.interval=5", "hang_timeout_s=15"]
    run_dir, num_steps, out = run_with_a_rank_lost(more, signal.SIGSTOP, tmp_path)
    # Which collective it waits in depends on the moment: of a step, or of a save.
    stacks = out.split("stacks of rank 0")[1].split("starting again")[0]
    assert "trainer/loop.py" in stacks, out
    assert "rank 1" in out, out
    assert [step for step, *_ in losses(run_dir)] == list(range(1, num_steps + 1))


@pytest.mark.long
def test_an_error_that_comes_back_is_given_up(small, tmp_path, monkeypatch):
    """Three times the same traceback at the same step: a fourth start would only cost money."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'trainer.rank' in ' '.join(sys.orig_argv):\n"
        "    import trainer.schedule as schedule\n"
        "    def scale(self, step, total_steps):\n"
        "        assert step < 7, f'no such step in process {id(self)}'\n"
        "        return 1.0\n"
        "    schedule.CosineConfig.scale = scale\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    process = command(*small, "nproc=2", "micro_batch_size=2", "stop.steps=300")
    out = finish(process, code=1)
    assert "giving up" in out and "no such step" in out, out
    assert out.count("resuming") == 0 and "start 3" in out and "start 4" not in out


def test_two_jobs_on_one_run_directory(trainer, small, tmp_path):
    process = command(*small, "stop.steps=100000", "checkpoint.interval=end")
    wait_for_step(tmp_path / "run", 2)
    second = trainer(*small)
    assert second.code == 2
    assert f"another job is training there (process {process.pid} on" in second.err
    process.send_signal(signal.SIGUSR1)
    out = finish(process, code=33)
    assert "SIGUSR1" in out
    assert not list((tmp_path / "run").glob(".lock-owner"))


def wait_for_step(run_dir, step, timeout_s=600):
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        path = run_dir / "metrics.jsonl"
        if path.exists() and any(r["step"] >= step for r in metrics(run_dir)):
            return
        time.sleep(0.1)
    raise AssertionError(f"step {step} did not come")


def _checkpoint_tensors(checkpoint):
    from trainer.checkpoint import Located, tensor_shapes

    tensors = {
        name: torch.empty(shape)
        for name, shape in tensor_shapes(checkpoint).items()
        if not name.startswith("optim.")
    }
    Located(checkpoint).read(tensors)
    return tensors


def test_compiled_blocks_train_alike(trainer, small, tmp_path):
    assert trainer(*small, f"run.dir={tmp_path / 'eager'}").code == 0
    finish(command(*small, "compile=true", f"run.dir={tmp_path / 'compiled'}"))
    for eager, compiled in zip(
        losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True
    ):
        assert compiled == pytest.approx(eager, rel=1e-4)


_COUNTS_GRAPHS = """
import sys
from torch._dynamo.utils import counters
from trainer.__main__ import main
assert main() == 0
print("graphs:", counters["stats"]["unique_graphs"])
"""


@pytest.mark.long
def test_what_is_asked_before_the_first_step_compiles_nothing(small):
    """One graph for training and one for evaluation; the probes' few tokens would add theirs."""
    words = [str(word) for word in [*small, "compile=true"]]
    done = run(python("-c", _COUNTS_GRAPHS, *words), environment(OMP_NUM_THREADS="1"))
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "graphs: 2"
