"""What a user may set about data. Imports neither torch nor datasets: `--help` reads it."""

import math
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path

from omegaconf import MISSING

from core.settings.rules import setting


def expanded(name: str) -> str:
    """A folder or a hub name, with the home directory in place of `~`, which no shell replaces
    behind `key=`."""
    return str(Path(name).expanduser()) if name.startswith("~") else name


class SourceKind(Enum):
    """Where documents come from. Names are lower case since OmegaConf reads an enum by its name."""

    stdlib = "stdlib"
    text = "text"
    jsonl = "jsonl"
    parquet = "parquet"
    hub = "hub"
    tokens = "tokens"


@dataclass
class SourceConfig:
    """One source of documents.

    Attributes:
        kind: What `path` is.
        path: File, folder or glob (`text`, `jsonl`, `parquet`), a repository or folder that
            `datasets.load_dataset` takes (`hub`), or a prepared token dataset (`tokens`). Links to
            files and folders are followed; one that leads nowhere is refused.
        column: The field that holds the text (`jsonl`, `parquet`, `hub`). The others need not be
            the same in all rows or files. Rows without text are left out, and counted.
        subset: Name of the configuration inside a hub repository.
        revision: Commit or tag of a hub repository.
        split: Split of a hub repository.
        streaming: Read a hub repository without storing it first.
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
    """How documents become samples, the same for every source.

    Attributes:
        max_seq_len: Tokens in a sample (T).
        tokenizer: `auto` (the pretrained model's own, else trained on the data), `train` (a
            byte-level BPE, which splits text as transformers will for the model's type), or a
            folder or hub name.
        tokenizer_vocab_size: Largest size of a trained tokenizer (little text makes fewer tokens).
        validation_fraction: Share of the documents held out. A document's digest decides, so that a
            held-out document stays held out when others are added.
        add_bos: Whether each document begins with the tokenizer's BOS token: `auto` does what the
            tokenizer itself does to a text (Gemma's and Llama's add one), `true` or `false`. What
            it came to is stored with the run.
        parse_special_tokens: Whether a document that spells a special token, such as
            `<|im_end|>`, gets that token (`true`: for text that was laid out as a conversation) or
            the text of its name (`false`).
        mask_documents: Compute and predict within documents only, whatever the model; otherwise a
            sample is read as one text.
        cache_dir: Where prepared token datasets live, one folder each, named by content.
        shard_tokens: Tokens in one shard file.
        verify: Check the digests of the prepared shards at every start.
    """

    max_seq_len: int = setting(1024, above=0)
    tokenizer: str = "auto"
    tokenizer_vocab_size: int = 4096
    validation_fraction: float = setting(0.05, above=0, below=1, fix="try 0.05")
    add_bos: bool | str = setting("auto", choices=("auto", True, False))
    parse_special_tokens: bool = False
    mask_documents: bool = False
    cache_dir: str = "${oc.env:SPOTFORGE_CACHE,'~/.cache/spotforge'}"
    shard_tokens: int = setting(100_000_000, above=0, fix="try 100000000")
    verify: bool = True

    def __post_init__(self) -> None:
        self.tokenizer = expanded(self.tokenizer)


@dataclass
class SingleDataConfig(PreparationConfig, SourceConfig):
    """`data=stdlib|text|jsonl|parquet|hub|tokens`: one source, keys at the top (`data.path`)."""


@dataclass
class MixtureDataConfig(PreparationConfig):
    """`data=mixture`: several sources.

    Attributes:
        sources: The sources, by names that you choose: `data.sources.NAME.kind|path|weight|...`.
    """

    sources: dict[str, SourceConfig] = field(default_factory=dict)


DataConfig = SingleDataConfig | MixtureDataConfig
