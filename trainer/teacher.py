"""The teacher of a distillation: a pretrained model that is evaluated and never trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from core.errors import ConfigError
from parallel.config import Dtype
from parallel.strategy import Materialize, torch_dtype
from trainer.data.tokenizer import fingerprint, load_tokenizer
from trainer.model import Materializer, build_meta_model
from trainer.model_config import PathModelConfig
from trainer.objective import model_inputs, outputs_of
from trainer.weight_files import find_file
from trainer.weights import WeightsReader

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


class Teacher(nn.Module):
    """Holds a frozen model that computes in its own type, for any precision of the run.

    It always stays in evaluation mode: no dropout, no random numbers.
    """

    def __init__(self, model: PreTrainedModel, config: PathModelConfig) -> None:
        super().__init__()
        self.model: Any = model.requires_grad_(False)
        self._config = config
        self.eval()

    def train(self, mode: bool = True) -> "Teacher":
        """Stays in evaluation mode, whatever mode its parent is set to."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, input_ids: Tensor, position_ids: Tensor | None, hidden: bool) -> Tensor:
        """Computes the teacher's output for a batch.

        Args:
            input_ids: Token ids, (B, T) int64.
            position_ids: Positions, (B, T) int64, or None.
            hidden: True returns the last hidden states, the input of its head.

        Returns:
            Hidden states (B, T, H), or logits (B, T, V), in the teacher's type.
        """
        # Autocast would compute in the student's type.
        with torch.autocast(input_ids.device.type, enabled=False):
            return outputs_of(self.model, hidden, model_inputs(input_ids, position_ids))

    def materializer(self, module: nn.Module, device: torch.device) -> Materialize:
        """Returns a function that fills the teacher's parts with its weights.

        Args:
            module: Module that contains this one, and whose parts are passed to the function.
            device: Device of the weights.
        """
        with _about(self._config):
            materialize = Materializer(module, self.model, self._config, 0, device)

        def fill(part: nn.Module) -> None:
            with _about(self._config):
                materialize(part)

        return fill


def build_teacher(
    config: PathModelConfig, dtype: Dtype, student: PreTrainedModel, tokenizer_fingerprint: str
) -> Teacher:
    """Returns the teacher on the meta device, after checking that its files exist.

    Args:
        config: Settings of the teacher.
        dtype: Type of its weights and computation.
        student: Model that it teaches.
        tokenizer_fingerprint: Fingerprint of the tokenizer that the data was prepared with.

    Raises:
        ConfigError: There is no such model, it has no weights, or its tokens are not the student's.
    """
    with _about(config):
        model = build_meta_model(config, 0, torch_dtype(dtype.value))
        WeightsReader(config, model)
        # Without a tokenizer of its own, only the sizes of the vocabularies can be compared.
        brings_tokenizer = any(find_file(config, name) for name in _TOKENIZER_FILES)
        tokenizer = load_tokenizer(config.path, config.revision) if brings_tokenizer else None
    rows, wanted = (m.get_output_embeddings().weight.shape[0] for m in (model, student))
    if rows != wanted:
        raise ConfigError(
            "objective.teacher",
            config.path,
            f"has a vocabulary of {rows}, and the model one of {wanted}",
            f"choose a teacher of the model's family, or set model.vocab_size={rows}",
        )
    if tokenizer is not None and fingerprint(tokenizer) != tokenizer_fingerprint:
        raise ConfigError(
            "objective.teacher",
            config.path,
            "its tokenizer is not the one that the data was prepared with",
            f"set data.tokenizer={config.path}",
        )
    return Teacher(model, config)


@contextmanager
def _about(config: PathModelConfig) -> Iterator[None]:
    """Turns errors about a model into errors about `objective.teacher`."""
    try:
        yield
    except ConfigError as e:
        raise ConfigError(
            "objective.teacher",
            config.path,
            e.rule,
            "give a causal language model with safetensors weights and model.attn_implementation",
        ) from e
