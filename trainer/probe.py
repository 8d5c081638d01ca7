"""Asks the loaded model, once before the first step, how it computes.

Families differ in what they do after their head, in what they add to cross-entropy, and in whether
restarting positions separates documents. No list of names could cover this. So a few tokens are
computed in each way, under the strategy and in the precision of the run, and compared with what
transformers computes.

Shapes: B sequences of T tokens, H hidden size, V vocabulary.
"""

import inspect
import math
from collections.abc import Callable, Collection
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

_NUM_TOKENS = 16
# The head's output is multiplied by this gain, so that caps on logits show even if the logits are
# small. It is a power of two, so that multiplying rounds nothing.
_GAIN = 1024.0
# Relative difference, to the largest value, up to which results count as equal, by type.
_TOLERANCE = {Dtype.float32: 1e-5, Dtype.bfloat16: 2e-2}
# The same for padding after a document, which changes only how its sums are rounded.
_ROUNDING = {Dtype.float32: 1e-3, Dtype.bfloat16: 1e-1}


def settle(
    config: TrainerConfig,
    module: Objective,
    strategy: Strategy,
    world: World,
    resolved: dict[str, Any],
    saved: dict[str, Any] | None,
    say: Callable[[str], None],
    given: Collection[str] = (),
) -> None:
    """Decides how `module` computes loss and documents, and records it in `resolved`; collective.

    A resumed run computes as it began. A run that began before this module existed has no such
    records in its settings, and gets none.

    Args:
        config: Settings of this run.
        module: Objective to set up, with its model loaded.
        strategy: Strategy that has set it up.
        world: Ranks of the run.
        resolved: Settings to be stored; they are changed.
        saved: Settings of the checkpoint from which the run resumes, or None.
        say: Function that prints a line.
        given: Keys that the user set; `model.fused_loss=auto` among them decides anew.

    Raises:
        ConfigError: The model cannot be trained as configured, or not as the run began.
    """
    probe = Probe(config, module, strategy, world)
    notes = {} if saved is None else dict(saved.get("probe", {}))
    same = saved is not None and all(
        saved["model"].get(key) == resolved["model"].get(key)
        for key in ("config", "attn_implementation")
    )
    if not same:
        notes["auxiliary_loss"] = probe.auxiliary_loss()
    elif "auxiliary_loss" not in notes and probe.has_more_than_entropy():
        say(
            f"what {type(module.model).__name__} adds to cross-entropy (an auxiliary loss) is no "
            "part of the loss, as before"
        )
    module.auxiliary = notes.get("auxiliary_loss", False)
    if module.auxiliary:
        say(f"{type(module.model).__name__} has an auxiliary loss, which is part of the loss")

    asked = config.model.fused_loss
    before: Any = None if saved is None else saved["model"]["fused_loss"]
    if saved is not None and (
        asked == before or (asked == "auto" and "model.fused_loss" not in given)
    ):
        module.fused = before
        if module.fused and "probe" not in saved and (name := probe.unfusable()):
            say(
                f"model.fused_loss=true leaves out what {name} does to its logits, as it did before"
            )
    else:
        module.fused = asked is not False and _fuses(probe, asked, say)
        if before and asked == "auto" and not module.fused:
            _refuse_another_loss(config, type(module.model).__name__)
    resolved["model"]["fused_loss"] = module.fused

    if config.data.mask_documents:
        masked = saved is not None and saved["data"]["mask_documents"]
        if masked and "documents" not in notes:
            if probe.documents() != POSITIONS:
                say(
                    f"data.mask_documents: {type(module.model).__name__} does not tell documents "
                    "apart by positions; its documents see each other, as they did before"
                )
        elif not (masked and same):
            notes["documents"] = _kept_apart(probe, type(module.model).__name__, say)
        module.apart = notes.get("documents") == APART
    if notes:
        resolved["probe"] = notes


def leave_unused(
    config: TrainerConfig,
    module: Objective,
    strategy: Strategy,
    world: World,
    say: Callable[[str], None],
) -> None:
    """Excludes parameters that the loss does not depend on from training; collective.

    Args:
        config: Settings of this run.
        module: Objective as `settle` left it: what an auxiliary loss depends on is trained.
        strategy: Strategy that has set it up, and has not loaded any state.
        world: Ranks of the run.
        say: Function that prints a line.
    """
    model: Any = module.model
    refuse_layerdrop(model.config.get_text_config(), world.world_size)
    vocab_size = model.config.get_text_config().vocab_size
    length = max(2, min(_NUM_TOKENS, config.data.max_seq_len))
    tokens = (torch.arange(length, device=world.device) % vocab_size)[None]
    model.eval()  # otherwise layers may be dropped at random and look unused
    try:
        unused = strategy.leave_unused(input_ids=tokens, targets=tokens)
    finally:
        model.train()
    if unused:
        say(
            f"{len(unused)} parameters of {type(model).__name__} do not affect its loss, and are "
            f"not trained: {unused[0]}{', ...' if len(unused) > 1 else ''}"
        )


def refuse_layerdrop(text_config: Any, world_size: int) -> None:
    """Raises ConfigError if ranks would drop different layers in the same step.

    A layer that one rank drops gets no gradient there: DDP fails, and FSDP waits for ever for a
    rank that does not gather the layer.
    """
    for name in ("layerdrop", "decoder_layerdrop"):
        share = getattr(text_config, name, 0.0)
        if share and world_size > 1:
            raise ConfigError(
                f"model.config.{name}",
                share,
                "drops layers at random, different ones on each rank",
                f"add +model.config.{name}=0, or set it in the config.json of a model that is "
                "loaded",
            )


def _fuses(probe: "Probe", asked: bool | str, say: Callable[[str], None]) -> bool:
    name = probe.unfusable()
    if name is None:
        return True
    if asked is True:
        raise ConfigError(
            "model.fused_loss",
            True,
            f"{name} does more to its logits than multiply hidden states by its head, which the "
            "fused loss leaves out",
            "set model.fused_loss=auto",
        )
    say(f"model.fused_loss=false: {name} does more to its logits than the fused loss could")
    return False


def _refuse_another_loss(config: TrainerConfig, name: str) -> None:
    if "model.fused_loss" not in config.allow_changes:
        raise ConfigError(
            "model.fused_loss",
            "auto",
            f"the checkpoint was trained with true, which leaves out what {name} does to its "
            "logits",
            "remove it, or add allow_changes=[model.fused_loss]",
        )


def _kept_apart(probe: "Probe", name: str, say: Callable[[str], None]) -> str:
    way = probe.documents()
    if way is None:
        raise ConfigError(
            "data.mask_documents",
            True,
            f"{name} does not tell documents apart by positions, and padding behind a document "
            "changes it",
            "set data.mask_documents=false",
        )
    if way == APART:
        say(
            f"data.mask_documents: {name} does not tell documents apart by positions, so each is "
            "computed in a row of its own"
        )
    return way


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
        length = max(2, min(_NUM_TOKENS, self._max_seq_len))
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
