"""What a machine tells of its ranks."""

import sys
import time

import pytest

from core.clock import VARIABLE
from launch.elastic.gang import Gang
from launch.elastic.protocol import Start
from tests.launch.elastic.conftest import wait_until

FAILS = """
import os, pathlib
folder = pathlib.Path(os.environ["SPOTFORGE_RANK_DIR"])
(folder / "error.txt").write_text(os.environ["%s"])
raise SystemExit(1)
"""


@pytest.mark.parametrize("ahead_s", [0, 3600, -3600])
def test_a_clock_that_is_wrong_does_not_change_which_rank_failed_first(
    tmp_path, monkeypatch, ahead_s
):
    began, now = time.monotonic(), time.time
    monkeypatch.setattr("launch.elastic.gang.time.time", lambda: now() + ahead_s)
    start = Start(1, 0, 0, 1, 1, "127.0.0.1", 29500, time=1.5e9)
    gang = Gang([sys.executable, "-E", "-S", "-c", FAILS % VARIABLE], start, tmp_path)
    try:
        (rank,) = wait_until(
            lambda: [rank for rank in gang.status() if rank.exit is not None],
            lambda: "it still runs",
        )
        # To the resolution of a file's time
        assert began - 0.1 <= rank.ended_at <= time.monotonic()
        assert 1.5e9 <= float(rank.error) + time.monotonic() < 1.5e9 + 3600
    finally:
        gang.close()
