"""A job as a SkyPilot task, for SkyPilot 0.14.

docs: https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""

import json
import re
import shlex
from typing import Any

from core.errors import ConfigError, ExitCode
from launch.config import LaunchConfig, Stage
from launch.place.job import MOUNT, Job, heading, to_yaml
from launch.plan.candidate import Candidate
from parallel.launcher import SUPERVISOR_PORT

# Cloud names of price lists -> SkyPilot's. SkyPilot does not support providers that are not here.
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
    """Returns the task as YAML for `sky launch` and `sky jobs launch`.

    Raises:
        ConfigError: SkyPilot cannot mount `launch.bucket`.
    """
    usage = "sky launch FILE, or as a managed job: sky jobs launch FILE"
    return f"{heading(job, usage)}\n{to_yaml(*documents(job))}"


def documents(job: Job) -> list[dict[str, Any]]:
    """Returns the documents of the YAML: one task, or a header and a task for each stage.

    Raises:
        ConfigError: See `render`.
    """
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
        # Repeating a failure of the job on a new machine would only cost money; lost machines are
        # not counted as errors, and 33 asks for another start.
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
    # An empty setup of the user's replaces the default one: null and "" differ.
    needs_setup = launch.setup is None and launch.skypilot.workdir is not None
    setup = _SETUP if needs_setup else launch.setup
    if setup:
        task["setup"] = setup
    task["run"] = _train(job) if trains else _later(job, stage)
    return task


def _prices(job: Job) -> str:
    """Returns the node prices of all candidates as JSON, from which the guard picks its own."""
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
    """Returns the script of a training node: the first one pays and supervises, others join it."""
    command = job.trainer_command()
    supervise = ["python", "-m", "launch", "supervise"]
    if job.num_nodes > 1:
        supervise += ["--listen", str(SUPERVISOR_PORT), "--nodes", str(job.num_nodes)]
    lines = [shlex.join(_guarded(job, [*supervise, "--", *command])), "code=$?"]
    if len(job.launch.stages) > 1:
        record = shlex.join(job.pipeline_command("--record", Stage.train))
        lines.append(f"if [ $code -eq 0 ]; then {record} || code=1; fi")
    lines += [*_keep(job), "exit $code"]
    if job.num_nodes == 1:
        return "\n".join(lines) + "\n"
    join = f'python -m launch join "$head:{SUPERVISOR_PORT}" -- {shlex.join(command)}'
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
    """Returns the script of a later stage, which first copies the run directory from the bucket."""
    fetch = []
    if _is_copied(job):
        run_dir = shlex.join([str(job.run_dir)])
        fetch = [f"mkdir -p {run_dir} && cp -r {job.kept_at}/run/. {run_dir} || exit 1"]
    guard = shlex.join(_guarded(job, job.pipeline_command("--only", stage)))
    return "\n".join([*fetch, guard, "code=$?", *_keep(job), "exit $code", ""])


def _guarded(job: Job, command: list[str]) -> list[str]:
    # The machine is paid for since its boot, and so also for the setup before this command.
    return job.guard_command(command, ["--since-boot"])


def _is_copied(job: Job) -> bool:
    """Returns whether the run directory is on the machine's own disk and a bucket keeps a copy."""
    return job.kept_at is not None and job.launch.shared_dir is None


def _keep(job: Job) -> list[str]:
    """Returns shell lines that copy the run directory to the bucket before the machine ends."""
    if not _is_copied(job):
        return []
    run_dir = shlex.join([str(job.run_dir)])
    copy = f"mkdir -p {job.kept_at}/run && cp -r {run_dir}/. {job.kept_at}/run"
    return ["# the machine goes when this ends", f"if [ $code -eq 0 ]; then {copy} || code=1; fi"]


def _ordered(job: Job) -> list[dict[str, Any]]:
    resources: list[dict[str, Any]] = []
    for way in job.candidates:
        # Zones without a name in the account become equal entries; SkyPilot tries them by itself.
        if (one := _resources(way)) not in resources:
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
    """Returns `aws/ap-south-1/ap-south-1a`, as far as known; empty if SkyPilot cannot go there."""
    offer = way.offer
    if offer.pool:
        return {"ssh": f"ssh/{offer.pool}", "kubernetes": f"k8s/{offer.pool}"}.get(offer.cloud, "")
    cloud = CLOUDS.get(offer.cloud)
    if cloud is None:
        return ""
    return "/".join(part for part in (cloud, offer.region, _zone(way)) if part)


def _zone(way: Candidate) -> str:
    """Returns the zone; empty if only its AWS ID is known, which no request accepts."""
    zone = way.offer.zone
    return "" if re.search(r"-az\d+$", zone) else zone


def _bucket(launch: LaunchConfig) -> tuple[str, str]:
    """Returns SkyPilot's name of the store, and the name of the bucket."""
    match = _BUCKET.fullmatch(launch.bucket or "")
    if match is None:
        rule = "is not a bucket that SkyPilot can mount"
        raise ConfigError("launch.bucket", launch.bucket, rule, "use s3://name, gs:// or r2://")
    return _STORES[match[1]], match[2]
