"""Compresses a model one decoder block after another, and goes on where it was stopped.

Memory holds a block, what methods gather of its inputs, and a batch of what flows through it; the
rest of that is on disk (`hidden.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from compression.block import Block
from compression.hidden import Hidden, embed
from compression.progress import Advance
from compression.recipe import Method
from compression.result import Result, persistent_tensors, round_inputs
from compression.stream import BlockStream
from core.errors import Interrupted


def compress(
    source: Path,
    methods: Mapping[str, Method],
    layers: Mapping[str, int],
    calibration: Tensor | None,
    result: Result,
    advance: Advance,
    stop_requested: Callable[[], bool] = lambda: False,
) -> None:
    """Applies methods to each block in turn and writes a result.

    Args:
        source: A dense Hugging Face folder.
        methods: By name, in order.
        layers: Names of the linear layers, with the number of their block.
        calibration: Token ids (N, T); None where no method needs data.
        result: Where to; its blocks that are there already are kept.
        advance: Told of each block.
        stop_requested: Asked between blocks.

    Raises:
        Interrupted: Told to stop; the same call goes on.
    """
    stream = BlockStream(source)
    num_blocks = len(stream.blocks)
    first = result.num_done()
    hidden = None
    if calibration is not None:
        shape = (*calibration.shape, stream.model.config.get_text_config().hidden_size)
        hidden = Hidden(_hidden_path(result, first), shape)
        if first < num_blocks and not hidden.path.exists():
            first = 0  # stopped between the two files of a block, long ago
            stream.load_embedding()
            hidden = embed(calibration, stream.embed, _hidden_path(result, 0), shape[2])
    advance(first, num_blocks)
    for index in range(first, num_blocks):
        module = stream.load(index)
        found = stream.layers(index).items()
        chosen = {name: layer for name, layer in found if name in layers}
        block = Block(
            stream.names[index],
            module,
            chosen,
            hidden.batches if hidden is not None else lambda: iter(()),
            partial(stream.run, index),
            result.dtype,
            scales_in=result.scales_in,
        )
        with torch.no_grad():
            for method in methods.values():
                method.apply(block)
            _round(block)
        if hidden is not None:
            following = hidden.map(partial(stream.run, index), _hidden_path(result, index + 1))
            result.write_block(index, block)
            hidden.path.unlink()
            hidden = following
        else:
            result.write_block(index, block)
        stream.release(index)
        advance(index + 1, num_blocks)
        if stop_requested():
            raise Interrupted(f"stopped after block {index}; the same command goes on from there")
    if hidden is not None:
        hidden.path.unlink(missing_ok=True)
    _write_rest(stream, result)


def _round(block: Block) -> None:
    """What follows sees the block as the artifact has it."""
    quantized = {f"{name}.weight" for name in block.quantized}
    for local, tensor in persistent_tensors(block.module).items():
        if f"{block.name}.{local}" not in quantized and tensor.is_floating_point():
            tensor.data = tensor.data.to(block.dtype).float()
    for name, value in block.quantized.items():
        round_inputs(block.layers[name], value.scheme.activation)


def _write_rest(stream: BlockStream, result: Result) -> None:
    stream.load_embedding()
    stream.load_head()
    tensors = {}
    for module in stream.rest():
        if stream.is_tied and module is stream.model.get_output_embeddings():
            continue
        for local, tensor in persistent_tensors(module, recurse=False).items():
            tensors[f"{stream.name_of(module)}.{local}"] = tensor
    result.write_rest(tensors)


def _hidden_path(result: Result, index: int) -> Path:
    return result.folder / f"hidden-{index:05d}.bin"
