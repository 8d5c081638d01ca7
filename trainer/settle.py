"""Decides, once before the first step, how loss and documents are computed and what is trained.

The model's answers (`probe.py`) decide, unless the user's settings do, or the way in which a
resumed run began.
"""

from collections.abc import Callable, Collection
from typing import Any

import torch

from core.errors import ConfigError
from parallel.strategy import Strategy
from parallel.world import World
from trainer.config import TrainerConfig
from trainer.objective import Objective
from trainer.probe import APART, NUM_TOKENS, POSITIONS, Probe


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
    length = max(2, min(NUM_TOKENS, config.data.max_seq_len))
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


def _fuses(probe: Probe, asked: bool | str, say: Callable[[str], None]) -> bool:
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


def _kept_apart(probe: Probe, name: str, say: Callable[[str], None]) -> str:
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
