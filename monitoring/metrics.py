"""The one place that a training run writes its numbers to; rank 0 only.

    MetricLogger.log(record) -> console     a bar or a plain line
                             -> jsonl       metrics.jsonl, one object a logged step
                             -> wandb       when it is switched on

Keys of a record (units in the names; absent when not known):

    step, loss (nats a token), grad_norm, lr, num_tokens (seen since the run began), tokens_per_s,
    mfu (0 to 1), peak_memory_bytes, data_wait_s and step_s (means since the last record),
    checkpoint_blocking_s; distillation_loss, cross_entropy and auxiliary_loss where `loss` is made
    of them;
    validation_loss and validation_bits_per_byte at evaluations.

Added here: elapsed_s (time in training since the run began, without the time between a stop and the
resume) and `resumed: true` on the first record after a resume.
"""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from core.folder import write_file
from monitoring.config import MonitoringConfig, WandbMode
from monitoring.console import build_console
from monitoring.jsonl import JsonlSink, Record, read_records


class Sink(Protocol):
    """Where records go. A new sink is one final class in a file, and a line in `_extra_sinks`."""

    def write(self, record: Record) -> None:
        """Take one logged step."""

    def close(self, exit_status: str) -> None:
        """Flush and let go."""


class MetricLogger:
    """Logs a run to the console, to `metrics.jsonl` and, if asked, to wandb.

    Use it as a context manager: leaving it closes with `finished`, or `failed` after an exception,
    unless `close` was called with another status before.

    Args:
        cfg: Sinks beside the two that are always on.
        run_dir: The run's folder; made when absent.
        run_name: Name shown on the console, in wandb and in the report.
        total_steps: Where the run ends, if that is known.
        first_step: Step of the checkpoint that the run goes on from, 0 for a new run. Records of
            later steps were lost with the machine and are removed, so a step never appears twice.
        settings: The resolved configuration, for wandb. A `num_parameters` in it is shown in the
            report.

    Raises:
        MissingExtraError: wandb is asked for and not installed.
    """

    def __init__(
        self,
        cfg: MonitoringConfig,
        run_dir: Path,
        run_name: str,
        total_steps: int | None,
        first_step: int,
        settings: dict[str, object],
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        extra_sinks = _extra_sinks(cfg, run_dir, run_name, settings)  # first: it can refuse
        metrics = JsonlSink(run_dir / "metrics.jsonl", first_step)
        self._samples = JsonlSink(run_dir / "samples.jsonl", first_step)
        self._console = build_console(run_name, total_steps, first_step, cfg.progress)
        self._sinks: list[Sink] = [metrics, *extra_sinks, self._console]
        self._status_path = run_dir / "status.json"
        self._status: dict[str, object] = {
            "run_name": run_name,
            "total_steps": total_steps,
            "num_parameters": settings.get("num_parameters"),
        }
        self._elapsed_before_s = _elapsed_s(run_dir / "metrics.jsonl")
        self._started = time.monotonic()
        self._resumed = first_step > 0
        self._closed = False
        self._write_status("running")
        if metrics.num_dropped:
            self.message(
                f"metrics.jsonl: dropped {metrics.num_dropped} line(s) after step {first_step}"
            )

    def log(self, record: dict[str, float | int | str]) -> None:
        """Write one record to every sink.

        Args:
            record: Must have `step`; see the module for the other keys. Plain numbers, no tensors.
        """
        elapsed_s = self._elapsed_before_s + time.monotonic() - self._started
        stamped = {**record, "elapsed_s": record.get("elapsed_s", elapsed_s)}
        if self._resumed:
            stamped["resumed"], self._resumed = True, False
        for sink in self._sinks:
            sink.write(stamped)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Show a generated text and append it to `samples.jsonl`.

        Args:
            step: Step of the weights that wrote it.
            prompt: What the model was given.
            text: The continuation, without the prompt.
        """
        self._samples.write({"step": step, "prompt": prompt, "text": text})
        shown = (prompt + "[...]" + text).replace("\n", "\n  ")
        self.message(f"sample at step {step}:\n  {shown}")

    def message(self, text: str) -> None:
        """Print a line, above the progress bar where there is one."""
        self._console.message(text)

    def progress(
        self, step: int, loss: float | None = None, tokens_per_s: float | None = None
    ) -> None:
        """Advance the bar; for every step, without metrics or waiting for a device.

        Args:
            step: Steps done.
            loss: Mean loss in nats a token, if it is at hand; None keeps the last one on screen.
            tokens_per_s: Rate, if it is at hand.
        """
        self._console.progress(step, loss, tokens_per_s)

    def close(self, exit_status: str) -> None:
        """Close every sink; a second call does nothing.

        Args:
            exit_status: `finished`, `stopped` (start again to go on) or `failed`; kept in
                `status.json`.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._write_status(exit_status)
        finally:  # the disk may be full
            self._samples.close(exit_status)
            for sink in reversed(self._sinks):  # the console first: wandb prints when it ends
                sink.close(exit_status)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close("finished" if kind is None else "failed")

    def _write_status(self, status: str) -> None:
        write_file(self._status_path, json.dumps({"status": status, **self._status}) + "\n")


def _extra_sinks(
    cfg: MonitoringConfig, run_dir: Path, run_name: str, settings: dict[str, object]
) -> list[Sink]:
    if cfg.wandb.mode is WandbMode.disabled:
        return []
    from monitoring.wandb_sink import WandbSink  # wandb is an extra, and slow to import

    return [WandbSink(cfg.wandb, run_dir, run_name, settings)]


def _elapsed_s(path: Path) -> float:
    """Seconds that the kept records of an earlier start took."""
    seconds = [record.get("elapsed_s") for record in read_records(path)]
    return max((float(s) for s in seconds if isinstance(s, int | float)), default=0.0)
