"""Computes one sample before the first step, so that a broken model fails with one line."""

import os
import traceback

import torch

from core.errors import ConfigError
from parallel.strategy import Strategy
from parallel.world import World
from trainer.config import TrainerConfig
from trainer.evaluation import evaluating
from trainer.objective import Objective

# Code below a model's in the stack when ranks communicate: a lost rank is not the model's fault.
_COMMUNICATION = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}")


def check_forward(
    config: TrainerConfig, strategy: Strategy, module: Objective, world: World
) -> None:
    """Computes a sample of the run's length in the run's precision; collective.

    Raises:
        ConfigError: The model's code in transformers cannot compute it.
    """
    # Ids below 64 are in every vocabulary.
    tokens = torch.arange(config.data.max_seq_len, device=world.device).unsqueeze(0) % 64
    try:
        with evaluating(module):
            strategy.forward(input_ids=tokens)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:
        if not _is_of_the_model(e):
            raise
        reason = str(e).strip().split("\n")[0].rstrip(".")
        raise ConfigError(
            "model",
            type(module.model).__name__,
            f"cannot compute {config.data.max_seq_len} tokens in "
            f"{config.precision.param_dtype.value} ({type(e).__name__}: {reason})",
            "try precision=fp32, model.attn_implementation=null or eager, or values of its config "
            "that fit together",
        ) from e


def _is_of_the_model(error: Exception) -> bool:
    """Returns whether the model's code in transformers raised an error, or torch on its behalf."""
    files = [frame.filename for frame in traceback.extract_tb(error.__traceback__)]
    models = f"{os.sep}transformers{os.sep}"
    inner = [i for i, file in enumerate(files) if models in file]
    return bool(inner) and not any(
        part in file for file in files[inner[-1] :] for part in _COMMUNICATION
    )
