"""A plan becomes a batch script, which a real Slurm runs: through a notice and to the end."""

import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from launch.__main__ import main
from tests.launch.place.slurm_cluster import PROGRAMS, slurm
from tests.words import last_of_each

POOL = "launch.pools={hpc:{kind:slurm,gpu:A100-80GB,gpus_per_node:2,nodes:2,usd_per_h:3}}"
SLURM = ("launch.target=slurm", "launch.nodes=[2]", POOL)


def rendered(capsys, *words):
    assert main(["render", *words]) == 0
    return capsys.readouterr().out


def test_the_script_asks_for_what_the_plan_counts_on(small, capsys):
    words = (
        "launch.slurm.partition=gpu",
        "launch.slurm.time_limit=2d",
        "launch.setup=module load x",
    )
    text = rendered(capsys, *small, *SLURM, *words, "launch.env={A: b c}", "launch.budget_usd=9")
    lines = text.splitlines()
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert {"nodes=2", "gpus-per-node=2", "time=2880", "signal=TERM@600", "requeue"} < set(options)
    assert "partition=gpu" in options and not any("account" in option for option in options)
    assert "export 'A=b c'" in lines and "module load x" in lines
    guard = next(line for line in lines if "launch guard" in line)
    assert "--usd-per-h 3 --nodes 2" in guard and "--budget-usd 9" in guard
    shell = [Path(sys.executable).with_name("shellcheck"), "--shell=bash", "-"]
    checked = subprocess.run(shell, input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize(
    ("words", "cost"),
    [
        ((), "the loss of more than 1 at once costs the whole run"),
        (("checkpoint.replicas=0",), "it costs the whole run"),
        (("checkpoint.upload=s3://mine/x",), "those since the last upload"),
    ],
)
def test_it_says_what_the_loss_of_a_node_costs(small, capsys, words, cost):
    text = rendered(capsys, *small, *SLURM, *words)
    [line] = [line for line in text.splitlines() if "a lost node costs" in line]
    assert line.startswith("# ") and cost in line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("launch.target=slurm",), "launch.target=slurm: launch.pools has no pool of"),
        ((*SLURM, "launch.bucket=s3://mine"), "launch.bucket=s3://mine: "),
        ((*SLURM, "launch.image=a/b"), "launch.image=a/b: "),
        ((*SLURM, "launch.slurm.partition=a b"), "launch.slurm.partition=a b: "),
        ((*SLURM, "launch.slurm.time_limit=5"), "launch.slurm.time_limit=5: "),
        (
            (*SLURM, "launch.slurm.time_limit=10min"),
            "launch.slurm.save_minutes=10: must be shorter than launch.slurm.time_limit=10min",
        ),
        ((*SLURM, "launch.nodes=[2,4]", "launch.name=A"), "launch.name=A: "),
        ((*SLURM, "launch.nodes=[4]"), "launch.nodes=[4]"),
    ],
)
def test_what_slurm_cannot_take_is_refused(small, words, said, capsys):
    assert main(["render", *last_of_each([*small, *words])]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(said) and len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_without_slurm_nothing_is_submitted(small, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["up", *small, *SLURM]) == 2
    err = capsys.readouterr().err
    assert err.startswith("launch.target=slurm: ") and "sbatch" in err


def test_logs_wait_for_no_file_that_is_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "mine.out").write_text("step 1")
    assert main(["logs", "mine", "launch.target=slurm"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("launch.target=slurm: ") and "squeue" in err
    (tmp_path / "squeue").touch(0o755)
    assert main(["logs", "other", "launch.target=slurm"]) == 2
    assert capsys.readouterr().err.startswith("launch.name=other: ")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        pytest.skip("the name of this machine has no address, which nodes of Slurm have")
    with slurm(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.mark.long
@pytest.mark.skipif(not all(map(shutil.which, PROGRAMS)), reason="no Slurm: apt install slurm-wlm")
def test_a_job_is_queued_again_after_a_notice_and_not_after_a_cancel(small, cluster, tmp_path):
    words = [
        "stop.steps=3000",
        "log.every_steps=50",
        "launch.name=mine",
        "launch.slurm.save_minutes=1",
    ]
    output, run_dir = tmp_path / "mine.out", tmp_path / "run"

    def launch(verb, *more):
        command = [sys.executable, "-m", "launch", verb, *last_of_each(more)]
        done = subprocess.run(
            command, cwd=tmp_path, env=cluster.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr

    def has(text, count=1):
        return output.exists() and output.read_text().count(text) >= count

    launch("up", *small, *words, *SLURM)
    cluster.wait_for(lambda: has("step 50/3000"))
    job = cluster.job()["JobId"]
    # as Slurm does before the time is over, and before it gives the machines to others
    cluster.ask("scancel", "--signal=TERM", job)
    cluster.wait_for(lambda: cluster.job()["JobState"] == "PENDING")
    assert has("stopped after saving")
    cluster.ask("scontrol", "update", f"JobId={job}", "StartTime=now")  # it waits for 2 minutes
    cluster.wait_for(lambda: has("resuming after step"))
    cluster.wait_for(lambda: cluster.job()["JobState"] == "COMPLETED")
    assert (run_dir / "checkpoints" / "step-00003000" / "manifest.json").is_file()
    assert cluster.job()["Restarts"] == "1"
    assert has("joined (1 rank)", 2)

    launch("up", *small, *words, *SLURM, "stop.steps=100000", f"run.dir={tmp_path / 'other'}")
    cluster.wait_for(lambda: has("step 50/100000"))
    launch("down", "mine", "launch.target=slurm")
    cluster.wait_for(lambda: "CANCELLED" in cluster.ask("scontrol", "show", "job"))
    cluster.wait_for(lambda: list((tmp_path / "other" / "checkpoints").glob("step-*")))
    cluster.wait_for(lambda: not cluster.ask("squeue", "-h").strip())
    assert "PENDING" not in cluster.ask("scontrol", "show", "job")
