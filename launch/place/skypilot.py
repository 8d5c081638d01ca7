"""A job as a SkyPilot task, for SkyPilot 0.14.

docs: https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""

import re
from collections.abc import Sequence
from typing import Any

import yaml

from launch.config import LaunchConfig
from launch.place.job import MOUNT, PORT, Job, shell
from launch.plan.candidate import Candidate
from launch.plan.planner import Plan
from monitoring.errors import ConfigError, ExitCode

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
_ONE_NODE = {"runpod"}  # SkyPilot refuses more there
_STORES = {"s3": "s3", "gs": "gcs", "r2": "r2"}
_BUCKET = re.compile(r"(s3|gs|r2)://([a-z0-9][-a-z0-9.]{1,61}[a-z0-9])")


def usable(plan: Plan) -> list[Candidate]:
    """The ways of a plan that SkyPilot can take, best first.

    Raises:
        ConfigError: There is none.
    """
    ways = [way for way in plan.candidates if infra(way)]
    ways = [way for way in ways if way.num_nodes == 1 or way.offer.cloud not in _ONE_NODE]
    if not ways:
        clouds = sorted({way.offer.cloud for way in plan.candidates})
        rule = f"SkyPilot knows none of {', '.join(clouds)}"
        fix = "take a list with its clouds: python -m launch catalog update"
        raise ConfigError("launch.clouds", plan.settings.launch.clouds, rule, fix)
    return ways


def render(job: Job) -> str:
    """The task, as YAML that `sky launch` and `sky jobs launch` take.

    Raises:
        ConfigError: `launch.bucket` is none that SkyPilot can mount.
    """
    text: str = yaml.dump(document(job), Dumper=_Dumper, sort_keys=False, width=100)
    return _heading(job) + text


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]  # PyYAML has no types
    """Writes scripts as they are read: line by line."""


def _text(dumper: _Dumper, text: str) -> Any:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)


def document(job: Job) -> dict[str, Any]:
    """The task, before it is written; see `render`."""
    launch = job.launch
    task: dict[str, Any] = {"name": job.name, "num_nodes": job.num_nodes}
    task["resources"] = {
        "ordered": [_resources(way) for way in job.candidates],
        # An error that is ours would only be repeated on a new machine, for money.
        "job_recovery": {
            "strategy": "FAILOVER",
            "max_restarts_on_errors": 0,
            "recover_on_exit_codes": [int(ExitCode.START_AGAIN)],
        },
        "autostop": {"idle_minutes": launch.autostop_minutes, "down": True},
    }
    if launch.image is not None:
        task["resources"]["image_id"] = f"docker:{launch.image}"
    if launch.workdir is not None:
        task["workdir"] = launch.workdir
    task["envs"] = {**launch.env, "SPOTFORGE_PRICES": job.prices()}
    if launch.secrets:
        task["secrets"] = dict.fromkeys(launch.secrets)
    if launch.bucket is not None:
        store, name = _bucket(launch)
        task["file_mounts"] = {MOUNT: {"name": name, "store": store, "mode": "MOUNT_CACHED"}}
    if launch.setup:
        task["setup"] = launch.setup
    task["run"] = _run(job)
    return task


def _run(job: Job) -> str:
    """What each node does: the first pays and supervises, the others join it."""
    command = job.trainer_command()
    supervise = ["python", "-m", "launch", "supervise"]
    if job.num_nodes > 1:
        supervise += ["--listen", str(PORT), "--nodes", str(job.num_nodes)]
    lines = [shell(job.guard_command([*supervise, "--", *command])), "code=$?"]
    if job.kept_at is not None and job.launch.shared_dir is None:
        lines += [
            "# the machine goes when this ends: what it has made is kept",
            f"mkdir -p {job.kept_at} && cp -r {shell([str(job.run_dir)])} {job.kept_at}/run",
        ]
        lines[-1] = f"if [ $code -eq 0 ]; then {lines[-1]} || code=1; fi"
    lines.append("exit $code")
    if job.num_nodes == 1:
        return "\n".join(lines) + "\n"
    join = f'python -m launch join "$head:{PORT}" -- {shell(command)}'
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
    return "/".join(part for part in (cloud, offer.region, offer.zone) if part)


def _bucket(launch: LaunchConfig) -> tuple[str, str]:
    """SkyPilot's name of the store, and the bucket's."""
    match = _BUCKET.fullmatch(launch.bucket or "")
    if match is None:
        rule = "is no bucket that SkyPilot mounts"
        raise ConfigError("launch.bucket", launch.bucket, rule, "use s3://name, gs:// or r2://")
    return _STORES[match[1]], match[2]


def _heading(job: Job) -> str:
    lines: Sequence[str] = [
        f"# {way.num_nodes} x {way.offer.gpus_per_node} {way.offer.gpu}, {way.offer.place}"
        f"{' spot' if way.offer.is_spot else ''}: ${way.costs.total_usd:,.2f} expected, "
        f"done in {way.p50_h:.1f} to {way.p95_h:.1f} h"
        for way in job.candidates
    ]
    return "\n".join([*lines, "#   sky launch FILE, or as a managed job: sky jobs launch FILE", ""])
