"""The configuration of a real run that takes a second, composed as a user's would be."""

from tests.words import last_of_each
from trainer.command import TRAINER

# Two sources, packed and masked; accumulation, clipping, warm-up and cosine.
SETTINGS = [
    "data=mixture",
    "data.tokenizer_vocab_size=300",
    "data.max_seq_len=32",
    "data.mask_documents=true",
    "data.validation_fraction=0.2",
    "micro_batch_size=2",
    "deterministic=true",
    "optim.lr=3e-3",
    "optim.max_norm=0.5",
    "schedule=cosine",
    "schedule.warmup_steps=6",
    "log.every_steps=1",
    "evaluation.max_samples=4",
    "export.at_end=false",
    "monitoring.progress=false",
    "monitoring.report=false",
]
LLAMA = [
    "model=tiny",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=4",
    "model.config.num_key_value_heads=2",
]
GPT2_WITH_DROPOUT = [
    "model=gpt2",
    "model.vocab_size=320",
    "model.config.n_embd=32",
    "model.config.n_layer=2",
    "model.config.n_head=4",
    "model.config.n_positions=32",
    "model.config.resid_pdrop=0.1",
    "model.config.embd_pdrop=0.1",
    "model.config.attn_pdrop=0.1",
]
STRATEGIES = ("ddp", "fsdp", "hsdp", "zero1", "zero2", "zero3")


def small_config(folder, *overrides):
    """The configuration of a run on the two sources that `write_sources` leaves in `folder`."""
    sources = (
        f"{{essays: {{kind: text, path: '{folder}/essays', weight: 2}}, "
        f"notes: {{kind: text, path: '{folder}/notes', weight: 1}}}}"
    )
    return TRAINER.compose(last_of_each([*SETTINGS, f"data.sources={sources}", *overrides]))


def parallel(strategy, ranks):
    """The overrides that choose a strategy."""
    if strategy == "hsdp":
        return ["parallel=fsdp", f"parallel.dp_replicate={2 if ranks == 4 else ranks}"]
    if strategy.startswith("zero"):
        return ["parallel=zero", f"parallel.stage={strategy[-1]}"]
    return [f"parallel={strategy}"]


def write_sources(folder):
    """Documents that fill several samples each, and documents of which several fill one."""
    for name in ("essays", "notes"):
        (folder / name).mkdir()
    for i in range(30):
        lines = (f"line {j} of essay {i}: the quick brown fox, {i * j} times\n" for j in range(30))
        (folder / "essays" / f"{i:03d}.txt").write_text("".join(lines))
    for i in range(150):
        note = f"{i} squared is {i * i}\n" * (1 + i % 3)
        (folder / "notes" / f"{i:03d}.txt").write_text(note)
