"""Batches on Celery with a real Redis, where there is one."""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from serving.batches.database import Database
from serving.keys import create
from tests.ports import free_port
from tests.serving.batches.small import ROOT, SmallGateway, begin, end, read, requests, wait_until

pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="needs redis-server: apt install redis-server"
)


class Redis:
    def __init__(self, folder):
        self._folder, self.port = folder, free_port()
        while not self.start():  # another process was given that port meanwhile
            self.port = free_port()
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self):
        """Returns whether it listens; not where its port is taken."""
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--save", "", "--dir", str(self._folder)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        wait_until(lambda: self._is_up() or self.process.poll() is not None)
        return self.process.poll() is None

    def stop(self):
        self.process.kill()
        self.process.wait()

    def _is_up(self):
        try:
            socket.create_connection(("127.0.0.1", self.port)).close()
        except ConnectionRefusedError:
            return False
        return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("celery")


@pytest.fixture(scope="module")
def redis(folder):
    server = Redis(folder)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def key(folder):
    return create(folder / "keys.json", "worker")


@pytest.fixture(scope="module")
def gateway(folder, redis, key):
    settings = [f"batches.broker={redis.url}", f"keys={folder / 'keys.json'}"]
    gateway = SmallGateway(folder, 0.06, *settings)
    yield gateway
    gateway.stop()


@pytest.fixture
def start_worker(gateway, redis, key, tmp_path):
    """Starts one, in a process group of its own."""
    workers = []

    def start(name, **settings):
        given = {"dir": gateway.folder / "batches", "broker": redis.url}
        given |= {"gateway": f"{gateway.url}/v1"}
        # A busy machine may renew a claim seconds late.
        given |= {"name": name, "lease_s": 4, "concurrency": 2, **settings}
        command = [sys.executable, "-m", "serving.batches.worker"]
        command += [f"{name}={value}" for name, value in given.items()]
        with (tmp_path / f"worker-{name}").open("w") as output:
            worker = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "SPOTFORGE_API_KEY": key},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        kill(worker)


def kill(worker):
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    worker.wait()


def child(pid):
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text())


def lines(gateway, where):
    database = Database(gateway.folder / "batches")
    try:
        return [dict(row) for row in database.read(f"SELECT * FROM lines WHERE {where}")]
    finally:
        database.close()


def check_all_once(client, batch, num_lines):
    assert batch.request_counts.model_dump() == {
        "total": num_lines,
        "completed": num_lines,
        "failed": 0,
    }
    names = [line["custom_id"] for line in read(client, batch.output_file_id)]
    assert names == [f"r{i}" for i in range(num_lines)]


def test_a_killed_worker_s_batch_goes_to_another(gateway, start_worker, key):
    worker = start_worker("a", visibility_timeout_s=2)
    with gateway.client(key) as client:
        batch = begin(client, requests(40, "killed", killed=20))
        wait_until(lambda: len(gateway.committed("killed")) == 20)
        kill(worker)
        done, before = gateway.committed("killed"), len(gateway.asked("killed"))
        gateway.open_gate("killed")
        start_worker("b", visibility_timeout_s=2)
        check_all_once(client, end(client, batch), 40)
    assert not done & set(gateway.asked("killed")[before:])
    assert len(gateway.asked("killed")) <= 42  # no more than what ran when it was killed


def test_a_killed_task_goes_on_and_a_worker_that_stops_gives_it_back(gateway, start_worker, key):
    """At once: the visibility timeout is an hour."""
    worker = start_worker("a")
    with gateway.client(key) as client:
        batch = begin(client, requests(80, "task", first=20, second=40))
        wait_until(lambda: len(gateway.committed("task")) == 20)
        os.kill(child(worker.pid), signal.SIGKILL)
        gateway.open_gate("first")
        # The two lines that it had may come last: they are claimed for some seconds.
        wait_until(lambda: len(gateway.committed("task")) >= 38)
        worker.terminate()
        assert worker.wait(120) == 0
        done = gateway.committed("task")
        before = len(gateway.asked("task"))
        gateway.open_gate("second")
        start_worker("b")
        check_all_once(client, end(client, batch), 80)
    assert 38 <= len(done) <= 40 and not done & set(gateway.asked("task")[before:])
    assert len(gateway.asked("task")) <= 84


def test_a_task_outlives_the_visibility_timeout(gateway, start_worker, key):
    """No line is answered before the second worker has lines too, however fast the first one is."""
    for name in "ab":
        start_worker(name, visibility_timeout_s=2)
    with gateway.client(key) as client:
        batch = begin(client, requests(40, "long", both=0))
        workers = "worker IS NOT NULL"
        wait_until(lambda: len({line["worker"] for line in lines(gateway, workers)}) > 1)
        gateway.open_gate("both")
        check_all_once(client, end(client, batch), 40)
    assert sorted(gateway.asked("long")) == sorted(f"long {i}" for i in range(40))


def test_a_worker_with_another_folder_loses_nothing(gateway, start_worker, key, tmp_path):
    (tmp_path / "other").mkdir()
    Database(tmp_path / "other").close()
    worker = start_worker("wrong", dir=tmp_path / "other")
    with gateway.client(key) as client:
        batch = begin(client, requests(3, "wrong"))
        wait_until(
            lambda: f"{batch.id} is not a batch of" in (tmp_path / "worker-wrong").read_text()
        )
        worker.terminate()
        worker.wait(120)
        start_worker("right")
        check_all_once(client, end(client, batch), 3)


def test_a_broker_that_is_gone_loses_nothing(gateway, start_worker, redis, key):
    with gateway.client(key) as client:
        forgotten = begin(client, requests(2, "forgotten"))
        redis.stop()
        number = len(client.batches.list().data)
        with pytest.raises(openai.InternalServerError) as refused:
            begin(client, requests(1, "refused"))
        assert refused.value.code == "queue"
        assert len(client.batches.list().data) == number
    gateway.kill()
    gateway.start()  # it does not wait for the broker
    assert redis.start()
    start_worker("a")
    with gateway.client(key) as client:
        check_all_once(client, end(client, forgotten), 2)
        check_all_once(client, end(client, begin(client, requests(1, "new"))), 1)
