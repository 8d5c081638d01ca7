"""Measures tokens per second of our loop, a plain PyTorch loop and the Hugging Face Trainer.

    python -m benchmarks.bench_training                    CPU: one process, all cores
    python -m benchmarks.bench_training --rounds 5 --out benchmarks/results/training.json

Every contestant trains the same Llama on the same number of tokens per step with AdamW, clipping
and float32, in a process of its own. They take turns in every round, because the speed of a shared
machine drifts: compare ratios within a round, not tokens per second across days.

    plain       the loop of a PyTorch tutorial: transformers' logits, cross_entropy, AdamW(fused)
    tuned       the same loop with our loss, and with malloc keeping freed memory
    hf_trainer  transformers.Trainer
    spotforge   python -m trainer, with its data pipeline, metrics and progress
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from core.process.python import environment, python
from core.settings.options import OptionParser

MODEL = {
    "hidden_size": 512,
    "intermediate_size": 1376,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
VOCAB_SIZE, SEQ_LEN, BATCH, LR, MAX_NORM = 8192, 512, 4, 3e-4, 1.0
WARMUP_STEPS = 5


def train_plain(steps: int, tuned: bool) -> float:
    """Returns the tokens per second of a minimal loop."""
    import torch
    import torch.nn.functional as F

    from trainer.cpu import keep_freed_memory
    from trainer.objective import NextTokenLoss

    if tuned:
        keep_freed_memory()
    model = _model()
    loss_module = NextTokenLoss(model, fused=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    began = 0.0
    for step, tokens in enumerate(_batches(WARMUP_STEPS + steps)):
        if step == WARMUP_STEPS:
            # The first steps are excluded: they allocate memory and choose kernels.
            _synchronize()
            began = time.perf_counter()
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        if tuned:
            loss = loss_module(inputs, targets) / targets.numel()
        else:
            logits = model(input_ids=inputs).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
    _synchronize()
    return steps * BATCH * SEQ_LEN / (time.perf_counter() - began)


def train_hf_trainer(steps: int) -> float:
    """Returns the tokens per second of `transformers.Trainer` with defaults except the batch."""
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Clock(TrainerCallback):
        began = 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == WARMUP_STEPS:
                _synchronize()
                self.began = time.perf_counter()

    # Labels are the inputs, since transformers shifts them by one itself.
    rows = [
        {"input_ids": row[:-1], "labels": row[:-1]}
        for batch in _batches(WARMUP_STEPS + steps)
        for row in batch.cpu()
    ]
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(
            model=_model(),
            args=TrainingArguments(
                folder,
                max_steps=WARMUP_STEPS + steps,
                per_device_train_batch_size=BATCH,
                learning_rate=LR,
                max_grad_norm=MAX_NORM,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                use_cpu=not torch.cuda.is_available(),
            ),
            train_dataset=rows,
            callbacks=[clock],
        ).train()
        _synchronize()
    seconds: float = time.perf_counter() - clock.began
    return steps * BATCH * SEQ_LEN / seconds


def train_spotforge(steps: int) -> float:
    """Returns the tokens per second that `python -m trainer` reports, without the first steps."""
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            "data=stdlib",
            f"data.tokenizer_vocab_size={VOCAB_SIZE}",
            f"data.max_seq_len={SEQ_LEN}",
            f"model.vocab_size={VOCAB_SIZE}",
            *(f"model.config.{key}={value}" for key, value in MODEL.items()),
            f"global_batch_size={BATCH}",
            f"micro_batch_size={BATCH}",
            f"stop.steps={WARMUP_STEPS + steps}",
            # The first line of metrics is the warm-up, and nothing else.
            f"log.every_steps={WARMUP_STEPS}",
            "schedule.warmup_steps=2",
            # What the others do not do is left out, or kept short.
            "evaluation.max_samples=4",
            "export.at_end=false",
            "monitoring.report=false",
            "nproc=1",
            f"run.dir={folder}",
        ]
        subprocess.run(
            python("-m", "trainer", *overrides),
            check=True,
            stdout=subprocess.DEVNULL,
            env=environment(),
        )
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        # The first record covers the warm-up steps.
        seconds = sum(json.loads(line)["step_s"] * WARMUP_STEPS for line in lines[1:])
        num_tokens = (len(lines) - 1) * WARMUP_STEPS * BATCH * SEQ_LEN
        return num_tokens / float(seconds)


CONTESTANTS: dict[str, Callable[[int], float]] = {
    "plain": lambda steps: train_plain(steps, tuned=False),
    "tuned": lambda steps: train_plain(steps, tuned=True),
    "hf_trainer": train_hf_trainer,
    "spotforge": train_spotforge,
}


def main() -> None:
    """Runs all contestants, prints a table and writes the result file."""
    parser = OptionParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="measured steps; a multiple of 5")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.json"))
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contestant:
        tokens_per_s = CONTESTANTS[arguments.contestant](arguments.steps)
        # Our trainer is a child process, the others are this one.
        used = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        print(json.dumps([tokens_per_s, max(u.ru_maxrss for u in used) * 1024]))
        return
    train_spotforge(WARMUP_STEPS)  # prepares the data, so that no round includes it
    results: dict[str, list[list[float]]] = {name: [] for name in CONTESTANTS}
    for number in range(arguments.rounds):
        for name, measured in results.items():
            measured.append(_measure(name, arguments.steps))
            print(f"round {number + 1}  {name:<12}{measured[-1][0]:8.0f} tokens/s", flush=True)
    _write(results, arguments)


def _measure(name: str, steps: int) -> list[float]:
    # In a process of its own, so that memory and threads of one do not affect the next.
    command = python("-m", "benchmarks.bench_training", "--contestant", name)
    output = subprocess.run(
        [*command, "--steps", str(steps)],
        check=True,
        capture_output=True,
        text=True,
        env=environment(),
    ).stdout
    measured: list[float] = json.loads(output.splitlines()[-1])
    return measured


def _write(results: dict[str, list[list[float]]], arguments: argparse.Namespace) -> None:
    from monitoring.environment import describe_environment

    plain = [tokens_per_s for tokens_per_s, _ in results["plain"]]
    table = {}
    for name, measured in results.items():
        rates = [tokens_per_s for tokens_per_s, _ in measured]
        table[name] = {
            "tokens_per_s_median": statistics.median(rates),
            # Ratios within a round, since the speed of the machine drifts between rounds.
            "ratio_to_plain_median": statistics.median(
                rate / base for rate, base in zip(rates, plain, strict=True)
            ),
            "ratio_to_tuned_median": statistics.median(
                rate / base for rate, (base, _) in zip(rates, results["tuned"], strict=True)
            ),
            "peak_memory_bytes": max(memory for _, memory in measured),
            "tokens_per_s_rounds": rates,
        }
        print(
            f"{name:<12}{table[name]['tokens_per_s_median']:8.0f} tokens/s  "
            f"x{table[name]['ratio_to_plain_median']:.3f} of plain  "
            f"x{table[name]['ratio_to_tuned_median']:.3f} of tuned"
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": f"python -m benchmarks.bench_training --rounds {arguments.rounds} "
        f"--steps {arguments.steps}",
        "config": {"model": MODEL, "vocab_size": VOCAB_SIZE, "seq_len": SEQ_LEN, "batch": BATCH},
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "environment": describe_environment(),
        "results": table,
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


def _model() -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=VOCAB_SIZE, **MODEL)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").to(device)


def _batches(count: int) -> Iterator[Any]:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        shape = (BATCH, SEQ_LEN + 1)
        yield torch.randint(0, VOCAB_SIZE, shape, generator=generator).to(device)


def _synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
