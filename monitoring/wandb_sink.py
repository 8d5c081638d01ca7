"""The Weights & Biases sink, and the only file that imports wandb."""

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
    """Sends records to one wandb run, which stays the same after a resume.

    Offline, every start leaves its own folder under `run_dir/wandb`, all with one run id; send them
    in order with `wandb sync --append`. Curves are drawn over `step`. The few steps that a resumed
    run repeats appear twice there, since wandb cannot delete points, but once in `metrics.jsonl`.

    Args:
        cfg: Mode and project; the mode is not `disabled`.
        run_dir: Directory in which `wandb_run_id` and `wandb/` are kept.
        run_name: Name shown in wandb.
        settings: Resolved configuration.
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
                resume=None if offline else "allow",  # offline mode ignores it with a warning
                dir=str(run_dir),
                config=dict(settings),
                settings=wandb.Settings(
                    console="off"
                ),  # else it wraps stdout, which breaks the bar
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
        """Queues a record, which a process of wandb's own sends."""
        self._run.log(dict(record))

    def close(self, exit_status: str) -> None:
        """Sends the rest and closes the run as finished, preempted (stopped) or failed."""
        if exit_status == "stopped":
            self._run.mark_preempting()
        self._run.finish(exit_code=0 if exit_status == "finished" else 1)


def _run_id(path: Path) -> str:
    """Returns the run's id, which is made up on the first start and stored for a resume."""
    if not path.exists():
        path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
