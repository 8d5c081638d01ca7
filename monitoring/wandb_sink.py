"""Weights & Biases: the only file that imports wandb."""

import secrets
from collections.abc import Mapping
from pathlib import Path

from core.errors import ConfigError, MissingExtraError
from monitoring.config import WandbConfig
from monitoring.jsonl import Record

try:
    import wandb
except ImportError as error:
    raise MissingExtraError(
        "monitoring.wandb.mode",
        "online or offline",
        "wandb is not installed",
        "run `pip install 'spotforge[wandb]'` or set monitoring=local",
    ) from error


class WandbSink:
    """Sends records to one wandb run, the same before and after a resume.

    Offline, every start leaves its own folder under `run_dir/wandb`, all with one run id; send them
    in order with `wandb sync --append`. Curves are drawn over `step`; the few steps that a
    resumed run does again are drawn twice there (wandb takes no points back), but stand once in
    `metrics.jsonl`.

    Args:
        cfg: Mode and project; not disabled.
        run_dir: Where `wandb_run_id` and `wandb/` are kept.
        run_name: Shown in wandb.
        settings: The resolved configuration.
    """

    def __init__(
        self, cfg: WandbConfig, run_dir: Path, run_name: str, settings: Mapping[str, object]
    ) -> None:
        offline = cfg.mode.value == "offline"
        try:
            self._run = wandb.init(
                project=cfg.project,
                name=run_name,
                id=_run_id(run_dir / "wandb_run_id"),
                mode="offline" if offline else "online",
                resume=None if offline else "allow",  # offline ignores it, with a warning
                dir=str(run_dir),
                config=dict(settings),
                settings=wandb.Settings(console="off"),  # else it wraps stdout, and the bar with it
            )
        except wandb.Error as error:
            raise ConfigError(
                "monitoring.wandb.mode",
                cfg.mode.value,
                str(error).strip().replace("\n", " "),
                "run `wandb login`, or set monitoring.wandb.mode=offline",
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Queue a record; a process of wandb's own sends it."""
        self._run.log(dict(record))

    def close(self, exit_status: str) -> None:
        """Send what is left and close the run as finished, preempted (stopped) or failed."""
        if exit_status == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if exit_status == "finished" else 1)


def _run_id(path: Path) -> str:
    """The run's id; made up on the first start, found again on a resume."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
