"""Settings of metrics. Imports neither torch nor wandb, because `--help` reads it."""

from dataclasses import dataclass, field
from enum import Enum


class WandbMode(Enum):
    """Selects where wandb records go; lower case because OmegaConf reads enums by name."""

    disabled = "disabled"
    offline = "offline"
    online = "online"


@dataclass
class WandbConfig:
    """Configures Weights & Biases, which needs the extra `spotforge[wandb]` unless disabled.

    Attributes:
        mode: Mode of the client: `disabled`, `offline` (written under the run directory, to be sent
            later with `wandb sync`) or `online`.
        project: Project that the run belongs to.
    """

    mode: WandbMode = WandbMode.disabled
    project: str = "spotforge"


@dataclass
class MonitoringConfig:
    """Configures metric sinks beside the console and `metrics.jsonl`, which are always on.

    Attributes:
        progress: Live progress bar on a terminal; plain lines if off or not on a terminal.
        report: Writing of `report.html` at the end of the run.
        wandb: Settings of Weights & Biases.
    """

    progress: bool = True
    report: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)
