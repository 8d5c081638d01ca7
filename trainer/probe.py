"""What the loaded model is asked once, before the first step.

Families differ in what they do behind their head, in what they add to cross-entropy, and in whether
positions that restart keep documents apart. No list of names could say which does what, so a few
tokens are computed in each way, under the strategy and in the precision of the run, and compared
with what transformers makes of them.

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
# What the head makes is multiplied by it: caps show then however small the logits are. It is a
# power of two, so that nothing is rounded.
_GAIN = 1024.0
# Share of the largest value by which equal results may differ, by the type that is computed in.
_TOLERANCE = {Dtype.float32: 1e-5, Dtype.bfloat16: 2e-2}
# The same for what follows a document and changes nothing but how its sums are rounded.
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
    """Decides how `module` computes loss and documents, and notes it in `resolved`; collective.

    A run that goes on computes as it began. One that began before any of this was asked has no such
    notes in its settings, and gets none.

    Args:
        config: Of this run.
        module: Is told; its model is loaded.
        strategy: Has set it up.
        world: The ranks.
        resolved: The settings as they are stored; is changed.
        saved: Those of the checkpoint that the run goes on from, if it does.
        say: Prints a line.
        given: Keys that the user set: `model.fused_loss=auto` among them is asked again.

    Raises:
        ConfigError: If the model cannot be trained as the config says, or not as it began.
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
    """Has training leave alone the parameters that the loss does not depend on; collective.

    Args:
        config: Of this run.
        module: As `settle` left it: what an auxiliary loss depends on takes part.
        strategy: Has set it up, and has not loaded any state.
        world: The ranks.
        say: Prints a line.
    """
    model: Any = module.model
    vocab_size = model.config.get_text_config().vocab_size
    length = max(2, min(_NUM_TOKENS, config.data.max_seq_len))
    tokens = (torch.arange(length, device=world.device) % vocab_size)[None]
    model.eval()  # of layers that are dropped at random, all take part
    try:
        unused = strategy.leave_unused(input_ids=tokens, targets=tokens)
    finally:
        model.train()
    if unused:
        say(
            f"{len(unused)} parameters of {type(model).__name__} take no part in its loss, and "
            f"stay as they are: {unused[0]}{', ...' if len(unused) > 1 else ''}"
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
    """Asks the model of an objective, and its teacher if it has one; every question is collective.

    Args:
        config: Of the run.
        module: Whose models they are.
        strategy: Has set it up.
        world: The ranks.
    """

    def __init__(
        self, config: TrainerConfig, module: Objective, strategy: Strategy, world: World
    ) -> None:
        self._module, self._strategy, self._world = module, strategy, world
        self._models = [module.model, *(child.model for child in frozen_children(module))]
        self._max_seq_len = config.data.max_seq_len
        self._tolerance = _TOLERANCE[config.precision.param_dtype]
        self._rounding = _ROUNDING[config.precision.param_dtype]
        self._generator = torch.Generator().manual_seed(config.seed)

    def unfusable(self) -> str | None:
        """The class of a model whose loss cannot be made of hidden states and head alone, if any.

        That is one whose logits are not their product, or whose auxiliary loss is made of logits.
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
        """Whether transformers trains the model on more than cross-entropy.

        Raises:
            ConfigError: If it does on another loss than cross-entropy and auxiliary losses.
        """
        model = self._module.model
        loss, entropy, own = self._compare(_losses, model)
        allowed = self._tolerance * abs(loss)
        if abs(loss - own) <= allowed:
            return False  # its cross-entropy is not transformers' common one; ours takes its place
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
        """Whether transformers trains the model on more, of whatever kind."""
        try:
            return self.auxiliary_loss()
        except ConfigError:
            return True

    def documents(self) -> str | None:
        """How the documents of a sample are kept apart.

        Returns:
            POSITIONS, if positions that restart do so: no document is changed by the one before it,
            and each comes out as it does alone. APART, if each needs a row of its own. None, if it
            comes out otherwise there, too, with padding behind it.
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
            # The same rows behind other first documents: the later ones must not change by a bit.
            changed = self._packed(model, [[self._tokens(model, len(r[0])), *r[1:]] for r in rows])
            later = [
                i for i, place in enumerate(n for row in rows for n in range(len(row))) if place
            ]
            leak = _distance([packed[i] for i in later], [changed[i] for i in later]) / largest
            difference = _distance(alone, packed) / largest
        rounding, leak, difference = self._world.max(rounding, leak, difference)
        is_causal = rounding <= self._rounding
        # Experts compute tokens in groups: which others are in them makes a difference in rounding.
        has_experts = any(name.endswith("experts") for name, _ in model.named_modules())
        if leak <= (self._tolerance if has_experts else 0.0) and (
            difference <= max(self._tolerance, 4 * rounding if is_causal else 0.0)
        ):
            return POSITIONS
        return APART if is_causal else None

    def _packed(self, model: Any, rows: list[list[Tensor]]) -> list[Tensor]:
        """What comes out of each document, (T, H) or (T, V), when rows of them share positions."""
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
        """Numbers that a question makes of a few tokens; the same on every rank."""
        length = max(2, min(_NUM_TOKENS, self._max_seq_len))
        input_ids = torch.stack([self._tokens(model, length) for _ in range(2)])
        answer = self._ask(question, model, input_ids.to(self._world.device))
        return self._world.max(*answer.tolist())

    def _ask(self, question: Callable[..., Tensor], model: Any, *arguments: Any) -> Tensor:
        """What a question answers where the strategy calls the module, with all weights there.

        A frozen model is asked inside the child that holds it: its weights are there only while
        that one is called.
        """
        module: Any = self._module
        held = (child for child in frozen_children(module) if child.get_submodule("model") is model)
        owner: Any = next(held, module)
        owner.forward = partial(question, model, *arguments)
        if owner is not module:
            module.forward = lambda: owner()  # a module by itself would become a child
        try:
            with evaluating(module):
                return self._strategy.forward()
        finally:
            del owner.forward
            if owner is not module:
                del module.forward

    def _tokens(self, model: Any, length: int) -> Tensor:
        """(T) int64, the same on every rank."""
        vocab_size = model.config.get_text_config().vocab_size
        return torch.randint(vocab_size, (length,), generator=self._generator)


def _fused_difference(model: Any, input_ids: Tensor) -> Tensor:
    """How far logits are from the product of hidden states and head: a share of it, (1)."""
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
    """Transformers' loss, the cross-entropy of the next token, and what is the model's own: (3)."""
    inputs = model_inputs(input_ids, None)
    loss = model(**inputs, labels=input_ids).loss
    logits, own = outputs_and_own_loss(model, False, inputs)
    entropy = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), input_ids[:, 1:].flatten())
    return torch.stack([loss.float(), entropy, own.float()])


def _own_losses(model: Any, input_ids: Tensor) -> Tensor:
    """The model's own loss, with logits of all positions and of one: (2)."""
    inputs = model_inputs(input_ids, None)
    return torch.stack([outputs_and_own_loss(model, h, inputs)[1].float() for h in (False, True)])


def _takes_positions(model: Any) -> bool:
    """Whether there is an argument for them, heeded or not."""
    parameters = inspect.signature(model.base_model.forward).parameters.values()
    return any(p.name == "position_ids" or p.kind is p.VAR_KEYWORD for p in parameters)


def _lengths(max_seq_len: int) -> list[list[int]]:
    """Of two and three documents that fill a sample: windows and chunks of attention show."""
    first, second = max(1, 3 * max_seq_len // 8), max(1, max_seq_len // 4)
    sizes = [[first, max_seq_len - first], [second, first, max_seq_len - first - second]]
    return [[size for size in row if size] for row in sizes]


def _distance(outputs: list[Tensor], others: list[Tensor]) -> float:
    """The largest difference of documents, of which the others may be padded."""
    return max((a - b[: len(a)]).abs().max().item() for a, b in zip(outputs, others, strict=True))
