"""Writes a token dataset as a stream, in constant memory, hashing it on the way.

manifest.json             content of the folder, with the size and SHA-256 of every other file
train-00000.bin ...       token ids, little-endian uint16 or uint32, cut at `shard_tokens`
train-documents.bin       little-endian uint64: start of each document in the split's stream
validation-...            the same for the held-out split
tokenizer/                as `save_pretrained` writes it
"""

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from core import layout
from core.folder import HashedFile, digest_of, manifest_of, write_file
from trainer.data.tokenizer import fingerprint, vocab_size_of

FORMAT_VERSION = 1
SPLITS = ("train", "validation")
TOKENIZER = "tokenizer"


def canonical_digest(content: object) -> str:
    """Returns the SHA-256 (hex) of JSON types, independent of the order of keys."""
    return digest_of(content, separators=(",", ":"))


def folder_name(source: dict[str, object], transform: dict[str, object]) -> str:
    """Returns the name in a cache of what is prepared: the digest of what it is made of.

    Args:
        source: Origin of the documents (`Source.identity`).
        transform: Settings that determine the tokens.
    """
    return canonical_digest([source, transform])[:16]


def given_name(digest: str) -> str:
    """Returns the name in a cache of a folder that the user gave, by its manifest's digest."""
    return f"tokens-{digest[:16]}"


class TokenDatasetWriter:
    """Writes one dataset into an empty folder; `finish` completes it.

    Args:
        folder: Folder to write to. Nothing outside it is touched.
        tokenizer: Tokenizer to store with the tokens.
        shard_tokens: Number of tokens in a shard file; a document may cross a border.
    """

    def __init__(
        self, folder: Path, tokenizer: PreTrainedTokenizerFast, *, shard_tokens: int
    ) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self.vocab_size = vocab_size_of(tokenizer)
        # Small ids in two bytes, which halves what is stored, hashed and read.
        self.dtype = np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")
        self._splits = {
            split: _SplitWriter(folder, split, self.dtype, shard_tokens) for split in SPLITS
        }

    def __enter__(self) -> "TokenDatasetWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for split in self._splits.values():
            split.close()

    def add(self, split: str, tokens: list[int], num_bytes: int) -> None:
        """Appends a document.

        Args:
            split: Name of the split, `train` or `validation`.
            tokens: Token ids, EOS included; not empty.
            num_bytes: Length of the text in UTF-8.
        """
        self._splits[split].add(np.asarray(tokens, self.dtype), num_bytes)

    def num_documents(self, split: str) -> int:
        """Returns the number of documents added to a split so far."""
        return self._splits[split].num_documents

    def finish(self, source: dict[str, object], transform: dict[str, object]) -> None:
        """Writes the tokenizer and the manifest.

        Args:
            source: Origin of the documents (`Source.identity`).
            transform: Settings that determine the tokens.
        """
        splits = {name: split.finish() for name, split in self._splits.items()}
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "tokenizer_fingerprint": fingerprint(self._tokenizer),
            "vocab_size": self.vocab_size,
            "eos_token_id": self._tokenizer.eos_token_id,
            "dtype": self.dtype.name,
            "source": source,
            "transform": transform,
            "splits": splits,
            "tokenizer": self._save_tokenizer(),
        }
        # Readers look for the manifest, so it is written last.
        manifest["digest"] = canonical_digest(manifest)
        write_file(self._folder / layout.MANIFEST, json.dumps(manifest, indent=1))

    def _save_tokenizer(self) -> list[dict[str, object]]:
        folder = self._folder / TOKENIZER
        if "local_files_only" in self._tokenizer.init_kwargs:
            # transformers records whether the hub may be asked, which is not part of the data.
            self._tokenizer.init_kwargs["local_files_only"] = False
        self._tokenizer.save_pretrained(folder)
        return [
            {"file": f"{TOKENIZER}/{name}", **entry} for name, entry in manifest_of(folder).items()
        ]


class _SplitWriter:
    """Writes the token stream of one split, cut into shards, and the starts of its documents."""

    def __init__(self, folder: Path, split: str, dtype: "np.dtype[Any]", shard_tokens: int) -> None:
        self._folder, self._split, self._dtype = folder, split, dtype
        self._shard_tokens = shard_tokens
        self._documents = HashedFile(folder / f"{split}-documents.bin")
        self._shard: HashedFile | None = None
        self._shards: list[dict[str, object]] = []
        self.num_tokens = self.num_documents = self.num_bytes = 0

    def add(self, tokens: npt.NDArray[Any], num_bytes: int) -> None:
        self._documents.write(np.array(self.num_tokens, "<u8").tobytes())
        self.num_documents += 1
        self.num_bytes += num_bytes
        # The border of a shard may cut a document; the stream of tokens is continuous.
        while len(tokens):
            if self._shard is None:
                name = f"{self._split}-{len(self._shards):05d}.bin"
                self._shard = HashedFile(self._folder / name)
            room = self._shard_tokens - self._shard.size_bytes // self._dtype.itemsize
            self._shard.write(tokens[:room].tobytes())
            self.num_tokens += len(tokens[:room])
            if len(tokens) >= room:
                self._end_shard()
            tokens = tokens[room:]

    def finish(self) -> dict[str, object]:
        self._end_shard()
        return {
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_bytes": self.num_bytes,
            "shards": self._shards,
            "documents": _described(self._documents),
        }

    def close(self) -> None:
        self._documents.close()
        if self._shard is not None:
            self._shard.close()

    def _end_shard(self) -> None:
        if self._shard is not None:
            num_tokens = self._shard.size_bytes // self._dtype.itemsize
            self._shards.append({**_described(self._shard), "num_tokens": num_tokens})
            self._shard = None


def _described(file: HashedFile) -> dict[str, object]:
    """Finishes a file and returns its entry for the manifest."""
    return {"file": file.path.name, **file.finish()}
