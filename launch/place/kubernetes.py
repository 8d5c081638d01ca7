"""Kubernetes: a job as a JobSet, whose pods are made again when their machines are taken away.

A JobSet and no TrainJob, which has no rule by exit code: 33 makes a pod again, however often, and
a failure ends the job instead of being repeated for money.

docs: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import ConfigError, ExitCode
from launch.config import LaunchConfig
from launch.place.job import MOUNT, PORT, Job, heading, to_yaml
from launch.place.place import Storage, of_one_pool, refuse_unused
from launch.place.program import Program
from launch.plan.candidate import Candidate
from launch.plan.planner import Plan
from launch.settings import Settings

_CONTAINER, _REPLICATED = "spotforge", "node"
# Taints by which GKE and AKS keep others off spot machines, and all clouds off machines with GPUs.
_TAINTS = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "nvidia.com/gpu")
_GRACE_S = 600  # a spot machine gives less
_ANSWER_S = 20
_WAIT_S = 3600  # for the first pod, while its machine is replaced


class Kubernetes:
    """Applies JobSets with `kubectl`."""

    def __init__(self, launch: LaunchConfig) -> None:
        self._launch = launch

    def usable(self, plan: Plan) -> list[Candidate]:
        """See `Place`."""
        return of_one_pool(plan)

    def storage(self, name: str, settings: Settings, ways: Sequence[Candidate]) -> Storage:
        """See `Place`."""
        refuse_unused(self._launch, "bucket", "shared_dir")
        if self._launch.kubernetes.volume_claim is None:
            rule = "a pod takes its disk with it"
            fix = "name a PersistentVolumeClaim (for several nodes: ReadWriteMany)"
            raise ConfigError("launch.kubernetes.volume_claim", None, rule, fix)
        if self._launch.image is None:
            rule = "a pod needs an image with the project in it"
            raise ConfigError("launch.image", None, rule, "name one")
        return Storage(Path(MOUNT) / name)

    def render(self, job: Job) -> str:
        """See `Place`."""
        return heading(job, "kubectl apply -f FILE") + "\n" + to_yaml(self.document(job))

    def document(self, job: Job) -> dict[str, Any]:
        """The JobSet, before it is written."""
        kubernetes = self._launch.kubernetes
        metadata: dict[str, Any] = {"name": job.name, "namespace": kubernetes.namespace}
        if kubernetes.queue is not None:
            metadata["labels"] = {"kueue.x-k8s.io/queue-name": kubernetes.queue}
        pods = {
            "parallelism": job.num_nodes,
            "completions": job.num_nodes,
            "completionMode": "Indexed",
            "backoffLimit": 6,
            "podFailurePolicy": {
                "rules": [
                    _on_exit("Ignore", ExitCode.START_AGAIN),
                    {
                        "action": "Ignore",
                        "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
                    },
                    _on_exit("FailJob", ExitCode.FAILED, ExitCode.BAD_CONFIG),
                ]
            },
            "template": {"spec": self._pod(job)},
        }
        return {
            "apiVersion": "jobset.x-k8s.io/v1alpha2",
            "kind": "JobSet",
            "metadata": metadata,
            "spec": {
                "failurePolicy": {"maxRestarts": 0},  # the Job below makes pods again by itself
                "replicatedJobs": [
                    {"name": _REPLICATED, "replicas": 1, "template": {"spec": pods}}
                ],
            },
        }

    def _pod(self, job: Job) -> dict[str, Any]:
        launch, kubernetes = self._launch, self._launch.kubernetes
        env: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in sorted(launch.env.items())]
        for name in launch.secrets:
            of = {"secretKeyRef": {"name": kubernetes.secret, "key": name}}
            env.append({"name": name, "valueFrom": of})
        container = {
            "name": _CONTAINER,
            "image": launch.image,
            "command": ["bash", "-c", self._script(job)],
            "env": env,
            "resources": {"limits": {"nvidia.com/gpu": job.candidates[0].offer.gpus_per_node}},
            "volumeMounts": [
                {"name": "runs", "mountPath": MOUNT},
                {"name": "memory", "mountPath": "/dev/shm"},  # 64 MiB is too little for NCCL
            ],
        }
        return {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": _GRACE_S,
            "nodeSelector": dict(kubernetes.node_labels),
            "tolerations": [
                {"key": key, "operator": "Exists"}
                for key in dict.fromkeys([*_TAINTS, *kubernetes.node_labels])
            ],
            "containers": [container],
            "volumes": [
                {
                    "name": "runs",
                    "persistentVolumeClaim": {"claimName": kubernetes.volume_claim},
                },
                {"name": "memory", "emptyDir": {"medium": "Memory"}},
            ],
        }

    def _script(self, job: Job) -> str:
        """What each pod does; `exec`, since a signal comes to the first process only."""
        command = job.trainer_command()
        supervise = ["python", "-m", "launch", "supervise"]
        lines = ["set -eu", *([self._launch.setup] if self._launch.setup else [])]
        if job.num_nodes > 1:
            supervise += ["--listen", str(PORT), "--nodes", str(job.num_nodes)]
            head = f"{job.name}-{_REPLICATED}-0-0.{job.name}:{PORT}"
            join = ["python", "-m", "launch", "join", head, "--wait", str(_WAIT_S), "--", *command]
            lines += [
                'if [ "$JOB_COMPLETION_INDEX" -gt 0 ]; then',
                f"  exec {shlex.join(join)}",
                "fi",
            ]
        guard = job.guard_command([*supervise, "--", *command], job.own_price())
        return "\n".join([*lines, f"exec {shlex.join(guard)}", ""])

    def start(self, job: Job, text: str) -> int:
        """See `Place`."""
        return self._kubectl().run("apply", "-f", "-", text=text)

    def status(self) -> int:
        """See `Place`."""
        return self._kubectl().run("get", "jobsets", *self._where())

    def logs(self, name: str) -> int:
        """See `Place`."""
        label = f"jobset.sigs.k8s.io/jobset-name={name}"
        words = ("--prefix", "--tail=-1", "--max-log-requests=64", "--follow")
        return self._kubectl().run("logs", "-l", label, *words, *self._where())

    def down(self, name: str) -> int:
        """See `Place`."""
        return self._kubectl().run("delete", "jobset", name, *self._where())

    def _where(self) -> tuple[str, str]:
        return "--namespace", self._launch.kubernetes.namespace

    def _kubectl(self) -> Program:
        fix = "install it, with access to the cluster"
        kubectl = Program("kubectl", "launch.target", "kubernetes", fix)
        problem = kubectl.problem("get", "--raw", "/version", f"--request-timeout={_ANSWER_S}s")
        if problem is not None:
            rule = f"kubectl reaches no cluster ({problem})"
            raise ConfigError(
                "launch.target", "kubernetes", rule, "see kubectl config get-contexts"
            )
        return kubectl


def _on_exit(action: str, *codes: int) -> dict[str, Any]:
    """A rule of `podFailurePolicy`."""
    values = [int(code) for code in codes]
    on = {"containerName": _CONTAINER, "operator": "In", "values": values}
    return {"action": action, "onExitCodes": on}
