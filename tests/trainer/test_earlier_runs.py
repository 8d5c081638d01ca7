"""A run begun with an earlier release goes on as that release would have gone on.

`tests/golden/run-of-09cbf22` is three steps of the run below at that commit: a mixture with masked
documents, and a model with a buffer that was not saved. The losses are those of steps 4 to 6 there.
"""

import json
import shutil
from pathlib import Path

import pytest

RUN = Path(__file__).parents[1] / "golden/run-of-09cbf22"
LOSSES = [5.0996820359002974, 4.877369600183823, 4.703548598574452]
WORDS = (
    "river stone lamp green cloud seven walk under paper bread north wheel glass quiet seed".split()
)
MODEL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "kv_lora_rank": 8,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "max_position_embeddings": 64,
}
SETTINGS = [
    "data=mixture",
    "data.tokenizer_vocab_size=280",
    "data.max_seq_len=32",
    "data.validation_fraction=0.2",
    "data.mask_documents=true",
    "global_batch_size=8",
    "micro_batch_size=4",
    "schedule=constant",
    "schedule.warmup_steps=0",
    "stop.steps=6",
    "log.every_steps=1",
    "evaluation.max_samples=4",
    "optim.lr=1e-2",
    "model=tiny",
    "model.model_type=deepseek_v3",
    *(f"++model.config.{name}={value}" for name, value in MODEL.items()),
    "checkpoint.interval=end",
    "export.at_end=false",
    "monitoring.report=false",
]


def write_texts(folder):
    for name, number in (("tales", 24), ("notes", 16), ("lists", 8)):
        (folder / name).mkdir(parents=True)
        for i in range(number):
            words = (WORDS[(7 * i + 3 * j * j + i * j) % len(WORDS)] for j in range(30))
            (folder / name / f"{i:02d}.txt").write_text(" ".join(words) + ".\n")


def test_a_run_of_an_earlier_release_goes_on_as_it_began(trainer, tmp_path):
    write_texts(tmp_path / "text")
    run_dir = tmp_path / "run"
    shutil.copytree(RUN, run_dir)
    sources = ", ".join(
        f"{name}: {{kind: text, path: '{tmp_path}/text/{name}', weight: {weight}}}"
        for name, weight in (("tales", 0.6), ("notes", 0.3), ("lists", 0.1))
    )
    result = trainer(*SETTINGS, f"+data.sources={{{sources}}}", f"run.dir={run_dir}")
    assert result.code == 0, result.err
    assert "resuming after step 3" in result.out
    # What the checkpoint does not say is said.
    assert "e_score_correction_bias" in result.out and "order of samples" in result.out
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert [r["loss"] for r in records[3:]] == pytest.approx(LOSSES, rel=1e-5)
