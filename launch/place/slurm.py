"""Slurm: a job as a batch script, which is queued again when machines or time run out.

docs: https://slurm.schedmd.com/sbatch.html
"""

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from core.errors import ConfigError, ExitCode
from launch.config import LaunchConfig, hours
from launch.place.place import Job, Storage, of_one_pool, refuse_unused, secrets_of
from launch.place.program import Program
from launch.plan.candidate import Candidate
from launch.plan.planner import Plan
from launch.settings import Settings
from parallel.launcher import TOKEN_VARIABLE

# The job's commands are in an exported shell function, since srun runs one command on every node.
_SCRIPT = """\
#!/bin/bash
{heading}
{options}
set -u
{environment}\
# The environment that calls sbatch goes along, and the folder it is called in is on every node.
head=$(hostname)  # the first node, on which this script runs
port=$((20000 + SLURM_JOB_ID % 40000))
export head port
# By it the other nodes join the first; srun hands it to all of them.
export {token}="${{{token}:-$(head -c 24 /dev/urandom | od -An -v -tx1 | tr -d ' \n')}}"

node() {{
  trap : TERM USR1  # they are for the programs, whose exit code this shell is to see
  if [ "$SLURM_NODEID" -gt 0 ]; then
    {join}
    code=$?
    # the first node says whether the job is started again
    if [ $code -eq {again} ]; then code=0; fi
    exit $code
  fi
  {supervise}
  code=$?
  # a job that is cancelled is stopped, too, and not to come back
  if [ $code -eq {again} ] && [ "$(squeue --noheader -j "$SLURM_JOB_ID" -o %T)" = RUNNING ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit $code
}}
export -f node
srun --kill-on-bad-exit=1 --cpu-bind=none bash -c node
"""
_PLAIN = re.compile(r"[-.\w]+")


class Slurm:
    """Submits batch jobs. The folder in which `sbatch` is called must exist on every node."""

    def __init__(self, launch: LaunchConfig) -> None:
        self._launch = launch
        slurm = launch.slurm
        for key, name in (("partition", slurm.partition), ("account", slurm.account)):
            if name is not None and not _PLAIN.fullmatch(name):
                rule = "is not a valid name in Slurm"
                raise ConfigError(f"launch.slurm.{key}", name, rule, "use letters, digits, - and _")

    def usable(self, plan: Plan) -> list[Candidate]:
        """See `Place`."""
        return of_one_pool(plan)

    def storage(self, name: str, settings: Settings, candidates: Sequence[Candidate]) -> Storage:
        """See `Place`; the path of the run directory must be the same on every node."""
        refuse_unused(self._launch, "bucket", "shared_dir", "image")
        is_uploaded = settings.trainer.checkpoint.upload is not None
        cost = "those since the last upload" if is_uploaded else "the whole run"
        replicas = settings.trainer.checkpoint.replicas
        copies = 1 if replicas == "auto" else int(replicas)
        lost = f"the loss of more than {copies} at once" if copies else "it"
        return Storage(
            Path(settings.trainer.run.dir).absolute(),
            on_loss=f"{Storage.on_loss}; if run.dir is on a disk of each node's own, {lost} costs "
            f"{cost}, since checkpoint.replicas is {replicas}"
            + ("" if is_uploaded else " and checkpoint.upload is not set"),
        )

    def render(self, job: Job) -> str:
        """See `Place`."""
        slurm, offer = self._launch.slurm, job.candidates[0].offer
        options = {
            "job-name": job.name,
            "nodes": job.num_nodes,
            "ntasks-per-node": 1,
            "gpus-per-node": offer.gpus_per_node,
            # Whole nodes: `mem: 0` asks for all memory, and the port is free of other jobs.
            "exclusive": None,
            "mem": 0,
            "time": _minutes(slurm.time_limit),
            # Without the prefix `B:` the signal goes to the steps of srun and not to this script.
            "signal": f"TERM@{60 * slurm.save_minutes}",
            "requeue": None,
            "open-mode": "append",
            "output": f"{job.name}.out",
            "partition": slurm.partition,
            "account": slurm.account,
        }
        given = {k: v for k, v in options.items() if v is not None or k in ("exclusive", "requeue")}
        environment = [
            f"export {shlex.join([f'{k}={v}'])}" for k, v in sorted(self._launch.env.items())
        ]
        environment += [self._launch.setup] if self._launch.setup else []
        return _SCRIPT.format(
            heading=job.heading("sbatch FILE"),
            options="\n".join(
                f"#SBATCH --{name}" + ("" if value is None else f"={value}")
                for name, value in given.items()
            ),
            token=TOKEN_VARIABLE,
            environment="".join(f"{line}\n" for line in environment),
            join=job.join('"$head:$port"') if job.num_nodes > 1 else ":",
            supervise=job.supervise(job.own_price(), port='"$port"'),
            again=int(ExitCode.START_AGAIN),
        )

    def start(self, job: Job, text: str) -> int:
        """See `Place`."""
        # sbatch passes the whole environment on.
        return _program("sbatch").run(text=text, env=secrets_of(job))

    def status(self) -> int:
        """See `Place`."""
        return _program("squeue").run("--me")

    def logs(self, name: str) -> int:
        """See `Place`; reads the output from the current folder, where the job was submitted.

        Raises:
            ConfigError: This folder has no output of the job.
        """
        _program("squeue")  # without Slurm, the file would never be written
        output = Path(f"{name}.out")
        if not output.is_file():
            rule = f"this folder has no {output}"
            fix = "go to the folder of its submission, or wait until it runs (status)"
            raise ConfigError("launch.name", name, rule, fix)
        return _program("tail").run("-n", "+1", "-F", str(output))

    def down(self, name: str) -> int:
        """See `Place`."""
        return _program("scancel").run("--me", "--name", name)


def _minutes(time_limit: str) -> int:
    return max(1, round(60 * hours("launch.slurm.time_limit", time_limit)))


def _program(name: str) -> Program:
    return Program(name, "launch.target", "slurm", "use a machine with Slurm's programs")
