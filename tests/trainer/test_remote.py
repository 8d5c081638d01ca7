"""Checkpoints in an object store: what is committed is whole, whatever happens on the way."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import fsspec
import pytest
from fsspec.registry import known_implementations

from core.errors import (
    ConfigError,
    DamagedError,
    MissingExtraError,
    SpotforgeError,
    SupersededError,
)
from tests import object_store
from tests.object_store import ObjectStore
from tests.trainer.uploads import FILES, SMALL, a_checkpoint, entry_of, of_start, send, stored_of
from trainer import remote, store
from trainer.checkpoint import verify
from trainer.remote import RemoteCheckpoints

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch):
    """The folder behind `double://`, without faults; retries come at once."""
    folder = tmp_path / "store"
    folder.mkdir()
    monkeypatch.setenv("OBJECT_STORE_FOLDER", str(folder))
    monkeypatch.delenv("OBJECT_STORE_FAULTS", raising=False)
    monkeypatch.setattr(ObjectStore, "num_puts", 0)
    monkeypatch.setattr(store, "_BACKOFF_S", 0.001)


@pytest.fixture
def faults(monkeypatch):
    return lambda text: monkeypatch.setenv("OBJECT_STORE_FAULTS", text)


@pytest.fixture(params=["double", "double/", "file", "file/", "memory"])
def url(request, tmp_path):
    kind = request.param.rstrip("/")
    base = {"file": f"file://{tmp_path}/deep/er", "double": "double://bucket/run"}
    yield base.get(kind, "memory://bucket/run") + request.param[len(kind) :]
    if kind == "memory":
        fsspec.filesystem("memory").store.clear()


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Round trip


@pytest.mark.parametrize("generation", [0, 3])
def test_round_trip(url, generation, tmp_path):
    checkpoints = RemoteCheckpoints(url)
    checkpoints.check()
    assert checkpoints.names() == [] and checkpoints.generation() == 0
    if generation:
        checkpoints.claim(generation)
        assert RemoteCheckpoints(url).generation() == checkpoints.generation() == generation
    for step in (2, 10, 1):
        send(checkpoints, a_checkpoint(tmp_path / "local", step, generation=generation))
    assert checkpoints.names() == ["step-00000010", "step-00000002", "step-00000001"]

    fetched = checkpoints.download("step-00000010", tmp_path / "elsewhere")
    assert fetched == tmp_path / "elsewhere/step-00000010"
    assert contents(fetched) == contents(tmp_path / "local/step-00000010")
    verify(fetched)
    assert checkpoints.read("step-00000010", "trainer.json") == FILES["trainer.json"]
    manifest = checkpoints.manifest("step-00000010")
    assert manifest.generation == generation and manifest.files.keys() == FILES.keys()
    assert manifest.content == (fetched / "manifest.json").read_bytes()
    assert [p.name for p in fetched.parent.iterdir()] == [fetched.name]  # no traces

    checkpoints.delete("step-00000010")
    checkpoints.delete("step-00000010")
    assert checkpoints.names() == ["step-00000002", "step-00000001"]
    with pytest.raises(DamagedError, match=r"manifest\.json cannot be read"):
        checkpoints.download("step-00000010", tmp_path / "elsewhere")
    if url.startswith("file"):
        assert not list(tmp_path.glob("deep/er/step-00000010*")), "empty folders were left"


def test_each_rank_uploads_its_own_at_once(url, tmp_path):
    checkpoint = a_checkpoint(tmp_path, 3)
    checkpoints = RemoteCheckpoints(url)
    failures = []

    def upload(files):
        try:
            checkpoints.upload(checkpoint, files)
        except BaseException as e:
            failures.append(e)

    names = list(FILES)
    threads = [threading.Thread(target=upload, args=(names[i::2],)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and checkpoints.names() == []
    checkpoints.commit(checkpoint)
    assert contents(checkpoints.download(checkpoint.name, tmp_path / "x")) == contents(checkpoint)


def test_what_others_do_there_is_seen(tmp_path):
    """A client's memory of a listing would hide the first, and show the last."""
    checkpoint = a_checkpoint(tmp_path, 1)
    here, there = RemoteCheckpoints("double://b/run"), RemoteCheckpoints("double://b/run")
    here.upload(checkpoint, list(FILES))
    assert here.names() == there.names() == []
    here.commit(checkpoint)
    assert there.names() == here.names() == [checkpoint.name]
    there.delete(checkpoint.name)
    assert here.names() == []
    with pytest.raises(SpotforgeError, match="missing"):
        here.commit(checkpoint)


def test_other_things_under_the_url_are_no_checkpoints(tmp_path):
    (tmp_path / "store" / "b%2Frun%2Fstep-7").touch()
    (tmp_path / "store" / "b%2Frun%2Fnotes%2Fmanifest%2Ejson").touch()
    (tmp_path / "store" / "b%2Frun2%2Fstep-00000009%2Fmanifest%2Ejson").touch()
    assert RemoteCheckpoints("double://b/run").names() == []


# The order of things


def changes():
    done = [line.removeprefix("double://") for line in object_store.operations()]
    return [line for line in done if line.startswith(("put ", "rm "))]


def test_the_manifest_is_written_last_and_removed_first(tmp_path):
    checkpoints = RemoteCheckpoints("double://b/run")
    checkpoint = a_checkpoint(tmp_path, 1)
    base = f"b/run/{checkpoint.name}"
    send(checkpoints, checkpoint)
    everything = [f"put {base}/{name}" for name in FILES] + [f"put {base}/manifest.json"]
    assert changes() == everything

    # Once more, as after a step back: it is not committed while its files are neither old nor new.
    send(checkpoints, checkpoint)
    assert changes()[len(everything) :] == [f"rm {base}/manifest.json", *everything]

    checkpoints.delete(checkpoint.name)
    removed = changes()[2 * len(everything) + 1 :]
    assert removed[0] == f"rm {base}/manifest.json" and len(removed) == len(everything)
    assert object_store.objects() == {}


def test_nothing_is_committed_before_all_is_there(tmp_path):
    checkpoints = RemoteCheckpoints("double://b/run")
    checkpoint = a_checkpoint(tmp_path, 1)
    key = f"b/run/{checkpoint.name}/__1_0.distcp"
    checkpoints.upload(checkpoint, [name for name in FILES if name != "__1_0.distcp"])
    with pytest.raises(SpotforgeError, match=r"__1_0\.distcp is missing"):
        checkpoints.commit(checkpoint)
    checkpoints.upload(checkpoint, ["__1_0.distcp"])
    object_store.damage(key, b"short")
    with pytest.raises(SpotforgeError, match=r"__1_0\.distcp has the wrong size"):
        checkpoints.commit(checkpoint)
    assert checkpoints.names() == []


# Faults


@pytest.mark.parametrize("fault", ["fail_every=2", "truncate_every=2", "fail_every=3 slow_s=0.001"])
def test_what_fails_or_arrives_short_is_sent_again(fault, faults, tmp_path):
    faults(fault)
    checkpoints = RemoteCheckpoints("double://b/run")
    checkpoint = a_checkpoint(tmp_path, 1)
    checkpoints.check()
    send(checkpoints, checkpoint)
    assert checkpoints.names() == [checkpoint.name]
    assert ObjectStore.num_puts > len(FILES) + 2
    stored = {key.split("/", 3)[3]: content for key, content in object_store.objects().items()}
    assert stored == contents(checkpoint)


@pytest.mark.parametrize("fault", ["fail_after=3", "truncate_every=1", "refuse=1"])
def test_what_fails_for_good_is_said_and_leaves_nothing_committed(fault, faults, tmp_path):
    checkpoints = RemoteCheckpoints("double://b/run")
    checkpoint = a_checkpoint(tmp_path, 1)
    faults(fault)
    with pytest.raises(SpotforgeError) as failed:
        send(checkpoints, checkpoint)
    assert str(failed.value).startswith("checkpoint.upload=double://b/run: ")
    assert "failed 5 times" in str(failed.value) and "\n" not in str(failed.value)
    faults("")
    assert checkpoints.names() == []
    send(checkpoints, checkpoint)
    assert checkpoints.names() == [checkpoint.name]


def test_a_refused_listing_is_not_taken_for_an_empty_one(faults, tmp_path):
    checkpoints = RemoteCheckpoints("double://b/run")
    send(checkpoints, a_checkpoint(tmp_path, 1))
    faults("refuse=1")
    with pytest.raises(SpotforgeError, match="403 Forbidden"):
        checkpoints.names()


def test_pauses_grow_and_differ(monkeypatch, faults, tmp_path):
    pauses = []
    monkeypatch.setattr(store, "_BACKOFF_S", 1.0)
    monkeypatch.setattr(time, "sleep", pauses.append)
    faults("fail_after=0")
    checkpoints = RemoteCheckpoints("double://b/run")
    state = random.getstate()
    for step in (1, 2):
        with pytest.raises(SpotforgeError):
            checkpoints.upload(a_checkpoint(tmp_path, step), list(FILES))
    pauses = [pause for pause in pauses if pause > 0]
    assert len(pauses) == 8 and pauses[:4] != pauses[4:]
    for i, pause in enumerate(pauses):
        assert 0.5 * 2 ** (i % 4) <= pause <= 1.5 * 2 ** (i % 4)
    assert random.getstate() == state  # the trainer's randomness is not drawn from


_UPLOAD = """
import sys
from pathlib import Path
import tests.object_store
from trainer.remote import RemoteCheckpoints

checkpoint = Path(sys.argv[1])
checkpoints = RemoteCheckpoints("double://b/run")
checkpoints.upload(checkpoint, sys.argv[2:])
checkpoints.commit(checkpoint)
"""


def test_an_upload_that_is_killed_leaves_no_checkpoint(tmp_path):
    checkpoints = RemoteCheckpoints("double://b/run")
    earlier, checkpoint = a_checkpoint(tmp_path, 1), a_checkpoint(tmp_path, 2)
    send(checkpoints, earlier)
    environment = os.environ | {"OBJECT_STORE_FAULTS": "hang_after=2"}
    with subprocess.Popen(
        [sys.executable, "-c", _UPLOAD, str(checkpoint), *FILES], cwd=ROOT, env=environment
    ) as process:
        deadline = time.monotonic() + 300
        while sum(checkpoint.name in key for key in object_store.objects()) < 2:
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    left = [key for key in object_store.objects() if checkpoint.name in key]
    assert len(left) == 2
    assert checkpoints.names() == [earlier.name]

    checkpoints.remove_incomplete(except_names=[checkpoint.name])
    assert [key for key in object_store.objects() if checkpoint.name in key] == left
    checkpoints.remove_incomplete()
    assert not [key for key in object_store.objects() if checkpoint.name in key]
    assert checkpoints.names() == [earlier.name]

    send(checkpoints, checkpoint)
    assert checkpoints.names() == [checkpoint.name, earlier.name]


# Starts of a run


def begin(folder, generation):
    """A start of the run, and a function that saves and uploads a checkpoint as it would."""
    checkpoints = RemoteCheckpoints("double://b/run")

    def save(step):
        disk = folder / str(generation)
        send(checkpoints, a_checkpoint(disk, step, of_start(generation), generation))

    return checkpoints, save


def test_an_older_start_is_refused_by_name(tmp_path):
    older, save_older = begin(tmp_path, 7)
    older.claim(7)
    save_older(1)
    newer, save_newer = begin(tmp_path, 8)
    assert newer.names() == ["step-00000001"] and newer.claim(newer.generation() + 1) == []
    before = object_store.objects()
    checkpoint = a_checkpoint(tmp_path / "7", 2, of_start(7), 7)
    for refused, what in (
        (lambda: older.commit(tmp_path / "7" / "step-00000001"), "step-00000001 of generation 7"),
        (lambda: older.upload(checkpoint, list(SMALL)), "step-00000002 of generation 7"),
        (lambda: older.delete("step-00000001"), "step-00000001 is not removed"),
        (older.remove_incomplete, "not removed"),
        (lambda: older.claim(8), "generation 8 does not begin"),
    ):
        with pytest.raises(SupersededError) as error:
            refused()
        by = f"generation 8 (host {socket.gethostname()}, process {os.getpid()}) has taken over"
        assert error.value.exit_code == 2 and "\n" not in str(error.value)
        assert str(error.value).startswith("checkpoint.upload=double://b/run: ")
        assert what in str(error.value) and by in str(error.value)
    assert object_store.objects() == before
    save_newer(2)
    assert older.names() == newer.names() == ["step-00000002", "step-00000001"]
    assert newer.manifest("step-00000001").generation == 7


def test_two_starts_with_one_number_do_not_both_commit(tmp_path):
    """Both look before the other one has claimed the store."""
    first, save_first = begin(tmp_path / "a", 1)
    second, save_second = begin(tmp_path / "b", 1)
    refused = []

    def attempt(action, argument):
        try:
            action(argument)
        except SupersededError:
            refused.append(action)

    with before_requests({2: lambda: attempt(first.claim, 1)}) as done:
        attempt(second.claim, 1)
    assert done[1].startswith("put")
    for save, claim in ((save_first, first.claim), (save_second, second.claim)):
        if claim not in refused:
            attempt(save, 1)
    assert len(refused) == 1 and first.names() == ["step-00000001"]


def test_each_start_has_files_of_its_own(tmp_path):
    for generation in (1, 2):
        checkpoints, save = begin(tmp_path, generation)
        if generation == 1:  # uploaded before there were generations
            send(checkpoints, a_checkpoint(tmp_path / "old", 4, of_start(9)))
            send(checkpoints, a_checkpoint(tmp_path / "old", 5, of_start(9)))
        checkpoints.claim(generation)
        save(5)
        assert stored_of("step-00000005") == generation
        assert {key for key in object_store.objects() if "00000005" in key} == {
            f"b/run/step-00000005/generation-{generation}/{name}"
            for name in (*SMALL, "manifest.json")
        }, "those of earlier starts are removed"
    assert stored_of("step-00000004") == 9
    checkpoints.delete("step-00000004")
    assert checkpoints.names() == ["step-00000005"]


def test_what_others_are_uploading_stays(tmp_path):
    checkpoints, _ = begin(tmp_path, 2)
    checkpoints.claim(2)
    # A machine of this start, one of an older start, and one that is about to take over.
    for generation in (1, 2, 3):
        folder = tmp_path / str(generation)
        checkpoint = a_checkpoint(folder, 5, of_start(generation), generation)
        RemoteCheckpoints("double://b/run").upload(checkpoint, [".metadata"]) if (
            generation > 1
        ) else fsspec.filesystem("double").pipe_file(
            "b/run/step-00000005/generation-1/.metadata", b"x"
        )
    checkpoints.remove_incomplete(except_names=["step-00000005"])
    left = {key.split("/")[3] for key in object_store.objects() if "step" in key}
    assert left == {"generation-2", "generation-3"}
    checkpoints.remove_incomplete()
    checkpoints.delete("step-00000005")
    left = {key.split("/")[3] for key in object_store.objects() if "step" in key}
    assert left == {"generation-3"}


class Killed(BaseException):
    pass


@contextmanager
def before_requests(actions):
    """Calls each of `{number: action}` before that request to the store, from 1; yields them all.

    The requests of actions do not count.
    """
    take_note, done, inside = object_store._take_note, [], False

    def note(operation, path):
        nonlocal inside
        if not inside:
            done.append(f"{operation} {path}")
            if len(done) in actions:
                inside = True
                actions[len(done)]()
                inside = False
        take_note(operation, path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(object_store, "_take_note", note)
        yield done


def empty_store():
    for path in Path(os.environ["OBJECT_STORE_FOLDER"]).iterdir():
        path.unlink()


def a_life(folder, generation, *steps):
    """What a start does to the store: it takes over, uploads, and removes what need not stay."""
    checkpoints, save = begin(folder, generation)
    checkpoints.claim(generation)
    for step in steps:
        save(step)
    checkpoints.delete("step-00000001")
    checkpoints.remove_incomplete()


@pytest.fixture
def earlier_run(tmp_path):
    """A function that puts the store into the state that an earlier run left."""
    checkpoints, save = begin(tmp_path, 5)
    checkpoints.claim(5)
    save(1)
    # Killed before it removed what was there from before there were generations.
    send(checkpoints, a_checkpoint(tmp_path / "4", 1, of_start(4)))
    save(2)
    save(3)
    store, saved = Path(os.environ["OBJECT_STORE_FOLDER"]), tmp_path / "saved"
    shutil.copytree(store, saved)

    def restore():
        for path in store.iterdir():
            path.unlink()
        shutil.copytree(saved, store, dirs_exist_ok=True)

    return restore


def kill():
    raise Killed


def all_requests(folder):
    with before_requests({}) as done:
        a_life(folder, 6, 3, 4)
    return done


def left_whole():
    """Which start each committed checkpoint is of, all of them verified."""
    names = RemoteCheckpoints("double://b/run").names()
    return {int(name[-1]): stored_of(name) for name in names}


def assert_nothing_else_is_left(num_checkpoints):
    assert len(object_store.objects()) == 1 + num_checkpoints * (len(SMALL) + 1)


def test_killed_at_any_request_a_start_leaves_whole_checkpoints(earlier_run, tmp_path):
    for number in range(1, len(all_requests(tmp_path)) + 1):
        earlier_run()
        with before_requests({number: kill}), pytest.raises(Killed):
            a_life(tmp_path, 6, 3, 4)
        left = left_whole()
        assert (left.pop(1, 5), left.pop(2), left.pop(3)) in ((5, 5, 5), (5, 5, 6)), number
        assert left in ({}, {4: 6}), number
        a_life(tmp_path, 7, 3)
        assert left_whole() == {2: 5, 3: 7} | left
        assert_nothing_else_is_left(2 + len(left))


def test_taken_over_at_any_request_a_start_harms_nothing(earlier_run, tmp_path):
    """Held up before each of its requests, while a newer start does all that it does.

    It then goes on, or is killed before its next request.
    """
    for number, request in enumerate(all_requests(tmp_path), 1):
        for killed in (False, True) if request.startswith(("put", "rm")) else (False,):
            earlier_run()
            actions = {number: lambda: a_life(tmp_path, 7, 3)}
            if killed:
                actions[number + 1] = kill
            with before_requests(actions), suppress(SupersededError, Killed):
                a_life(tmp_path, 6, 3, 4)
            left = left_whole()
            assert left in ({2: 5, 3: 7}, {2: 5, 3: 7, 4: 6}), request
            later, _ = begin(tmp_path, 8)
            later.claim(8)
            later.remove_incomplete()
            assert left_whole() == left
            assert_nothing_else_is_left(len(left))


def test_what_a_newer_start_did_not_see_is_not_there_later(earlier_run, tmp_path):
    """It claims the store before any change that an older one makes, and looks what is there."""
    for number, request in enumerate(all_requests(tmp_path), 1):
        if not request.startswith("put"):
            continue
        earlier_run()
        there = {}

        def take_over(there=there):
            begin(tmp_path, 7)[0].claim(7)
            there |= left_whole()

        with before_requests({number: take_over}), pytest.raises(SupersededError):
            a_life(tmp_path, 6, 3, 4)
        assert left_whole() == there, request


# Parts of files


def test_ranges(url, tmp_path):
    checkpoints = RemoteCheckpoints(url)
    for step, generation in ((1, 0), (2, 4)):
        if generation:
            checkpoints.claim(generation)
        name = a_checkpoint(tmp_path, step, generation=generation).name
        send(checkpoints, tmp_path / name)
        content = FILES["__1_0.distcp"]
        for offset, length in ((0, 1), (7, 5000), (100_000, 1), (0, 100_001), (50, 0)):
            part = checkpoints.read_range(name, "__1_0.distcp", offset, length)
            assert part == content[offset : offset + length]
        assert RemoteCheckpoints(url).read_range(name, ".metadata", 2, 3) == b"ere"
        with pytest.raises(DamagedError, match=r"__1_0\.distcp has the wrong size"):
            checkpoints.read_range(name, "__1_0.distcp", 100_000, 2)
        with pytest.raises(DamagedError, match="nowhere is missing"):
            checkpoints.read_range(name, "nowhere", 0, 1)


def test_a_short_range_is_asked_for_again(tmp_path, monkeypatch):
    checkpoints, checkpoint, _ = uploaded(tmp_path)
    cat_file, answers = ObjectStore.cat_file, []

    def sometimes_short(self, path, start=None, end=None, **kwargs):
        answers.append(cat_file(self, path, start, end - (len(answers) % 2 == 0)))
        return answers[-1]

    checkpoints.manifest(checkpoint.name)
    monkeypatch.setattr(ObjectStore, "cat_file", sometimes_short)
    part = checkpoints.read_range(checkpoint.name, "__0_0.distcp", 10, 20)
    assert part == FILES["__0_0.distcp"][10:30] and [len(a) for a in answers] == [19, 20]


def test_digests_of_blocks_are_kept(tmp_path):
    checkpoints = RemoteCheckpoints("double://b/run")
    checkpoint = a_checkpoint(tmp_path, 1)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"]["__0_0.distcp"]["blocks"] = ["ab", "cd"]
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    send(checkpoints, checkpoint)
    assert checkpoints.manifest(checkpoint.name).files == manifest["files"]


# Fetching


def uploaded(tmp_path):
    checkpoints = RemoteCheckpoints("double://b/run")
    checkpoint = a_checkpoint(tmp_path / "local", 1)
    send(checkpoints, checkpoint)
    return checkpoints, checkpoint, f"b/run/{checkpoint.name}"


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (b"x" * len(FILES["__0_0.distcp"]), "does not match its SHA-256"),
        (FILES["__0_0.distcp"][:-1], "has the wrong size"),
        (None, "is missing"),
    ],
)
def test_a_damaged_file_is_named(content, wrong, tmp_path):
    checkpoints, checkpoint, base = uploaded(tmp_path)
    if content is None:
        fsspec.filesystem("double").rm_file(f"{base}/__0_0.distcp")
    else:
        object_store.damage(f"{base}/__0_0.distcp", content)
    here = a_checkpoint(tmp_path / "here", 1, {"old": b"still good"})
    with pytest.raises(DamagedError) as damaged:
        checkpoints.download(checkpoint.name, here.parent)
    assert f"double://b/run/{checkpoint.name}: __0_0.distcp {wrong}" in str(damaged.value)
    assert [p.name for p in here.parent.iterdir()] == [here.name]
    assert (here / "old").exists()


@pytest.mark.parametrize("manifest", ["", "[]", "{}", '{"files": []}', '{"files": {"a": 1}}'])
def test_a_manifest_that_is_none_is_refused(manifest, tmp_path):
    checkpoints, checkpoint, base = uploaded(tmp_path)
    object_store.damage(f"{base}/manifest.json", manifest.encode())
    with pytest.raises(DamagedError, match=r"manifest\.json cannot be read"):
        checkpoints.download(checkpoint.name, tmp_path / "here")


@pytest.mark.parametrize(
    "name",
    ["../escaped", "/tmp/escaped", "a/../../escaped", "..", "", ".", "manifest.json", "a\0b"],
)
def test_a_manifest_cannot_write_outside_of_the_checkpoint(name, tmp_path):
    checkpoints, checkpoint, base = uploaded(tmp_path)
    content = json.dumps({"files": {name: entry_of(b"x")}}).encode()
    object_store.damage(f"{base}/manifest.json", content)
    before = contents(tmp_path / "local")
    with pytest.raises(DamagedError, match="not inside the checkpoint"):
        checkpoints.download(checkpoint.name, tmp_path / "here" / "deep")
    assert not [p for p in tmp_path.rglob("*escaped*")]
    assert contents(tmp_path / "local") == before


def test_what_was_there_is_replaced_as_a_whole(tmp_path):
    checkpoints, checkpoint, _ = uploaded(tmp_path)
    here = a_checkpoint(tmp_path / "here", 1, {"old": b"damaged"})
    for left in (f".staging-{here.name}", f".staging-{here.name}-replaced"):
        (here.parent / left / "huggingface").mkdir(parents=True)  # of a process that was killed
        (here.parent / left / "huggingface" / "half").touch()
    assert contents(checkpoints.download(here.name, here.parent)) == contents(checkpoint)
    assert [p.name for p in here.parent.iterdir()] == [here.name]


def test_a_short_transfer_is_repeated(tmp_path, monkeypatch):
    checkpoints, checkpoint, _ = uploaded(tmp_path)
    get_file, count = ObjectStore.get_file, 0

    def sometimes_short(self, rpath, lpath, **kwargs):
        nonlocal count
        count += 1
        get_file(self, rpath, lpath)
        if count % 2:
            os.truncate(lpath, os.stat(lpath).st_size // 2)

    monkeypatch.setattr(ObjectStore, "get_file", sometimes_short)
    assert contents(checkpoints.download(checkpoint.name, tmp_path / "x")) == contents(checkpoint)
    assert count > len(FILES)


def test_a_download_that_does_not_fit_is_refused_before_it_begins(tmp_path, monkeypatch):
    checkpoints, checkpoint, _ = uploaded(tmp_path)
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"run\.dir=.*0\.00 GB are free"):
        checkpoints.download(checkpoint.name, tmp_path / "here" / "checkpoints")
    assert not [line for line in object_store.operations() if "distcp" in line and "get" in line]


# Refusals


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("s3:/bucket/run", "must be a URL"),
        ("/mnt/run", "must be a URL"),
        ("nowhere://bucket/run", "Protocol not known"),
        ("double://", "must name a bucket"),
        ("file:///", "must name a bucket"),
        ("double://bucket/run[1]", "must not contain"),
    ],
)
def test_a_url_that_cannot_work_is_refused(url, rule):
    with pytest.raises(ConfigError, match=rule) as refused:
        RemoteCheckpoints(url)
    assert refused.value.key == "checkpoint.upload" and refused.value.value == url


def test_a_missing_package_is_named(monkeypatch):
    absent = {"class": "absent_store.AbsentFileSystem", "err": "Install it"}
    monkeypatch.setitem(known_implementations, "absent", absent)
    with pytest.raises(MissingExtraError) as refused:
        RemoteCheckpoints("absent://bucket/run")
    assert str(refused.value) == (
        "checkpoint.upload=absent://bucket/run: absent_store is not installed; "
        "pip install absent_store"
    )


def test_a_store_that_refuses_is_found_out_at_the_start(faults):
    faults("refuse=1")
    with pytest.raises(ConfigError, match="403 Forbidden") as refused:
        RemoteCheckpoints("double://b/run").check()
    assert refused.value.key == "checkpoint.upload"


def test_a_folder_that_cannot_be_written_is_found_out_at_the_start(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be written"):
        RemoteCheckpoints(f"file://{tmp_path}/file/run").check()


def test_the_probe_leaves_nothing():
    checkpoints = RemoteCheckpoints("double://b/run")
    checkpoints.check()
    assert object_store.objects() == {}
