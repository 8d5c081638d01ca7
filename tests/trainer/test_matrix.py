"""What any strategy saves on any number of ranks, any other resumes on any other number.

These are whole runs, `train_in`. An uninterrupted one leaves the checkpoint of step 4; another run
resumes it, and its next 20 steps are compared with the uninterrupted one's: losses, gradient norms,
learning rates and token counts, and bit for bit (with the weights and moments of the last step)
where the layout is the same.

`make test` takes a covering subset, `make test-matrix` all 576 pairs; the latter writes
`benchmarks/results/matrix.json`.
"""

import copy
import json
import multiprocessing
import queue
import threading
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from core.errors import SpotforgeError
from monitoring.environment import describe_environment
from monitoring.jsonl import read_records
from parallel.world import join_world
from tests.distributed import run_distributed
from tests.trainer.small_config import (
    GPT2_WITH_DROPOUT,
    LLAMA,
    SETTINGS,
    STRATEGIES,
    parallel,
    small_config,
    write_sources,
)
from trainer.checkpoint import Located, step_name, tensor_shapes
from trainer.heartbeat import Heartbeat
from trainer.run import train_in
from trainer.stopping import StopSignal

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "matrix.json"
SAVED_AT, THEN = 4, 20
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4  # absolute; relative
GIVEN_UP = "given-up"  # in the directory of a run whose checkpoint will never come


class Layout(NamedTuple):
    strategy: str
    ranks: int

    def __str__(self):
        return f"{self.strategy}-{self.ranks}"


def layout(name):
    strategy, ranks = name.split("-")
    return Layout(strategy, int(ranks))


def pairs_of(resumers):
    return [(layout(saver), layout(name)) for saver, names in resumers.items() for name in names]


ALL = [Layout(*pair) for pair in product(STRATEGIES, (1, 2, 3, 4))]
COVERING = pairs_of(
    {
        "ddp-1": ["ddp-1", "fsdp-3", "zero3-3"],
        "ddp-4": ["ddp-4"],  # from 3 ranks on the order in which gradients are added up matters
        "fsdp-2": ["ddp-4", "zero1-1"],
        "hsdp-4": ["hsdp-4", "hsdp-2"],
        "zero1-3": ["zero1-3", "ddp-2"],
        "zero2-2": ["hsdp-4"],
        "zero3-4": ["zero3-4", "zero2-3"],
    }
)


@dataclass
class Case:
    """Pairs of (saved by, resumed by) that train the same thing."""

    name: str
    settings: list
    pairs: list
    steps: int = SAVED_AT + THEN


UNEVEN = Case(
    "global batch 13",  # no two ranks, nor three, share it evenly
    [*LLAMA, "global_batch_size=13"],
    pairs_of({"fsdp-2": ["ddp-3", "fsdp-2"], "zero2-3": ["fsdp-2", "zero2-3"]}),
)
DROPOUT = Case(
    "dropout",
    [*GPT2_WITH_DROPOUT, "global_batch_size=12"],
    pairs_of({"ddp-2": ["ddp-2", "ddp-1"], "fsdp-2": ["fsdp-2"], "zero2-2": ["zero2-2"]}),
    steps=SAVED_AT + 8,
)


def case_of(pairs):
    return Case("global batch 12", [*LLAMA, "global_batch_size=12"], pairs)


@dataclass
class Pair:
    """How a resumed run compares with the uninterrupted one."""

    case: str
    saver: Layout
    resumer: Layout
    loss_difference: float = 0.0
    norm_difference: float = 0.0  # relative
    bit_for_bit: bool = False
    faults: list = field(default_factory=list)

    def __str__(self):
        return f"{self.case}: {self.saver} -> {self.resumer}: {'; '.join(self.faults)}"


# -- Training ---------------------------------------------------------------------------------


def train_each(configs):
    """On every rank of a world, run after run; returns what went wrong in each, or None.

    A run that fails on all ranks does not keep them from the next one. Any other error leaves them
    apart, and ends them all.
    """
    torch.use_deterministic_algorithms(True)
    # Else torch fills what is allocated with NaN, and DeepSpeed allocates 2 GB at every step.
    torch.utils.deterministic.fill_uninitialized_memory = False
    errors = []
    with join_world() as world:
        for config in configs:
            if config.resume != "auto":
                wait_for(Path(config.resume))
            try:
                train_in(world, config, StopSignal(), Heartbeat())
                errors.append(None)
            except SpotforgeError as e:
                if not e.seen_by_all:
                    raise
                give_up(config)
                errors.append(str(e))
    return errors


def wait_for(checkpoint):
    """Another world may still be at it."""
    given_up = checkpoint.parents[1] / GIVEN_UP
    while not (checkpoint.exists() or given_up.exists()):
        time.sleep(0.05)


def give_up(config):
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    (Path(config.run.dir) / GIVEN_UP).touch()


def train_in_worlds(configs):
    """{ranks: configurations} -> {ranks: what went wrong in each, or None}; all worlds at once.

    DeepSpeed keeps the process groups of its first world for ever, so each world has processes of
    its own, once: to start them costs more than to train.
    """
    done = queue.SimpleQueue()

    def train(ranks):
        try:
            done.put((ranks, run_distributed(train_each, ranks, configs[ranks])[0]))
        except AssertionError as e:
            for config in configs[ranks]:
                give_up(config)
            done.put((ranks, [str(e)] * len(configs[ranks])))

    for ranks in configs:
        threading.Thread(target=train, args=[ranks], daemon=True).start()
    try:
        return dict(done.get() for _ in configs)
    finally:
        for process in multiprocessing.active_children():  # only where a timeout ends the test
            process.kill()


def run(cases, folder):
    """Trains what the cases need, and compares."""
    write_sources(folder)
    saving, resuming = {}, {}  # run directory -> (ranks, configuration)
    for case in cases:
        composed = {}
        for layout in {layout for pair in case.pairs for layout in pair}:
            chosen = [*case.settings, f"stop.steps={case.steps}", *parallel(*layout)]
            composed[layout] = small_config(folder, *chosen)
        for saver, resumer in case.pairs:
            uninterrupted, resumed = dirs(folder, case, saver, resumer)
            config = copy.deepcopy(composed[saver])
            config.run.dir = str(uninterrupted)
            config.checkpoint.interval, config.checkpoint.keep_last = str(SAVED_AT), 100
            saving[uninterrupted] = (saver.ranks, config)
            config = copy.deepcopy(composed[resumer])
            config.run.dir, config.checkpoint.interval = str(resumed), "end"
            config.resume = str(uninterrupted / "checkpoints" / step_name(SAVED_AT))
            resuming[resumed] = (resumer.ranks, config)
    worlds = {}
    for ranks, config in [*saving.values(), *resuming.values()]:
        worlds.setdefault(ranks, []).append(config)
    errors = {}
    for ranks, what in train_in_worlds(worlds).items():
        for config, error in zip(worlds[ranks], what, strict=True):
            errors[Path(config.run.dir)] = error
    return [
        compare(case, saver, resumer, *dirs(folder, case, saver, resumer), errors)
        for case in cases
        for saver, resumer in case.pairs
    ]


def dirs(folder, case, saver, resumer):
    """Of the uninterrupted run, and of the one that goes on from its checkpoint."""
    here = folder / case.name.replace(" ", "-")
    return here / str(saver), here / f"{saver}--{resumer}"


# -- Comparing --------------------------------------------------------------------------------


def compare(case, saver, resumer, uninterrupted, resumed, errors):
    pair = Pair(case.name, saver, resumer)
    expected = read_records(uninterrupted / "metrics.jsonl")[SAVED_AT:]
    found = read_records(resumed / "metrics.jsonl")
    wanted = list(range(SAVED_AT + 1, case.steps + 1))
    for records, run_dir in ((expected, uninterrupted), (found, resumed)):
        steps = [r["step"] for r in records]
        if steps != wanted:  # what a run wrote counts, even if its world was lost later
            error = errors[run_dir] or "no error"
            pair.faults.append(f"{run_dir.name} has steps {steps}: {error}")
    if pair.faults:
        return pair
    for before, after in zip(expected, found, strict=True):
        loss = abs(after["loss"] - before["loss"])
        norm = abs(after["grad_norm"] / before["grad_norm"] - 1)
        pair.loss_difference = max(pair.loss_difference, loss)
        pair.norm_difference = max(pair.norm_difference, norm)
        for key in ("lr", "num_tokens"):
            if after[key] != before[key]:
                pair.faults.append(f"{key} of step {after['step']} is another")
    keys = ("loss", "grad_norm", "validation_loss")
    pair.bit_for_bit = all(
        before.get(key) == after.get(key)
        for before, after in zip(expected, found, strict=True)
        for key in keys
    ) and same_tensors(
        *(d / "checkpoints" / step_name(case.steps) for d in (uninterrupted, resumed))
    )
    if not pair.loss_difference <= LOSS_TOLERANCE:
        pair.faults.append(f"a loss differs by {pair.loss_difference:.2g}")
    if not pair.norm_difference <= NORM_TOLERANCE:
        pair.faults.append(f"a gradient norm differs by {pair.norm_difference:.2g} of itself")
    if saver == resumer and not pair.bit_for_bit:
        pair.faults.append("not bit for bit")
    return pair


def same_tensors(*checkpoints):
    """Whether two checkpoints hold the same bits: weights and moments."""
    tensors = [{n: torch.empty(s) for n, s in tensor_shapes(c).items()} for c in checkpoints]
    for checkpoint, empty in zip(checkpoints, tensors, strict=True):
        Located(checkpoint).read(empty)
    first, second = tensors
    return first.keys() == second.keys() and all(torch.equal(first[n], second[n]) for n in first)


def assert_passed(pairs):
    """Fails with every pair that does."""
    failed = [str(pair) for pair in pairs if pair.faults]
    assert not failed, "\n".join([f"{len(failed)} of {len(pairs)} pairs failed:", *failed])


# -- Tests ------------------------------------------------------------------------------------


def test_the_subset_covers():
    savers, resumers = zip(*COVERING, strict=True)
    family = {name: name.rstrip("123").replace("hsdp", "fsdp") for name in STRATEGIES}
    for side in (savers, resumers):
        assert {layout.strategy for layout in side} == set(STRATEGIES)
        assert {layout.ranks for layout in side} == {1, 2, 3, 4}
    seen = {(family[a.strategy], family[b.strategy]) for a, b in COVERING}
    assert seen == set(product(family.values(), repeat=2))


@pytest.fixture(scope="module")
def subset(tmp_path_factory):
    """{case: pairs} of the default test run."""
    cases = [case_of(COVERING), UNEVEN, DROPOUT]
    pairs = run(cases, tmp_path_factory.mktemp("subset"))
    return {case.name: [pair for pair in pairs if pair.case == case.name] for case in cases}


@pytest.mark.long
@pytest.mark.timeout(900)  # whichever comes first trains for all
@pytest.mark.parametrize("name", ["global batch 12", "global batch 13"])
def test_any_strategy_on_any_ranks_resumes_any_other(subset, name):
    assert_passed(subset[name])


@pytest.mark.long
@pytest.mark.timeout(900)
def test_dropout_is_repeated(subset):
    """Its generators are seeded by step and rank, so nothing of them needs saving."""
    assert_passed([pair for pair in subset["dropout"] if pair.saver == pair.resumer])
    [other] = [pair for pair in subset["dropout"] if pair.saver != pair.resumer]
    assert other.loss_difference > 1e-3, "other ranks draw other masks: or was dropout off?"


@pytest.mark.matrix
@pytest.mark.timeout(3 * 3600)
def test_every_pair(tmp_path):
    began = time.monotonic()
    pairs = run([case_of(list(product(ALL, repeat=2)))], tmp_path)
    RESULT.write_text(json.dumps(summary(pairs, time.monotonic() - began), indent=1) + "\n")
    assert_passed(pairs)


def summary(pairs, duration_s):
    worst = {a: dict.fromkeys(STRATEGIES, 0.0) for a in STRATEGIES}
    for pair in pairs:
        row, column = worst[pair.saver.strategy], pair.resumer.strategy
        row[column] = max(row[column], pair.loss_difference)
    same = [pair for pair in pairs if pair.saver == pair.resumer]
    others = [pair for pair in pairs if pair.saver != pair.resumer]
    return {
        "command": "make test-matrix",
        "config": {
            "overrides": [*SETTINGS, *case_of([]).settings],
            "saved_at_step": SAVED_AT,
            "steps_compared": THEN,
            "loss_tolerance": LOSS_TOLERANCE,
            "grad_norm_tolerance_relative": NORM_TOLERANCE,
        },
        "environment": describe_environment(),
        "duration_s": round(duration_s, 1),
        "pairs": len(pairs),
        "passed": sum(not pair.faults for pair in pairs),
        "failed": [str(pair) for pair in pairs if pair.faults],
        "bit_for_bit": {
            "same_layout": f"{sum(pair.bit_for_bit for pair in same)} of {len(same)}",
            "other_layout": f"{sum(pair.bit_for_bit for pair in others)} of {len(others)}",
        },
        "largest_loss_difference": max(pair.loss_difference for pair in pairs),
        "largest_grad_norm_difference_relative": max(pair.norm_difference for pair in pairs),
        "largest_loss_difference_by_saver_and_resumer": worst,
    }
