"""A stage: writes OUT/result from INPUT, and ends as told.

    python stand_in.py OUT [--input PATH] [--ends 33,0] [--text T] [--wait]

`--ends` are the exit codes of its first, second, ... start; the last one stays. OUT.log has a line
a start. Only an end with 0 leaves OUT. `--wait`: it ends with 33 on SIGTERM, and not before.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("out", type=Path)
parser.add_argument("--input", type=Path)
parser.add_argument("--ends", default="0")
parser.add_argument("--text", default="")
parser.add_argument("--wait", action="store_true")
options = parser.parse_args()

options.out.parent.mkdir(parents=True, exist_ok=True)
log = options.out.with_suffix(".log")
num_before = len(log.read_text().splitlines()) if log.exists() else 0
if options.wait:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(33))
with log.open("a") as file:
    file.write("started\n")
if options.wait:
    time.sleep(60)
codes = [int(code) for code in options.ends.split(",")]
code = codes[min(num_before, len(codes) - 1)]
if code == 0:
    options.out.mkdir(exist_ok=True)
    text = (options.input / "result").read_text() if options.input else ""
    (options.out / "result").write_text(text + options.text)
sys.exit(code)
