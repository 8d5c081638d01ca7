"""Measures the decoding speed of the candidates of `recipe=auto target=cpu` beside the parent's.

    python -m benchmarks.bench_decode --model DIR --text FILE [FILE ...]

The goal is an artifact that decodes twice as fast as the float32 parent on a CPU. Candidates for
OpenVINO are included if SPOTFORGE_OPENVINO_PYTHON names an environment (`make test-openvino` makes
one). Prints the command's own table and writes `benchmarks/results/decode.json`.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

from benchmarks.bench_compression import copy_text
from core.process.python import environment, python
from core.settings.options import OptionParser
from monitoring.environment import describe_environment

RESULT = Path("benchmarks/results/decode.json")


def main() -> None:
    """Runs the command line."""
    parser = OptionParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="files of text")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        copy_text(options.text, folder)
        command = python("-m", "compression", f"model={options.model}", "recipe=auto")
        command += ["target=cpu", "data=text", f"data.path={folder / 'text'}"]
        command += ["data.max_seq_len=512", "data.validation_fraction=0.2"]
        # A busy machine falsifies timings, so the load goes into the result.
        load = os.getloadavg()
        subprocess.run([*command, f"out={folder / 'out'}"], check=True, env=environment())
        found = json.loads((folder / "out" / "auto.json").read_text())
    rows = {}
    for one in found["candidates"]:
        report = one.pop("report")
        if report is not None:
            one |= {key: report[key] for key in ("weight_bytes", "speed", "evaluation")}
            parent, child = (report["speed"][who] for who in ("parent", "child"))
            ratio = child["decode_tokens_per_s"] / parent["decode_tokens_per_s"]
            one["decode_ratio"] = round(ratio, 2)
        rows[f"{one.pop('recipe')} {one.pop('target')}"] = one
    result = {
        "environment": describe_environment(),
        "load_average": load,
        "picked": found["picked"],
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
