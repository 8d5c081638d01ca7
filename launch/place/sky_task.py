"""A job as a SkyPilot task, for SkyPilot 0.14.

docs: https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""

import json
import re
import shlex
from typing import Any

from core.errors import ConfigError, ExitCode
from launch.config import LaunchConfig, Stage
from launch.place.job import MOUNT, PORT, Job, heading, to_yaml
from launch.plan.candidate import Candidate

# Names in our lists -> SkyPilot's; a provider that is not here is none of SkyPilot's.
CLOUDS = {
    "aws": "aws",
    "azure": "azure",
    "cudo": "cudo",
    "digitalocean": "do",
    "do": "do",
    "fluidstack": "fluidstack",
    "gcp": "gcp",
    "hyperbolic": "hyperbolic",
    "ibm": "ibm",
    "lambda": "lambda",
    "nebius": "nebius",
    "oci": "oci",
    "paperspace": "paperspace",
    "primeintellect": "primeintellect",
    "runpod": "runpod",
    "scp": "scp",
    "seeweb": "seeweb",
    "shadeform": "shadeform",
    "vast": "vast",
    "verda": "verda",
}
_SETUP = "pip install -c constraints.txt ."
_STORES = {"s3": "s3", "gs": "gcs", "r2": "r2"}
_BUCKET = re.compile(r"(s3|gs|r2)://([a-z0-9][-a-z0-9.]{1,61}[a-z0-9])")


def render(job: Job) -> str:
    """The task, as YAML that `sky launch` and `sky jobs launch` take.

    Raises:
        ConfigError: `launch.bucket` is none that SkyPilot can mount.
    """
    usage = "sky launch FILE, or as a managed job: sky jobs launch FILE"
    return f"{heading(job, usage)}\n{to_yaml(*documents(job))}"


def documents(job: Job) -> list[dict[str, Any]]:
    """The task; for several stages their tasks, behind the pipeline's name. See `render`."""
    stages = job.launch.stages
    if len(stages) == 1:
        return [_task(job, stages[0], job.name)]
    tasks = [_task(job, stage, f"{job.name}-{stage.value}") for stage in stages]
    return [{"name": job.name}, *tasks]


def _task(job: Job, stage: Stage, name: str) -> dict[str, Any]:
    launch = job.launch
    trains = stage is Stage.train
    task: dict[str, Any] = {"name": name, "num_nodes": job.num_nodes if trains else 1}
    task["resources"] = {
        "ordered": _ordered(job),
        # An error that is ours would only be repeated on a new machine, for money.
        "job_recovery": {
            "strategy": "FAILOVER",
            "max_restarts_on_errors": 0,
            "recover_on_exit_codes": [int(ExitCode.START_AGAIN)],
        },
        "autostop": {"idle_minutes": launch.skypilot.autostop_minutes, "down": True},
    }
    if launch.image is not None:
        task["resources"]["image_id"] = f"docker:{launch.image}"
    if launch.skypilot.workdir is not None:
        task["workdir"] = launch.skypilot.workdir
    task["envs"] = {**launch.env, "SPOTFORGE_PRICES": _prices(job)}
    if launch.secrets:
        task["secrets"] = dict.fromkeys(launch.secrets)
    if launch.bucket is not None:
        store, bucket = _bucket(launch)
        task["file_mounts"] = {MOUNT: {"name": bucket, "store": store, "mode": "MOUNT_CACHED"}}
    needs_setup = launch.setup is None and launch.skypilot.workdir is not None
    setup = _SETUP if needs_setup else launch.setup
    if setup:
        task["setup"] = setup
    task["run"] = _train(job) if trains else _later(job, stage)
    return task


def _prices(job: Job) -> str:
    """Of a node at each candidate, for the guard, which SkyPilot tells where it is: JSON."""
    return json.dumps(
        [
            {
                "cloud": CLOUDS.get(way.offer.cloud, way.offer.cloud),
                "region": way.offer.region,
                "zone": _zone(way),
                "gpu": way.offer.gpu,
                "gpus_per_node": way.offer.gpus_per_node,
                "is_spot": way.offer.is_spot,
                "usd_per_h": way.offer.usd_per_h,
            }
            for way in job.candidates
        ]
    )


def _train(job: Job) -> str:
    """What each node does: the first pays and supervises, the others join it."""
    command = job.trainer_command()
    supervise = ["python", "-m", "launch", "supervise"]
    if job.num_nodes > 1:
        supervise += ["--listen", str(PORT), "--nodes", str(job.num_nodes)]
    lines = [shlex.join(_guarded(job, [*supervise, "--", *command])), "code=$?"]
    if len(job.launch.stages) > 1:
        record = shlex.join(job.pipeline_command("--record", Stage.train))
        lines.append(f"if [ $code -eq 0 ]; then {record} || code=1; fi")
    lines += [*_keep(job), "exit $code"]
    if job.num_nodes == 1:
        return "\n".join(lines) + "\n"
    join = f'python -m launch join "$head:{PORT}" -- {shlex.join(command)}'
    return "\n".join(
        [
            'if [ "$SKYPILOT_NODE_RANK" -gt 0 ]; then',
            '  head=$(echo "$SKYPILOT_NODE_IPS" | head -n 1)',
            "  # the first node says whether the job is started again: SkyPilot hears any node",
            f"  {join}; code=$?",
            f"  [ $code -eq {int(ExitCode.START_AGAIN)} ] && code=0",
            "  exit $code",
            "fi",
            *lines,
            "",
        ]
    )


def _later(job: Job, stage: Stage) -> str:
    """A stage on a machine of its own, which first fetches what the one before has left."""
    fetch = []
    if _is_copied(job):
        run_dir = shlex.join([str(job.run_dir)])
        fetch = [f"mkdir -p {run_dir} && cp -r {job.kept_at}/run/. {run_dir} || exit 1"]
    guard = shlex.join(_guarded(job, job.pipeline_command("--only", stage)))
    return "\n".join([*fetch, guard, "code=$?", *_keep(job), "exit $code", ""])


def _guarded(job: Job, command: list[str]) -> list[str]:
    return job.guard_command(command, ["--since-boot"])


def _is_copied(job: Job) -> bool:
    """Whether the run directory is on the machine's own disk, and a bucket is there for a copy."""
    return job.kept_at is not None and job.launch.shared_dir is None


def _keep(job: Job) -> list[str]:
    """Lines that copy what a machine has made, which goes when they end."""
    if not _is_copied(job):
        return []
    run_dir = shlex.join([str(job.run_dir)])
    copy = f"mkdir -p {job.kept_at}/run && cp -r {run_dir}/. {job.kept_at}/run"
    return ["# the machine goes when this ends", f"if [ $code -eq 0 ]; then {copy} || code=1; fi"]


def _ordered(job: Job) -> list[dict[str, Any]]:
    resources: list[dict[str, Any]] = []
    for way in job.candidates:
        if (one := _resources(way)) not in resources:  # zones that SkyPilot tries by itself
            resources.append(one)
    return resources


def _resources(way: Candidate) -> dict[str, Any]:
    offer = way.offer
    return {
        "infra": infra(way),
        "accelerators": f"{offer.gpu}:{offer.gpus_per_node}",
        "use_spot": offer.is_spot,
    }


def infra(way: Candidate) -> str:
    """`aws/ap-south-1/ap-south-1a`, as far as it is known; empty: not SkyPilot's."""
    offer = way.offer
    if offer.pool:
        return {"ssh": f"ssh/{offer.pool}", "kubernetes": f"k8s/{offer.pool}"}.get(offer.cloud, "")
    cloud = CLOUDS.get(offer.cloud)
    if cloud is None:
        return ""
    return "/".join(part for part in (cloud, offer.region, _zone(way)) if part)


def _zone(way: Candidate) -> str:
    """Empty where only AWS's ID of it is known, which AWS takes nowhere and SkyPilot never says."""
    zone = way.offer.zone
    return "" if re.search(r"-az\d+$", zone) else zone


def _bucket(launch: LaunchConfig) -> tuple[str, str]:
    """SkyPilot's name of the store, and the bucket's."""
    match = _BUCKET.fullmatch(launch.bucket or "")
    if match is None:
        rule = "is no bucket that SkyPilot mounts"
        raise ConfigError("launch.bucket", launch.bucket, rule, "use s3://name, gs:// or r2://")
    return _STORES[match[1]], match[2]
