"""Reads and verifies token datasets (`writer.py` describes the folder)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from core import layout
from core.errors import ConfigError, DamagedError
from core.folder import Entry, wrong_content, wrong_size
from trainer.data.files import StopRequested, check_stop
from trainer.data.tokenizer import fingerprint, load_tokenizer
from trainer.data.writer import FORMAT_VERSION, TOKENIZER, canonical_digest

Tokens = npt.NDArray[np.int64]


class TokenDataset:
    """Reads one split of a prepared folder: a stream of tokens with known starts of documents.

    Attributes:
        folder: Folder of the dataset.
        split: Name of the split, `train` or `validation`.
        manifest: Content of the folder's manifest.
        num_tokens: Number of tokens in the stream, with an EOS after each document.
        num_documents: Number of documents.
        num_bytes: Total length of their texts in UTF-8.
    """

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        self.folder, self.split, self.manifest = folder, split, manifest
        entry = manifest["splits"][split]
        self.num_tokens: int = entry["num_tokens"]
        self.num_documents: int = entry["num_documents"]
        self.num_bytes: int = entry["num_bytes"]
        # Files are little-endian on every machine. They are mapped, so that a sample reads only its
        # own pages and the ranks of a machine share them.
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._shards = [
            np.memmap(folder / shard["file"], dtype, mode="r") for shard in entry["shards"]
        ]
        self._starts = np.memmap(folder / entry["documents"]["file"], "<u8", mode="r")
        # Position in the stream at which each shard starts, and the end: (num_shards + 1,)
        self._borders = np.cumsum([0, *(len(shard) for shard in self._shards)])

    @classmethod
    def open(cls, folder: Path, split: str) -> "TokenDataset":
        """Opens a split; verifies the manifest and all sizes of files, but not their digests.

        Raises:
            ConfigError: The folder is not a prepared one, or was written by a later version.
            DamagedError: A file is missing or has another size, or the manifest was altered.
        """
        return cls(folder, split, read_manifest(folder))

    def read(self, start: int, count: int) -> Tokens:
        """Returns tokens [start, start + count) of the stream, across shards: (count,) int64.

        Raises:
            IndexError: The range is not inside the stream.
        """
        if not 0 <= start <= start + count <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {self.num_tokens}")
        tokens = np.empty(count, np.int64)
        done = 0
        # From the right, so that a position on a border belongs to the shard that starts there.
        shard = int(np.searchsorted(self._borders, start, side="right")) - 1
        while done < count:
            inside = start + done - int(self._borders[shard])
            part = self._shards[shard][inside : inside + count - done]
            tokens[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return tokens

    def document_starts(self, start: int, count: int) -> Tokens:
        """Returns starts of documents in [start, start + count), minus `start`: (n,) int64."""
        bounds = np.array([start, start + count], self._starts.dtype)
        first, last = np.searchsorted(self._starts, bounds)
        return self._starts[first:last].astype(np.int64) - start

    def first_texts(self, tokenizer: PreTrainedTokenizerFast, count: int) -> list[str]:
        """Returns the first `count` documents as text, each cut to 4096 tokens."""
        starts = [*self._starts[: count + 1].tolist(), self.num_tokens][: count + 1]
        backend = tokenizer.backend_tokenizer
        return [
            backend.decode(self.read(start, min(end - start, 4096)).tolist())
            for start, end in zip(starts, starts[1:], strict=False)
        ]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns a folder's manifest after verifying it, the tokenizer's digests and all sizes.

    Raises:
        ConfigError: The folder is not a prepared one, or was written by a later version.
        DamagedError: A file is missing or altered.
    """
    path = folder / layout.MANIFEST
    if not path.is_file():
        rule = f"is not a prepared token dataset: it has no {layout.MANIFEST}"
        raise ConfigError("data.path", folder, rule, "give a folder that spotforge has prepared")
    try:
        manifest = parse_manifest(path.read_bytes())
    except ValueError as error:
        raise _damaged(folder, layout.MANIFEST, str(error)) from error
    if manifest["format_version"] != FORMAT_VERSION:
        rule = f"has format {manifest['format_version']}, this version reads {FORMAT_VERSION}"
        raise ConfigError("data.path", folder, rule, "prepare it again")
    # Sizes only: digests would cost a read of all tokens at each start (data.verify).
    for entry in entries_of(manifest):
        _check_size(folder, entry)
    for entry in manifest["tokenizer"]:
        _check_digest(folder, entry)
    return manifest


def parse_manifest(content: bytes) -> dict[str, Any]:
    """Returns a manifest from the bytes of its file.

    Raises:
        ValueError: It is damaged; says how.
    """
    try:
        manifest: dict[str, Any] = json.loads(content)
        digest = manifest.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError("cannot be parsed") from error
    if canonical_digest(manifest) != digest:
        raise ValueError("was altered since it was written")
    return manifest | {"digest": digest}


def read_tokenizer(folder: Path, manifest: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Returns the tokenizer that made the tokens.

    Raises:
        DamagedError: This version of the libraries loads another tokenizer from the same files.
    """
    tokenizer = load_tokenizer(str(folder / TOKENIZER))
    if fingerprint(tokenizer) != manifest["tokenizer_fingerprint"]:
        raise _damaged(folder, TOKENIZER, "is not the tokenizer that made these tokens")
    return tokenizer


def verify(
    folder: Path, rank: int, world_size: int, stop_requested: StopRequested = lambda: False
) -> None:
    """Verifies the digests of this rank's share of the files: index % world_size == rank.

    Args:
        folder: Prepared folder that all `world_size` ranks see. With one copy per node, pass the
            local rank and local world size.
        rank: Number of this process.
        world_size: Number of processes that share the work.
        stop_requested: Function that is polled while reading.

    Raises:
        DamagedError: A file is damaged; names the file and the fix.
    """
    entries = entries_of(read_manifest(folder))
    for entry in entries[rank::world_size]:
        _check_digest(folder, entry, stop_requested)


def entries_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the entries of all files of a folder but its manifest: `file`, size and digest."""
    entries: list[dict[str, Any]] = []
    for split in manifest["splits"].values():
        entries += [*split["shards"], split["documents"]]
    return [*entries, *manifest["tokenizer"]]


def _check_size(folder: Path, entry: dict[str, Any]) -> None:
    if fault := wrong_size(folder / entry["file"], _entry(entry)):
        raise _damaged(folder, entry["file"], fault)


def _check_digest(
    folder: Path, entry: dict[str, Any], stop_requested: StopRequested = lambda: False
) -> None:
    path = folder / entry["file"]
    if fault := wrong_content(path, _entry(entry), lambda: check_stop(stop_requested)):
        raise _damaged(folder, entry["file"], fault)


def _entry(entry: dict[str, Any]) -> Entry:
    return {"size_bytes": entry["size_bytes"], "sha256": entry["sha256"]}


def _damaged(folder: Path, file: str, rule: str) -> DamagedError:
    return DamagedError("data", folder / file, rule, f"delete {folder}; it is prepared again")
