"""Writes a checkpoint as an ordinary Hugging Face folder, without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from core import layout
from core.errors import ConfigError, SpotforgeError
from core.folder import digest_of, sha256_of, staged_folder, write_lineage
from monitoring.environment import describe_environment
from parallel.config import Dtype
from trainer.checkpoint import Located, described_tensors, read_state
from trainer.data.tokenizer import check_tokenizer, fingerprint, load_tokenizer
from trainer.model import Materializer, build_meta_model
from trainer.model_config import PathModelConfig
from trainer.weight_files import INDEX, SINGLE
from trainer.weights import WeightGroup, WeightsReader, canonical_names, saving_groups

_SHARD_BYTES = 5 * 10**9  # size of one file that the hub recommends
_NUM_PROBED = 16  # number of tokens whose logits are compared


def export_checkpoint(located: Located, out: Path, dtype: Dtype) -> None:
    """Writes safetensors, config, tokenizer and `lineage.json`, and replaces `out` atomically.

    Tensors have the names and shapes that `save_pretrained` gives them. One shard of about 5 GB is
    held at a time. The written files are verified before they replace `out`.

    Args:
        located: Committed, verified checkpoint.
        out: Hugging Face folder to write.
        dtype: Type of its weights; float32 reproduces the training model's logits exactly.

    Raises:
        ConfigError: The folder cannot be written, `out` contains other files, or transformers loads
            its tokenizer as another one.
        SpotforgeError: The written weights differ from the checkpoint's.
    """
    _check_replaceable(out)
    checkpoint = located.folder
    try:
        with staged_folder(out, replace=True) as staging:
            shutil.copytree(checkpoint / layout.ASSETS, staging, dirs_exist_ok=True)
            names = staging / layout.STORED_NAMES
            stored_names = json.loads(names.read_text()) if names.exists() else None
            names.unlink(missing_ok=True)
            weights = _Weights(located, staging, getattr(torch, dtype.value))
            _write_weights(weights, staging, stored_names)
            config = json.loads((staging / "config.json").read_text())
            # Engines choose the class of a model by `architectures`.
            config |= {"architectures": [type(weights.model).__name__], "dtype": dtype.value}
            (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            _check_reads_back(weights, staging)
            _check_tokenizer(checkpoint, staging)
            write_lineage(staging, _origin(checkpoint, dtype))
    except OSError as e:
        raise ConfigError(
            "export",
            out,
            e.strerror or str(e),
            "free space or change permissions, then export again",
        ) from e


def _check_replaceable(out: Path) -> None:
    """Raises ConfigError unless `out` is missing, empty, or contains only an earlier export."""
    if not out.exists():
        return
    if not out.is_dir():
        raise ConfigError("out", out, "is a file", "name a folder")
    files = {str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()}
    known: set[str] = set()
    if layout.LINEAGE in files:
        known = {layout.LINEAGE, *json.loads((out / layout.LINEAGE).read_text())["files"]}
    strange = sorted(files - known)
    if strange:
        raise ConfigError(
            "out", out, f"contains {strange[0]}, which no export wrote", "choose an empty folder"
        )


def _check_tokenizer(checkpoint: Path, folder: Path) -> None:
    """Raises ConfigError if the exported tokenizer makes other tokens than the one in training."""
    if fingerprint(load_tokenizer(str(folder))) != read_state(checkpoint).tokenizer_fingerprint:
        # A class may name an additional token and still make the same tokens of every text.
        check_tokenizer(folder, PreTrainedTokenizerFast.from_pretrained(checkpoint / layout.ASSETS))


class _Weights:
    """Reads the model's tensors from a checkpoint, in the types of the export.

    Args:
        located: Verified checkpoint.
        folder: Folder with its config.json.
        dtype: Type of the export.
    """

    def __init__(self, located: Located, folder: Path, dtype: torch.dtype) -> None:
        self._located, self._checkpoint = located, located.folder
        self.config = PathModelConfig(path=str(folder), weights=False, attn_implementation=None)
        self.model = build_meta_model(self.config, 0, dtype)
        self._canonical = canonical_names(self.model)
        self._stored = described_tensors(located.folder)
        exact: dict[str, torch.dtype] = self.model._get_dtype_plan(dtype)
        self._dtypes = {
            name: next((t for part, t in exact.items() if re.search(part, name)), tensor.dtype)
            for name, tensor in self.model.state_dict().items()
        }
        self._absent = self._read_absent()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns tensors by their names in the model."""
        names = list(names)
        wanted = {self._canonical[n] for n in names} - self._absent.keys()
        found = {n: torch.empty_like(self._stored[n], device="cpu") for n in wanted}
        self._located.read(found)
        found |= self._absent
        return {n: found[self._canonical[n]].to(self._dtypes[n]) for n in names}

    def _read_absent(self) -> dict[str, Tensor]:
        """Returns the buffers that an earlier release did not save, from the initial model.

        Raises:
            ConfigError: The initial model is no longer available.
        """
        absent = set(self._canonical.values()) - self._stored.keys()
        if not absent:
            return {}
        settings = read_state(self._checkpoint).config["model"]
        if settings.get("weights"):
            source = PathModelConfig(path=settings["path"], revision=settings["revision"])
            reader = WeightsReader(source, self.model)
            found = {name: reader(name) for name in absent}
        else:
            model = build_meta_model(self.config, 0)
            fill = Materializer(model, model, self.config, 0, torch.device("cpu"))
            for name in absent:
                fill(model.get_submodule(name.rpartition(".")[0]))
            found = {name: model.get_buffer(name) for name in absent}
        print(
            f"{self._checkpoint.name} was saved by a release that did not save buffers; "
            f"{', '.join(sorted(absent))} are taken from the initial model",
            file=sys.stderr,
        )
        return found


def _write_weights(weights: _Weights, folder: Path, stored_names: list[str] | None) -> None:
    shards = list(_shards(saving_groups(weights.model, stored_names)))
    weight_map: dict[str, str] = {}
    for i, groups in enumerate(shards, start=1):
        file = SINGLE
        if len(shards) > 1:
            file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for group in groups:
            tensors |= group.convert(weights.read(group.sources).__getitem__)
        save_weights({n: t.contiguous() for n, t in tensors.items()}, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        size = sum(_size_bytes(group) for groups in shards for group in groups)
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def _check_reads_back(weights: _Weights, folder: Path) -> None:
    """Raises SpotforgeError unless the folder has the same weights as the checkpoint.

    Every tensor is compared bit for bit. If two models fit into half of the free memory,
    transformers also loads the folder, and its logits are compared with the checkpoint's.
    """
    model = weights.model
    reader = WeightsReader(PathModelConfig(path=str(folder)), model)
    for name in model.state_dict():
        written = reader(name)
        if not torch.equal(written, weights.read([name])[name]):
            raise SpotforgeError(f"the exported {name} differs from the trained one")
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    # Two models have to fit into half of the free memory.
    if 4 * size > psutil.virtual_memory().available:
        return
    with torch.random.fork_rng(), torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=model.dtype).eval()
        trained = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).eval()
        trained.load_state_dict(weights.read(trained.state_dict()))
        token_ids = torch.arange(_NUM_PROBED)[None] % model.config.get_text_config().vocab_size
        one, other = (m(input_ids=token_ids, use_cache=False).logits for m in (loaded, trained))
    if not torch.allclose(one, other, rtol=0, atol=0, equal_nan=True):
        raise SpotforgeError(
            f"transformers computes other logits from the export than the trained "
            f"{type(model).__name__} has, by up to {(one - other).abs().max().item():.3g}"
        )


def save_weights(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Writes safetensors with the permissions of a new file; the library makes them 0600."""
    save_file(tensors, path, {"format": "pt", **(metadata or {})})
    umask = os.umask(0)  # the umask can only be read by setting it
    os.umask(umask)
    path.chmod(0o666 & ~umask)


def _shards(groups: list[WeightGroup]) -> Iterator[list[WeightGroup]]:
    shard: list[WeightGroup] = []
    size = 0
    for group in groups:
        if shard and size + _size_bytes(group) > _SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append(group)
        size += _size_bytes(group)
    yield shard


def _size_bytes(group: WeightGroup) -> int:
    return sum(t.numel() * t.element_size() for t in group.targets.values())


def _origin(checkpoint: Path, dtype: Dtype) -> dict[str, Any]:
    """Returns the origin of the weights, for `lineage.json`."""
    state = read_state(checkpoint)
    model = state.config["model"]
    return {
        "code": describe_environment().get("git"),
        "config_sha256": digest_of(state.config),
        "data_digest": state.data_digest,
        "tokenizer_fingerprint": state.tokenizer_fingerprint,
        "parent": {"path": model["path"], "revision": model["revision"]}
        if model.get("weights")
        else None,
        "checkpoint": {
            "name": checkpoint.name,
            "manifest_sha256": sha256_of(checkpoint / layout.MANIFEST),
            "step": state.step,
            "num_tokens": state.num_tokens,
        },
        "dtype": dtype.value,
    }
