"""Every line is committed once, whoever is killed and however many work on it."""

import asyncio
import collections
import json
import random
import threading
import time

import httpx
import pytest

from serving.batches.ask import ask_over_http
from serving.batches.batches import Batches
from serving.batches.database import Database
from serving.batches.files import Files
from serving.batches.ledger import Ledger, Line, Nothing
from serving.batches.runner import Reply, Runner
from tests.serving.batches.small import begin, end, read, request, requests, wait_until
from tests.serving.conftest import until


@pytest.fixture
def database(tmp_path):
    database = Database(tmp_path)
    yield database
    database.close()


def new_batch(database, num_lines, tmp_path):
    path = tmp_path / "input.jsonl"
    lines = (json.dumps(request(f"r{i}", f"p{i}")) + "\n" for i in range(num_lines))
    path.write_text("".join(lines))
    with path.open("rb") as content:
        file = Files(database).add("alice", "input.jsonl", content)
    return Batches(database).create("alice", file["id"], "/v1/completions", None)["id"]


def output(database, batch_id):
    batch = Batches(database).get("alice", batch_id)
    assert batch["status"] == "completed"
    text = Files(database).path("alice", batch["output_file_id"]).read_text()
    return [json.loads(line) for line in text.splitlines()]


def answer(line, by="x"):
    return {"status_code": 200, "request_id": by, "body": line.body["prompt"]}


def test_a_killed_gateway_goes_on_where_it_was(small_gateway):
    # A busy machine may renew a claim seconds late.
    gateway = small_gateway(0.03, "batches.concurrency=4", "batches.lease_s=4")
    generator = random.Random(1)
    with gateway.client() as client:
        batch = begin(client, requests(60, "p", first=15, second=35, third=50))
    for gate, goal in (("first", 15), ("second", 31)):
        # Up to four that the killed one had claimed wait, and four that are held take all places.
        wait_until(lambda goal=goal: len(gateway.committed("p")) >= goal)
        gateway.open_gate(gate)
        time.sleep(generator.random() * 0.1)  # anywhere between two answers
        gateway.kill()
        committed, asked_before = gateway.committed("p"), len(gateway.asked())
        gateway.start()
        wait_until(lambda before=asked_before: len(gateway.asked()) > before)
        assert not committed & set(gateway.asked()[asked_before:])
    gateway.open_gate("third")
    with gateway.client() as client:
        batch = end(client, batch)
        assert batch.request_counts.model_dump() == {"total": 60, "completed": 60, "failed": 0}
        names = [line["custom_id"] for line in read(client, batch.output_file_id)]
    assert names == [f"r{i}" for i in range(60)]
    twice = [text for text, n in collections.Counter(gateway.asked()).items() if n > 1]
    assert len(twice) <= 2 * 4  # no more than what ran when it was killed
    gateway.stop()
    left = {path.name for path in (gateway.folder / "batches/files").iterdir()}
    assert left == {batch.input_file_id, batch.output_file_id}


def test_a_stopped_gateway_loses_nothing_that_runs(small_gateway):
    gateway = small_gateway(0.2, "batches.concurrency=4")
    with gateway.client() as client:
        batch = begin(client, [request(f"r{i}", f"p{i}") for i in range(24)])
        wait_until(lambda: len(gateway.asked()) >= 8)
    gateway.stop()
    gateway.start()  # at once: what it gave back waits for no lease
    with gateway.client() as client:
        assert end(client, batch).request_counts.completed == 24
    assert sorted(gateway.asked()) == sorted(f"p{i}" for i in range(24))


def test_two_workers_share_the_lines(database, tmp_path):
    batch_id = new_batch(database, 100, tmp_path)
    asked = []

    async def ask(line):
        asked.append(line.number)
        await asyncio.sleep(random.random() * 0.01)
        return Reply(200, "x", line.body["prompt"])

    def work():
        connection = Database(tmp_path)
        asyncio.run(Runner(Ledger(connection, 30.0), ask, 4, 1000).run(batch_id))
        connection.close()

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert sorted(asked) == list(range(1, 101))
    assert [line["response"]["body"] for line in output(database, batch_id)] == [
        f"p{i}" for i in range(100)
    ]


def test_the_first_answer_counts_where_two_ask_the_same(database, tmp_path):
    """The claim of the first ran out: a worker that is slow, or was stopped and woke up again."""
    batch_id = new_batch(database, 20, tmp_path)
    ledger = Ledger(database, 0.0)
    ledger.prepare(batch_id, 100)
    first = ledger.take(batch_id, "slow")
    again = ledger.take(batch_id, "other")
    assert isinstance(first, Line) and first == again
    committed = []

    def commit(name):
        connection = Database(tmp_path)
        for _ in range(20):
            committed.append(Ledger(connection, 0.0).commit(first, answer(first, name)))
        connection.close()

    threads = [threading.Thread(target=commit, args=(str(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert committed.count(True) == 1
    counts = Batches(database).get("alice", batch_id)["request_counts"]
    assert counts == {"total": 20, "completed": 1, "failed": 0}


def test_an_answer_after_the_end_is_thrown_away(database, tmp_path):
    batch_id = new_batch(database, 2, tmp_path)
    ledger = Ledger(database, 0.0)
    ledger.prepare(batch_id, 100)
    late = ledger.take(batch_id, "late")
    Batches(database).cancel("alice", batch_id)
    assert ledger.take(batch_id, "other") is Nothing.LEFT
    assert not ledger.commit(late, answer(late))
    ledger.finish(batch_id)
    assert not ledger.commit(late, answer(late))
    batch = Batches(database).get("alice", batch_id)
    assert batch["status"] == "cancelled" and batch["output_file_id"] is None


def test_files_are_written_once_by_whoever_does(database, tmp_path, monkeypatch):
    """Killed before the database knew of the files, and two that write them at once."""
    batch_id = new_batch(database, 30, tmp_path)
    ledger = Ledger(database, 30.0)
    ledger.prepare(batch_id, 100)
    while isinstance(line := ledger.take(batch_id, "w"), Line):
        assert ledger.commit(line, answer(line))
    assert line is Nothing.LEFT
    with monkeypatch.context() as patch:
        patch.setattr("serving.batches.ledger.insert", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ledger.finish(batch_id)
    assert Batches(database).get("alice", batch_id)["status"] == "finalizing"
    threads = [threading.Thread(target=ledger.finish, args=(batch_id,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [line["custom_id"] for line in output(database, batch_id)] == [
        f"r{i}" for i in range(30)
    ]
    assert not list(tmp_path.glob("*.jsonl.*")) and not database.read("SELECT * FROM lines")
    assert len(list((tmp_path / "files").iterdir())) == 2


class LedgerClock:
    """The time of ledgers; goes on by two thirds of a lease when two workers have renewed.

    So a claim that is renewed does not run out, however long this process gets no CPU.
    """

    def __init__(self, lease_s):
        self.lease_s, self.leases = lease_s, 0.0
        self.goes = False
        self._begun_s, self._renewed = time.time(), set()

    def time(self):
        return self._begun_s + self.leases * self.lease_s

    def on_renewed(self, worker):
        if self.goes:
            self._renewed.add(worker)
        if len(self._renewed) == 2:
            self._renewed.clear()
            self.leases += 2 / 3


class ClockedLedger(Ledger):
    def __init__(self, database, clock):
        super().__init__(database, clock.lease_s)
        self._clock = clock

    def renew(self, worker):
        super().renew(worker)
        self._clock.on_renewed(worker)


def test_a_worker_that_lives_keeps_its_lines(database, tmp_path, monkeypatch):
    """A task that outlives its claim many times over, while both workers look for lines."""
    batch_id = new_batch(database, 4, tmp_path)
    asked, clock = [], LedgerClock(lease_s=0.06)
    monkeypatch.setattr("serving.batches.ledger.time", clock)

    async def ask(line):
        asked.append(line.number)
        clock.goes = len(asked) >= 4
        await until(lambda: clock.leases > 30, "claims were renewed 45 times")
        return Reply(200, "x", "y")

    async def both():
        runners = [Runner(ClockedLedger(database, clock), ask, 3, 10) for _ in range(2)]
        await asyncio.gather(*(runner.run(batch_id) for runner in runners))

    asyncio.run(both())
    assert sorted(asked) == [1, 2, 3, 4]


def test_a_gateway_that_cannot_be_reached_is_waited_for(database, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.batches.runner._UNREACHABLE_S", 0.01)
    batch_id = new_batch(database, 3, tmp_path)
    replies = collections.Counter()

    async def ask(line):
        replies[line.number] += 1
        return None if replies[line.number] < 10 else Reply(200, "x", "y")

    asyncio.run(Runner(Ledger(database, 30.0), ask, 2, 10).run(batch_id))
    assert len(output(database, batch_id)) == 3


def test_a_cancelled_batch_waits_for_no_place(database, tmp_path):
    batch_id = new_batch(database, 3, tmp_path)

    async def ask(line):
        return Reply(429, "x", {}, retry_after_s=0.02)

    async def run():
        runner = Runner(Ledger(database, 30.0), ask, 2, 10)
        running = asyncio.create_task(runner.run(batch_id))
        await asyncio.sleep(0.2)
        Batches(database).cancel("alice", batch_id)
        await asyncio.wait_for(running, 120)

    asyncio.run(run())
    assert Batches(database).get("alice", batch_id)["status"] == "cancelled"


@pytest.mark.parametrize(
    ("response", "reply"),
    [
        (httpx.Response(502, text="<html>"), None),
        (httpx.Response(401, json={}), None),
        (httpx.Response(429, json={}, headers={"retry-after": "7"}), (429, 7.0)),
        (httpx.Response(503, json={}, headers={"retry-after": "Wed, 01 Jan"}), (503, 5.0)),
        (httpx.Response(500, text="oh"), (500, None)),
        (httpx.ConnectError("refused"), None),
        (httpx.ReadTimeout("slow"), None),
    ],
)
def test_what_an_answer_over_http_means(response, reply):
    def handle(_):
        if isinstance(response, Exception):
            raise response
        return response

    async def ask():
        transport = httpx.MockTransport(handle)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
            line = Line("b", 1, "r", "alice", "/v1/completions", {"prompt": "\ud800"})
            return await ask_over_http(client, line)

    got = asyncio.run(ask())
    assert (got and (got.status, got.retry_after_s)) == reply
