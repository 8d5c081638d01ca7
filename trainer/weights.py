"""Maps weights between a Hugging Face folder and the model in memory.

Transformers 5 renames, splits and joins tensors between the two (experts are one tensor each on
disk and one for all in memory, `embed_out` becomes `lm_head`). Both directions follow its rules
(`conversion_mapping.py` and `core_model_loading.py` of transformers), but a few tensors at a time,
while `from_pretrained` and `save_pretrained` hold the whole model.

A group contains the tensors that must be converted together, on both sides. Its result is known
before anything is read, because the group is first converted on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    dot_natural_key,
    revert_weight_conversion,
)

from core.errors import ConfigError
from trainer.model_config import PathModelConfig
from trainer.weight_files import described_weights, weight_files

# Types that are numbers by themselves; codes of a quantized model need their scales.
_NUMBERS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}

# Returns a tensor by its name on the side that is read.
Read = Callable[[str], Tensor]


@dataclass(frozen=True)
class WeightGroup:
    """Describes tensors that are converted together.

    Attributes:
        sources: Names of the tensors before conversion.
        targets: Names, shapes and types of the results, on the meta device.
        convert: Function that reads the sources and makes the targets.
    """

    sources: tuple[str, ...]
    targets: dict[str, Tensor]
    convert: Callable[[Read], dict[str, Tensor]]


class WeightsReader:
    """Reads a parameter or persistent buffer by its name in a model.

    At most one group of tensors is held. The model is told which of transformers' conversions its
    files used, as `from_pretrained` does, so that an export reverts them.

    Attributes:
        stored_names: Names of the tensors in the files.

    Args:
        config: Folder or hub repository.
        model: Model on any device; only its names, shapes and types count.

    Raises:
        ConfigError: The files lack a tensor of the model, contain one that the model has no place
            for, or contain one of another shape or kind of number.
        DamagedError: A file cannot be read.
    """

    def __init__(self, config: PathModelConfig, model: PreTrainedModel) -> None:
        self._files = weight_files(config)
        self.stored_names = sorted(self._files)
        conversions = get_model_conversion_mapping(model)
        stored = described_weights(config, self._files)
        groups, unexplained = _loading_groups(model, conversions, stored)
        _use_conversions(model, conversions)
        self._group_of = {name: group for group in groups for name in group.targets}
        self._twins = _twins(model)
        self._converted: dict[str, Tensor] = {}

        _check_missing(config, model, self._group_of, self._twins)
        _check_unexplained(config, model, unexplained)
        vocab_size = getattr(model.config.get_text_config(), "vocab_size", None)
        for name, wanted in model.state_dict().items():
            if name in self._group_of:
                _check_kind(config, self._group_of[name], name, wanted, vocab_size)
        self._check_tied(config)

    def __call__(self, name: str) -> Tensor:
        there = next(n for n in (name, *self._twins.get(name, ())) if n in self._group_of)
        if there not in self._converted:
            self._converted.clear()
            self._converted = self._group_of[there].convert(self._read_stored)
        # Popped, so that the tensors of a group are freed one after another.
        return self._converted.pop(there)

    def __contains__(self, name: str) -> bool:
        return any(n in self._group_of for n in (name, *self._twins.get(name, ())))

    def _read_stored(self, name: str) -> Tensor:
        # Opened each time: mapped pages of a file that stays open count as memory in use.
        with safe_open(self._files[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def _check_tied(self, config: PathModelConfig) -> None:
        """Raises ConfigError if parameters that the model ties differ in the files."""
        stored = [
            (name, twin)
            for name, twins in self._twins.items()
            for twin in twins
            if name < twin and {name, twin} <= self._group_of.keys()
        ]
        for pair in stored:
            # One pair at a time, so that no more than two groups are held.
            one, other = (self._group_of[n].convert(self._read_stored)[n] for n in pair)
            if not torch.equal(one, other):
                raise ConfigError(
                    "model.path",
                    config.path,
                    f"its config ties {pair[0]} and {pair[1]}, but their weights differ",
                    "set tie_word_embeddings to false in its config.json if both are meant",
                )


def saving_groups(
    model: PreTrainedModel, stored_names: Iterable[str] | None = None
) -> list[WeightGroup]:
    """Returns the tensors that `save_pretrained` would write for `model`, in groups.

    Args:
        model: Model on the meta device, in the type in which it is saved.
        stored_names: Names in the files that it was loaded from; None for a model that was not
            loaded, or if they are not known.
    """
    if stored_names is not None:
        conversions = get_model_conversion_mapping(model)
        _loading_groups(model, conversions, dict.fromkeys(stored_names), convert=False)
        _use_conversions(model, conversions)
        reverted = [c for c in conversions if c.was_used()]
    else:
        # As in transformers: without files it is not known whether names had a prefix.
        conversions = get_model_conversion_mapping(model, add_legacy=False)
        reverted = [c for c in conversions if not isinstance(c, PrefixChange)]
    reversed_ones = [c.reverse_transform() for c in reverted[::-1]]
    converters = [c for c in reversed_ones if isinstance(c, WeightConverter)]
    tensors = _saved_tensors(model)
    together: dict[str, list[str]] = {}
    for name in sorted(tensors, key=dot_natural_key):
        renamed, _ = _converted_name(name, converters)
        together.setdefault(renamed, []).append(name)
    groups = []
    for names in together.values():

        def convert(read: Read, names: list[str] = names) -> dict[str, Tensor]:
            made: dict[str, Tensor] = revert_weight_conversion(model, {n: read(n) for n in names})
            return made

        groups.append(WeightGroup(tuple(names), convert(tensors.__getitem__), convert))
    return groups


def canonical_names(model: PreTrainedModel) -> dict[str, str]:
    """Returns the checkpoint name of every tensor of `model`, including twins of tied ones.

    A tied parameter has one canonical name: the first under which `named_parameters` yields it.
    """
    names = {name: name for name in model.state_dict()}
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    return names


def _loading_groups(
    model: PreTrainedModel,
    conversions: list[Any],
    stored: Mapping[str, Tensor | None],
    convert: bool = True,
) -> tuple[list[WeightGroup], list[str]]:
    """Sorts stored tensors into groups, as `convert_and_load_state_dict_in_model` does.

    Args:
        model: Model of the results.
        conversions: Transformers' conversions for it; each records whether it was used.
        stored: Tensors on the meta device by their names in the files.
        convert: True makes the groups; False only records which conversions are used.

    Returns:
        Groups, and the stored names for which the model has no tensor.
    """
    renamings = [c for c in conversions if not isinstance(c, WeightConverter)]
    converters = [c for c in conversions if isinstance(c, WeightConverter)]
    of_pattern = {pattern: c for c in converters for pattern in c.source_patterns}
    wanted = model.state_dict()
    prefix = model.base_model_prefix
    plain: dict[str, str] = {}
    joint: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    unexplained: list[str] = []
    for name in sorted(stored, key=dot_natural_key):
        renamed = name
        # As in transformers, all renamings apply in turn, but only the first converter that
        # matches.
        for renaming in renamings:
            renamed, _ = renaming.rename_source_key(renamed)
        renamed, pattern = _converted_name(renamed, converters)
        renamed = _with_prefix(renamed, prefix, wanted)
        if renamed not in wanted and name in wanted:  # the file already has the model's names
            renamed, pattern = name, None
        if renamed not in wanted:
            unexplained.append(name)
        elif pattern is None:
            plain[renamed] = name
        else:
            joint.setdefault(renamed, (of_pattern[pattern], []))[1].append((pattern, name))
    if not convert:
        return [], unexplained

    groups = []
    for target, source in plain.items():
        tensor = stored[source]
        assert tensor is not None
        groups.append(WeightGroup((source,), {target: tensor}, _renamed(source, target)))
    for target, (converter, members) in joint.items():
        make = _joined(model, target, converter, members)
        made = make({n: t for n, t in stored.items() if t is not None}.__getitem__)
        groups.append(WeightGroup(tuple(name for _, name in members), made, make))
    return groups, unexplained


def _use_conversions(model: PreTrainedModel, conversions: list[Any]) -> None:
    """Stores in a model the conversions that matched a name, as `from_pretrained` does."""
    vars(model)["_weight_conversions"] = [c for c in conversions if c.was_used()]


def _converted_name(name: str, converters: list[Any]) -> tuple[str, str | None]:
    """Returns the name given by the first converter that matches, and its pattern."""
    for converter in converters:
        renamed, pattern = converter.rename_source_key(name)
        if pattern is not None:
            return renamed, pattern
    return name, None


def _with_prefix(name: str, prefix: str, wanted: Mapping[str, Tensor]) -> str:
    """Returns a name with the base model's prefix added or removed, as the model requires."""
    if not prefix:
        return name
    if name.startswith(prefix):
        bare = re.sub(f"^{prefix}.", "", name, count=1)
        if bare in wanted:
            return bare
    return f"{prefix}.{name}" if f"{prefix}.{name}" in wanted else name


def _renamed(source: str, target: str) -> Callable[[Read], dict[str, Tensor]]:
    return lambda read: {target: read(source)}


def _joined(
    model: PreTrainedModel, target: str, converter: Any, members: list[tuple[str, str]]
) -> Callable[[Read], dict[str, Tensor]]:
    def make(read: Read) -> dict[str, Tensor]:
        # A converter collects tensors, so each conversion needs a fresh copy.
        fresh = deepcopy(converter)
        for pattern, name in members:
            fresh.add_tensor(target, name, pattern, read(name))
        made = fresh.convert(target, model=model, config=model.config)
        return {n: t[0] if isinstance(t, list) else t for n, t in made.items()}

    return make


def _twins(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Returns the other names of each tied parameter."""
    of_parameter: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        of_parameter.setdefault(id(parameter), []).append(name)
    return {
        name: tuple(n for n in names if n != name)
        for names in of_parameter.values()
        for name in names
    }


def _saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the tensors that `save_pretrained` writes, with one name for tied tensors."""
    ignored = set(model._keys_to_ignore_on_save or ())
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    saved: dict[str, Tensor] = {}
    seen: set[int] = set()
    state = model.state_dict(keep_vars=True)
    for name in sorted(state, key=lambda n: n in tied):  # names that others are tied to first
        tensor = state[name]
        if name not in ignored and id(tensor) not in seen:
            seen.add(id(tensor))
            saved[name] = tensor.detach()
    return saved


def _check_missing(
    config: PathModelConfig,
    model: PreTrainedModel,
    group_of: Mapping[str, WeightGroup],
    twins: Mapping[str, tuple[str, ...]],
) -> None:
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    optional = model._keys_to_ignore_on_load_missing or ()
    for name in model.state_dict():
        if any(n in group_of for n in (name, *twins.get(name, ()))):
            continue
        if name not in parameters and any(re.search(pattern, name) for pattern in optional):
            continue
        fix = "download it again, or give a checkpoint of this architecture"
        if name not in parameters:
            fix = (
                "if transformers' own value will do, save it again with "
                "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
            )
        raise ConfigError("model.path", config.path, f"its weights have no {name}", fix)


def _check_unexplained(
    config: PathModelConfig, model: PreTrainedModel, unexplained: list[str]
) -> None:
    """Raises ConfigError for a tensor that transformers would warn about and ignore."""
    ignored = set(model._keys_to_ignore_on_load_unexpected or ())
    buffers = [name for name, _ in model.named_buffers()]
    # Buffers that older versions of transformers saved and newer ones compute.
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        ignored.add(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        ignored.add(r"(^|\.)position_ids$")
    strange = [n for n in unexplained if not any(re.search(p, n) for p in ignored)]
    if strange:
        more = f" (and {len(strange) - 1} more)" if len(strange) > 1 else ""
        raise ConfigError(
            "model.path",
            config.path,
            f"its weights hold {strange[0]}{more}, which {type(model).__name__} has no place for",
            "check that config.json describes these weights, or remove what does not belong",
        )


def _check_kind(
    config: PathModelConfig, group: WeightGroup, name: str, wanted: Tensor, vocab_size: int | None
) -> None:
    found = group.targets[name]
    if found.shape != wanted.shape:
        fix = "config.json and the weights are of different models: download both again"
        # Adding tokens to a model changes only this size.
        if found.shape[1:] == wanted.shape[1:] and wanted.shape[0] == vocab_size:
            fix = (
                f"set vocab_size={found.shape[0]} in its config.json if these weights are meant, "
                "or download both again"
            )
        raise ConfigError(
            "model.path",
            config.path,
            f"{group.sources[0]} makes {name} {tuple(found.shape)}, and it is "
            f"{tuple(wanted.shape)} by its config",
            fix,
        )
    if found.dtype != wanted.dtype and not {found.dtype, wanted.dtype} <= _NUMBERS:
        raise ConfigError(
            "model.path",
            config.path,
            f"{group.sources[0]} is {_name(found.dtype)}, and {name} of the model is "
            f"{_name(wanted.dtype)}: these are codes of a quantized model, or of another model",
            "give the model that it was made from",
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
