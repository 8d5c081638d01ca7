"""Validation loss and generated text, in the same sharded forward as training."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from parallel.strategy import Strategy
from parallel.world import World
from trainer.config import TrainerConfig
from trainer.data.loader import validation_batches
from trainer.data.prepare import PreparedData


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()


def evaluate(
    config: TrainerConfig,
    data: PreparedData,
    strategy: Strategy,
    module: nn.Module,
    world: World,
    stop_requested: Callable[[], bool],
) -> dict[str, float] | None:
    """Mean loss over the held-out samples; collective.

    Returns:
        `validation_loss` in nats a token and `validation_bits_per_byte`, which compares across
        tokenizers; None where a rank was told to stop meanwhile.
    """
    total = torch.zeros((), device=world.device)
    num_targets = 0.0
    batches = validation_batches(
        data,
        max_seq_len=config.data.max_seq_len,
        mask_documents=config.data.mask_documents,
        batch_size=config.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        max_samples=config.evaluation.max_samples,
    )
    with _evaluating(module):
        for batch in batches:
            count, stop = world.sum(batch.num_targets, stop_requested())
            if stop:
                return None
            num_targets += count
            on_device = batch.to(world.device)
            total += strategy.forward(
                input_ids=on_device.input_ids,
                targets=on_device.targets,
                position_ids=on_device.position_ids,
            )
    dist.all_reduce(total)
    loss = total.item() / num_targets
    return {
        "validation_loss": loss,
        "validation_bits_per_byte": loss / math.log(2) / data.validation_bytes_per_token,
    }


def generate(
    config: TrainerConfig,
    tokenizer: Any,
    strategy: Strategy,
    module: nn.Module,
    world: World,
) -> str:
    """Continues `evaluation.sample_prompt` greedily; collective.

    Every rank decodes the same tokens through the sharded forward, a whole forward a token: the
    model is never gathered for it.
    """
    prompt = config.evaluation.sample_prompt
    assert prompt is not None
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    prompt_len = len(ids)
    with _evaluating(module):
        for _ in range(config.evaluation.sample_tokens):
            window = torch.tensor([ids[-config.data.max_seq_len :]], device=world.device)
            logits = strategy.forward(input_ids=window)  # (1, V)
            choice = logits.argmax(-1)
            dist.broadcast(choice, src=0)  # kernels may differ in the last bit between ranks
            ids.append(int(choice.item()))
    text: str = tokenizer.decode(ids[prompt_len:])
    return text
