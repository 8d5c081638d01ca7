"""Asks the loaded model, once before the first step, how it computes.

Families differ in what they do after their head, in what they add to cross-entropy, and in whether
restarting positions separates documents. No list of names could cover this. So a few tokens are
computed in each way, under the strategy and in the precision of the run, and compared with what
transformers computes.

Shapes: B sequences of T tokens, H hidden size, V vocabulary.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from core.errors import ConfigError
from parallel.config import Dtype
from parallel.strategy import Strategy, frozen_children
from parallel.world import World
from trainer.config import TrainerConfig
from trainer.evaluation import evaluating
from trainer.objective import (
    Objective,
    model_inputs,
    outputs_and_own_loss,
    outputs_of,
    with_head,
)

POSITIONS, APART = "positions", "apart"

NUM_TOKENS = 16
# The head's output is multiplied by this gain, so that caps on logits show even if the logits are
# small. It is a power of two, so that multiplying rounds nothing.
_GAIN = 1024.0
# Relative difference, to the largest value, up to which results count as equal, by type.
_TOLERANCE = {Dtype.float32: 1e-5, Dtype.bfloat16: 2e-2}
# The same for padding after a document, which changes only how its sums are rounded.
_ROUNDING = {Dtype.float32: 1e-3, Dtype.bfloat16: 1e-1}


class Probe:
    """Asks the model of an objective, and its teacher if any; every question is collective.

    Args:
        config: Settings of the run.
        module: Objective that holds the models.
        strategy: Strategy that has set it up.
        world: Ranks of the run.
    """

    def __init__(
        self, config: TrainerConfig, module: Objective, strategy: Strategy, world: World
    ) -> None:
        self._module, self._strategy, self._world = module, strategy, world
        self._models = [module.model, *(child.model for child in frozen_children(module))]
        self._max_seq_len = config.data.max_seq_len
        self._tolerance = _TOLERANCE[config.precision.param_dtype]
        self._rounding = _ROUNDING[config.precision.param_dtype]
        # A separate generator is alike on all ranks and leaves the run's random state unchanged.
        self._generator = torch.Generator().manual_seed(config.seed)

    def unfusable(self) -> str | None:
        """Returns the class of a model whose loss needs more than hidden states and head, or None.

        Its logits are not the product of the two, or its auxiliary loss depends on the logits.
        """
        for model in self._models:
            (difference,) = self._compare(_fused_difference, model)
            if not difference <= self._tolerance:
                return type(model).__name__
        if self._module.auxiliary:
            model = self._module.model
            own, fused_own = self._compare(_own_losses, model)
            if not abs(own - fused_own) <= self._tolerance * abs(own):
                return type(model).__name__
        return None

    def auxiliary_loss(self) -> bool:
        """Returns whether transformers trains the model on more than cross-entropy.

        Raises:
            ConfigError: Its loss has parts other than cross-entropy and auxiliary losses.
        """
        model = self._module.model
        loss, entropy, own = self._compare(_losses, model)
        allowed = self._tolerance * abs(loss)
        if abs(loss - own) <= allowed:
            return False  # its cross-entropy differs from the common one; ours replaces it
        if not abs(loss - entropy - own) <= allowed:
            raise ConfigError(
                "model",
                type(model).__name__,
                f"transformers trains it on a loss ({loss:.5g}) that is more than cross-entropy "
                f"({entropy:.5g}) and auxiliary losses ({own:.5g})",
                "choose another architecture",
            )
        return own != 0

    def has_more_than_entropy(self) -> bool:
        """Returns whether transformers trains the model on more than cross-entropy, of any kind."""
        try:
            return self.auxiliary_loss()
        except ConfigError:
            return True

    def documents(self) -> str | None:
        """Returns how the documents of a sample are kept apart.

        Returns:
            POSITIONS if restarting positions separate them: no document is changed by the one
            before it, and each gives the same result as alone. APART if each needs a row of its
            own. None if even there padding after a document changes it.
        """
        found = [self._documents(model) for model in self._models]
        return next((way for way in (None, APART) if way in found), POSITIONS)

    def _documents(self, model: Any) -> str | None:
        if self._max_seq_len < 2:
            return POSITIONS
        lengths = _lengths(self._max_seq_len)
        rows = [[self._tokens(model, size) for size in sizes] for sizes in lengths]
        documents = [document for row in rows for document in row]
        alone = [self._outputs(model, document[None])[0] for document in documents]
        padded = list(self._outputs(model, pad_sequence(documents, batch_first=True)))
        largest = max(output.abs().max().item() for output in alone)
        rounding = _distance(alone, padded) / largest
        leak = difference = math.inf
        if _takes_positions(model):
            packed = self._packed(model, rows)
            # The same rows after other first documents: the later ones must not change by a bit.
            changed = self._packed(model, [[self._tokens(model, len(r[0])), *r[1:]] for r in rows])
            later = [
                i for i, place in enumerate(n for row in rows for n in range(len(row))) if place
            ]
            leak = _distance([packed[i] for i in later], [changed[i] for i in later]) / largest
            difference = _distance(alone, packed) / largest
        rounding, leak, difference = self._world.max(rounding, leak, difference)
        is_causal = rounding <= self._rounding
        # Experts compute tokens in groups, whose other members affect rounding.
        has_experts = any(name.endswith("experts") for name, _ in model.named_modules())
        if leak <= (self._tolerance if has_experts else 0.0) and (
            difference <= max(self._tolerance, 4 * rounding if is_causal else 0.0)
        ):
            return POSITIONS
        return APART if is_causal else None

    def _packed(self, model: Any, rows: list[list[Tensor]]) -> list[Tensor]:
        """Returns the output of each document, (T, H) or (T, V), from rows of several documents."""
        input_ids = torch.stack([torch.cat(row) for row in rows])
        positions = torch.stack(
            [torch.cat([torch.arange(len(document)) for document in row]) for row in rows]
        )
        outputs = self._outputs(model, input_ids, positions)
        return [
            part
            for output, row in zip(outputs, rows, strict=True)
            for part in output.split([len(document) for document in row])
        ]

    def _outputs(self, model: Any, input_ids: Tensor, positions: Tensor | None = None) -> Tensor:
        device = self._world.device
        inputs = model_inputs(
            input_ids.to(device), None if positions is None else positions.to(device)
        )
        return self._ask(outputs_of, model, self._module.fused, inputs).float()

    def _compare(self, question: Callable[[Any, Tensor], Tensor], model: Any) -> list[float]:
        """Returns numbers that a question computes from a few tokens; equal on all ranks."""
        length = max(2, min(NUM_TOKENS, self._max_seq_len))
        input_ids = torch.stack([self._tokens(model, length) for _ in range(2)])
        answer = self._ask(question, model, input_ids.to(self._world.device))
        return self._world.max(*answer.tolist())

    def _ask(self, question: Callable[..., Tensor], model: Any, *arguments: Any) -> Tensor:
        """Returns the answer of a question that is asked inside the strategy's forward.

        All weights are gathered there. A frozen model is asked inside the child that holds it,
        because its weights are gathered only during that child's forward.
        """
        module: Any = self._module
        held = (child for child in frozen_children(module) if child.get_submodule("model") is model)
        owner: Any = next(held, module)
        owner.forward = partial(question, model, *arguments)
        if owner is not module:
            module.forward = lambda: owner()  # a module assigned here would become a child
        try:
            with evaluating(module):
                return self._strategy.forward()
        finally:
            del owner.forward
            if owner is not module:
                del module.forward

    def _tokens(self, model: Any, length: int) -> Tensor:
        """Returns random tokens, (T) int64, the same on every rank."""
        vocab_size = model.config.get_text_config().vocab_size
        return torch.randint(vocab_size, (length,), generator=self._generator)


def _fused_difference(model: Any, input_ids: Tensor) -> Tensor:
    """Returns the relative difference between logits and hidden states times head: (1)."""
    inputs = model_inputs(input_ids, None)
    head = model.get_output_embeddings()
    with head.register_forward_hook(lambda _, __, output: output * _GAIN):
        logits: Tensor = model(**inputs).logits.float()
    hidden: Tensor | None = getattr(model.base_model(**inputs), "last_hidden_state", None)
    weight = getattr(head, "weight", None)
    if hidden is None or weight is None or weight.shape != (logits.shape[-1], hidden.shape[-1]):
        return torch.full((1,), torch.inf)
    product = F.linear(*with_head(model, hidden)).float() * _GAIN
    return torch.dist(logits, product).div(product.norm()).reshape(1)


def _losses(model: Any, input_ids: Tensor) -> Tensor:
    """Returns transformers' loss, the next token's cross-entropy, and the model's own loss: (3)."""
    inputs = model_inputs(input_ids, None)
    loss = model(**inputs, labels=input_ids).loss
    logits, own = outputs_and_own_loss(model, False, inputs)
    entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())
    return torch.stack([loss.float(), entropy, own.float()])


def _own_losses(model: Any, input_ids: Tensor) -> Tensor:
    """Returns the model's own loss, with logits of all positions and of one: (2)."""
    inputs = model_inputs(input_ids, None)
    return torch.stack([outputs_and_own_loss(model, h, inputs)[1].float() for h in (False, True)])


def _takes_positions(model: Any) -> bool:
    """Returns whether forward has an argument for positions, used or not."""
    parameters = inspect.signature(model.base_model.forward).parameters.values()
    return any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in parameters)


def _lengths(max_seq_len: int) -> list[list[int]]:
    """Returns lengths of two and three documents in a sample, which show attention windows."""
    first, second = max(1, 3 * max_seq_len // 8), max(1, max_seq_len // 4)
    sizes = [[first, max_seq_len - first], [second, first, max_seq_len - first - second]]
    return [[size for size in row if size] for row in sizes]


def _distance(outputs: list[Tensor], others: list[Tensor]) -> float:
    """Returns the largest difference between documents, of which `others` may be padded."""
    return max((a - b[: len(a)]).abs().max().item() for a, b in zip(outputs, others, strict=True))
