"""Settings of data. Imports neither torch nor datasets, because `--help` reads it."""

import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

from core.settings.rules import setting


def expanded(name: str) -> str:
    """Returns a folder or hub name with `~` expanded, which no shell does behind `key=`."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


class SourceKind(Enum):
    """Lists the kinds of sources. Names are lower case because OmegaConf reads enums by name."""

    stdlib = "stdlib"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    hub = "hub"
    tokens = "tokens"


@dataclass
class SourceConfig:
    """Configures one source of documents.

    Attributes:
        kind: Kind of the source, which tells what `path` is.
        path: File, folder or glob (`text`, `jsonl`, `parquet`), a repository or folder that
            `datasets.load_dataset` takes (`hub`), or a prepared token dataset (`tokens`). Links to
            files and folders are followed; a broken link is refused.
        column: Field that contains the text (`jsonl`, `parquet`, `hub`). Other fields may differ
            between rows and files. Rows without text are skipped and counted.
        subset: Name of the configuration inside a hub repository.
        revision: Commit or tag of a hub repository.
        split: Split of a hub repository.
        streaming: True reads a hub repository without storing it first.
        weight: Share of the samples in a mixture, relative to the other sources.
    """

    kind: SourceKind = MISSING
    path: str | None = None
    column: str | None = None
    subset: str | None = None
    revision: str | None = None
    split: str | None = None
    streaming: bool = False
    weight: float = setting(1.0, above=0, below=math.inf, fix="or remove the source")


@dataclass
class PreparationConfig:
    """Configures how documents become samples, alike for every source.

    Attributes:
        max_seq_len: Number of tokens in a sample (T).
        tokenizer: Tokenizer to use: `auto` (the pretrained model's, otherwise one trained on the
            data), `train` (a byte-level BPE that splits text as transformers does for the model's
            type), or a folder or hub name.
        tokenizer_vocab_size: Largest size of a trained tokenizer (little text makes fewer tokens).
        validation_fraction: Share of the documents that is held out. A document's digest decides,
            so it stays held out when other documents are added.
        add_bos: Addition of the tokenizer's BOS token to the start of each document: `true`,
            `false`, or `auto`, which does as the tokenizer does by default (Gemma's and Llama's add
            one). The result is stored with the run.
        parse_special_tokens: Treatment of a document that spells a special token such as
            `<|im_end|>`: `true` makes it that token (for text laid out as a conversation), `false`
            keeps it as text.
        mask_documents: True restricts attention and prediction to documents, for any model; false
            treats a sample as one text.
        cache_dir: Folder of prepared token datasets, each in a folder named by its content.
        cache_url: URL of a folder in an object store (`s3://bucket/data`, any fsspec URL): what is
            prepared is uploaded there, and what is there is fetched instead of prepared again.
        shard_tokens: Number of tokens in one shard file.
        verify: True verifies the digests of the prepared shards at every start.
    """

    max_seq_len: int = setting(1024, above=0)
    tokenizer: str = "auto"
    tokenizer_vocab_size: int = 4096
    validation_fraction: float = setting(0.05, above=0, below=1, fix="try 0.05")
    add_bos: bool | str = setting("auto", choices=("auto", True, False))
    parse_special_tokens: bool = False
    mask_documents: bool = False
    cache_dir: str = "${oc.env:SPOTFORGE_CACHE,'~/.cache/spotforge'}"
    cache_url: str | None = None
    shard_tokens: int = setting(100_000_000, above=0, fix="try 100000000")
    verify: bool = True

    def __post_init__(self) -> None:
        self.tokenizer = expanded(self.tokenizer)


@dataclass
class SingleDataConfig(PreparationConfig, SourceConfig):
    """Configures one source, `data=stdlib|text|jsonl|parquet|hub|tokens`, with keys in `data`."""


@dataclass
class MixtureDataConfig(PreparationConfig):
    """Configures `data=mixture`: several sources.

    Attributes:
        sources: Sources by names that you choose: `data.sources.NAME.kind|path|weight|...`.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)


DataConfig = SingleDataConfig | MixtureDataConfig
