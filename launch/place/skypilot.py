"""SkyPilot: jobs on rented machines, as tasks of SkyPilot 0.14.

SkyPilot runs as a program of a separate environment, since its pinned dependencies clash with ours.

docs: https://docs.skypilot.co/en/latest/reference/yaml-spec.html
"""

import json
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from core.errors import ConfigError, ExitCode
from launch.catalog.offer import Offer
from launch.catalog.skypilot import SINGLE_NODE_CLOUDS
from launch.config import LaunchConfig, Stage
from launch.place.place import MOUNT, Job, Storage, secrets_of
from launch.place.program import Program
from launch.place.readable_yaml import to_yaml
from launch.plan.candidate import Candidate
from launch.plan.planner import Plan
from launch.settings import Settings
from parallel.launcher import SUPERVISOR_PORT

# Cloud names of price lists -> SkyPilot's. SkyPilot does not support providers that are not here.
_CLOUDS = {
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
# The machine is paid for since its boot, and so also for the setup before the job.
_PRICE = ("--since-boot",)


class SkyPilot:
    """Starts managed jobs, which SkyPilot moves when machines are lost, not when the job fails."""

    def __init__(self, launch: LaunchConfig) -> None:
        self._launch = launch

    def usable(self, plan: Plan) -> list[Candidate]:
        """See `Place`."""
        usable = [
            candidate
            for candidate in plan.candidates
            if _infra(candidate.offer)
            and (candidate.num_nodes == 1 or candidate.offer.cloud not in SINGLE_NODE_CLOUDS)
        ]
        if not usable:
            clouds = sorted({c.offer.cloud or c.offer.pool_kind for c in plan.candidates})
            rule = f"SkyPilot supports none of {', '.join(clouds)}"
            fix = "use a price list with its clouds: python -m launch catalog update"
            raise ConfigError("launch.clouds", self._launch.clouds, rule, fix)
        return usable

    def storage(self, name: str, settings: Settings, candidates: Sequence[Candidate]) -> Storage:
        """See `Place`."""
        launch = self._launch
        workdir = launch.skypilot.workdir
        if workdir is not None and not Path(workdir).expanduser().is_dir():
            fix = "give the project's folder, or null if the image contains it"
            raise ConfigError("launch.skypilot.workdir", workdir, "is not a folder", fix)
        if launch.bucket is None and any(c.offer.is_spot for c in candidates):
            rule = "is needed on spot: checkpoints on a machine's disk are lost with the machine"
            fix = "set launch.bucket=s3://name (gs://, r2://), or launch.spot=never"
            raise ConfigError("launch.bucket", None, rule, fix)
        kept_at = None if launch.bucket is None else f"{MOUNT}/{name}"
        if launch.shared_dir is not None:
            return Storage(Path(launch.shared_dir) / name, kept_at)
        uploads = kept_at is not None or settings.trainer.checkpoint.upload is not None
        cost = "the steps since the last upload" if uploads else "the whole run: set launch.bucket"
        return Storage(
            Path(settings.trainer.run.dir),
            kept_at,
            "each node has a disk of its own (launch.shared_dir is not set), and SkyPilot may "
            f"replace all nodes when one is lost, which costs {cost}",
        )

    def render(self, job: Job) -> str:
        """Returns the task as YAML for `sky launch` and `sky jobs launch`.

        Raises:
            ConfigError: SkyPilot cannot mount `launch.bucket`.
        """
        secrets = "".join(f" --secret {name}" for name in job.secrets)
        usage = f"sky launch{secrets} FILE, or as a managed job: sky jobs launch{secrets} FILE"
        return f"{job.heading(usage)}\n{to_yaml(*documents(job))}"

    def start(self, job: Job, text: str) -> int:
        """Starts a managed job; see `Place`.

        Raises:
            ConfigError: A secret has no value, or no cloud of the job has credentials.
        """
        values, sky = secrets_of(job), self._sky()
        clouds = sorted({_infra(c.offer).partition("/")[0] for c in job.candidates})
        if not _enabled(sky.ask("check", "-o", "json", *clouds)):
            rule = f"no credentials for any of {', '.join(clouds)}"
            raise ConfigError("launch.clouds", clouds, rule, f"see: sky check {' '.join(clouds)}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{job.name}.yaml"
            path.write_text(text, encoding="utf-8")
            # SkyPilot takes the values from the environment: they appear in no file or argument.
            secrets = [word for name in values for word in ("--secret", name)]
            words = ["--yes", "--detach-run", "--name", job.name, *secrets, str(path)]
            return sky.run("jobs", "launch", *words, env=values)

    def status(self) -> int:
        """See `Place`."""
        return self._sky().run("jobs", "queue")

    def logs(self, name: str) -> int:
        """See `Place`."""
        return self._sky().run("jobs", "logs", "--name", name)

    def down(self, name: str) -> int:
        """See `Place`."""
        return self._sky().run("jobs", "cancel", "--yes", "--name", name)

    def _sky(self) -> Program:
        fix = "pip install 'skypilot[aws,gcp]==0.14.1' in an environment of its own"
        return Program(self._launch.sky, "launch.sky", self._launch.sky, fix)


def _enabled(checked: str) -> set[str]:
    """Returns the clouds that can rent machines, from the output of `sky check -o json`.

    Its exit code is 0 in any case.

    Args:
        checked: Output with `{"workspace": {"AWS": ["compute", "storage"]}}` after other lines.
    """
    try:
        workspaces = json.loads(checked[checked.index("{") :])
        found = [clouds.items() for clouds in workspaces.values()]
    except (ValueError, AttributeError):  # it failed and printed why, or has another version
        return set()
    return {cloud for clouds in found for cloud, can in clouds if "compute" in can}


def documents(job: Job) -> list[dict[str, Any]]:
    """Returns the documents of the YAML: one task, or a header and a task for each stage.

    Raises:
        ConfigError: SkyPilot cannot mount `launch.bucket`.
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
    if job.secrets:
        task["secrets"] = dict.fromkeys(job.secrets)
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
                "cloud": offer.pool_kind or _CLOUDS[offer.cloud],
                "region": offer.region,
                "zone": _zone(offer),
                "gpu": offer.gpu,
                "gpus_per_node": offer.gpus_per_node,
                "is_spot": offer.is_spot,
                "usd_per_h": offer.usd_per_h,
            }
            for offer in [candidate.offer for candidate in job.candidates]
        ]
    )


def _train(job: Job) -> str:
    """Returns the script of a training node: the first one pays and supervises, others join it."""
    lines = [job.supervise(_PRICE), "code=$?"]
    if len(job.launch.stages) > 1:
        record = job.pipeline("--record", Stage.train)
        lines.append(f"if [ $code -eq 0 ]; then {record} || code=1; fi")
    lines += [*_keep(job), "exit $code"]
    if job.num_nodes == 1:
        return "\n".join(lines) + "\n"
    join = job.join(f'"$head:{SUPERVISOR_PORT}"')
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
        run_dir = shlex.quote(str(job.storage.run_dir))
        fetch = [f"mkdir -p {run_dir} && cp -r {job.storage.kept_at}/run/. {run_dir} || exit 1"]
    guarded = job.guard(job.pipeline("--only", stage), _PRICE)
    return "\n".join([*fetch, guarded, "code=$?", *_keep(job), "exit $code", ""])


def _is_copied(job: Job) -> bool:
    """Returns whether the run directory is on the machine's own disk and a bucket keeps a copy."""
    return job.storage.kept_at is not None and job.launch.shared_dir is None


def _keep(job: Job) -> list[str]:
    """Returns shell lines that copy the run directory to the bucket before the machine ends."""
    if not _is_copied(job):
        return []
    run_dir, kept_at = shlex.quote(str(job.storage.run_dir)), job.storage.kept_at
    copy = f"mkdir -p {kept_at}/run && cp -r {run_dir}/. {kept_at}/run"
    return ["# the machine goes when this ends", f"if [ $code -eq 0 ]; then {copy} || code=1; fi"]


def _ordered(job: Job) -> list[dict[str, Any]]:
    resources: list[dict[str, Any]] = []
    for offer in [candidate.offer for candidate in job.candidates]:
        one = {
            "infra": _infra(offer),
            "accelerators": f"{offer.gpu}:{offer.gpus_per_node}",
            "use_spot": offer.is_spot,
        }
        # Zones without a name in the account become equal entries; SkyPilot tries them by itself.
        if one not in resources:
            resources.append(one)
    return resources


def _infra(offer: Offer) -> str:
    """Returns `aws/ap-south-1/ap-south-1a`, as far as known; empty if SkyPilot cannot go there."""
    if offer.pool:
        prefix = {"ssh": "ssh", "kubernetes": "k8s"}.get(offer.pool_kind)
        return f"{prefix}/{offer.pool}" if prefix else ""
    cloud = _CLOUDS.get(offer.cloud)
    if cloud is None:
        return ""
    return "/".join(part for part in (cloud, offer.region, _zone(offer)) if part)


def _zone(offer: Offer) -> str:
    """Returns the zone; empty if only its AWS ID is known, which no request accepts."""
    return "" if re.search(r"-az\d+$", offer.zone) else offer.zone


def _bucket(launch: LaunchConfig) -> tuple[str, str]:
    """Returns SkyPilot's name of the store, and the name of the bucket."""
    match = _BUCKET.fullmatch(launch.bucket or "")
    if match is None:
        rule = "is not a bucket that SkyPilot can mount"
        raise ConfigError("launch.bucket", launch.bucket, rule, "use s3://name, gs:// or r2://")
    return _STORES[match[1]], match[2]
