"""Refuses a run whose machines have different software, before anything else is done."""

import socket

from core.errors import ConfigError
from core.software import difference, software
from parallel.world import World


def check_same_software(world: World) -> None:
    """Compares the machines of a run; collective.

    A supervisor refuses such a machine when it joins. This is for ranks that others have started.

    Raises:
        ConfigError: Two machines differ; the same error is raised on all ranks.
    """
    if world.world_size == world.local_world_size:
        return
    own = (socket.gethostname(), software()) if world.local_rank == 0 else None
    machines = [(rank, *told) for rank, told in enumerate(world.gather(own)) if told is not None]
    first_rank, first_host, expected = machines[0]
    for rank, host, found in machines[1:]:
        if (differing := difference(found, expected)) is not None:
            its, others = differing
            rule = f"rank {rank} has {its}, rank {first_rank} on {first_host} {others}"
            raise ConfigError("machine", host, rule, "install the same on all machines")
