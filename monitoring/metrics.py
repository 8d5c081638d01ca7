"""Logging of a training run's numbers to all of their destinations; on rank 0 only.

    MetricLogger.log(record) -> console     a bar or a plain line
                             -> jsonl       metrics.jsonl, one object a logged step
                                                      -> wandb       if enabled

Keys of a record (units in the names; unknown ones are absent):

    step, loss (nats per token), grad_norm, lr, num_tokens (since the run began), tokens_per_s,
    mfu (0 to 1), peak_memory_bytes, data_wait_s and step_s (means since the last record),
    checkpoint_blocking_s; distillation_loss, cross_entropy and auxiliary_loss if `loss` is a sum
    of them;
    validation_loss and validation_bits_per_byte at evaluations.

The logger adds elapsed_s (training time since the run began, without the time between a stop and
the resume) and `resumed: true` on the first record after a resume.
"""

import json
import time
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from core import layout
from core.folder import write_file
from monitoring.config import MonitoringConfig, WandbMode
from monitoring.console import build_console
from monitoring.jsonl import JsonlSink, Record, read_records


class Sink(Protocol):
    """Receives records. A new sink is one final class in a file, and a line in `_extra_sinks`."""

    def write(self, record: Record) -> None:
        """Takes one logged step."""

    def close(self, exit_status: str) -> None:
        """Flushes and releases everything."""


class MetricLogger:
    """Logs a run to the console, to `metrics.jsonl` and, if asked, to wandb.

    Use it as a context manager: on exit it closes with `finished`, or with `failed` after an
    exception, unless `close` was called with another status before.

    Args:
        cfg: Settings of the sinks beside the two that are always on.
        run_dir: Directory of the run; created if missing.
        run_name: Name shown on the console, in wandb and in the report.
        total_steps: Last step of the run; None if it is not known.
        first_step: Step of the checkpoint from which the run resumes, 0 for a new run. Records of
            later steps are removed, because those steps are repeated: a step never appears twice.
        settings: Resolved configuration, for wandb. Its `num_parameters`, if any, is shown in the
            report.

    Raises:
        MissingExtraError: wandb is enabled but not installed.
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
        # The extra sinks come first: they may refuse, and then no file has been touched yet.
        extra_sinks = _extra_sinks(cfg, run_dir, run_name, settings)
        metrics = JsonlSink(run_dir / layout.METRICS, first_step)
        self._samples = JsonlSink(run_dir / layout.SAMPLES, first_step)
        self._console = build_console(run_name, total_steps, first_step, cfg.progress)
        self._sinks: list[Sink] = [metrics, *extra_sinks, self._console]
        self._status_path = run_dir / layout.STATUS
        self._status: dict[str, object] = {
            "run_name": run_name,
            "total_steps": total_steps,
            "num_parameters": settings.get("num_parameters"),
        }
        self._elapsed_before_s = _elapsed_s(run_dir / layout.METRICS)
        self._started = time.monotonic()
        self._resumed = first_step > 0
        self._closed = False
        self._write_status("running")
        if metrics.num_dropped:
            self.message(
                f"metrics.jsonl: dropped {metrics.num_dropped} line(s) after step {first_step}"
            )

    def log(self, record: dict[str, float | int | str]) -> None:
        """Writes one record to every sink.

        Args:
            record: Plain numbers, not tensors, by the keys that the module lists; `step` is
                mandatory.
        """
        elapsed_s = self._elapsed_before_s + time.monotonic() - self._started
        stamped = {**record, "elapsed_s": record.get("elapsed_s", elapsed_s)}
        if self._resumed:
            stamped["resumed"], self._resumed = True, False
        for sink in self._sinks:
            sink.write(stamped)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Shows a generated text and appends it to `samples.jsonl`.

        Args:
            step: Step of the weights that generated the text.
            prompt: Prompt that the model was given.
            text: Continuation, without the prompt.
        """
        self._samples.write({"step": step, "prompt": prompt, "text": text})
        shown = (prompt + "[...]" + text).replace("\n", "\n  ")
        self.message(f"sample at step {step}:\n  {shown}")

    def message(self, text: str) -> None:
        """Prints a line, above the progress bar if there is one."""
        self._console.message(text)

    def progress(
        self, step: int, loss: float | None = None, tokens_per_s: float | None = None
    ) -> None:
        """Advances the bar; cheap enough for every step, as it never waits for a device.

        Args:
            step: Number of steps done.
            loss: Mean loss in nats per token, if available; None keeps the last one on screen.
            tokens_per_s: Throughput, if available; None keeps the last one on screen.
        """
        self._console.progress(step, loss, tokens_per_s)

    def close(self, exit_status: str) -> None:
        """Closes every sink; a second call does nothing.

        Args:
            exit_status: Status to store in `status.json`: `finished`, `stopped` (can be resumed) or
                `failed`.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self._write_status(exit_status)
        finally:  # writing the status fails on a full disk, and the sinks must close even so
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
    """Returns the training time, in seconds, up to the last record that was kept."""
    seconds = [record.get("elapsed_s") for record in read_records(path)]
    return max((float(s) for s in seconds if isinstance(s, int | float)), default=0.0)
