"""Prepares token datasets on disk for a data configuration; finds existing ones by content.

A folder in `data.cache_dir` is named by the digest of all that determines its content: the source's
files and settings, the tokenizer, and how documents are split and cut. Sequence length, masking
and weights apply when samples are read, so changing them prepares nothing again.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from core.errors import ConfigError, DamagedError
from core.folder import locked
from trainer.data.build import build_dataset
from trainer.data.cache import build_once, full_disk_explained, open_cache
from trainer.data.config import (
    DataConfig,
    MixtureDataConfig,
    PreparationConfig,
    SourceConfig,
    SourceKind,
)
from trainer.data.fetch import DataStore
from trainer.data.files import FileDigests, StopRequested, check_stop
from trainer.data.sources import PIECE_CHARS, WHOLE_FILE_BYTES, Source, check_keys, open_source
from trainer.data.tokenizer import KEY as TOKENIZER_KEY
from trainer.data.tokenizer import (
    adds_bos,
    check_for_model,
    fingerprint,
    load_tokenizer,
    tokenizer_family,
    train_tokenizer,
)
from trainer.data.tokens import TokenDataset, read_manifest, read_tokenizer, verify
from trainer.data.writer import FORMAT_VERSION, canonical_digest, folder_name

# More text does not make a better tokenizer; from a larger source a fixed share is drawn.
TOKENIZER_TRAINING_BYTES = 512 << 20

Build = Callable[[Path], None]  # fills an empty folder


@dataclass(frozen=True)
class PreparedData:
    """Holds the data that training reads.

    Attributes:
        names: Names of the sources, in the configured order.
        sources: Training split of each source.
        weights: Share of each source in the samples, relative to the others.
        validation: Held-out split of each source.
        tokenizer: Tokenizer that made all tokens.
        tokenizer_fingerprint: Hexadecimal SHA-256 of the tokenizer.
        add_bos: True if each document begins with the tokenizer's BOS.
        digest: Hexadecimal SHA-256 over the content of the folders and the weights.
        folders: Folder of each source.
        validation_bytes_per_token: Bytes of held-out text (UTF-8) per token, EOS counted as a
            token: loss in nats / (ln 2 * this) is bits per byte.
    """

    names: list[str]
    sources: list[TokenDataset]
    weights: list[float]
    validation: list[TokenDataset]
    tokenizer: PreTrainedTokenizerFast
    tokenizer_fingerprint: str
    add_bos: bool
    digest: str
    folders: list[Path]
    validation_bytes_per_token: float

    def describe(self) -> dict[str, Any]:
        """Returns the content of the run's `data.json` in JSON types."""
        return {
            "digest": self.digest,
            "tokenizer_fingerprint": self.tokenizer_fingerprint,
            "validation_bytes_per_token": self.validation_bytes_per_token,
            "sources": [
                _describe(*source)
                for source in zip(self.names, self.weights, self.sources, strict=True)
            ],
        }

    def verify(
        self,
        share_of: Callable[[Path], tuple[int, int]] = lambda _: (0, 1),
        stop_requested: StopRequested = lambda: False,
    ) -> None:
        """Verifies the digests of this rank's share of all files.

        Args:
            share_of: Function that returns, for a folder, the number of this rank among those that
                share its verification, and how many they are.
            stop_requested: Function that is polled while reading.

        Raises:
            DamagedError: A file is damaged; names the file and the fix.
        """
        for folder in dict.fromkeys(self.folders):
            verify(folder, *share_of(folder), stop_requested)


class Plan:
    """Knows the prepared folder of each source, and makes those that are missing.

    Attributes:
        folders: Folder of each source, by its name, in the configured order.
        given: Names of the sources whose folder the user gave.
    """

    def __init__(
        self,
        folders: dict[str, Path],
        builders: dict[str, Build],
        stop_requested: StopRequested,
    ) -> None:
        self.folders, self.given = folders, folders.keys() - builders.keys()
        self._builders, self._stop_requested = builders, stop_requested

    def make(self, store: DataStore | None = None) -> None:
        """Makes all folders exist: what is missing comes from the store, or is prepared.

        Raises:
            ConfigError: A source cannot be used; nothing is left behind.
            DamagedError: A folder in the store was altered.
            Interrupted: A stop was requested; no partial result is left behind.
        """
        for source, build in self._builders.items():
            folder = self.folders[source]
            build_once(folder, partial(self._fill, folder.name, build, store), self._stop_requested)

    def _fill(self, name: str, build: Build, store: DataStore | None, staging: Path) -> None:
        if store is None or not store.fetch(name, staging, self._stop_requested):
            build(staging)


def make_plan(
    cfg: DataConfig,
    *,
    model_path: str | None,
    stop_requested: StopRequested,
    model_config: PreTrainedConfig | None = None,
    begun_before: bool = False,
) -> Plan:
    """Opens the sources, and finds out in which folders their tokens are, or have to be.

    Any number of processes may call this and `Plan.make` at once: one works, the others wait.

    Args:
        cfg: Settings of the data to prepare.
        model_path: Pretrained model whose tokenizer `auto` takes; None trains one.
        stop_requested: Function that is polled between batches.
        model_config: Config of the model to be trained: a tokenizer is trained, or refused, as
            transformers will load it beside this config. None skips this check.
        begun_before: True prepares data as for a run that began before `data.add_bos` existed: a
            byte order mark is part of a text, links to folders are not followed, and `model_config`
            is ignored.

    Raises:
        ConfigError: A setting or a source cannot be used.
        DamagedError: A prepared folder was altered.
        Interrupted: A stop was requested.
    """
    sources = named_sources(cfg)
    _check(cfg, sources)
    folders = {
        name: Path(source.path or "").expanduser().absolute()
        for name, (_, source) in sources.items()
        if source.kind is SourceKind.tokens
    }
    if begun_before:
        model_config = None
    tokenizer = _given_tokenizer(cfg, model_path, model_config, list(folders.values()))
    add_bos = _resolve_bos(cfg, tokenizer, list(folders.values()))
    builders: dict[str, Build] = {}
    if len(folders) < len(sources):
        cache = open_cache(cfg.cache_dir)
        opened = _open_sources(sources, cache, begun_before, stop_requested)
        family = PreTrainedTokenizerFast
        if tokenizer is None and model_config is not None:
            family = tokenizer_family(model_config)
        missing = _plan_sources(cfg, opened, tokenizer, family, add_bos, cache, stop_requested)
        folders |= {name: folder for name, (folder, _) in missing.items()}
        builders = {name: build for name, (_, build) in missing.items()}
    return Plan({name: folders[name] for name in sources}, builders, stop_requested)


def prepare(
    cfg: DataConfig,
    *,
    model_path: str | None,
    stop_requested: StopRequested,
    model_config: PreTrainedConfig | None = None,
    begun_before: bool = False,
) -> PreparedData:
    """Finds or makes the token datasets on this machine; see `make_plan` and `Plan.make`."""
    plan = make_plan(
        cfg,
        model_path=model_path,
        stop_requested=stop_requested,
        model_config=model_config,
        begun_before=begun_before,
    )
    plan.make(open_store(cfg))
    return open_prepared(cfg, plan.folders)


def open_store(cfg: PreparationConfig) -> DataStore | None:
    """Returns the store at `data.cache_url`, if there is one.

    Raises:
        ConfigError: The URL cannot be used.
    """
    return None if cfg.cache_url is None else DataStore(cfg.cache_url)


def named_sources(cfg: DataConfig) -> dict[str, tuple[str, SourceConfig]]:
    """Returns pairs (configuration key, source) by name."""
    if not isinstance(cfg, MixtureDataConfig):
        return {cfg.kind.value: ("data", cfg)}
    if not cfg.sources:
        fix = "add some, e.g. '+data.sources={code: {kind: stdlib}}'"
        raise ConfigError("data.sources", "{}", "a mixture needs sources", fix)
    return {name: (f"data.sources.{name}", source) for name, source in cfg.sources.items()}


def _check(cfg: DataConfig, sources: dict[str, tuple[str, SourceConfig]]) -> None:
    for key, source in sources.values():
        check_keys(key, source)
    if not isinstance(cfg, MixtureDataConfig) and cfg.weight != 1.0:
        rule = "has no effect with one source"
        raise ConfigError("data.weight", cfg.weight, rule, "remove it or use data=mixture")


def _given_tokenizer(
    cfg: PreparationConfig,
    model_path: str | None,
    model_config: PreTrainedConfig | None,
    token_folders: list[Path],
) -> PreTrainedTokenizerFast | None:
    """Returns the configured tokenizer, or the one stored with tokens; None to train one."""
    tokenizer, name = None, cfg.tokenizer
    if name == "auto" and model_path is not None:
        name = model_path
    if name not in ("auto", "train"):
        tokenizer = load_tokenizer(name)
    for folder in token_folders:
        if cfg.tokenizer == "train":
            rule = f"{folder} holds tokens already, made by another tokenizer"
            raise ConfigError(TOKENIZER_KEY, "train", rule, "set it to auto")
        tokenizer, name = _same_tokenizer(tokenizer, name, folder), str(folder)
    default = PreparationConfig.tokenizer_vocab_size
    if tokenizer is not None and cfg.tokenizer_vocab_size != default:
        rule = f"has no effect, as the tokenizer of {name} is taken"
        fix = "remove it, or set data.tokenizer=train"
        raise ConfigError("data.tokenizer_vocab_size", cfg.tokenizer_vocab_size, rule, fix)
    # A pretrained model's own tokenizer is exported exactly as it was loaded.
    if tokenizer is not None and model_config is not None and name != model_path:
        check_for_model(name, tokenizer, model_config)
    return tokenizer


def _same_tokenizer(
    tokenizer: PreTrainedTokenizerFast | None, name: str, folder: Path
) -> PreTrainedTokenizerFast:
    manifest = read_manifest(folder)
    if tokenizer is None:
        return read_tokenizer(folder, manifest)
    if fingerprint(tokenizer) != manifest["tokenizer_fingerprint"]:
        rule = f"the tokens in {folder} were made by another tokenizer"
        raise ConfigError(TOKENIZER_KEY, name, rule, "prepare them again from their source")
    return tokenizer


def _resolve_bos(
    cfg: PreparationConfig, tokenizer: PreTrainedTokenizerFast | None, token_folders: list[Path]
) -> bool:
    """Returns the resolved `data.add_bos`; tokens that are already prepared decide it."""
    key = "data.add_bos"
    for folder in token_folders:
        transform = read_manifest(folder)["transform"]
        added = bool(transform.get("add_bos"))
        if cfg.add_bos == "auto":
            cfg = replace(cfg, add_bos=added)
        if cfg.add_bos != added:
            rule = f"the documents in {folder} begin {'with' if added else 'without'} a BOS token"
            fix = f"set it to {str(added).lower()}, or prepare them again from their source"
            raise ConfigError(key, cfg.add_bos, rule, fix)
        if cfg.parse_special_tokens and not transform.get("parse_special_tokens"):
            rule = f"special tokens in {folder} were read as text"
            fix = "remove it, or prepare them again from their source"
            raise ConfigError("data.parse_special_tokens", True, rule, fix)
    if cfg.add_bos == "auto":
        return tokenizer is not None and adds_bos(tokenizer)
    if cfg.add_bos and (tokenizer is None or tokenizer.bos_token_id is None):
        name = "the tokenizer that is trained on the data" if tokenizer is None else "the tokenizer"
        raise ConfigError(key, True, f"{name} has no BOS token", "set it to auto or false")
    return bool(cfg.add_bos)


def _plan_sources(
    cfg: PreparationConfig,
    sources: dict[str, Source],
    tokenizer: PreTrainedTokenizerFast | None,
    family: type[PreTrainedTokenizerFast],
    add_bos: bool,
    cache: Path,
    stop_requested: StopRequested,
) -> dict[str, tuple[Path, Build]]:
    """Returns the folder of each source that is not tokens already, and what fills it."""
    opened = list(sources.values())
    training = _training_identity(cfg, family, opened)
    # A tokenizer that is not trained yet is identified by what it will be trained on.
    made_by = fingerprint(tokenizer) if tokenizer else f"train:{canonical_digest(training)}"
    transform = _transform(cfg, made_by, add_bos)

    @functools.cache
    def made() -> PreTrainedTokenizerFast:
        return tokenizer or _trained(cfg, family, cache, training, opened, stop_requested)

    def plan(source: Source) -> tuple[Path, Build]:
        def build(folder: Path) -> None:
            build_dataset(
                folder,
                source=source,
                tokenizer=made(),
                cfg=cfg,
                add_bos=add_bos,
                transform=transform,
                stop_requested=stop_requested,
            )

        return cache / folder_name(source.identity, transform), build

    return {name: plan(source) for name, source in sources.items()}


def _open_sources(
    configs: dict[str, tuple[str, SourceConfig]],
    cache: Path,
    begun_before: bool,
    stop_requested: StopRequested,
) -> dict[str, Source]:
    # Under a lock, so that one rank reads 1 TB and the others find its digests.
    with locked(cache / "digests.lock", between=lambda: check_stop(stop_requested)):
        digests = FileDigests(cache / "digests.json", stop_requested)
        try:
            return {
                name: open_source(key, source, digests, begun_before=begun_before)
                for name, (key, source) in configs.items()
                if source.kind is not SourceKind.tokens
            }
        finally:  # after a stop in the middle, the next start continues with these digests
            with full_disk_explained(cache):
                digests.save()


def _transform(cfg: PreparationConfig, made_by: str, add_bos: bool) -> dict[str, object]:
    # Keys are absent if off, so that folders prepared before they existed are found again.
    chosen = {"add_bos": add_bos, "parse_special_tokens": cfg.parse_special_tokens}
    return {
        **{name: True for name, is_on in chosen.items() if is_on},
        "format_version": FORMAT_VERSION,
        "tokenizer": made_by,
        "validation_fraction": cfg.validation_fraction,
        "shard_tokens": cfg.shard_tokens,
        "whole_file_bytes": WHOLE_FILE_BYTES,
        "piece_chars": PIECE_CHARS,
    }


def _training_identity(
    cfg: PreparationConfig, family: type[PreTrainedTokenizerFast], sources: list[Source]
) -> dict[str, object]:
    identity: dict[str, object] = {
        "vocab_size": cfg.tokenizer_vocab_size,
        "validation_fraction": cfg.validation_fraction,
        "sources": [source.identity for source in sources],
    }
    if family is not PreTrainedTokenizerFast:  # absent otherwise, as in older identities
        identity["family"] = family.__name__
    return identity


def _trained(
    cfg: PreparationConfig,
    family: type[PreTrainedTokenizerFast],
    cache: Path,
    identity: dict[str, object],
    sources: list[Source],
    stop_requested: StopRequested,
) -> PreTrainedTokenizerFast:
    """Returns one tokenizer for all sources, trained once on their training documents."""
    folder = cache / f"tokenizer-{canonical_digest(identity)[:16]}"

    def build(temporary: Path) -> None:
        texts = _training_texts(cfg, sources, stop_requested)
        tokenizer = train_tokenizer(texts, cfg.tokenizer_vocab_size, family)
        tokenizer.save_pretrained(temporary)
        (temporary / "fingerprint").write_text(fingerprint(tokenizer))

    build_once(folder, build, stop_requested)
    tokenizer = load_tokenizer(str(folder))
    if fingerprint(tokenizer) != (folder / "fingerprint").read_text():
        fix = f"delete {folder}; it is trained again"
        raise DamagedError(TOKENIZER_KEY, folder, "was altered since it was trained", fix)
    return tokenizer


def _training_texts(
    cfg: PreparationConfig, sources: list[Source], stop_requested: StopRequested
) -> Iterator[str]:
    size_bytes = sum(source.size_bytes for source in sources)
    kept = min(1.0, TOKENIZER_TRAINING_BYTES / max(1, size_bytes))
    held_out = cfg.validation_fraction
    for source in sources:
        for document in source.documents():
            check_stop(stop_requested)
            # The draw that splits documents also selects them: without state, always the same ones.
            if held_out <= document.draw < held_out + (1 - held_out) * kept:
                yield document.text


def open_prepared(cfg: DataConfig, folders: dict[str, Path]) -> PreparedData:
    """Opens prepared folders.

    Args:
        cfg: Settings of the data.
        folders: Folder of each source, by its name.

    Raises:
        DamagedError: A folder was altered.
    """
    sources = named_sources(cfg)
    paths = [folders[name] for name in sources]
    train = [TokenDataset.open(folder, "train") for folder in paths]
    validation = [TokenDataset.open(folder, "validation") for folder in paths]
    weights = [float(source.weight) for _, source in sources.values()]
    manifests = [dataset.manifest for dataset in train]
    # Weights decide which sample comes when, so they are part of what a run was trained on.
    content = [[m["digest"], weight] for m, weight in zip(manifests, weights, strict=True)]
    num_bytes = sum(dataset.num_bytes for dataset in validation)
    return PreparedData(
        names=list(sources),
        sources=train,
        weights=weights,
        validation=validation,
        tokenizer=read_tokenizer(paths[0], manifests[0]),
        tokenizer_fingerprint=manifests[0]["tokenizer_fingerprint"],
        add_bos=bool(manifests[0]["transform"].get("add_bos")),
        digest=canonical_digest(content),
        folders=paths,
        validation_bytes_per_token=num_bytes / sum(dataset.num_tokens for dataset in validation),
    )


def _describe(name: str, weight: float, dataset: TokenDataset) -> dict[str, Any]:
    manifest = dataset.manifest
    counted = ("num_tokens", "num_documents", "num_bytes")
    return {
        "name": name,
        "weight": weight,
        "folder": str(dataset.folder),
        "digest": manifest["digest"],
        **manifest["source"],
        "transform": manifest["transform"],
        "splits": {
            split: {key: entry[key] for key in counted}
            for split, entry in manifest["splits"].items()
        },
    }
