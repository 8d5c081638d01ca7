"""Computes the validation loss and generates text, with the same sharded forward as training."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from core.errors import ConfigError
from parallel.strategy import Strategy
from parallel.world import World
from trainer.config import TrainerConfig
from trainer.data.batch import Batch
from trainer.data.loader import validation_batches
from trainer.data.prepare import PreparedData
from trainer.objective import Objective
from trainer.process import Process


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Puts the module in evaluation mode: no dropout, no auxiliary losses, no gradients."""
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        module.train()


def held_out_batches(
    config: TrainerConfig, data: PreparedData, world: World, apart: bool
) -> Iterator[Batch]:
    """Returns this rank's share of the held-out samples; all ranks get equally many batches.

    Raises:
        ConfigError: The held-out data is too short for one sample; raised at once.
    """
    return validation_batches(
        data,
        max_seq_len=config.data.max_seq_len,
        mask_documents=config.data.mask_documents,
        batch_size=config.micro_batch_size,
        rank=world.rank,
        world_size=world.world_size,
        max_samples=config.evaluation.max_samples,
        apart=apart,
    )


def evaluate(
    config: TrainerConfig,
    data: PreparedData,
    strategy: Strategy,
    module: Objective,
    process: Process,
) -> dict[str, float] | None:
    """Computes the mean loss over the held-out samples; collective.

    Returns:
        Metrics `validation_loss`, in nats per token, and `validation_bits_per_byte`, which compares
        across tokenizers; None if a rank was told to stop meanwhile.
    """
    world = process.world
    total = torch.zeros((), device=world.device)
    num_targets = 0.0
    with evaluating(module):
        for batch in held_out_batches(config, data, world, module.apart):
            # Ranks agree on a stop before each forward, which is collective.
            count, stop = world.sum(batch.num_targets, process.poll())
            if stop:
                return None
            num_targets += count
            on_device = batch.to(world.device)
            total += strategy.forward(**on_device.inputs())
    # Once, since a sum after each batch would wait for the device each time.
    dist.all_reduce(total)
    loss = total.item() / num_targets
    return {
        "validation_loss": loss,
        "validation_bits_per_byte": loss / math.log(2) / data.validation_bytes_per_token,
    }


def prompt_ids(config: TrainerConfig, tokenizer: Any) -> list[int]:
    """Returns the tokens of `evaluation.sample_prompt`, or the first token of a text if empty.

    A prompt begins a document, so it has a BOS if `data.add_bos`, resolved, is true.

    Raises:
        ConfigError: There is no token: the prompt is empty, and the tokenizer has no BOS and no
            EOS.
    """
    prompt = config.evaluation.sample_prompt
    assert prompt is not None
    ids: list[int] = tokenizer.encode(prompt, add_special_tokens=False)
    bos = tokenizer.bos_token_id
    if config.data.add_bos is True and ids[:1] != [bos]:
        ids = [bos, *ids]
    if ids:
        return ids
    # A text ends with EOS and the next one follows; without a BOS, texts therefore begin after EOS.
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if first is None:
        raise ConfigError(
            "evaluation.sample_prompt",
            repr(prompt),
            "has no tokens, and the tokenizer has neither BOS nor EOS to begin with",
            "give a word, or null to generate nothing",
        )
    return [int(first)]


def generate(
    config: TrainerConfig,
    tokenizer: Any,
    strategy: Strategy,
    module: Objective,
    process: Process,
) -> str | None:
    """Continues `evaluation.sample_prompt`; collective. Returns None if a rank was told to stop.

    Every rank runs the same sharded forward once per token, and rank 0 chooses the token, so the
    model is never gathered. The choice is seeded: a step of a run always generates the same text.
    """
    world, ids = process.world, prompt_ids(config, tokenizer)
    prompt_len = len(ids)
    temperature = config.evaluation.sample_temperature
    generator = torch.Generator(world.device).manual_seed(config.seed)
    with evaluating(module):
        for _ in range(config.evaluation.sample_tokens):
            if any(world.sum(process.poll())):
                return None
            # The model was trained at no later position.
            window = torch.tensor([ids[-config.data.max_seq_len :]], device=world.device)
            logits = strategy.forward(input_ids=window)[0].float()  # (V)
            if temperature > 0:
                probabilities = (logits / temperature).softmax(-1)
                choice = torch.multinomial(probabilities, 1, generator=generator)
            else:
                choice = logits.argmax(-1, keepdim=True)
            # Ranks may compute slightly different logits, so all take rank 0's choice.
            dist.broadcast(choice, src=0)
            ids.append(int(choice.item()))
    text: str = tokenizer.decode(ids[prompt_len:])
    return text
