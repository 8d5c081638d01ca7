"""`python -m trainer.export`: finds a checkpoint, and has `exporter.py` write it.

What needs torch is imported once the settings are valid, so that `--help` is instant.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from core import layout
from core.errors import ConfigError, ExitCode
from core.folder import find_run
from core.settings.command import Command, Job
from parallel.config import Dtype


@dataclass
class ExportArguments:
    """Configures `python -m trainer.export`.

    Attributes:
        run: Run directory, or the name of a run under `runs/`.
        checkpoint: Name of a checkpoint of the run; null takes the newest valid one.
        out: Folder to write; null takes `export` in the run directory.
        dtype: Type of the weights.
    """

    run: str = MISSING
    checkpoint: str | None = None
    out: str | None = None
    dtype: Dtype = Dtype.float32


EXPORT = Command(
    program="python -m trainer.export",
    about="Turn any checkpoint into an ordinary Hugging Face folder, without a GPU.",
    schema=ExportArguments,
    root="export",
    examples="""
python -m trainer.export run=runs/demo
python -m trainer.export run=runs/demo checkpoint=step-00001000 out=exports/demo dtype=bfloat16
""",
    notes="Exit codes: 0 done; 2 refused; 1 failed.",
)


def _find_run(name: str) -> Path:
    run = find_run(name, holds=layout.CHECKPOINTS)
    if run is None:
        raise ConfigError("run", name, "is not a run with checkpoints", "give runs/<name>")
    return run.absolute()


def _find_checkpoint(run: Path, name: str | None) -> Path:
    from trainer.checkpoint import committed, verify

    if name is not None:
        path = run / layout.CHECKPOINTS / name
        if not path.is_dir():
            have = ", ".join(p.name for p in committed(run / layout.CHECKPOINTS)) or "none"
            raise ConfigError(
                "checkpoint", name, "there is no such checkpoint", f"there are: {have}"
            )
        verify(path)
        return path
    newest: ConfigError | None = None
    for path in committed(run / layout.CHECKPOINTS):
        try:
            verify(path)
        except ConfigError as e:
            print(f"passed over: {e}", file=sys.stderr)
            newest = newest or e
            continue
        return path
    raise newest or ConfigError("run", run, "has no committed checkpoint", "train it first")


def _run(arguments: ExportArguments, job: Job) -> int:
    run = _find_run(arguments.run)
    from trainer.checkpoint import Located  # late: it imports torch
    from trainer.exporter import export_checkpoint

    checkpoint = _find_checkpoint(run, arguments.checkpoint)
    out = Path(arguments.out).expanduser().absolute() if arguments.out else run / layout.EXPORT
    export_checkpoint(Located(checkpoint), out, arguments.dtype)
    print(f"{checkpoint.name} -> {out}")
    return ExitCode.FINISHED


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    return EXPORT.main(_run, argv or ["--help"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
