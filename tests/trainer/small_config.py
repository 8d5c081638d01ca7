"""Real runs that take a second: composed as a user would, and trained by ranks that stay."""

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from trainer.cli import CONFIG_DIR
from trainer.schemas import register_schemas

LLAMA = [
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
# On every strategy's name, the overrides that choose it on a number of ranks.
STRATEGIES = {
    "ddp": lambda ranks: ["parallel=ddp"],
    "fsdp": lambda ranks: ["parallel=fsdp"],
    "hsdp": lambda ranks: ["parallel=fsdp", f"parallel.dp_replicate={2 if ranks == 4 else ranks}"],
    "zero1": lambda ranks: ["parallel=zero", "parallel.stage=1"],
    "zero2": lambda ranks: ["parallel=zero", "parallel.stage=2"],
    "zero3": lambda ranks: ["parallel=zero", "parallel.stage=3"],
}


def write_notes(folder):
    """Short documents, several to a sample of 32 tokens, beside the long ones of `corpus`."""
    folder.mkdir()
    for i in range(150):
        (folder / f"{i:03d}.txt").write_text(f"note {i}: {i * i} is the square of {i}\n" * (1 + i % 3))
    return folder


def small_config(run_dir, corpus, notes, *overrides, model=LLAMA):
    """A mixture of two sources, packed and masked; clipping, accumulation, warm-up and cosine."""
    register_schemas()
    given = [
        *model,
        "data=mixture",
        f"+data.sources={{corpus: {{kind: text, path: '{corpus}', weight: 2}}, "
        f"notes: {{kind: text, path: '{notes}', weight: 1}}}}",
        "data.tokenizer_vocab_size=300",
        "data.max_seq_len=32",
        "data.mask_documents=true",
        "data.validation_fraction=0.2",
        "global_batch_size=12",
        "micro_batch_size=2",
        "deterministic=true",
        "stop.steps=24",
        "optim.lr=3e-3",
        "optim.max_norm=0.5",
        "schedule.warmup_steps=6",
        "log.every_steps=1",
        "evaluation.max_samples=4",
        "export.at_end=false",
        "monitoring.progress=false",
        "monitoring.report=false",
        f"run.dir={run_dir}",
    ]
    with initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3"):
        return OmegaConf.to_object(compose("trainer", [*given, *overrides]))
