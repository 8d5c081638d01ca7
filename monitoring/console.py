"""Progress of a run for people: a progress bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from monitoring.jsonl import Record
from monitoring.units import compact, duration, gibibytes, printable

_FORMATS: dict[str, Callable[[float], str]] = {
    "loss": lambda v: f"loss {v:.4f}",
    "lr": lambda v: f"lr {v:.1e}",
    "grad_norm": lambda v: f"grad_norm {v:.2f}",
    "tokens_per_s": lambda v: f"{compact(v)} tokens/s",
    "mfu": lambda v: f"mfu {v:.1%}",
    "peak_memory_bytes": lambda v: f"peak {gibibytes(v)}",
}
_EVALUATION_FORMATS: dict[str, Callable[[float], str]] = {
    "validation_loss": lambda v: f"validation_loss {v:.4f}",
    "validation_bits_per_byte": lambda v: f"bits_per_byte {v:.4f}",
}


class ConsoleSink(Protocol):
    """Is implemented by consoles; `MetricLogger` calls two methods beside those of every sink."""

    def write(self, record: Record) -> None:
        """Shows a logged step."""

    def progress(self, step: int, loss: float | None, tokens_per_s: float | None) -> None:
        """Notes that a step is done; it is called every step, so it must cost next to nothing."""

    def message(self, text: str) -> None:
        """Shows a line of text."""

    def close(self, exit_status: str) -> None:
        """Restores the terminal."""


def build_console(
    run_name: str, total_steps: int | None, first_step: int, bar: bool
) -> ConsoleSink:
    """Returns a progress bar if it is wanted and can be drawn, else plain lines.

    Args:
        run_name: Name shown left of the bar.
        total_steps: Last step of the run; None if it is not known.
        first_step: Step from which the run resumes.
        bar: True if the user wants a bar.
    """
    console = Console()
    if bar and console.is_terminal and not console.is_dumb_terminal:
        return BarConsole(console, run_name, total_steps, first_step)
    return PlainConsole(total_steps, first_step)


def _parts(record: Record, formats: dict[str, Callable[[float], str]]) -> list[str]:
    return [show(float(record[key])) for key, show in formats.items() if key in record]


class PlainConsole:
    """Prints one compact line per logged step, for logs and CI.

    Args:
        total_steps: Last step of the run; None if it is not known.
        first_step: Step from which the run resumes.
        clock: Function that returns seconds from any origin.
    """

    def __init__(
        self,
        total_steps: int | None,
        first_step: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total = total_steps
        self._first_step = first_step
        self._clock = clock
        self._origin: tuple[int, float] | None = None

    def write(self, record: Record) -> None:
        """Prints `step 20/100  loss 5.4321  lr 3.0e-04  ...  eta 3m12s`."""
        step = int(record["step"])
        self.progress(step, None, None)
        of_total = f"/{self._total}" if self._total is not None else ""
        parts = [f"step {step}{of_total}", *_parts(record, _FORMATS)]
        parts += _parts(record, _EVALUATION_FORMATS) + self._eta(step)
        self.message("  ".join(parts))

    def progress(self, step: int, loss: float | None, tokens_per_s: float | None) -> None:
        """Starts the clock for the remaining time after the first step, which may compile."""
        if self._origin is None and step > self._first_step:
            self._origin = (step, self._clock())

    def message(self, text: str) -> None:
        """Prints one line; replaces characters that the stream's encoding lacks."""
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(printable(text).encode(encoding, "replace").decode(encoding), flush=True)

    def close(self, exit_status: str) -> None:
        """Does nothing: plain lines leave nothing to restore."""

    def _eta(self, step: int) -> list[str]:
        if self._total is None or self._origin is None:
            return []
        first, since = self._origin
        if not first < step < self._total:
            return []
        return [f"eta {duration((self._total - step) * (self._clock() - since) / (step - first))}"]


class BarConsole:
    """Shows a live bar: step n/total, loss, tokens/s, elapsed and remaining time.

    Args:
        console: Terminal to draw on.
        run_name: Name shown left of the bar.
        total_steps: Last step of the run; None if it is not known.
        first_step: Step from which the run resumes.
    """

    def __init__(
        self, console: Console, run_name: str, total_steps: int | None, first_step: int
    ) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            _StepColumn(),
            TextColumn("{task.fields[figures]}", markup=False),
            TimeElapsedColumn(),
            _EtaColumn(),
            console=console,
            expand=True,
            refresh_per_second=4,
            speed_estimate_period=3600,  # the default of 30 s may not contain two steps
        )
        self._task = self._progress.add_task(
            run_name, total=total_steps, completed=first_step, figures=""
        )
        self._figures: dict[str, str] = {}
        self._progress.start()

    def write(self, record: Record) -> None:
        """Moves the bar; an evaluation also prints a line above it."""
        self.progress(
            int(record["step"]),
            float(record["loss"]) if "loss" in record else None,
            float(record["tokens_per_s"]) if "tokens_per_s" in record else None,
        )
        if evaluation := _parts(record, _EVALUATION_FORMATS):
            self.message("  ".join([f"step {record['step']}", *evaluation]))

    def progress(self, step: int, loss: float | None, tokens_per_s: float | None) -> None:
        """Moves the bar; a figure that is None keeps its last value."""
        if loss is not None:
            self._figures["loss"] = f"loss {loss:.4f}"
        if tokens_per_s is not None:
            self._figures["rate"] = f"{compact(tokens_per_s)} tokens/s"
        self._progress.update(self._task, completed=step, figures="  ".join(self._figures.values()))

    def message(self, text: str) -> None:
        """Prints above the bar; brackets in the text are not markup."""
        self._progress.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def close(self, exit_status: str) -> None:
        """Stops redrawing; the last state of the bar stays on screen."""
        self._progress.stop()


class _StepColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        total = f"/{task.total:.0f}" if task.total is not None else ""
        return Text(f"step {task.completed:.0f}{total}", style="bold")


class _EtaColumn(ProgressColumn):
    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        seconds = task.time_remaining
        return Text(f"eta {'-' if seconds is None else duration(seconds)}", style="cyan")
