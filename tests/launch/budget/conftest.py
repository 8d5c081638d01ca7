"""Runs real guards, around a stand-in for the trainer or the trainer itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STAND_IN = Path(__file__).with_name("stand_in.py")


class Site:
    """A job's folders."""

    def __init__(self, folder):
        self.folder, self.ledger, self.run_dir = folder, folder / "ledger", folder / "run"

    def guard(self, *options, command=None, env=None, **popen):
        """A guard that runs: by default a tick is 0.1 s, and a second costs a dollar."""
        known = {k: v for k, v in os.environ.items() if not k.startswith(("SKYPILOT", "SPOTFORGE"))}
        known["SPOTFORGE_CACHE"] = os.environ["SPOTFORGE_CACHE"]
        words = ["--ledger", self.ledger, "--run-dir", self.run_dir]
        if "--tick-s" not in options:
            words += ["--tick-s", "0.1"]
        if "--usd-per-h" not in options and "SPOTFORGE_PRICES" not in (env or {}):
            words += ["--usd-per-h", "3600"]
        command = command or self.stand_in()
        return subprocess.Popen(
            [sys.executable, "-W", "error", "-m", "launch", "guard"]
            + [str(word) for word in [*words, *options, "--", *command]],
            cwd=ROOT,
            env={**known, **(env or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **popen,
        )

    def stand_in(self, *words):
        return [sys.executable, "-E", "-S", STAND_IN, self.run_dir, *words]

    def entries(self, kind=None):
        """Of all starts, in order."""
        lines = [
            json.loads(line)
            for path in sorted(self.ledger.glob("*.jsonl"))
            for line in path.read_text().splitlines()
        ]
        return [line for line in lines if kind in (None, line["entry"])]


def end(process, timeout_s=300):
    """Its exit code, and what it said."""
    out, err = process.communicate(timeout=timeout_s)
    return process.returncode, err


@pytest.fixture
def site(tmp_path):
    return Site(tmp_path)
