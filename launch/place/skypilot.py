"""SkyPilot: jobs on rented machines.

SkyPilot runs as a program of a separate environment, since its pinned dependencies clash with ours.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from core.errors import ConfigError
from launch.catalog.skypilot import SINGLE_NODE_CLOUDS
from launch.config import LaunchConfig
from launch.place.job import MOUNT, Job
from launch.place.place import Storage, check_secrets
from launch.place.program import Program
from launch.place.sky_task import infra, render
from launch.plan.candidate import Candidate
from launch.plan.planner import Plan
from launch.settings import Settings


class SkyPilot:
    """Starts managed jobs, which SkyPilot moves when machines are lost, not when the job fails."""

    def __init__(self, launch: LaunchConfig) -> None:
        self._launch = launch

    def usable(self, plan: Plan) -> list[Candidate]:
        """See `Place`."""
        ways = [way for way in plan.candidates if infra(way)]
        ways = [
            way for way in ways if way.num_nodes == 1 or way.offer.cloud not in SINGLE_NODE_CLOUDS
        ]
        if not ways:
            clouds = sorted({way.offer.cloud for way in plan.candidates})
            rule = f"SkyPilot supports none of {', '.join(clouds)}"
            fix = "use a price list with its clouds: python -m launch catalog update"
            raise ConfigError("launch.clouds", self._launch.clouds, rule, fix)
        return ways

    def storage(self, name: str, settings: Settings, ways: Sequence[Candidate]) -> Storage:
        """See `Place`."""
        launch = self._launch
        workdir = launch.skypilot.workdir
        if workdir is not None and not Path(workdir).expanduser().is_dir():
            fix = "give the project's folder, or null if the image contains it"
            raise ConfigError("launch.skypilot.workdir", workdir, "is not a folder", fix)
        if launch.bucket is None and any(way.offer.is_spot for way in ways):
            rule = "is needed on spot: checkpoints on a machine's disk are lost with the machine"
            fix = "set launch.bucket=s3://name (gs://, r2://), or launch.spot=never"
            raise ConfigError("launch.bucket", None, rule, fix)
        if (num_nodes := ways[0].num_nodes) > 1 and launch.shared_dir is None:
            rule = f"is needed: {num_nodes} nodes write one checkpoint to a folder that they share"
            fix = "give one (NFS, FSx, Filestore), or set launch.nodes=[1]"
            raise ConfigError("launch.shared_dir", None, rule, fix)
        return Storage(
            Path(settings.trainer.run.dir)
            if launch.shared_dir is None
            else Path(launch.shared_dir) / name,
            None if launch.bucket is None else f"{MOUNT}/{name}",
        )

    def render(self, job: Job) -> str:
        """See `Place`."""
        return render(job)

    def start(self, job: Job, text: str) -> int:
        """Starts a managed job; see `Place`.

        Raises:
            ConfigError: A secret has no value, or no cloud of the job has credentials.
        """
        check_secrets(self._launch)
        sky = self._sky()
        clouds = sorted({infra(way).partition("/")[0] for way in job.candidates})
        if not _enabled(sky.ask("check", "-o", "json", *clouds)):
            rule = f"no credentials for any of {', '.join(clouds)}"
            raise ConfigError("launch.clouds", clouds, rule, f"see: sky check {' '.join(clouds)}")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"{job.name}.yaml"
            path.write_text(text, encoding="utf-8")
            # SkyPilot takes the values from the environment: they appear in no file or argument.
            secrets = [word for name in self._launch.secrets for word in ("--secret", name)]
            words = ["--yes", "--detach-run", "--name", job.name, *secrets, str(path)]
            return sky.run("jobs", "launch", *words)

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
