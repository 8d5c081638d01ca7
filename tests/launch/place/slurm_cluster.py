"""A Slurm of two machines with two GPUs each, none of which is there: on loopback, in a folder."""

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.ports import free_port

PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "scontrol")
_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/ctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
MpiDefault=none
GresTypes=gpu
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} RealMemory=500 Gres=gpu:2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} RealMemory=500 Gres=gpu:2
PartitionName=all Nodes=n[0-1] Default=YES MaxTime=INFINITE
"""


class Cluster:
    """What a user of it types."""

    def __init__(self, conf):
        # jobs run in the environment of whoever submits them: `python` is this one
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = os.environ | {
            "SLURM_CONF": str(conf),
            "OMP_NUM_THREADS": "1",
            "PATH": path,
        }

    def ask(self, *command):
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        return done.stdout + done.stderr

    def job(self):
        """The fields of the only job: JobState, Restarts, ..."""
        words = self.ask("scontrol", "--oneliner", "show", "job").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_for(self, condition, seconds=600):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.ask("scontrol", "show", "job")
            time.sleep(0.1)


@contextlib.contextmanager
def slurm(folder):
    """Starts it, and ends it with all that it runs."""
    (folder / "state").mkdir(parents=True)
    for i in range(2):
        (folder / f"gpu{i}").touch()
    ports = [free_port() for _ in range(3)]
    fields = {"host": socket.gethostname(), "user": getpass.getuser()}
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(folder=folder, ports=ports, **fields))
    (folder / "gres.conf").write_text(f"NodeName=n[0-1] Name=gpu File={folder}/gpu[0-1]\n")
    cluster = Cluster(conf)
    started = []
    try:
        for words in (("slurmctld", "-D"), ("slurmd", "-D", "-N", "n0"), ("slurmd", "-D", "-Nn1")):
            with (folder / "log").open("a") as log:
                program = shutil.which(words[0], path=os.environ["PATH"] + ":/usr/sbin")
                words = [program, *words[1:]]
                process = subprocess.Popen(words, env=cluster.environment, stdout=log, stderr=log)
            started.append(process)
        cluster.wait_for(
            lambda: cluster.ask("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2"
        )
        yield cluster
    finally:
        cluster.ask("scancel", "--me")
        deadline = time.monotonic() + 20
        while cluster.ask("squeue", "-h", "--me").strip() and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in reversed(started):
            process.terminate()
            process.wait()
