"""A model with one decoder block in memory at a time.

The whole model is on the meta device. Code outside the blocks runs as transformers wrote it (masks,
rotary embeddings, soft-capping), in every architecture; all blocks but one return their input
unchanged.

Shapes: B sequences of T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compression.experts import split_experts
from compression.layers import linear_layers
from core.errors import ConfigError
from parallel.strategy import decoder_blocks
from trainer.cpu import return_freed_memory
from trainer.model import Materializer, build_meta_model
from trainer.model_config import PathModelConfig

Overwrite = Callable[[str, nn.Module], None]
_CPU = torch.device("cpu")


class BlockStream:
    """Reads the safetensors of a Hugging Face folder, a block at a time, as float32 on the CPU.

    Attributes:
        model: The model, on the meta device except for small modules outside blocks, embedding,
            head.
        blocks: Decoder blocks of the model.
        names: Full names of the blocks, such as `model.layers.0`.
        wraps: True if blocks return tuples. It is set when a block runs; a stream that only runs
            the
            head has to be told.

    Args:
        folder: Folder with config.json and safetensors.
        overwrite: Function that is given the name of each part and the part itself after it was
            read, to replace its weights by those of a compressed model.

    Raises:
        ConfigError: The folder has no causal language model with decoder blocks, or its weights do
            not fit the model.
    """

    def __init__(self, folder: Path, overwrite: Overwrite = lambda name, part: None) -> None:
        return_freed_memory()
        config = PathModelConfig(path=str(folder), attn_implementation=None)
        self.model: Any = build_meta_model(config, tokenizer_size=1).eval()
        of_module = {module: name for name, module in self.model.named_modules()}
        # Only numbered modules are layers: some models (BERT) also list their embeddings there.
        self.blocks = [
            block
            for block in decoder_blocks(self.model)
            if of_module[block].rpartition(".")[2].isdecimal()
        ]
        if not self.blocks:
            rule = f"{type(self.model).__name__} names no decoder blocks"
            raise ConfigError("model", folder, rule, "choose a decoder-only architecture")
        self.names = [of_module[block] for block in self.blocks]
        self._of_module: dict[nn.Module, str] = of_module
        self._overwrite = overwrite
        self._read = Materializer(self.model, self.model, config, 0, _CPU)
        self._embedding = self.model.get_input_embeddings()
        self._head = self.model.get_output_embeddings()
        self.is_tied = self._embedding.weight is self._head.weight
        # Norms, rotary embeddings and the like are small: they stay loaded.
        for module in self.rest():
            if module not in (self._embedding, self._head):
                self._load(module)
        self._inject: Tensor | None = None
        self.wraps = False
        for block in self.blocks:
            block.forward = self._pass_on

    def rest(self) -> Iterator[nn.Module]:
        """Yields the modules outside the blocks that have weights or buffers of their own."""
        inside = {module for block in self.blocks for module in block.modules()}
        for module in self.model.modules():
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            if module not in inside and own:
                yield module

    def layers(self, index: int) -> dict[str, nn.Linear]:
        """Returns the linear layers of a block by full name, with each expert's, loaded or not."""
        return linear_layers(self.names[index], self.blocks[index])

    def chosen(self, layers: Mapping[str, int]) -> dict[str, nn.Linear]:
        """Returns layers by full name, given with the number of their block."""
        found = {index: self.layers(index) for index in set(layers.values())}
        return {name: found[index][name] for name, index in layers.items()}

    def needing_weights(self, layers: Collection[str], are_absent: bool) -> list[str]:
        """Returns layers, or modules around them, whose weights are used outside a layer's forward.

        One block of each kind is read, run, and initialised as transformers does on loading.
        Experts are not checked, since few tokens reach few of them.

        Args:
            layers: Full names of layers that will hold codes.
            are_absent: True if such layers have no attribute `weight` after loading.
        """
        config = self.model.config
        # Some models check this flag, and then call their layers instead of using their weights.
        vars(config)["_is_quantized"] = True
        kinds, found = set(), []
        for index, (prefix, block) in enumerate(zip(self.names, self.blocks, strict=True)):
            wanted = [n for n in self.layers(index) if n in layers and ".experts." not in n]
            kind = type(block), tuple(name.removeprefix(prefix) for name in wanted)
            if kind in kinds:
                continue
            kinds.add(kind)
            self.load(index)
            every = self.layers(index)
            chosen, called = {name: every[name] for name in wanted}, set[nn.Module]()
            for layer in chosen.values():
                layer.register_forward_hook(partial(_note, called))
            self.run(index, torch.ones(1, 4, config.get_text_config().hidden_size))
            # A layer that was not called was bypassed: the block multiplied by its weight itself.
            found += [name for name, layer in chosen.items() if layer not in called]
            for layer in chosen.values():
                del layer.weight
            for name, module in block.named_modules():
                try:
                    if are_absent and module not in chosen.values():
                        self.model._init_weights(module)
                except AttributeError:
                    found.append(f"{prefix}.{name}")
            self.release(index)
        return found

    def name_of(self, module: nn.Module) -> str:
        """Returns the full name of a module, such as `model.layers.0.mlp.up_proj`."""
        return self._of_module[module]

    def load(self, index: int) -> nn.Module:
        """Reads a block and returns it; `release` it before the next one to save memory.

        Experts that transformers fuses become linear layers.
        """
        return self._load(self.blocks[index])

    def release(self, index: int) -> None:
        """Drops the weights of a block that is not needed again."""
        self.blocks[index].to("meta")

    def load_embedding(self) -> nn.Module:
        """Reads and returns the input embedding."""
        return self._load(self._embedding)

    def load_head(self) -> Any:
        """Reads and returns the output head; a tied one gets the weight of the embedding."""
        if not self.is_tied:
            return self._load(self._head)
        self._head.weight = self.load_embedding().weight
        return self._head

    def embed(self, input_ids: Tensor) -> Tensor:
        """Returns the first block's input (B, T, H) for token ids (B, T)."""
        return self._run(0, None, input_ids=input_ids)

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Returns a loaded block's output (B, T, H) for its input (B, T, H)."""
        return self._run(index, hidden, inputs_embeds=_nothing_like(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Returns logits (B, T, V) float32 for the last block's output (B, T, H)."""
        # All blocks pass this on in place of their input, so that it reaches the last norm and the
        # head.
        self._inject = hidden
        result: Tensor = self.model(inputs_embeds=_nothing_like(hidden), use_cache=False).logits
        self._inject = None
        return result.float()

    @torch.no_grad()
    def _run(self, index: int, hidden: Tensor | None, **inputs: Tensor) -> Tensor:
        # The block's arguments (masks, rotary embeddings) are made by transformers' own forward. It
        # is run up to this block with a stand-in input of the same shape, and left by an exception
        # after it.
        block = self.blocks[index]

        def reach(*args: Any, **kwargs: Any) -> None:
            if hidden is None:
                raise _Reached(args[0] if args else kwargs["hidden_states"])
            if not args:
                kwargs.pop("hidden_states")
            output = type(block).forward(block, hidden, *args[1:], **kwargs)
            self.wraps = isinstance(output, tuple)
            raise _Reached(output[0] if self.wraps else output)

        block.forward = reach
        try:
            self.model.base_model(**inputs, use_cache=False)
        except _Reached as reached:
            return reached.hidden
        finally:
            block.forward = self._pass_on
        raise AssertionError(f"{self.names[index]} was not called")

    def _pass_on(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs["hidden_states"]
        hidden = given if self._inject is None else self._inject
        return (hidden,) if self.wraps else hidden

    def _load(self, part: nn.Module) -> nn.Module:
        self._read(part)
        split_experts(part)
        self._overwrite(self._of_module[part], part)
        return part


def _note(called: set[nn.Module], module: nn.Module, *_: Any) -> None:
    called.add(module)


class _Reached(Exception):
    """Leaves transformers' forward with the hidden states that were wanted."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def _nothing_like(hidden: Tensor) -> Tensor:
    """Returns a tensor of the same shape that takes no memory, as its values are not used."""
    return hidden.new_zeros(1).expand(hidden.shape)
