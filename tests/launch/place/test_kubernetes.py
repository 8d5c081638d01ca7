"""A plan becomes a JobSet that the field's own schemas take, and whose scripts train."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet

from launch.__main__ import main
from tests.words import last_of_each

POOL = "launch.pools={mine:{kind:kubernetes,gpu:H100,gpus_per_node:2,nodes:2,usd_per_h:16}}"
CLUSTER = (
    "launch.target=kubernetes",
    POOL,
    "launch.name=mine",
    "launch.kubernetes.volume_claim=runs",
    "launch.image=me/it:1",
)
SPOT = 'launch.kubernetes.node_labels={cloud.google.com/gke-spot:"true",karpenter.sh/pool:a}'


def job_set(capsys, *words):
    assert main(["render", *words]) == 0
    return yaml.safe_load(capsys.readouterr().out)


def pods_of(document):
    [replicated] = document["spec"]["replicatedJobs"]
    return replicated["template"]["spec"]


def test_schemas_of_kubernetes_and_jobset_take_it(small, capsys):
    words = ("launch.nodes=[2]", "launch.kubernetes.queue=gpus", SPOT)
    more = ("launch.env={A: b}", "launch.secrets=[WANDB_API_KEY]")
    document = job_set(capsys, *small, *CLUSTER, *words, *more)
    # a field that the schema does not know would be lost on the way
    assert JobsetV1alpha2JobSet.from_dict(document).to_dict() == document
    metadata = {"name": "mine-node-0"}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata}
    kubernetes_validate.validate(job | {"spec": pods_of(document)}, "1.31", strict=True)
    assert document["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gpus"}


def test_33_and_a_lost_machine_make_a_pod_again_and_a_failure_ends_the_job(small, capsys):
    rules = pods_of(job_set(capsys, *small, *CLUSTER))["podFailurePolicy"]["rules"]
    on_exit = {
        code: r["action"] for r in rules for code in r.get("onExitCodes", {}).get("values", [])
    }
    assert on_exit == {33: "Ignore", 1: "FailJob", 2: "FailJob"}
    lost = [r["action"] for r in rules if "onPodConditions" in r]
    assert lost == ["Ignore"]


def test_spot_machines_are_asked_for_and_their_taints_tolerated(small, capsys):
    pod = pods_of(job_set(capsys, *small, *CLUSTER, SPOT))["template"]["spec"]
    assert pod["nodeSelector"] == {"cloud.google.com/gke-spot": "true", "karpenter.sh/pool": "a"}
    tolerated = {toleration["key"] for toleration in pod["tolerations"]}
    assert {"kubernetes.azure.com/scalesetpriority", *pod["nodeSelector"]} <= tolerated
    assert pod["containers"][0]["resources"] == {"limits": {"nvidia.com/gpu": 2}}


def test_secrets_are_named_only(small, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    document = job_set(capsys, *small, *CLUSTER, "launch.secrets=[WANDB_API_KEY]")
    assert "very-secret" not in str(document)
    [env] = pods_of(document)["template"]["spec"]["containers"][0]["env"]
    assert env["valueFrom"] == {"secretKeyRef": {"name": "spotforge", "key": "WANDB_API_KEY"}}


def test_nodes_join_by_a_token_of_the_cluster(small, capsys, tmp_path, monkeypatch):
    words = [*small, *CLUSTER, "launch.nodes=[2]"]
    [env] = pods_of(job_set(capsys, *words))["template"]["spec"]["containers"][0]["env"]
    reference = {"secretKeyRef": {"name": "spotforge", "key": "SPOTFORGE_TOKEN"}}
    assert env == {"name": "SPOTFORGE_TOKEN", "valueFrom": reference}
    kubectl = tmp_path / "kubectl"
    kubectl.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncat {tmp_path}/$2\nexit 0\n')
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    (tmp_path / "secret").write_text("")
    assert main(["up", *words]) == 2  # its pods would never start
    assert capsys.readouterr().err.startswith("launch.kubernetes.secret=spotforge: ")
    assert "apply" not in (tmp_path / "calls").read_text()
    (tmp_path / "secret").write_text("c2VjcmV0")
    assert main(["up", *words]) == 0
    assert "apply" in (tmp_path / "calls").read_text()


def test_pods_may_have_disks_of_their_own_if_their_checkpoints_are_uploaded(small, capsys):
    own = [word for word in CLUSTER if "volume_claim" not in word]
    upload = "checkpoint.upload=s3://mine/runs"
    assert main(["render", *small, *own, "launch.nodes=[2]", upload]) == 0
    text = capsys.readouterr().out
    pod = pods_of(yaml.safe_load(text))["template"]["spec"]
    assert pod["volumes"][0] == {"name": "runs", "emptyDir": {}}
    assert "costs the steps since the last checkpoint" in text and "last upload" in text
    words = [*small, *own, "launch.nodes=[2]", upload, "checkpoint.replicas=0"]
    assert main(["render", *words]) == 0
    assert "costs the steps since the last upload" in capsys.readouterr().out
    # A pod that comes back has nothing: not without a store, not alone, and not with a ledger.
    for words, key in (
        (["launch.nodes=[2]"], "launch.kubernetes.volume_claim"),
        (["launch.nodes=[1]", upload], "launch.kubernetes.volume_claim"),
        (["launch.nodes=[2]", upload, "launch.budget_usd=9"], "launch.budget_usd"),
        (["launch.nodes=[2]", upload, "launch.deadline=9h"], "launch.deadline"),
    ):
        assert main(["render", *small, *own, *words]) == 2
        assert capsys.readouterr().err.startswith(f"{key}=")


@pytest.mark.parametrize("missing", ["launch.kubernetes.volume_claim", "launch.image"])
def test_what_a_pod_cannot_do_without_is_asked_for(small, missing, capsys):
    words = [word for word in CLUSTER if not word.startswith(missing)]
    assert main(["render", *small, *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"{missing}=None: ") and captured.out == ""


@pytest.mark.parametrize("words", [["status"], ["logs", "mine"], ["down", "mine"]])
def test_without_a_cluster_it_is_said_in_one_line(words, tmp_path, monkeypatch, capfd):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text("#!/bin/sh\necho memcache.go >&2\necho refused - did you? >&2\nexit 1\n")
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert main([*words, "launch.target=kubernetes"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("launch.target=kubernetes: kubectl reaches no cluster (refused - did you")


@pytest.mark.long
def test_pods_train_and_one_that_is_lost_comes_back(small, capsys, tmp_path, supervisor_port):
    # A machine that is fast, or looks late, gets more steps, of which one is still to come.
    folders = [(steps, tmp_path / str(steps)) for steps in (2500, 25_000)]
    assert any(one_pod_comes_back(small, capsys, *how) for how in folders), "it was over too soon"


def one_pod_comes_back(small, capsys, num_steps, tmp_path):
    """Whether the run went on long enough for a pod to be lost; asserts that it comes back."""
    tmp_path.mkdir()
    words = [f"stop.steps={num_steps}", "log.every_steps=50", "launch.nodes=[2]"]
    document = job_set(capsys, *last_of_each([*small, *words, *CLUSTER]))
    script = pods_of(document)["template"]["spec"]["containers"][0]["command"][2]
    # what the cluster provides: a name, a volume
    script = script.replace("mine-node-0-0.mine", "127.0.0.1").replace("/spotforge", str(tmp_path))
    output = tmp_path / "output"

    def pod(index):
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = os.environ | {"JOB_COMPLETION_INDEX": str(index), "PATH": path}
        environment |= {"OMP_NUM_THREADS": "1", "SPOTFORGE_TOKEN": "of the cluster's Secret"}
        with output.open("a") as file:
            return subprocess.Popen(
                ["bash", "-c", script], env=environment, stdout=file, stderr=file
            )

    def wait_for(text):
        deadline = time.monotonic() + 600
        while text not in output.read_text():
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)

    pods = [pod(0), pod(1)]
    try:
        wait_for(f"step 100/{num_steps}")
        pods[1].send_signal(signal.SIGTERM)  # `exec`: it reaches the program
        if pods[1].wait(300) == 0:
            return False
        assert pods[1].returncode == 33
        pods[1] = pod(1)
        wait_for("resuming after step")
        assert [process.wait(600) for process in pods] == [0, 0]
    finally:
        for process in pods:
            process.kill()
            process.wait()
    checkpoints = tmp_path / "mine" / "checkpoints"
    assert (checkpoints / f"step-{num_steps:08d}" / "manifest.json").is_file()
    return True
