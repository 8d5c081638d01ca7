"""The settings of `python -m trainer`, for all that compose them: the program, planner, healing.

Every dataclass is registered as `/schema/<group>/<name>`, from which the YAML file of an option
starts, so that a misspelt key or a wrong type fails before anything runs. Imports no torch.
"""

from core.settings.command import Command
from monitoring.config import MonitoringConfig
from parallel.config import DdpConfig, FsdpConfig, PrecisionConfig, ZeroConfig
from trainer.config import CheckpointConfig, DistillConfig, PretrainConfig, TrainerConfig
from trainer.data.config import MixtureDataConfig, SingleDataConfig
from trainer.model_config import NamedModelConfig, PathModelConfig
from trainer.optim import AdamWConfig
from trainer.schedule import ConstantConfig, CosineConfig, WarmupStableDecayConfig

_EXAMPLES = """
python -m trainer experiment=stdlib                       the main job: small, on this machine
python -m trainer data=text data.path=book.txt nproc=2    your text, two ranks
python -m trainer model=pretrained model.path=DIR data=jsonl data.path=rows.jsonl parallel=fsdp
python -m trainer objective=distill objective.teacher=DIR model=pretrained model.path=SMALLER ...
python -m trainer --multirun optim.lr=1e-4,3e-4,1e-3      a sweep, one run after another
"""

_NOTES = """
Exit codes: 0 finished; 33 stopped, with all steps saved, start it again; 2 refused; 1 failed.
"""

TRAINER = Command(
    program="python -m trainer",
    about="Train a causal language model.",
    schema=TrainerConfig,
    root="trainer",
    groups={
        "model": {"named": NamedModelConfig, "path": PathModelConfig},
        "objective": {"pretrain": PretrainConfig, "distill": DistillConfig},
        "data": {"single": SingleDataConfig, "mixture": MixtureDataConfig},
        "parallel": {"ddp": DdpConfig, "fsdp": FsdpConfig, "zero": ZeroConfig},
        "optim": {"adamw": AdamWConfig},
        "schedule": {
            "cosine": CosineConfig,
            "wsd": WarmupStableDecayConfig,
            "constant": ConstantConfig,
        },
        "precision": {"base": PrecisionConfig},
        "checkpoint": {"base": CheckpointConfig},
        "monitoring": {"base": MonitoringConfig},
    },
    sweeps=True,
    examples=_EXAMPLES,
    notes=_NOTES,
)
