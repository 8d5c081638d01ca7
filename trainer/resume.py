"""Finds the checkpoint to resume from, and refuses one that belongs to another run."""

import json
from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core import layout
from core.errors import ConfigError
from parallel.optimizer_state import OptimizerState
from parallel.strategy import Strategy, persistent_buffers
from parallel.world import World
from trainer.checkpoint import Located, TrainerState, committed, set_aside, tensor_shapes
from trainer.config import TrainerConfig
from trainer.data.order import OrderRule
from trainer.remote import RemoteCheckpoints
from trainer.reporter import Reporter

# A difference in one of these keys changes what is trained. All others (strategy, ranks,
# micro-batch, paths, logging, ...) change where and how, and are only reported.
_MEANING = (
    "seed",
    "global_batch_size",
    "model.model_type",
    "model.vocab_size",
    "model.config",
    "model.keep_zeros",
    "fake_quant.bits",
    "fake_quant.group_size",
    "objective",
    "data.max_seq_len",
    "data.mask_documents",
    "data.add_bos",
    "data.parse_special_tokens",
    "optim",
    "schedule",
    "precision",
)

# Values that runs had before a key existed.
_BEFORE_KEYS = {
    "optim.decay": "matrices",
    "data.add_bos": False,
    "checkpoint.replicas": "auto",
}
# Keys of data that do not affect its digest: they apply when it is read, or say where it is.
_NOT_IN_DIGEST = (
    "data.max_seq_len",
    "data.mask_documents",
    "data.cache_dir",
    "data.cache_url",
    "data.verify",
)


def stored_config(config: TrainerConfig, world: World) -> dict[str, Any] | None:
    """Returns the settings of the run to be resumed, before its checkpoint is verified; collective.

    Data is prepared before the checkpoint is read, in the way of the run that it belongs to.

    Returns:
        Stored settings; None if there is nothing to resume, or nothing that can be read.

    Raises:
        ConfigError: There is nothing on a disk, and the object store cannot be used.
    """
    if config.resume == "never":
        return None
    # Machines may have disks of their own, and this one may be new.
    own = _config_on_disk(config) if world.local_rank == 0 else None
    found = [stored for stored in world.gather(own) if stored is not None]
    if found:
        return max(found, key=lambda stored: stored[0])[1]
    stored = None
    with world.together():
        if world.rank == 0 and config.checkpoint.upload is not None and config.resume == "auto":
            stored = _config_in_store(config.checkpoint.upload)
    return world.from_first(stored)


def _config_on_disk(config: TrainerConfig) -> tuple[str, dict[str, Any]] | None:
    """Returns the name and the settings of the newest checkpoint whose settings can be read."""
    checkpoints = committed(config.run_dir / layout.CHECKPOINTS)
    if config.resume != "auto":
        checkpoints = [Path(config.resume).expanduser()]
    for checkpoint in checkpoints:
        with suppress(OSError, ValueError, KeyError, TypeError):  # reported by verification
            content = (checkpoint / layout.TRAINER_STATE).read_bytes()
            return checkpoint.name, json.loads(content)["config"]
    return None


def _config_in_store(url: str) -> dict[str, Any] | None:
    remote = RemoteCheckpoints(url)
    remote.check()
    for name in remote.names():
        with suppress(OSError, ValueError, KeyError, TypeError):
            stored: dict[str, Any] = json.loads(remote.read(name, layout.TRAINER_STATE))["config"]
            return stored
    return None


def set_newer_aside(
    folder: Path, checkpoint: Path, remote: RemoteCheckpoints | None, reporter: Reporter
) -> None:
    """Renames this run's checkpoints of later steps on this disk; called once for each disk.

    They are damaged, or the user went back before them: the next resume must not take them.

    Raises:
        ConfigError: The object store has newer ones, which only their owner may delete.
    """
    newer = [p for p in committed(folder) if p.name > checkpoint.name]
    if remote is not None and checkpoint.parent != folder:
        ahead = [name for name in remote.names() if name > checkpoint.name]
        if ahead:
            raise ConfigError(
                "resume",
                checkpoint,
                f"{remote.url} contains {ahead[0]}, which the next resume would take",
                "delete it there, or set another checkpoint.upload",
            )
    for path in newer:
        reporter.say(f"{path.name} is set aside as {set_aside(path).name}")


def keep_what_was_found(
    resolved: dict[str, Any], saved: dict[str, Any], given: Collection[str]
) -> None:
    """Takes over what was found out or chosen when the run began.

    Args:
        resolved: Settings of this run; they are changed.
        saved: Settings of the checkpoint.
        given: Keys that the user set; their `auto` is a choice, and is compared like any other
            value.
    """
    if resolved["model"]["fused_loss"] == "auto" and "model.fused_loss" not in given:
        resolved["model"]["fused_loss"] = saved["model"]["fused_loss"]
    if "probe" in saved:
        resolved["probe"] = saved["probe"]
    before = saved["optim"].get("decay", _BEFORE_KEYS["optim.decay"])
    if resolved["optim"]["decay"] == "auto" and "optim.decay" not in given:
        resolved["optim"]["decay"] = before
    if "decay" not in saved["optim"] and resolved["optim"]["decay"] == before:
        del resolved["optim"]["decay"]  # so that the next resume sees an old run as well


def check_same_run(
    config: TrainerConfig, state: TrainerState, saved: TrainerState, say: Callable[[str], None]
) -> None:
    """Compares what a checkpoint was trained with to what this run would train with.

    Args:
        config: Settings of this run.
        state: State of this run if it began anew.
        saved: State of the checkpoint.
        say: Function that prints a line.

    Raises:
        ConfigError: A difference changes what is trained and is not listed in `allow_changes`;
            names the first one.
    """
    before, now = _BEFORE_KEYS | _flat(saved.config), _BEFORE_KEYS | _flat(state.config)
    before |= {"data": saved.data_digest, "data.tokenizer": saved.tokenizer_fingerprint}
    now |= {"data": state.data_digest, "data.tokenizer": state.tokenizer_fingerprint}
    # Follows from `stop`. Training for longer changes no step, unless the schedule is stretched.
    total_before = before.pop("total_steps", None)
    total_now = now.pop("total_steps", None)
    bound = {"data", "data.tokenizer"}
    if config.schedule.check(config.total_steps) is not None:  # its shape depends on the length
        before["stop.steps"], now["stop.steps"] = total_before, total_now
        bound.add("stop.steps")
    for key in config.allow_changes:
        if not any(_within(k, [key]) for k in before.keys() | now.keys()):
            raise ConfigError(
                "allow_changes", key, "there is no such key", "name a key of the config"
            )
    # A change of the data's digest follows from an allowed change of its settings.
    implied = {
        "data"
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key)
        and key.startswith("data.")
        and not _within(key, _NOT_IN_DIGEST)
        and _within(key, config.allow_changes)
    }
    changes = []
    digests = ("data", "data.tokenizer")  # last: the setting that changed them is more precise
    for key in sorted(before.keys() | now.keys(), key=lambda key: (key in digests, key)):
        old, new = before.get(key), now.get(key)
        if old == new or (key not in before and not new):  # a new key that is off changes nothing
            continue
        binding = key in bound or _within(key, _MEANING)
        if binding and not (_within(key, config.allow_changes) or key in implied):
            raise ConfigError(
                key,
                _shown(new),
                f"the checkpoint at step {saved.step} was trained with {_shown(old)}",
                f"set it back, choose another run.name, or add allow_changes=[{key}]",
            )
        if binding or not key.startswith(("run.", "resume", "allow_changes")):
            changes.append(f"{key} was {_shown(old)}, is {_shown(new)}")
    if changes:
        say(f"resume: {'; '.join(changes)}")


def data_changed(saved: dict[str, Any], now: dict[str, Any]) -> bool:
    """Returns whether two settings of data, as stored, would prepare different data."""
    before, after = ({f"data.{k}": v for k, v in _flat(x).items()} for x in (saved, now))
    return any(
        before.get(key) != after.get(key) and (key in before or after.get(key))
        for key in before.keys() | after.keys()
        if key not in _NOT_IN_DIGEST
    )


def order_of(saved: TrainerState, run_dir: Path) -> OrderRule:
    """Returns the rule by which a resumed run orders its samples.

    Runs from before rules had names added weights with the `sum` of their Python version.
    environment.json contains that version until such a run is resumed; afterwards data.json names
    the rule.

    Args:
        saved: State of the checkpoint.
        run_dir: Directory of its run; if the version is missing there, Python 3.11 is assumed.
    """
    if saved.order is not None:
        return saved.order
    named = _read_object(run_dir / layout.DATA).get("order")
    if named in tuple(OrderRule):
        return OrderRule(named)
    python = str(_read_object(run_dir / layout.ENVIRONMENT).get("python", ""))
    major, _, rest = python.partition(".")
    minor = rest.partition(".")[0]
    if major.isdecimal() and minor.isdecimal() and (int(major), int(minor)) >= (3, 12):
        return OrderRule.compensated
    return OrderRule.left_to_right


def check_same_model(
    checkpoint: Path,
    model: nn.Module,
    optimizer_state: OptimizerState,
    say: Callable[[str], None],
) -> None:
    """Compares a checkpoint's tensors with those of the model.

    Checkpoints of earlier releases lack buffers, and have optimizer state of frozen parameters.

    Args:
        checkpoint: Verified checkpoint.
        model: Model on the meta device.
        optimizer_state: Description of what its optimizer keeps.
        say: Function that prints a line.

    Raises:
        ConfigError: Names or shapes differ.
    """
    parameters, buffers = dict(model.named_parameters()), persistent_buffers(model)
    wanted = {name: tensor.shape for name, tensor in (*parameters.items(), *buffers.items())}
    frozen: set[str] = set()
    for name, parameter in parameters.items():
        entries = [slot.entry(name) for slot in optimizer_state.slots]
        if parameter.requires_grad:
            wanted |= dict.fromkeys(entries, parameter.shape)
        else:
            frozen.update(entries)
    stored = tensor_shapes(checkpoint)
    absent = buffers.keys() - stored.keys()
    if absent:
        say(
            f"resume: {checkpoint.name} was saved by a release that did not save buffers; "
            f"{', '.join(sorted(absent))} are the model's own"
        )
    for name in sorted((wanted.keys() | stored.keys()) - absent - frozen):
        if wanted.get(name) != stored.get(name):
            raise ConfigError(
                "resume",
                checkpoint,
                f"is a checkpoint of another model: {name} is {_shape(stored.get(name))} there and "
                f"{_shape(wanted.get(name))} in this one",
                "set model to what it was, or choose another run.name",
            )


def load_checkpoint(located: Located, strategy: Strategy, step: int, world: World) -> None:
    """Fills the state of a strategy from a checkpoint that `check_same_model` accepted; collective.

    Buffers that the checkpoint lacks, as those of earlier releases do, keep their values.

    Args:
        located: The checkpoint.
        strategy: Strategy that was set up.
        step: Step of the checkpoint.
        world: Ranks of the run.
    """
    stored = tensor_shapes(located.folder)

    def read(tensors: dict[str, Tensor]) -> None:
        located.read({n: t for n, t in tensors.items() if n in stored})

    # Not `together`: strategies communicate as they load, so a rank that fails alone has to end.
    strategy.load_state(read, num_updates=step)
    world.barrier()
    if world.local_rank == 0:  # the ranks of a machine fetch each part once for all of them
        located.forget_fetched()


def _read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; empty if the file is missing or truncated."""
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _shown(value: Any) -> str:
    """Returns a value as it is written in a configuration."""
    return "null" if value is None else str(value)


def _within(key: str, names: tuple[str, ...] | list[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in names)


def _shape(shape: torch.Size | None) -> str:
    return "absent" if shape is None else str(tuple(shape))
