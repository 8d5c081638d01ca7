"""Reports a run: files in the run directory and lines on the console, from rank 0."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from transformers import PreTrainedModel

from core import layout
from core.errors import ConfigError
from monitoring.environment import describe_environment
from monitoring.events import EventLog, read_events
from monitoring.jsonl import read_records
from monitoring.metrics import MetricLogger
from monitoring.throughput import flops_per_token, mfu, peak_memory_bytes
from parallel.world import World
from trainer.checkpoint import TrainerState
from trainer.config import TrainerConfig
from trainer.data.loader import split_step
from trainer.data.prepare import PreparedData
from trainer.heartbeat import PROCESS_BEGAN


class Reporter:
    """Reports on rank 0 and is silent on other ranks; `log` is nevertheless collective."""

    def __init__(
        self,
        config: TrainerConfig,
        resolved: dict[str, Any],
        data: PreparedData,
        model: PreTrainedModel,
        world: World,
    ) -> None:
        self._config, self._resolved, self._data, self._world = config, resolved, data, world
        self._num_parameters = sum(p.numel() for p in model.parameters())
        self._flops_per_token = _flops_per_token(model, config.data.max_seq_len)
        self._logger: MetricLogger | None = None
        self._events = EventLog(config.run_dir / layout.EVENTS)

    def event(self, event: str, step: int, **details: float | int | str) -> None:
        """Records an event of the run (`monitoring/events.py`); safe to call from any thread."""
        if self._world.rank == 0:
            self._events.write(event, step, **details)

    def say(self, text: str) -> None:
        """Prints a line for the user."""
        if self._world.rank != 0:
            return
        if self._logger is not None:
            self._logger.message(text)
        else:
            print(text, flush=True)

    def open(self, state: TrainerState) -> None:
        """Writes the description of the run to its directory, once nothing can be refused any more.

        Args:
            state: State from which the run starts or resumes.
        """
        if self._world.rank != 0:
            return
        first_step = state.step
        run_dir = self._config.run_dir
        (run_dir / layout.CONFIG).write_text(yaml.safe_dump(self._resolved, sort_keys=False))
        # The order matters: until data.json names the rule of the samples' order, an old run's rule
        # is known only from the Python version in its environment.json, which is overwritten here.
        for name, content in (
            (layout.DATA, self._data.describe() | {"order": state.order}),
            (layout.ENVIRONMENT, describe_environment()),
        ):
            (run_dir / name).write_text(json.dumps(content, indent=1))
        config = self._config
        self.say(
            f"{config.run.name}: {self._num_parameters / 1e6:.1f}M parameters, "
            f"{self._world.world_size} x {self._device_name()}, "
            f"{type(config.parallel).__name__.removesuffix('Config').upper()}, "
            f"global batch {config.global_batch_size} x {config.data.max_seq_len} tokens "
            f"({config.grad_accum_steps(self._world.world_size)} micro-batches of "
            f"{_rows(config, self._world.world_size)} a rank)"
        )
        self.event(
            "start",
            first_step,
            world_size=self._world.world_size,
            strategy=type(config.parallel).__name__.removesuffix("Config").lower(),
            lost_steps=max(0, _last_step(run_dir) - first_step),
            startup_s=time.monotonic() - PROCESS_BEGAN,
        )
        self._open_sinks(first_step)

    def roll_back(self, step: int) -> None:
        """Removes the metrics of later steps."""
        if self._logger is not None:
            self._logger.close("running")
            self._open_sinks(step)

    def progress(self, step: int) -> None:
        """Moves the progress bar."""
        if self._logger is not None:
            self._logger.progress(step)

    def log(self, record: dict[str, Any]) -> None:
        """Writes the metrics of one step; collective, with the maximum of memory and waits."""
        memory, data_wait_s = self._world.max(
            peak_memory_bytes(self._world.device.type), record.get("data_wait_s", 0.0)
        )
        record |= {"peak_memory_bytes": int(memory)}
        if "data_wait_s" in record:  # missing before the first step
            record["data_wait_s"] = data_wait_s
        self.keep(record)

    def keep(self, record: dict[str, Any]) -> None:
        """Writes what rank 0 knows of one step; not collective."""
        if "tokens_per_s" in record:
            utilisation = mfu(
                record["tokens_per_s"],
                self._flops_per_token,
                self._device_name(),
                {"float32": "fp32", "bfloat16": "bf16"}[self._config.precision.param_dtype.value],
                self._world.world_size,
            )
            if utilisation is not None:
                record["mfu"] = utilisation
        if self._logger is not None:
            self._logger.log(record)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Shows and stores a generated text."""
        if self._logger is not None:
            self._logger.sample(step, prompt, text)

    def close(self, status: str) -> None:
        """Closes the sinks and writes the report."""
        if self._logger is None:
            return
        self._logger.close(status)
        self._logger = None
        if self._config.monitoring.report:
            from monitoring.report import write_report  # imports matplotlib, which is slow

            write_report(self._config.run_dir)

    def say_what_next(self, checkpoint: Path) -> None:
        """Prints where the results are, and what to try next."""
        run_dir = self._config.run_dir
        export = run_dir / layout.EXPORT
        self.say(f"\ncheckpoint  {_short(checkpoint)}")
        for name, path in (("export", export), ("report", run_dir / layout.REPORT)):
            if path.exists():
                self.say(f"{name:<12}{_short(path)}")
        if export.exists():
            prompt = self._config.evaluation.sample_prompt or "The"
            code = (
                "from transformers import pipeline; "
                f"print(pipeline('text-generation', '{_short(export)}')({prompt!r})"
                "[0]['generated_text'])"
            )
            self.say(f'\ntry it      {_short(Path(sys.executable))} -c "{code}"')

    def _open_sinks(self, first_step: int) -> None:
        config = self._config
        self._logger = MetricLogger(
            config.monitoring,
            config.run_dir,
            config.run.name,
            config.total_steps,
            first_step,
            {**self._resolved, "num_parameters": self._num_parameters},
        )

    def _device_name(self) -> str:
        if self._world.device.type == "cuda":
            return torch.cuda.get_device_name(self._world.device)
        return "cpu"


def count_crashes(run_dir: Path) -> int:
    """Returns how often the run crashed: the number of starts without an end."""
    marks = [e["event"] for e in read_events(run_dir)]
    marks = [mark for mark in marks if mark in ("start", "stop", "finish", "fail")]
    return sum(a == b == "start" for a, b in itertools.pairwise([*marks, "start"]))


def save_costs_s(run_dir: Path) -> list[float]:
    """Returns the time that each save took from training, in seconds, in order."""
    saves = [e for e in read_events(run_dir) if e["event"] == "checkpoint"]
    return [cast(float, save["blocking_s"]) for save in saves]


def check_run_dir(config: TrainerConfig) -> None:
    """Raises ConfigError if the run directory cannot be written; creates nothing."""
    folder = config.run_dir
    while not folder.exists():
        folder = folder.parent
    reason = None
    if not folder.is_dir():
        reason = f"{folder} is not a folder"
    elif not os.access(folder, os.W_OK | os.X_OK):
        reason = f"no permission to write in {folder}"
    if reason is not None:
        raise ConfigError(
            "run.dir", config.run_dir, reason, "choose another run.dir, or change its permissions"
        )


def _rows(config: TrainerConfig, world_size: int) -> str:
    """Returns the samples of a micro-batch: `4`, or `3-4` if ranks have different numbers."""
    sizes = {
        len(rows)
        for rank in split_step(config.global_batch_size, config.micro_batch_size, world_size)
        for rows in rank
    }
    return "-".join(str(size) for size in sorted(sizes))


def _last_step(run_dir: Path) -> int:
    """Returns the last step that an earlier start has logged."""
    return max((int(str(r["step"])) for r in read_records(run_dir / layout.METRICS)), default=0)


def _flops_per_token(model: PreTrainedModel, seq_len: int) -> float:
    text = model.config.get_text_config()
    embedding = model.get_input_embeddings().weight
    # An embedding is a lookup, not a product, unless it is also the output layer.
    in_matmuls = sum(
        p.numel()
        for p in model.parameters()
        if p.ndim >= 2 and (p is not embedding or text.tie_word_embeddings)
    )
    return flops_per_token(in_matmuls, text.num_hidden_layers, text.hidden_size, seq_len)


def _short(path: Path) -> str:
    """Returns a path relative to the working directory, if it lies there."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
