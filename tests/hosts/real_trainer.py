"""The real trainer on hosts: its command, and the environment of ranks without a supervisor."""

import sys

from tests.chaos.setup import BASE, write_corpus


def command(folder, *overrides):
    """A run of many short steps in `folder`, which all hosts share."""
    if not (folder / "corpus").exists():
        write_corpus(folder / "corpus")
    # Prepared data is shared, too.
    words = [f"data.path={folder}/corpus", f"data.cache_dir={folder}/cache"]
    words += [f"run.dir={folder}/run", *overrides]
    return [sys.executable, "-m", "trainer", *BASE, *words]


def place(rank, hosts):
    """Variables of the only rank on a host, as torchrun sets them."""
    variables = {"RANK": rank, "WORLD_SIZE": len(hosts), "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    variables |= {"MASTER_ADDR": hosts[0].address, "MASTER_PORT": 29500}
    return {name: str(value) for name, value in variables.items()}
