"""A decoder block with inputs that correlate, as real ones do, for tests of methods."""

import torch
from torch import nn

from compression.block import Block
from compression.stream import BlockStream


def take_block(folder, index=0, dtype=torch.float32, num_batches=4):
    """A loaded block of a model, and a function that runs it on one batch."""
    stream = BlockStream(folder)
    module = stream.load(index)
    generator = torch.Generator().manual_seed(7)
    width = stream.model.config.hidden_size
    mix = torch.randn(width, width, generator=generator) / width**0.5
    scale = torch.rand(width, generator=generator) ** 3 * 4 + 0.05
    batches = [
        torch.randn(2, 32, width, generator=generator) @ mix * scale for _ in range(num_batches)
    ]
    layers = {
        f"{stream.names[index]}.{name}": part
        for name, part in module.named_modules()
        if isinstance(part, nn.Linear)
    }
    return Block(
        stream.names[index],
        module,
        layers,
        lambda: iter(batches),
        lambda batch: stream.run(index, batch),
        dtype,
    )


def outputs(block):
    """What the block makes of its inputs."""
    with torch.no_grad():
        return torch.cat([block.run(batch) for batch in block.inputs()])


@torch.no_grad()
def error_after(folder, method, **options):
    """Relative change of a block's output by a method, and the block."""
    block = take_block(folder, **options)
    before = outputs(block)
    method.apply(block)
    return float((outputs(block) - before).norm() / before.norm()), block
