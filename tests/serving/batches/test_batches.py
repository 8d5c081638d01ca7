"""Files and batches through the official client, with the server in a process of its own."""

import time

import httpx
import openai
import pytest

from serving.batches.batches import Batches
from serving.batches.database import Database
from serving.keys import create, revoke
from tests.serving.batches.small import begin, end, read, request, requests, upload, wait_until


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gateway")


@pytest.fixture(scope="module")
def keys(folder):
    return {name: create(folder / "keys.json", name) for name in ("alice", "bob")}


@pytest.fixture(scope="module")
def gateway(folder, keys):
    from tests.serving.batches.small import SmallGateway

    gateway = SmallGateway(
        folder,
        0.02,
        f"keys={folder / 'keys.json'}",
        "batches.max_file_mb=1",
        "batches.max_lines=200",
        "batches.concurrency=4",
    )
    yield gateway
    gateway.stop()


@pytest.fixture
def client(gateway, keys):
    with gateway.client(keys["alice"]) as client:
        yield client


def errors_of(client, lines, endpoint="/v1/completions"):
    batch = end(client, begin(client, lines, endpoint))
    assert batch.status == "failed" and batch.output_file_id is None
    return [(error.code, error.line) for error in batch.errors.data]


def test_answers_come_in_the_order_of_the_requests(client):
    names = [f"line {i} \U0001f600" for i in range(40)]
    batch = begin(client, [request(name, name) for name in names])
    assert batch.status == "validating" and batch.completion_window == "24h"
    batch = end(client, batch)
    assert batch.status == "completed" and batch.error_file_id is None
    assert batch.request_counts.model_dump() == {"total": 40, "completed": 40, "failed": 0}
    answers = read(client, batch.output_file_id)
    assert [answer["custom_id"] for answer in answers] == names
    assert [a["response"]["body"]["choices"][0]["text"] for a in answers] == names
    assert len({answer["id"] for answer in answers}) == 40
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at


def test_a_request_that_is_refused_is_in_the_error_file(client):
    lines = [request("good", "x"), request("bad", "x", max_tokens=-1)]
    lines += [request("half", "\ud800"), request("lost", "boom")]
    batch = end(client, begin(client, lines))
    assert batch.status == "completed"
    assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 3)
    assert [line["custom_id"] for line in read(client, batch.output_file_id)] == ["good"]
    failed = read(client, batch.error_file_id)
    assert [line["response"]["status_code"] for line in failed] == [400, 400, 503]
    assert [line["custom_id"] for line in failed] == ["bad", "half", "lost"]


def test_a_request_that_kills_the_engine_is_asked_three_times(gateway, client):
    end(client, begin(client, [request("a", "boom 3")]))
    assert gateway.asked().count("boom 3") == 3


def test_a_file_with_bad_lines_runs_none(gateway, client):
    lines = [request("a", "never"), b"{", b'{"custom_id": "b"}', request("a", "never"), b"[1]"]
    lines += [request("c", "never") | {"url": "/v1/embeddings"}, b"", b"\xff\xfe"]
    lines += [request("d", "never") | {"method": "GET"}, b"[" * 100_000, b'{"\\ud800": NaN}']
    lines += [request("e", "never", stream=True), request("", "never"), b'{"\\ud800": 1}']
    assert errors_of(client, lines) == [
        ("invalid_json_line", 2),
        ("invalid_request", 3),
        ("duplicate_custom_id", 4),
        ("invalid_request", 5),
        ("mismatched_url", 6),
        ("invalid_json_line", 8),
        ("invalid_method", 9),
        ("invalid_json_line", 10),
        ("invalid_json_line", 11),
        ("invalid_request", 12),
        ("invalid_request", 13),
        ("invalid_request", 14),
    ]
    assert "never" not in gateway.asked()


def test_a_file_of_no_lines_or_too_many_fails(client):
    assert errors_of(client, [b"", b"  "]) == [("empty_file", None)]
    many = [request(str(i), "never") for i in range(201)]
    assert errors_of(client, many) == [("too_many_lines", None)]


def test_keys_do_not_see_each_other(gateway, client, keys):
    batch = begin(client, [request("a", "secret")])
    with gateway.client(keys["bob"]) as bob:
        assert not list(bob.files.list()) and not list(bob.batches.list())
        for call in (
            lambda: bob.files.retrieve(batch.input_file_id),
            lambda: bob.files.content(batch.input_file_id),
            lambda: bob.files.delete(batch.input_file_id),
            lambda: bob.batches.retrieve(batch.id),
            lambda: bob.batches.cancel(batch.id),
            lambda: bob.files.list(after=batch.input_file_id),
            lambda: bob.batches.create(
                input_file_id=batch.input_file_id,
                endpoint="/v1/completions",
                completion_window="24h",
            ),
        ):
            with pytest.raises(openai.NotFoundError):
                call()
    with gateway.client("sf-nobody") as nobody, pytest.raises(openai.AuthenticationError):
        nobody.files.list()
    assert end(client, batch).status == "completed"


def test_a_key_that_was_revoked_asks_no_more(gateway, folder):
    with gateway.client(create(folder / "keys.json", "carol")) as carol:
        batch = begin(carol, requests(8, "carol", revoked=0))
        wait_until(lambda: len(gateway.asked("carol")) == 4)
        revoke(folder / "keys.json", "carol")
        gateway.open_gate("revoked")
    database = Database(folder / "batches")
    try:
        batches = Batches(database)
        wait_until(lambda: batches.get("carol", batch.id)["status"] == "completed")
        assert batches.get("carol", batch.id)["request_counts"]["failed"] == 4
        assert len(gateway.asked("carol")) == 4
    finally:
        database.close()


def test_a_file_that_is_read_is_not_deleted(gateway, client):
    batch = begin(client, requests(1, "read", deleted=0))
    with pytest.raises(openai.ConflictError, match="still reads"):
        client.files.delete(batch.input_file_id)
    client.batches.cancel(batch.id)
    gateway.open_gate("deleted")
    assert end(client, batch).status == "cancelled"
    assert client.files.delete(batch.input_file_id).deleted
    with pytest.raises(openai.NotFoundError):
        client.files.retrieve(batch.input_file_id)


def test_cancelling_ends_what_runs_and_begins_nothing(gateway, client):
    batch = begin(client, requests(20, "cancel", cancelled=0))
    wait_until(lambda: len(gateway.asked("cancel")) == 4)
    assert client.batches.cancel(batch.id).status == "cancelling"
    gateway.open_gate("cancelled")
    batch = end(client, batch)
    assert batch.status == "cancelled" and batch.cancelled_at >= batch.cancelling_at
    answered = [line["custom_id"] for line in read(client, batch.output_file_id)]
    assert answered == [f"r{i}" for i in range(4)]
    unanswered = read(client, batch.error_file_id)
    assert [line["custom_id"] for line in unanswered] == [f"r{i}" for i in range(4, 20)]
    assert {line["error"]["code"] for line in unanswered} == {"batch_cancelled"}
    assert client.batches.cancel(batch.id).status == "cancelled"
    assert len(gateway.asked("cancel")) == 4


def test_what_has_ended_is_not_cancelled(client):
    batch = end(client, begin(client, [request("a", "b")]))
    with pytest.raises(openai.ConflictError, match="completed already"):
        client.batches.cancel(batch.id)


def test_lists_have_pages(client):
    files = [upload(client, [request(str(i), "x")]) for i in range(5)]
    new = [file.id for file in reversed(files)]
    page = client.files.list(limit=2, purpose="batch")
    assert [file.id for file in page.data] == new[:2] and page.has_more
    everything = [file.id for file in client.files.list(limit=2, purpose="batch")]
    assert everything[:5] == new and len(set(everything)) == len(everything)
    assert [file.id for file in client.files.list(order="asc")][-5:] == new[::-1]
    batches = [end(client, begin(client, [request("a", "b")])).id for _ in range(3)]
    assert [batch.id for batch in client.batches.list(limit=1)][:3] == batches[::-1]
    with pytest.raises(openai.NotFoundError):
        client.files.list(after="file-none")
    with pytest.raises(openai.BadRequestError, match="limit must be greater") as error:
        client.batches.list(limit=0)
    assert error.value.param == "limit"


def test_uploads_are_bounded(client, gateway, keys, folder):
    with pytest.raises(openai.APIStatusError) as error:
        client.files.create(file=("big", b"x" * (2**20 + 2**17)), purpose="batch")
    assert error.value.status_code == 413

    def endless():
        yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
        for _ in range(64):
            yield b"x" * 2**16

    headers = {"authorization": f"Bearer {keys['alice']}"}
    kind = {"content-type": "multipart/form-data; boundary=b"}
    url = f"{gateway.url}/v1/files"
    response = httpx.post(url, content=endless(), headers=headers | kind)
    assert response.status_code == 413
    for purpose in ("assistants", "../batch"):
        with pytest.raises(openai.BadRequestError, match="purpose"):
            client.files.create(file=("f", b"x"), purpose=purpose)
    assert httpx.post(url, data={"purpose": "batch"}, headers=headers).status_code == 400
    assert httpx.post(url, content=b"x", headers=headers | kind).status_code == 400


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a\x00b", "%2e%2e%2fkeys.json"]
)
def test_names_are_no_paths(client, folder, gateway, keys, name):
    file = client.files.create(file=(name, b"content"), purpose="batch")
    assert client.files.content(file.id).text == "content"
    assert (folder / "batches/files" / file.id).read_text() == "content"
    headers = {"authorization": f"Bearer {keys['alice']}"}
    for path in ("..%2F..%2Fkeys.json", "../batches.sqlite3", f"..%2Ffiles%2F{file.id}"):
        response = httpx.get(f"{gateway.url}/v1/files/{path}/content", headers=headers)
        assert response.status_code == 404, path


def test_a_batch_is_of_what_is_there(client):
    file = upload(client, [request("a", "b")])
    for changed, error in (
        ({"input_file_id": "file-none"}, openai.NotFoundError),
        ({"endpoint": "/v1/responses"}, openai.BadRequestError),
        ({"completion_window": "1h"}, openai.BadRequestError),
        ({"metadata": {"k": "v" * 513}}, openai.BadRequestError),
    ):
        given = {"endpoint": "/v1/completions", "completion_window": "24h"}
        with pytest.raises(error):
            client.batches.create(**{"input_file_id": file.id, **given, **changed})


def test_nothing_of_a_key_is_kept(folder, client, keys):
    end(client, begin(client, [request("a", "b")]))
    for path in (folder / "batches").rglob("*"):
        if path.is_file():
            assert keys["alice"].encode() not in path.read_bytes()


def test_an_engine_that_is_full_is_asked_again(small_gateway):
    full = ["engine.max_running=1", "admission.max_queued_requests=1", "batches.concurrency=6"]
    gateway = small_gateway(0.05, *full)
    with gateway.client() as client:
        batch = begin(client, requests(12, "p", refused=0))
        wait_until(lambda: "queue_full" in httpx.get(f"{gateway.url}/metrics").text)
        gateway.open_gate("refused")
        batch = end(client, batch)
        assert batch.request_counts.completed == 12 and batch.error_file_id is None
    assert sorted(gateway.asked()) == sorted(f"p {i}" for i in range(12))


def test_a_batch_expires(small_gateway):
    gateway = small_gateway(0.0, "batches.concurrency=1")
    with gateway.client() as client:
        batch = begin(client, requests(50, "p", expired=2))
        wait_until(lambda: len(gateway.asked()) > 2)
        database = Database(gateway.folder / "batches")
        with database.transaction() as transaction:
            transaction.execute("UPDATE batches SET expires_at = ?", (int(time.time()),))
        database.close()
        gateway.open_gate("expired")
        batch = end(client, batch)
        assert batch.status == "expired" and batch.expired_at is not None
        done = [line["custom_id"] for line in read(client, batch.output_file_id)]
        late = read(client, batch.error_file_id)
    assert done == [f"r{i}" for i in range(3)]  # the third was on its way
    assert [line["custom_id"] for line in late] == [f"r{i}" for i in range(3, 50)]
    assert {line["error"]["code"] for line in late} == {"batch_expired"}
