"""Measures how much of the loss by structured pruning is recovered by healing, on held-out text.

    python -m benchmarks.bench_healing --model DIR --text FILE [FILE ...]

A quarter of the parameters is pruned: without the refit, with it, and with healing by distillation
from the parent on the calibration text. Text and model of the published figures are those of
`bench_compression`. Prints a table and writes `benchmarks/results/healing.json`.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.bench_compression import copy_text, measure, table
from core.settings.options import OptionParser
from monitoring.environment import describe_environment

RESULT = Path("benchmarks/results/healing.json")


def main() -> None:
    """Runs the command line."""
    parser = OptionParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files of text")
    parser.add_argument("--tokens", type=int, default=131_072, help="tokens to heal on")
    parser.add_argument("--lr", type=float, default=3e-4, help="largest learning rate of healing")
    parser.add_argument("--calibration", type=int, default=32, help="samples of 512 tokens")
    parser.add_argument("--evaluation", type=int, default=32, help="samples of 512 tokens")
    options = parser.parse_args()
    heal = [
        "recipe=[prune_structured,heal]",
        f"recipe.heal.tokens={options.tokens}",
        f"recipe.heal.lr={options.lr}",
        # Few tokens make few steps: smaller batches make more of them.
        "recipe.heal.global_batch_size=4",
    ]
    recipes = {
        "pruned 25%, no refit": ["recipe=prune_structured", "recipe.prune_structured.refit=false"],
        "pruned 25%": ["recipe=prune_structured"],
        "pruned 25%, healed": heal,
    }
    rows: dict[str, Any] = {}
    result: dict[str, Any] = {
        "environment": describe_environment(),
        "heal_tokens": options.tokens,
        "heal_lr": options.lr,
        "calibration_samples": options.calibration,
        "evaluation_samples": options.evaluation,
        "max_seq_len": 512,
        "rows": rows,
    }
    with tempfile.TemporaryDirectory() as name:
        copy_text(options.text, Path(name))
        for row, words in recipes.items():
            started = time.monotonic()
            rows[row] = measure(options, Path(name), words)
            rows[row]["wall_s"] = round(time.monotonic() - started, 1)
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
            print(table({row: rows[row]}).splitlines()[-1], flush=True)
    result["share of the lost loss that healing brings back"] = round(recovered(rows), 4)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))
    print(f"of the loss that pruning cost, healing brings back {recovered(rows):.0%}")


def recovered(rows: dict[str, Any]) -> float:
    """Returns the share of the loss by pruning that healing recovers, in log-perplexity."""
    pruned, healed = rows["pruned 25%"], rows["pruned 25%, healed"]
    # Differences of log-perplexity, since those are differences of the loss that is trained.
    lost = math.log(pruned["child_perplexity"] / pruned["parent_perplexity"])
    left = math.log(healed["child_perplexity"] / healed["parent_perplexity"])
    return 1 - left / lost


if __name__ == "__main__":
    main()
