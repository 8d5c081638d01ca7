"""A launcher's environment: whole or refused; a rendezvous ends, and can be told to end."""

import os
import signal
import threading

import pytest

from core.errors import ConfigError, Interrupted, SpotforgeError
from parallel import world
from parallel.launcher import VARIABLES, Place, read_place
from parallel.world import join_world
from tests.distributed import run_distributed
from tests.ports import free_port
from trainer.stopping import StopSignal

WHOLE = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}


def test_a_whole_environment_is_a_place_and_none_is_none():
    assert read_place(WHOLE | {"HOME": "/"}) == Place(3, 4, 1, 2, "10.0.0.1", 29500)
    assert read_place({"HOME": "/"}) is None


@pytest.mark.parametrize("name", VARIABLES)
def test_a_part_of_a_launcher_is_refused(name):
    with pytest.raises(ConfigError, match=f"^{name}=: must be set"):
        read_place({key: value for key, value in WHOLE.items() if key != name})
    with pytest.raises(ConfigError, match="must be set, since " + name):
        read_place({name: WHOLE[name]})
    with pytest.raises(ConfigError, match=f"^{name}="):
        read_place(WHOLE | {name: ""})


@pytest.mark.parametrize(
    ("wrong", "key"),
    [
        ({"RANK": "4"}, "RANK"),
        ({"RANK": "-1"}, "RANK"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK"),
        ({"LOCAL_RANK": "2"}, "LOCAL_RANK"),
        ({"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE"),
        ({"MASTER_PORT": "0"}, "MASTER_PORT"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT"),
    ],
)
def test_a_place_that_cannot_be_is_refused(wrong, key):
    with pytest.raises(ConfigError, match=f"^{key}="):
        read_place(WHOLE | wrong)


@pytest.mark.parametrize("name", ["RANK", pytest.param("WORLD_SIZE", marks=pytest.mark.long)])
def test_the_trainer_refuses_half_a_launcher_in_one_line(trainer, small, monkeypatch, name):
    monkeypatch.setenv(name, "0")
    result = trainer(*small)
    assert result.code == 2 and result.out == "" and len(result.err.splitlines()) == 1
    assert f"{name}=0 is" in result.err


def wait_alone(rank, how):
    """What a rank says whose only peer never comes."""
    port = free_port()
    alone = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2}
    os.environ |= {key: str(value) for key, value in alone.items()} | {"MASTER_PORT": str(port)}
    if how is None:
        world._RENDEZVOUS_S = 0.5
    with StopSignal() as stop:
        if how is not None:
            threading.Timer(0.5, os.kill, (os.getpid(), how)).start()
        try:
            with join_world(stop.requested):
                return "joined"
        except (Interrupted, SpotforgeError) as e:
            return int(e.exit_code), str(e)


@pytest.mark.parametrize(
    ("rank", "how", "code", "said"),
    [
        (0, signal.SIGTERM, 33, "told to stop while rank 0 of 2 (master at 127.0.0.1:"),
        (1, signal.SIGINT, 33, "told to stop while rank 1 of 2 (master at 127.0.0.1:"),
        (1, None, 1, "the other ranks did not join within"),
    ],
)
@pytest.mark.long
def test_a_rendezvous_to_which_nobody_comes_ends(rank, how, code, said):
    """In a process of its own, which must end, too, while a thread of it still waits."""
    [(found, text)] = run_distributed(wait_alone, 1, rank, how)
    assert found == code and said in text


def test_a_pod_of_one_process_is_whole():
    """As PyTorchJob describes it: nothing is said of the machine."""
    pod = {key: value for key, value in WHOLE.items() if not key.startswith("LOCAL_")}
    assert read_place(pod) == Place(3, 4, 0, 1, "10.0.0.1", 29500)
    for name in ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"):
        with pytest.raises(ConfigError, match="^LOCAL_RANK=: must be set"):
            read_place(pod | {name: "0"})
    for name in pod:
        with pytest.raises(ConfigError, match="=: must be set"):
            read_place({key: value for key, value in pod.items() if key != name})
