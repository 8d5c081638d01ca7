"""Builds the model without holding it in full: on the meta device first, then part by part."""

from __future__ import annotations

import copy
import difflib
import hashlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging

from core.errors import ConfigError
from parallel.strategy import decoder_blocks, persistent_buffers
from trainer.attention import plain_attention
from trainer.constructed import constructed_values
from trainer.model_config import NamedModelConfig, PathModelConfig
from trainer.weights import WeightsReader


def hf_config_of(config: NamedModelConfig | PathModelConfig) -> Any:
    """Returns transformers' config of the model.

    Raises:
        ConfigError: There is no such model, or a field is misspelt.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if isinstance(config, PathModelConfig):
        try:
            found = AutoConfig.from_pretrained(
                config.path, revision=config.revision, trust_remote_code=False
            )
        except (OSError, ValueError) as e:
            raise ConfigError(
                "model.path",
                config.path,
                _first_line(e),
                "give a folder with config.json, or a hub name while there is a network",
            ) from e
        _check_not_quantized(found, config)
        return found
    try:
        known = AutoConfig.for_model(config.model_type)
    except (ValueError, StrictDataclassError) as e:
        raise ConfigError(
            "model.model_type", config.model_type, _first_line(e), "use a type transformers knows"
        ) from e
    for field in config.config:
        # transformers would store an unknown field and ignore it.
        if not _has_field(known, field):
            close = difflib.get_close_matches(field, known.to_dict(), n=1)
            raise ConfigError(
                f"model.config.{field}",
                config.config[field],
                f"is not a field of {type(known).__name__}",
                f"did you mean {close[0]}?" if close else "remove it",
            )
    sizes = {} if config.vocab_size is None else {"vocab_size": config.vocab_size}
    try:
        return AutoConfig.for_model(config.model_type, **config.config, **sizes)
    except (ValueError, TypeError, AttributeError, KeyError, StrictDataclassError) as e:
        rule = str(e).strip().split("\n")[-1].strip()
        raise ConfigError(
            "model.config", config.config, rule, f"give values that {type(known).__name__} takes"
        ) from e


def _has_field(known: Any, field: str) -> bool:
    try:
        return hasattr(known, field)
    except RuntimeError:  # raised for a field of which each layer has its own value
        return True


def _check_not_quantized(hf_config: Any, config: PathModelConfig) -> None:
    """Raises ConfigError for a quantized model, whose files hold codes instead of weights."""
    for part in (hf_config, hf_config.get_text_config()):
        quantization = getattr(part, "quantization_config", None)
        if quantization is None:
            continue
        if not isinstance(quantization, dict):
            quantization = quantization.to_dict()
        raise ConfigError(
            "model.path",
            config.path,
            f"is quantized ({quantization.get('quant_method', 'by an unknown method')})",
            "give the model that it was made from, or load it with transformers, dequantize it and "
            "save it",
        )


def build_meta_model(
    config: NamedModelConfig | PathModelConfig,
    tokenizer_size: int,
    dtype: torch.dtype = torch.float32,
) -> PreTrainedModel:
    """Returns the model on the meta device, which has shapes but uses no memory.

    Raises:
        ConfigError: The architecture is unknown, a field is misspelt, or the tokenizer has more
            tokens than the embedding has rows.
    """
    hf_config = hf_config_of(config)
    text_config = hf_config.get_text_config()
    if isinstance(config, NamedModelConfig):
        text_config.vocab_size = config.vocab_size or -(-tokenizer_size // 64) * 64
        _fit_special_tokens(config, text_config)
    vocab_size = text_config.vocab_size
    if tokenizer_size > vocab_size:
        raise ConfigError(
            "data.tokenizer",
            f"{tokenizer_size} tokens",
            f"does not fit the model's vocabulary of {vocab_size}",
            "use the model's own tokenizer (data.tokenizer=auto with model=pretrained), a smaller "
            "data.tokenizer_vocab_size, or a larger model.vocab_size",
        )
    # The causal language model of an encoder-decoder (BART) is its decoder.
    if hf_config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not (
        getattr(hf_config, "is_decoder", True) or getattr(hf_config, "is_encoder_decoder", False)
    ):
        raise ConfigError(
            "model",
            hf_config.model_type,
            "is an encoder, which sees the tokens that it is to predict",
            "choose a causal language model, or one whose config says is_decoder=true",
        )
    if config.attn_implementation == "eager" != plain_attention(hf_config):
        raise ConfigError(
            "model.attn_implementation",
            "eager",
            f"transformers adds ALiBi twice in eager attention of {hf_config.model_type}",
            "set model.attn_implementation=sdpa",
        )
    model = _build(hf_config, dtype, config.attn_implementation)
    if model.get_output_embeddings() is None:
        raise ConfigError(
            "model", type(model).__name__, "has no output head", "choose a causal language model"
        )
    return model


def _build(hf_config: Any, dtype: torch.dtype, attn_implementation: str | None) -> PreTrainedModel:
    try:
        return _on_meta(hf_config, dtype, attn_implementation)
    except Exception as e:  # constructors check little: values that do not fit raise anything
        error = e
    # A second attempt tells whether the attention is to blame or the rest of the config.
    if attn_implementation is not None:
        try:
            _on_meta(hf_config, dtype, None)
        except Exception:
            pass  # the attention is not the cause
        else:
            raise ConfigError(
                "model.attn_implementation",
                attn_implementation,
                f"{hf_config.model_type} cannot be built with it ({_first_sentence(error)})",
                "set model.attn_implementation=null, so that transformers chooses",
            ) from error
    raise ConfigError(
        "model",
        hf_config.model_type,
        f"transformers cannot build it ({type(error).__name__}: {_first_line(error)})",
        "choose a causal language model, and values of its config that fit together",
    ) from error


def _on_meta(
    hf_config: Any, dtype: torch.dtype, attn_implementation: str | None
) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(hf_config), dtype=dtype, attn_implementation=attn_implementation
        )
    return model


def _fit_special_tokens(config: NamedModelConfig, text_config: Any) -> None:
    """Clears a family's default special tokens that are outside of a smaller vocabulary."""
    for name in {"pad_token_id", "bos_token_id", "eos_token_id"} - config.config.keys():
        given = getattr(text_config, name, None)
        ids = given if isinstance(given, list) else [given]
        if any(i is not None and i >= text_config.vocab_size for i in ids):
            set_special_token(text_config, name, None, otherwise=text_config.vocab_size - 1)


def set_special_token(described: Any, name: str, value: int | None, otherwise: int) -> None:
    """Sets `pad_token_id` or a similar field; where None is refused, sets `otherwise`."""
    try:
        setattr(described, name, value)
    except StrictDataclassError:
        setattr(described, name, otherwise)


class Materializer:
    """Fills one part of a meta model after another with the run's initial weights.

    Random weights come from the model's own initialization, one module at a time, each under a seed
    derived from its name: they are the same for every strategy, order and number of ranks.
    Pretrained weights, including persistent buffers, are read from the safetensors files, only
    those of the part at hand.

    Attributes:
        sparse: Names of the parameters whose zeros stay zero: with `model.keep_zeros` all matrices
            except embeddings, otherwise none.
        num_zeros: Number of zeros in the sparse parameters that are filled so far.
    """

    def __init__(
        self,
        module: nn.Module,
        model: PreTrainedModel,
        config: NamedModelConfig | PathModelConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self._model, self._seed, self._device = model, seed, device
        self._names = {m: name for name, m in model.named_modules()}
        self._owners = _owners(model)
        self._constructed: dict[str, Tensor] | None = None
        self._read: WeightsReader | None = None
        self._buffers = set(persistent_buffers(model))
        if isinstance(config, PathModelConfig) and config.weights:
            self._read = WeightsReader(config, model)
        keeps_zeros = isinstance(config, PathModelConfig) and config.keep_zeros
        self.sparse = _matrices(model) if keeps_zeros else set()
        self.num_zeros = 0
        # Modules outside of the model (a teacher) are filled by their own materializer.
        self._done: set[nn.Module] = {m for m in module.modules() if m not in self._names}

    @property
    def stored_names(self) -> list[str] | None:
        """Names of the tensors in the files; None for random weights."""
        return None if self._read is None else self._read.stored_names

    @torch.no_grad()
    def __call__(self, part: nn.Module) -> None:
        """Materializes `part` and its submodules, except those that are already filled."""
        modules = [m for m in _children_first(part) if m not in self._done]
        for module in modules:
            # Not recursive: children are in the list themselves unless they are filled already.
            module.to_empty(device=self._device, recurse=False)
            for _, tensor in _own_tensors(module):
                if tensor.is_floating_point():
                    tensor.fill_(torch.nan)  # marks uninitialized values for the check below
        # Forked, so that filling weights leaves the run's own random state unchanged.
        with torch.random.fork_rng(
            devices=[self._device] if self._device.type == "cuda" else [],
        ):
            for module in modules:  # children first: a parent may refine their values (GPT-2)
                torch.manual_seed(_seed_of(self._seed, self._names[module]))
                self._owners[module]._init_weights(module)
        for name, tensor in self._tensors(modules):
            if self._read is not None and self._is_state(name, tensor) and name in self._read:
                tensor.copy_(self._read(name))
                if name in self.sparse:
                    self.num_zeros += int((tensor == 0).sum())
            elif _has_nan(tensor):
                self._fill_unset(name, tensor)
        self._done.update(modules)
        if all(m in self._done for m in self._names):
            self._model.tie_weights()  # to_empty separated tied parameters of different modules
            if self.sparse and not self.num_zeros:
                raise ConfigError(
                    "model.keep_zeros",
                    True,
                    "no weight of the model is zero",
                    "give a pruned model, or remove it",
                )
        self._check(modules)

    def _is_state(self, name: str, tensor: Tensor) -> bool:
        return isinstance(tensor, nn.Parameter) or name in self._buffers

    def _fill_unset(self, name: str, tensor: Tensor) -> None:
        """Gives a tensor that `_init_weights` does not set its value from the constructor."""
        if self._constructed is None:
            self._constructed = constructed_values(self._model, self._seed)
        if name in self._constructed:
            tensor.copy_(self._constructed[name])

    def _check(self, modules: list[nn.Module]) -> None:
        for name, tensor in self._tensors(modules):
            if _has_nan(tensor):
                raise ConfigError(
                    "model",
                    type(self._model).__name__,
                    f"{name} is NaN, or transformers leaves it unset",
                    "repair the weights, or choose another architecture",
                )

    def _tensors(self, modules: list[nn.Module]) -> Iterator[tuple[str, Tensor]]:
        """Yields the parameters and buffers of modules, by their names in the model."""
        for module in modules:
            for name, tensor in _own_tensors(module):
                yield f"{self._names[module]}.{name}".removeprefix("."), tensor


def prepare_training(model: PreTrainedModel, *, compile: bool, checkpointing: bool) -> None:
    """Enables recomputation and compilation of each block; call it before sharding."""
    model.train()
    for block in decoder_blocks(model):
        if checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        if compile:
            block.compile()


def _matrices(model: nn.Module) -> set[str]:
    """Returns the names of parameters of two or more dimensions, except embeddings."""
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return {n for n, p in model.named_parameters() if p.ndim >= 2 and p not in embeddings}


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Returns the parameters and buffers of a module itself, without its children's."""
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


def _has_nan(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.isnan().any())


def _owners(model: PreTrainedModel) -> dict[nn.Module, PreTrainedModel]:
    """Returns for each module the innermost transformers model around it, which initializes it."""
    owners: dict[nn.Module, PreTrainedModel] = {}
    for module in model.modules():  # yields parents before their children
        if isinstance(module, PreTrainedModel):
            owners |= dict.fromkeys(module.modules(), module)
    return owners


def _children_first(module: nn.Module) -> list[nn.Module]:
    ordered = [m for child in module.children() for m in _children_first(child)]
    return [*ordered, module]


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _first_sentence(error: Exception) -> str:
    """Returns the first sentence, which says what is wrong; advice by transformers follows it."""
    return _first_line(error).partition(". ")[0]


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
