"""Fixtures of several packages' tests."""

import os
import shutil
import sys
from dataclasses import dataclass

import pytest

from tests import ports, programs
from tests.words import last_of_each

# Before torch is imported. Its threads wait for each other in loops, which on cores that two tests
# share took ten times the CPU-seconds of one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# At the end of the tests, one of these files would leave the other workers without work.
_LONG_FILES = """
    test_readme.py test_run.py test_chaos.py test_celery.py test_supervisor.py test_agent.py
    test_split.py test_parity.py test_batches.py test_engine.py
""".split()


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in _LONG_FILES)


@dataclass
class Result:
    code: int
    out: str
    err: str


@pytest.fixture(scope="session", autouse=True)
def cache_dir(tmp_path_factory):
    """Prepared data of the tests, apart from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPOTFORGE_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session", autouse=True)
def forked_programs():
    """Programs of ours that tests start are forks of one that has imported torch."""
    with programs.fork_programs():
        yield


@pytest.fixture
def real_programs(forked_programs):
    """Programs that a test with this starts are executed, as a user's are."""
    with programs.execute_programs():
        yield


@pytest.fixture
def supervisor_port():
    """Of one test at a time: the port at which a supervisor of several machines listens."""
    with ports.supervisor_port():
        yield


@pytest.fixture
def trainer(capfd, monkeypatch):
    """Calls `python -m trainer` in this process (one rank): fast, and nothing is mocked."""
    from trainer.__main__ import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["trainer", *map(str, last_of_each(arguments))])
        capfd.readouterr()
        code = main()
        return Result(code, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of small text files."""
    folder = tmp_path_factory.mktemp("corpus")
    for i in range(40):
        lines = (f"line {j} of file {i}: the quick brown fox, {i * j} times\n" for j in range(30))
        (folder / f"{i:02d}.txt").write_text("".join(lines))
    return folder


@pytest.fixture
def small(corpus, tmp_path):
    """Overrides of a run that takes half a second; a report and an export would double that."""
    return [
        "data=text",
        f"data.path={corpus}",
        "data.tokenizer_vocab_size=300",
        "data.max_seq_len=32",
        "data.validation_fraction=0.2",
        "global_batch_size=8",
        "micro_batch_size=4",
        "stop.steps=6",
        "schedule.warmup_steps=2",
        "log.every_steps=1",
        "evaluation.max_samples=8",
        "export.at_end=false",
        "monitoring.report=false",
        "model.config.hidden_size=32",
        "model.config.intermediate_size=64",
        "model.config.num_hidden_layers=2",
        "model.config.num_attention_heads=4",
        "model.config.num_key_value_heads=2",
        f"run.dir={tmp_path / 'run'}",
    ]


@pytest.fixture(scope="session")
def first(tmp_path_factory):
    return tmp_path_factory.mktemp("first") / "run"


@pytest.fixture
def trained(trainer, small, tmp_path, first):
    """A run that has ended, in this test's folder; one is trained for all tests."""
    if first.exists():
        shutil.copytree(first, tmp_path / "run")
    else:
        assert trainer(*small).code == 0
        shutil.copytree(tmp_path / "run", first)
    return tmp_path / "run"
