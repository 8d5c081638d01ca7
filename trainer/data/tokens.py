"""Read a token dataset (see `writer.py` for what is in the folder), and check that it is intact."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerFast

from core.errors import ConfigError, DamagedError
from core.folder import MANIFEST, Entry, wrong_content, wrong_size
from trainer.data.files import StopRequested, check_stop
from trainer.data.tokenizer import fingerprint, load_tokenizer
from trainer.data.writer import FORMAT_VERSION, TOKENIZER, canonical_digest

Tokens = npt.NDArray[np.int64]


class TokenDataset:
    """One split of a prepared folder: a stream of tokens in which documents start at known places.

    Attributes:
        folder: Where it is.
        split: `train` or `validation`.
        manifest: What the folder says of itself.
        num_tokens: Length of the stream, an EOS after each document included.
        num_documents: Documents in it.
        num_bytes: Length of their texts in UTF-8.
    """

    def __init__(self, folder: Path, split: str, manifest: dict[str, Any]) -> None:
        self.folder, self.split, self.manifest = folder, split, manifest
        entry = manifest["splits"][split]
        self.num_tokens: int = entry["num_tokens"]
        self.num_documents: int = entry["num_documents"]
        self.num_bytes: int = entry["num_bytes"]
        dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
        self._shards = [
            np.memmap(folder / shard["file"], dtype, mode="r") for shard in entry["shards"]
        ]
        self._starts = np.memmap(folder / entry["documents"]["file"], "<u8", mode="r")
        # Where each shard starts in the stream, and the end: (num_shards + 1,)
        self._borders = np.cumsum([0, *(len(shard) for shard in self._shards)])

    @classmethod
    def open(cls, folder: Path, split: str) -> "TokenDataset":
        """Open a split for reading; checks the manifest and every file's size, not their digests.

        Raises:
            ConfigError: Not a prepared folder, or one of a later version.
            DamagedError: A file is missing, has another size, or the manifest was altered.
        """
        return cls(folder, split, read_manifest(folder))

    def read(self, start: int, count: int) -> Tokens:
        """Tokens [start, start + count) of the stream, across shard borders: (count,) int64.

        Raises:
            IndexError: Not inside the stream.
        """
        if not 0 <= start <= start + count <= self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of {self.num_tokens}")
        tokens = np.empty(count, np.int64)
        done = 0
        shard = int(np.searchsorted(self._borders, start, side="right")) - 1
        while done < count:
            inside = start + done - int(self._borders[shard])
            part = self._shards[shard][inside : inside + count - done]
            tokens[done : done + len(part)] = part
            done += len(part)
            shard += 1
        return tokens

    def document_starts(self, start: int, count: int) -> Tokens:
        """Documents that start in [start, start + count), as offsets from `start`: (n,) int64."""
        bounds = np.array([start, start + count], self._starts.dtype)
        first, last = np.searchsorted(self._starts, bounds)
        return self._starts[first:last].astype(np.int64) - start

    def first_texts(self, tokenizer: PreTrainedTokenizerFast, count: int) -> list[str]:
        """The first `count` documents, or all, as text; of a long one its first 4096 tokens."""
        starts = [*self._starts[: count + 1].tolist(), self.num_tokens][: count + 1]
        backend = tokenizer.backend_tokenizer
        return [
            backend.decode(self.read(start, min(end - start, 4096)).tolist())
            for start, end in zip(starts, starts[1:], strict=False)
        ]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read a folder's manifest and check it, the tokenizer's digests and all sizes.

    Raises:
        ConfigError: Not a prepared folder, or one of a later version.
        DamagedError: Something is missing or altered.
    """
    path = folder / MANIFEST
    if not path.is_file():
        rule = f"no prepared token dataset: it has no {MANIFEST}"
        raise ConfigError("data.path", folder, rule, "give a folder that spotforge has prepared")
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        digest = manifest.pop("digest")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise _damaged(folder, MANIFEST, "cannot be parsed") from error
    if canonical_digest(manifest) != digest:
        raise _damaged(folder, MANIFEST, "was altered since it was written")
    if manifest["format_version"] != FORMAT_VERSION:
        rule = f"has format {manifest['format_version']}, this version reads {FORMAT_VERSION}"
        raise ConfigError("data.path", folder, rule, "prepare it again")
    manifest["digest"] = digest
    for entry in _entries(manifest):
        _check_size(folder, entry)
    for entry in manifest["tokenizer"]:
        _check_digest(folder, entry)
    return manifest


def read_tokenizer(folder: Path, manifest: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that made the tokens.

    Raises:
        DamagedError: This version of the libraries reads another tokenizer out of the same files.
    """
    tokenizer = load_tokenizer(str(folder / TOKENIZER))
    if fingerprint(tokenizer) != manifest["tokenizer_fingerprint"]:
        raise _damaged(folder, TOKENIZER, "is not the tokenizer that made these tokens")
    return tokenizer


def verify(
    folder: Path, rank: int, world_size: int, stop_requested: StopRequested = lambda: False
) -> None:
    """Check the digests of this rank's share of the files: those with index % world_size == rank.

    Args:
        folder: A prepared folder that all `world_size` ranks see. With one copy a node, pass the
            local rank and local world size.
        rank: Of this process.
        world_size: Number of processes that share the work.
        stop_requested: Polled while reading.

    Raises:
        DamagedError: Naming the file and what to do.
    """
    entries = _entries(read_manifest(folder))
    for entry in entries[rank::world_size]:
        _check_digest(folder, entry, stop_requested)


def _entries(manifest: dict[str, Any]) -> list[dict[str, Any]]:
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
