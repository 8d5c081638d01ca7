"""A part of the chaos suite that is short enough for every commit; `make chaos` runs all of it."""

import hashlib
import json
import random

import pytest

from tests.chaos import checkpoints, injections
from tests.chaos.long_run import LongRun
from tests.chaos.rounds import WAIT_S, rounds
from tests.chaos.setup import Layout, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("chaos") / "corpus")


@pytest.fixture
def long_run(corpus, tmp_path):
    def make(*layouts):
        return LongRun("run", tmp_path / "long", corpus, list(layouts), random.Random(0))

    return make


def test_kills_and_damage_lose_nothing_that_was_committed(long_run):
    run = long_run(Layout("ddp", 2))
    rows = []
    places = ["step", "fsync", "commit", "begin", "unlink", "evaluate"]
    for place, kind in zip(places, checkpoints.DAMAGE, strict=True):
        rows.append(injections.kill(run, place))
        rows.append(injections.damage(run, kind))
    rows.append(run.finish())
    assert not [row for row in rows if row.problems]
    assert [row.resumed for row in rows].count(None) == 0, "some start was never checked"


def test_any_one_rank_stops_all_without_losing_a_step(long_run):
    run = long_run(Layout("fsdp", 2), Layout("ddp", 3))
    places = list(injections.STOPPED_IN)
    stops = zip(places, injections.REASONS, strict=False)
    rows = [injections.stop(run, place, source) for place, source in stops]
    rows.append(run.finish())
    assert not [row for row in rows if row.problems]
    assert len(rows) == 7 and not any(row.lost_steps for row in rows)


def test_a_machine_is_lost_and_comes_back(long_run):
    rows = []
    run = long_run(Layout("ddp", 1), Layout("ddp", 2))
    # `make chaos` holds it to 15 s; here other tests may have the processor.
    rounds(run, 1, rows.append, promised_s=WAIT_S)
    assert not [row for row in rows if row.problems]
    assert [row.moment for row in rows] == ["2 -> 1", "1 -> 2", "finish"]


@pytest.mark.parametrize("kind", checkpoints.DAMAGE)
def test_the_auditor_sees_damage(tmp_path, kind):
    folder = tmp_path / "step-00000003"
    folder.mkdir()
    files = {"__0_0.distcp": b"abc", "trainer.json": b'{"step": 3}'}
    manifest = {}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        manifest[name] = {"size_bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "manifest.json").write_text(json.dumps({"files": manifest}))
    assert checkpoints.valid_steps(tmp_path) == [3]
    checkpoints.DAMAGE[kind](folder, random.Random(0))
    assert checkpoints.valid_steps(tmp_path) == ([3] if kind == "uncommitted staging" else [])
