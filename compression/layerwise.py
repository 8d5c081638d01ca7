"""Compresses a model one decoder block at a time, and resumes where it was stopped.

Memory holds one block, the statistics of its inputs that methods gather, and one batch of hidden
states; all other hidden states are on disk (`hidden.py`).
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
    """Applies methods to each block in turn and writes the result.

    Args:
        source: A dense Hugging Face folder.
        methods: Methods by name, in order.
        layers: Names of the linear layers to compress, with the number of their block.
        calibration: Token ids (N, T); None if no method needs data.
        result: Result to write; blocks that it already holds are kept.
        advance: Called with the number of blocks that are done, and their total.
        stop_requested: Function that is called between blocks.

    Raises:
        Interrupted: A stop was requested; the same call goes on from there.
    """
    stream = BlockStream(source)
    num_blocks = len(stream.blocks)
    first = result.num_done()
    hidden = None
    if calibration is not None:
        shape = (*calibration.shape, stream.model.config.get_text_config().hidden_size)
        hidden = Hidden(_hidden_path(result, first), shape)
        # A block is done when its file and the hidden states after it are there. A process that was
        # killed between the two starts over: the hidden states of earlier blocks are gone.
        if first < num_blocks and not hidden.path.exists():
            first = 0
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
            # Run again after the methods: the next block is calibrated on what this block outputs
            # once it is compressed, so that methods make up for earlier errors.
            following = hidden.map(partial(stream.run, index), _hidden_path(result, index + 1))
            # The hidden states are written first: a block file is the promise that they are there.
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
    """Rounds a block to what the artifact stores, which is what later blocks receive."""
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
        # A tied head is the embedding, and is stored once.
        if stream.is_tied and module is stream.model.get_output_embeddings():
            continue
        for local, tensor in persistent_tensors(module, recurse=False).items():
            tensors[f"{stream.name_of(module)}.{local}"] = tensor
    result.write_rest(tensors)


def _hidden_path(result: Result, index: int) -> Path:
    return result.folder / f"hidden-{index:05d}.bin"
