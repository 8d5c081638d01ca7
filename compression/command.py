"""What `python -m compression` is set by, for all who compose it. Imports no torch."""

from compression.config import CompressionConfig
from compression.recipe import (
    AutoConfig,
    AwqConfig,
    GptqConfig,
    HealConfig,
    MixedConfig,
    PruneConfig,
    QatConfig,
    RoundConfig,
    SmoothQuantConfig,
    StructuredPruneConfig,
)
from core.settings.command import Command
from trainer.command import TRAINER

_EXAMPLES = """
python -m compression run=runs/stdlib recipe=int8_weight_only
python -m compression model=DIR data=text data.path=notes.txt data.max_seq_len=512 \\
    recipe=int4_gptq recipe.int4_gptq.group_size=64
python -m compression run=runs/stdlib 'recipe=[prune_wanda,int4_gptq]'     steps in order
python -m compression run=runs/stdlib recipe=int8_weight_only,int4_awq --multirun   and a plot
"""

_NOTES = """
A gate that is not passed leaves no artifact, and exit code 1.
Exit codes: 0 done; 33 told to stop, start it again and it goes on; 2 refused; 1 failed.
"""

COMPRESSION = Command(
    program="python -m compression",
    about="Make a trained model smaller; run=DIR or model=DIR says which.",
    schema=CompressionConfig,
    root="compression",
    groups={
        "recipe.NAME": {
            "auto": AutoConfig,
            "round": RoundConfig,
            "gptq": GptqConfig,
            "heal": HealConfig,
            "qat": QatConfig,
            "mixed": MixedConfig,
            "awq": AwqConfig,
            "smoothquant": SmoothQuantConfig,
            "prune": PruneConfig,
            "prune_structured": StructuredPruneConfig,
        },
        "data": TRAINER.groups["data"],
    },
    # `model` is a group of the trainer's, too, and Hydra would look for an option of that name.
    short={"run": "parent.run", "model": "parent.model"},
    sweeps=True,
    examples=_EXAMPLES,
    notes=_NOTES,
)
