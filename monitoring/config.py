"""What a user may set about metrics. Imports neither torch nor wandb: `--help` reads it."""

from dataclasses import dataclass, field
from enum import Enum


class WandbMode(Enum):
    """Where Weights & Biases records go. Lower case, since OmegaConf reads an enum by its name."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass
class WandbConfig:
    """Weights & Biases; needs the extra `spotforge[wandb]` unless disabled.

    Attributes:
        mode: `disabled`, `offline` (written under the run directory, to be sent later with
            `wandb sync`) or `online`.
        project: Project that the run belongs to.
    """

    mode: WandbMode = WandbMode.disabled
    project: str = "spotforge"


@dataclass
class MonitoringConfig:
    """Metric sinks beside the console and `metrics.jsonl`, which are always on.

    Attributes:
        progress: Live progress bar on a terminal; plain lines when off or when not a terminal.
        report: Write `report.html` at the end.
        wandb: Weights & Biases.
    """

    progress: bool = True
    report: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)
