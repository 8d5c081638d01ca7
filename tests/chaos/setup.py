"""What the runs of the suite train, on what, and how a row of the report looks."""

from dataclasses import dataclass, field

GLOBAL_BATCH = 8
INTERVAL = 3
BASE = [
    "data=text",
    "data.tokenizer_vocab_size=300",
    "data.max_seq_len=32",
    "data.validation_fraction=0.1",
    f"global_batch_size={GLOBAL_BATCH}",
    "micro_batch_size=2",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=2",
    "optim.lr=3e-4",
    "schedule=constant",
    "schedule.warmup_steps=4",
    "stop.steps=1000000",
    "log.every_steps=1",
    "evaluation.max_samples=32",
    f"checkpoint.interval={INTERVAL}",
    "checkpoint.keep_last=3",
    "export.at_end=false",
    "monitoring.progress=false",
    "monitoring.report=false",
]
STRATEGIES = {
    "ddp": ["parallel=ddp"],
    "fsdp": ["parallel=fsdp"],
    "zero2": ["parallel=zero", "parallel.stage=2"],
    "zero3": ["parallel=zero", "parallel.stage=3"],
}


@dataclass(frozen=True)
class Layout:
    """How a start of a run is spread out: a name of `STRATEGIES`, and how many ranks."""

    strategy: str
    world_size: int

    def __str__(self):
        return f"{self.strategy} x {self.world_size}"


@dataclass
class Row:
    """One injection, and what came of it.

    Attributes:
        kind: kill, stop, damage, disk, two_jobs or round.
        moment: Where it struck.
        source: What it was: SIGKILL, notice file, flipped bit, ...
        run: Which long run it hit.
        layout: Strategy and ranks at that time.
        rank: Which was hit; None for the files.
        step: Last completed step, by metrics.jsonl.
        checkpoint: Newest valid checkpoint afterwards, by our own count.
        resumed: Where the next start went on.
        lost_steps: Completed steps to be done again.
        seconds: From the blow to the end of all ranks.
        problems: Promises that it broke.
    """

    kind: str
    moment: str
    source: str
    run: str
    layout: str
    rank: int | None = None
    step: int = 0
    checkpoint: int = 0
    resumed: int | None = None
    lost_steps: int = 0
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)


def write_corpus(folder):
    """Text that takes about a second to prepare."""
    folder.mkdir(parents=True)
    for i in range(300):
        lines = (f"line {j} of file {i}: the quick brown fox, {i * j} times\n" for j in range(120))
        (folder / f"{i:03d}.txt").write_text("".join(lines))
    return folder
