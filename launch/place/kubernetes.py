"""Kubernetes: a job as a JobSet, whose pods are created again when their machines are preempted.

A JobSet, unlike a TrainJob, has rules by exit code: 33 creates a pod again without limit, and a
failure ends the job instead of repeating it at the user's expense.

docs: https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from core.errors import ConfigError, ExitCode
from launch.config import LaunchConfig
from launch.place.place import MOUNT, Job, Storage, of_one_pool, refuse_unused
from launch.place.program import Program
from launch.place.readable_yaml import to_yaml
from launch.plan.candidate import Candidate
from launch.plan.planner import Plan
from launch.settings import Settings
from parallel.launcher import SUPERVISOR_PORT, TOKEN_VARIABLE

_CONTAINER, _REPLICATED = "spotforge", "node"
# Taints with which GKE and AKS reserve spot machines, and all clouds machines with GPUs.
_TAINTS = ("cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority", "nvidia.com/gpu")
_GRACE_S = 600  # the most; a preempted spot machine ends sooner
_ANSWER_S = 20
_WAIT_S = 3600  # for which pods wait for the first one while its machine is replaced


class Kubernetes:
    """Applies JobSets with `kubectl`."""

    def __init__(self, launch: LaunchConfig) -> None:
        self._launch = launch

    def usable(self, plan: Plan) -> list[Candidate]:
        """See `Place`."""
        return of_one_pool(plan)

    def storage(self, name: str, settings: Settings, candidates: Sequence[Candidate]) -> Storage:
        """See `Place`."""
        refuse_unused(self._launch, "bucket", "shared_dir")
        if self._launch.image is None:
            rule = "is needed: a pod runs an image that contains the project"
            raise ConfigError("launch.image", None, rule, "give its name")
        storage = Storage(Path(MOUNT) / name)
        if self._launch.kubernetes.volume_claim is not None:
            return storage
        fix = "name a PersistentVolumeClaim (for several nodes: ReadWriteMany)"
        if candidates[0].num_nodes == 1 or settings.trainer.checkpoint.upload is None:
            rule = "is needed: a pod's own disk is deleted with the pod"
            fix += "; for several nodes, checkpoint.upload=URL will do"
            raise ConfigError("launch.kubernetes.volume_claim", None, rule, fix)
        for key in ("budget_usd", "deadline"):
            if (value := getattr(self._launch, key)) is not None:
                rule = "needs launch.kubernetes.volume_claim: the ledger is deleted with the pod"
                raise ConfigError(f"launch.{key}", value, rule, fix)
        cost = f"{storage.on_loss}; nodes lost together, those since the last upload"
        if settings.trainer.checkpoint.replicas == "0":
            cost = "a lost node costs the steps since the last upload (checkpoint.replicas=0)"
        own = "each node has a disk of its own, which goes with its pod"
        return replace(storage, on_loss=f"{own}: {cost}")

    def render(self, job: Job) -> str:
        """See `Place`."""
        usage = "kubectl apply -f FILE"
        if job.secrets:
            usage += f"; its Secret {self._launch.kubernetes.secret} has {', '.join(job.secrets)}"
        return job.heading(usage) + "\n" + to_yaml(self.document(job))

    def document(self, job: Job) -> dict[str, Any]:
        """Returns the JobSet as a document, before it becomes YAML."""
        kubernetes = self._launch.kubernetes
        metadata: dict[str, Any] = {"name": job.name, "namespace": kubernetes.namespace}
        if kubernetes.queue is not None:
            metadata["labels"] = {"kueue.x-k8s.io/queue-name": kubernetes.queue}
        pods = {
            "parallelism": job.num_nodes,
            "completions": job.num_nodes,
            "completionMode": "Indexed",
            "backoffLimit": 6,
            # The first rule that matches counts. Ignored ends do not use up backoffLimit; exit
            # codes that no rule names, e.g. 137 out of memory, do.
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
                # A restart of the JobSet would end all pods; the Job below replaces single ones.
                "failurePolicy": {"maxRestarts": 0},
                "replicatedJobs": [
                    {"name": _REPLICATED, "replicas": 1, "template": {"spec": pods}}
                ],
            },
        }

    def _pod(self, job: Job) -> dict[str, Any]:
        launch, kubernetes = self._launch, self._launch.kubernetes
        env: list[dict[str, Any]] = [{"name": k, "value": v} for k, v in sorted(launch.env.items())]
        for name in job.secrets:
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
                # A container's default of 64 MiB is too little for NCCL.
                {"name": "memory", "mountPath": "/dev/shm"},
            ],
        }
        claim = kubernetes.volume_claim
        runs = {"persistentVolumeClaim": {"claimName": claim}} if claim else {"emptyDir": {}}
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
                {"name": "runs", **runs},
                {"name": "memory", "emptyDir": {"medium": "Memory"}},
            ],
        }

    def _script(self, job: Job) -> str:
        """Returns the script of a pod. It uses `exec`, since only process 1 receives SIGTERM."""
        lines = ["set -eu", *([self._launch.setup] if self._launch.setup else [])]
        if job.num_nodes > 1:
            # The DNS name that a JobSet gives the first pod of its first Job.
            head = f"{job.name}-{_REPLICATED}-0-0.{job.name}:{SUPERVISOR_PORT}"
            lines += [
                'if [ "$JOB_COMPLETION_INDEX" -gt 0 ]; then',
                f"  exec {job.join(head, f' --wait {_WAIT_S}')}",
                "fi",
            ]
        return "\n".join([*lines, f"exec {job.supervise(job.own_price())}", ""])

    def start(self, job: Job, text: str) -> int:
        """See `Place`.

        Raises:
            ConfigError: The cluster lacks a secret, without which no pod would start.
        """
        kubectl, secret = self._kubectl(), self._launch.kubernetes.secret
        for name in job.secrets:
            path = f"jsonpath={{.data.{name}}}"
            if not kubectl.ask("get", "secret", secret, "-o", path, *self._where()):
                rule = f"the cluster's Secret of that name has no {name}"
                fix = f"kubectl create secret generic {secret} --from-literal={name}=..."
                if name == TOKEN_VARIABLE:
                    rule += ", by which nodes join"
                    fix = fix.replace("...", '"$(openssl rand -hex 24)"')
                raise ConfigError("launch.kubernetes.secret", secret, rule, fix)
        return kubectl.run("apply", "-f", "-", text=text)

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
    """Returns a rule of `podFailurePolicy` for exit codes."""
    values = [int(code) for code in codes]
    on = {"containerName": _CONTAINER, "operator": "In", "values": values}
    return {"action": action, "onExitCodes": on}
