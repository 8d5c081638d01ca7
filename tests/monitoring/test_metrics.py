import io
import json
import os
import subprocess
import sys
import time

import pytest
from rich.console import Console

from core.errors import MissingExtraError
from monitoring.config import MonitoringConfig, WandbConfig, WandbMode
from monitoring.console import BarConsole, PlainConsole
from monitoring.jsonl import read_records
from monitoring.metrics import MetricLogger


def open_logger(run_dir, first_step=0, total_steps=100, **cfg):
    return MetricLogger(MonitoringConfig(**cfg), run_dir, "demo", total_steps, first_step, {})


def status(run_dir):
    return json.loads((run_dir / "status.json").read_text())["status"]


def test_a_resumed_run_logs_every_step_once_and_goes_on_counting_time(tmp_path, capsys):
    with open_logger(tmp_path) as logger:
        for step in (10, 20, 30):
            logger.log({"step": step, "elapsed_s": step * 1.5})
            logger.sample(step, "a", "b")
    began_s = time.monotonic()
    with open_logger(tmp_path, first_step=20) as logger:
        logger.log({"step": 30})
        logger.log({"step": 40})
    took_s = time.monotonic() - began_s
    records = read_records(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in records] == [10, 20, 30, 40]
    assert [r.get("resumed") for r in records] == [None, None, True, None]
    assert 30 <= records[2]["elapsed_s"] <= records[3]["elapsed_s"] <= 30 + took_s
    assert [r["step"] for r in read_records(tmp_path / "samples.jsonl")] == [10, 20]
    assert "dropped 1 line(s) after step 20" in capsys.readouterr().out


def test_samples_are_stored_as_they_are_and_printed_without_control_characters(tmp_path, capsys):
    with open_logger(tmp_path) as logger:
        logger.sample(5, "Once [bold]", "a\x1b[31m time\nthe end")
    (sample,) = read_records(tmp_path / "samples.jsonl")
    assert sample == {"step": 5, "prompt": "Once [bold]", "text": "a\x1b[31m time\nthe end"}
    out = capsys.readouterr().out
    assert "sample at step 5" in out and "Once [bold]" in out and "\x1b" not in out


def test_status_tells_how_the_run_ended(tmp_path):
    with open_logger(tmp_path):
        assert status(tmp_path) == "running"
    assert status(tmp_path) == "finished"
    with open_logger(tmp_path) as logger:
        logger.close("stopped")
    assert status(tmp_path) == "stopped"
    with pytest.raises(RuntimeError), open_logger(tmp_path):
        raise RuntimeError
    assert status(tmp_path) == "failed"


def test_plain_lines_away_from_a_terminal(tmp_path, capsys):
    with open_logger(tmp_path) as logger:
        for step in range(1, 21):
            logger.progress(step)
        logger.log(
            {
                "step": 20,
                "loss": 5.43214,
                "lr": 3e-4,
                "grad_norm": 0.714,
                "tokens_per_s": 8123.0,
                "mfu": 0.412,
                "peak_memory_bytes": 3 * 2**30,
                "validation_loss": 5.5,
                "validation_bits_per_byte": 1.25,
            }
        )
    (line,) = capsys.readouterr().out.splitlines()
    assert line.rpartition("  ")[0] == (
        "step 20/100  loss 5.4321  lr 3.0e-04  grad_norm 0.71  8.1k tokens/s  mfu 41.2%"
        "  peak 3.0 GiB  validation_loss 5.5000  bits_per_byte 1.2500"
    )
    assert line.rpartition("  ")[2].startswith("eta ")


def test_remaining_time_counts_from_the_first_step_of_this_start(capsys):
    now = [0.0]
    console = PlainConsole(100, 40, clock=lambda: now[0])
    now[0] = 60.0  # compiling is not a step
    console.progress(41, None, None)
    now[0] = 69.0
    console.write({"step": 50})
    console.write({"step": 100})
    assert capsys.readouterr().out == "step 50/100  eta 50s\nstep 100/100\n"


def test_a_run_without_a_known_end_has_no_remaining_time(capsys):
    console = PlainConsole(None, 0)
    console.write({"step": 1, "loss": 2.0})
    console.write({"step": 2, "loss": 2.0})
    assert capsys.readouterr().out == "step 1  loss 2.0000\nstep 2  loss 2.0000\n"


def test_bar_on_a_terminal():
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=120)
    bar = BarConsole(terminal, "demo", 100, 0)
    bar.progress(19, None, None)
    bar.write({"step": 20, "loss": 5.0, "tokens_per_s": 8123.0, "validation_loss": 5.5})
    bar.message("saved [step-20]")
    bar.close("finished")
    shown = screen.getvalue()
    for text in ("demo", "step 20/100", "loss 5.0000", "8.1k tokens/s", "eta", "[step-20]"):
        assert text in shown
    assert "step 20  validation_loss 5.5000" in shown


def test_wandb_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, "monitoring.wandb_sink", raising=False)
    with pytest.raises(MissingExtraError, match=r"pip install 'spotforge\[wandb\]'"):
        open_logger(tmp_path, wandb=WandbConfig(mode=WandbMode.offline))
    assert not (tmp_path / "metrics.jsonl").exists()  # refused before anything was touched


_WANDB_RUN = """
import pathlib, sys
from monitoring.config import MonitoringConfig, WandbConfig, WandbMode
from monitoring.metrics import MetricLogger
cfg = MonitoringConfig(wandb=WandbConfig(mode=WandbMode.offline))
first_step = int(sys.argv[2])
with MetricLogger(cfg, pathlib.Path(sys.argv[1]), "demo", 9, first_step, {"a": {"b": 1}}) as logger:
    logger.log({"step": first_step + 1, "loss": 2.0})
    logger.close(sys.argv[3])
"""


def test_wandb_offline_without_a_network_keeps_one_run_id(tmp_path):
    pytest.importorskip("wandb")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    environment |= {"PYTHONPATH": os.getcwd(), "WANDB_BASE_URL": "http://127.0.0.1:9"}
    for first_step, ended in (("0", "finished"), ("5", "stopped"), ("7", "finished")):
        subprocess.run(
            [sys.executable, "-c", _WANDB_RUN, str(tmp_path), first_step, ended],
            env=environment,
            check=True,
            timeout=300,
        )
    run_id = (tmp_path / "wandb_run_id").read_text().strip()
    written = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 3
    assert {path.name for path in written} == {f"run-{run_id}.wandb"}


def test_importing_is_cheap():
    heavy = ("torch", "wandb", "jinja2", "matplotlib", "numpy", "omegaconf")
    code = f"import sys, monitoring.metrics; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
