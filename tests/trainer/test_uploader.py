"""Uploads in the background: outages, several machines, and a start that is superseded.

Time is counted, not waited for: once a test lets it run, every look at the clock takes a second.
"""

import itertools
import threading

import pytest
import torch.distributed as dist

from core.errors import ConfigError, SpotforgeError, SupersededError
from tests import object_store
from tests.trainer.uploads import SMALL, a_checkpoint, of_start, stored_of
from trainer import store, uploader
from trainer.config import CheckpointConfig
from trainer.remote import RemoteCheckpoints
from trainer.uploader import Leaders, LeaderUploader, Uploader


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch):
    """The folder behind `double://`; what is tried again is tried at once."""
    folder = tmp_path / "store"
    folder.mkdir()
    monkeypatch.setenv("OBJECT_STORE_FOLDER", str(folder))
    monkeypatch.delenv("OBJECT_STORE_FAULTS", raising=False)
    monkeypatch.setattr(store, "_BACKOFF_S", 0)
    monkeypatch.setattr(uploader, "_POLL_S", 0.0005)
    monkeypatch.setattr(uploader, "_LEADERS_S", 1e9)


class Clock:
    """Moves on whenever it is looked at; calls what is due then."""

    def __init__(self, tick_s=0.0):
        self.now_s, self.tick_s, self.due = 0.0, tick_s, []

    def __call__(self):
        self.now_s += self.tick_s
        for at_s, action in list(self.due):
            if self.now_s >= at_s:
                self.due.remove((at_s, action))
                action()
        return self.now_s


class Counted(RemoteCheckpoints):
    """Remembers what was to be uploaded when."""

    def __init__(self, clock=lambda: 0.0):
        super().__init__("double://b/run")
        self._clock, self.attempts = clock, []

    def upload(self, checkpoint, files, done=None):
        self.attempts.append((checkpoint.name, self._clock()))
        super().upload(checkpoint, files, done)


class Rank0:
    """An uploader with all that it needs."""

    def __init__(self, tmp_path, others=None):
        self.clock, self.events, self.folder = Clock(), [], tmp_path / "disk"
        self.remote = Counted(self.clock)
        self.remote.claim(1)
        config = CheckpointConfig(keep_last=2)
        tell = lambda event, step, **details: self.events.append((event, step))  # noqa: E731
        self.uploader = Uploader(self.remote, config, tell, others, self.clock)

    def save(self, step, files=SMALL):
        self.uploader.submit(a_checkpoint(self.folder, step, of_start(1), 1), files)

    def wait(self, finished=True):
        """Lets time run only from now on, so that it does not run ahead of a slow test."""
        return self.uploader.wait(self.let_time_run, finished)

    def let_time_run(self):
        self.clock.tick_s = 1.0


@pytest.fixture
def rank0(tmp_path):
    rank0 = Rank0(tmp_path)
    yield rank0
    rank0.uploader.close()


@pytest.fixture
def away(monkeypatch):
    """A function that has the store answer no more, or again."""
    return lambda now: monkeypatch.setenv("OBJECT_STORE_FAULTS", "away=1" if now else "")


def until(happened):
    """Waits for another thread."""
    ticks = threading.Event()
    for _ in range(100_000):
        if happened():
            return
        ticks.wait(0.001)
    raise AssertionError("it did not happen")


# Outages


def test_training_goes_on_while_the_store_is_away(rank0, away, capsys):
    away(True)
    rank0.clock.due = [(300, lambda: rank0.save(2)), (600, lambda: away(False))]
    rank0.save(1)
    rank0.let_time_run()
    until(lambda: ("upload", 2) in rank0.events)
    names, times = zip(*rank0.remote.attempts, strict=True)
    assert set(names) == {"step-00000001", "step-00000002"} and list(names) == sorted(names)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert len(gaps) >= 10 and sum(30 <= gap <= 40 for gap in gaps) >= len(gaps) - 1
    assert rank0.events == [("upload_failed", 1), ("upload_failed", 2), ("upload", 2)]
    assert len(capsys.readouterr().err.splitlines()) == 2, "each checkpoint is named once"
    assert rank0.wait() is None and rank0.remote.names() == ["step-00000002"]
    assert rank0.uploader.busy == set()


def test_a_finished_run_goes_on_trying(rank0, away, capsys):
    away(True)
    rank0.clock.due.append((500, lambda: away(False)))
    rank0.save(1)
    until(lambda: rank0.remote.attempts)
    assert rank0.wait() is None and rank0.remote.names() == ["step-00000001"]
    [line] = [e for e in capsys.readouterr().err.splitlines() if "for up to 15 minutes" in e]
    assert line.startswith("step-00000001 was not uploaded: ")


def test_a_finished_run_gives_up_after_a_quarter_of_an_hour(rank0, away):
    away(True)
    rank0.save(1)
    until(lambda: rank0.events)
    first_s = rank0.remote.attempts[0][1]
    assert "connection timed out" in rank0.wait()
    took_s = rank0.remote.attempts[-1][1] - first_s
    assert 870 <= took_s <= 930 and len(rank0.remote.attempts) > 20
    assert rank0.uploader.busy == set()


def test_a_stopped_run_tries_once_more(rank0, away):
    away(True)
    rank0.save(1)
    until(lambda: rank0.events)
    assert len(rank0.remote.attempts) == 1
    assert "connection timed out" in rank0.wait(finished=False)
    assert len(rank0.remote.attempts) == 2


def test_a_stopped_run_uploads_its_last_checkpoint(rank0, away):
    away(True)
    rank0.save(1)
    until(lambda: rank0.events)
    away(False)
    rank0.save(2)
    assert rank0.wait(finished=False) is None
    assert rank0.remote.names()[0] == "step-00000002"


def test_what_was_uploaded_before_it_failed_is_not_sent_again(rank0, monkeypatch):
    sent, put, failures = [], rank0.remote._store.put, iter([SpotforgeError("busy")])

    def sometimes(local, path):
        if local.name == "__1_0.distcp" and (error := next(failures, None)):
            raise error
        sent.append(local.name)
        put(local, path)

    monkeypatch.setattr(rank0.remote._store, "put", sometimes)
    rank0.save(1)
    assert rank0.wait() is None
    assert sent == sorted(SMALL) and stored_of("step-00000001") == 1


def test_a_checkpoint_that_is_gone_from_the_disk_is_given_up(rank0):
    rank0.save(1, files=[*SMALL, "gone"])
    assert "gone" in rank0.wait()
    assert len(rank0.remote.attempts) == 1


def test_old_checkpoints_that_cannot_be_removed_cost_no_second_upload(rank0, monkeypatch, capsys):
    def fail(except_names=()):
        raise SpotforgeError("busy")

    monkeypatch.setattr(rank0.remote, "remove_incomplete", fail)
    rank0.save(1)
    assert rank0.wait() is None
    assert len(rank0.remote.attempts) == 1 and "uploaded, but busy" in capsys.readouterr().err


def test_events_that_cannot_be_written_end_no_upload(rank0, away, monkeypatch, capsys):
    def full(event, step, **details):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(rank0.uploader, "_tell", full)
    away(True)
    rank0.save(1)
    until(lambda: "upload_failed" in capsys.readouterr().err)
    away(False)
    assert rank0.wait() is None and rank0.remote.names() == ["step-00000001"]
    assert "was not uploaded" not in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_upload_thread_that_has_died_is_not_waited_for(rank0, monkeypatch):
    def fail(*_):
        raise SystemExit

    monkeypatch.setattr(rank0.remote, "upload", fail)
    rank0.save(1)
    assert rank0.wait() is not None


# A newer start


def test_a_superseded_start_does_not_try_again(rank0):
    rank0.save(1)
    assert rank0.wait() is None
    newer = RemoteCheckpoints("double://b/run")
    newer.claim(2)
    rank0.save(2)
    until(lambda: rank0.uploader.superseded is not None)
    with pytest.raises(SupersededError, match="generation 2 .* has taken over"):
        rank0.wait()
    assert len(rank0.remote.attempts) == 2 and newer.names() == ["step-00000001"]


# Several machines


@pytest.fixture
def machines(tmp_path):
    """Rank 0 and rank 2, each with one share on a disk of its own, and the files that both have."""
    ranks_store = dist.HashStore()
    rank0 = Rank0(tmp_path, Leaders(ranks_store, 1, [2]))
    rank0.folder = tmp_path / "disk0"
    there = Counted()
    leader = LeaderUploader(there, Leaders(ranks_store, 1), 2)

    def submit_there(step):
        checkpoint = a_checkpoint(tmp_path / "disk2", step, of_start(1), 1)
        (checkpoint / "__0_0.distcp").unlink()
        leader.submit(checkpoint, ["__1_0.distcp"])

    def submit_here(step):
        checkpoint = a_checkpoint(rank0.folder, step, of_start(1), 1)
        (checkpoint / "__1_0.distcp").unlink()
        rank0.uploader.submit(checkpoint, ["__0_0.distcp", ".metadata"])

    yield rank0, there, leader, submit_here, submit_there
    rank0.uploader.close()
    leader.close()


def test_two_machines_upload_one_checkpoint(machines):
    rank0, there, leader, submit_here, submit_there = machines
    submit_here(1)
    until(lambda: len(object_store.objects()) == 1 + 2)
    assert rank0.remote.names() == [], "the other half is missing"
    submit_there(1)
    assert rank0.wait() is None
    assert stored_of("step-00000001") == 1
    assert [name for name, _ in there.attempts] == ["step-00000001"]


def test_a_machine_that_fails_is_tried_again(machines, monkeypatch):
    rank0, there, leader, submit_here, submit_there = machines
    upload, failures = there.upload, iter([SpotforgeError("the disk of rank 2"), OSError()])

    def sometimes(*given):
        if error := next(failures, None):
            raise error
        upload(*given)

    monkeypatch.setattr(there, "upload", sometimes)
    submit_there(1)
    submit_here(1)
    until(lambda: rank0.events)
    assert rank0.wait() is None and stored_of("step-00000001") == 1
    assert rank0.events[-1] == ("upload", 1) and next(failures, None) is None


def test_rank_0_chooses_for_all(machines, monkeypatch):
    """A slow machine does not wander off to newer checkpoints, which would then never be whole."""
    rank0, there, leader, submit_here, submit_there = machines
    upload, go_on = there.upload, threading.Event()

    def slow(*given):
        go_on.wait()
        upload(*given)

    monkeypatch.setattr(there, "upload", slow)
    for step in (1, 2, 3):
        submit_here(step)
        submit_there(step)
        until(lambda: ".metadata" in str(object_store.objects().keys()))
    assert {"step-00000001", "step-00000003"} <= leader.busy
    go_on.set()
    assert rank0.wait() is None
    assert rank0.remote.names() == ["step-00000003", "step-00000001"]
    assert [name for name, _ in there.attempts] == ["step-00000001", "step-00000003"]
    assert leader.busy == {"step-00000003"}


def test_a_superseded_start_has_no_other_machine_upload(machines):
    """Not even if the newer one has the same number."""
    rank0, there, _, submit_here, submit_there = machines
    rank0.remote._store.write("starts/1-" + "f" * 33, b"{}")
    submit_there(1)
    submit_here(1)
    with pytest.raises(SupersededError):
        rank0.wait()
    assert there.attempts == []
    there.act_for(rank0.remote.start)  # as if it had been chosen a moment before
    with pytest.raises(SupersededError):
        there.check_newest(rank0.folder / "step-00000001")


def test_a_machine_is_not_waited_for_without_end(machines, monkeypatch):
    rank0, *_, submit_here, _ = machines
    monkeypatch.setattr(uploader, "_LEADERS_S", 120.0)
    submit_here(1)
    assert "rank 2 has not uploaded its files within 2 minutes" in rank0.wait(finished=False)
    assert rank0.remote.names() == []


# The start of a run during an outage


@pytest.fixture
def time_of_store(monkeypatch):
    """The clock that the store waits by."""
    clock = Clock(tick_s=1.0)
    counted = type("Time", (), {"monotonic": clock, "sleep": lambda seconds: None})
    monkeypatch.setattr(store, "time", counted)
    return clock


def test_a_run_that_had_begun_waits_for_its_store(away, time_of_store, capsys):
    beats = []
    away(True)
    time_of_store.due.append((400, lambda: away(False)))
    RemoteCheckpoints("double://b/run").check(begun_before=True, beat=lambda: beats.append(1))
    [line] = capsys.readouterr().err.splitlines()
    assert "waiting for it for up to 15 minutes" in line and len(beats) > 100
    assert object_store.objects() == {}


def test_a_run_that_had_begun_does_not_wait_for_ever(away, time_of_store):
    away(True)
    with pytest.raises(SpotforgeError, match="for 15 minutes") as error:
        RemoteCheckpoints("double://b/run").check(begun_before=True)
    assert error.value.exit_code == 1 and time_of_store.now_s > 900


def test_a_fresh_run_and_a_refusal_are_not_waited_for(away, time_of_store, monkeypatch):
    away(True)
    with pytest.raises(ConfigError, match="connection timed out"):
        RemoteCheckpoints("double://b/run").check()
    monkeypatch.setenv("OBJECT_STORE_FAULTS", "refuse=1")
    with pytest.raises(ConfigError, match="403 Forbidden"):
        RemoteCheckpoints("double://b/run").check(begun_before=True)
    assert time_of_store.now_s < 20


def test_a_stop_ends_the_wait_for_the_store(away, time_of_store):
    def stop():
        raise KeyboardInterrupt

    away(True)
    with pytest.raises(KeyboardInterrupt):
        RemoteCheckpoints("double://b/run").check(begun_before=True, beat=stop)
