"""Documents: where they come from, in a fixed order, and which of them are held out.

What is one document:
    stdlib          one `*.py` file of Python's standard library
    text            one file; a file of more than 64 Ki bytes is cut at blank lines into pieces
                    of about 16 Ki characters (else one book would leave nothing to hold out)
    jsonl, parquet  one row
    hub             one row
"""

import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

from core.errors import ConfigError
from trainer.data.config import SourceConfig, SourceKind
from trainer.data.files import FileDigests, SourceFile, list_files
from trainer.data.hub import hub_files, hub_texts
from trainer.data.tables import table_texts

TEXT_EXTENSIONS = (
    *(".txt", ".text", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".log", ".srt"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".java", ".js", ".ts", ".go", ".rs"),
    *(".rb", ".php", ".sh", ".sql", ".lua", ".kt", ".swift", ".scala", ".jl", ".r", ".css"),
    *(".yaml", ".yml", ".toml", ".ini", ".csv", ".tsv"),
)
TABLE_EXTENSIONS = {
    SourceKind.jsonl: (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".jsonl.bz2"),
    SourceKind.parquet: (".parquet",),
}
# Tests are no sample of the library's own style, and some are broken on purpose.
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}

WHOLE_FILE_BYTES = 64 << 10
PIECE_CHARS = 16 << 10

_COLUMN_KEYS = {"path", "column"}
_KEYS = {
    SourceKind.stdlib: set[str](),
    SourceKind.text: {"path"},
    SourceKind.jsonl: _COLUMN_KEYS,
    SourceKind.parquet: _COLUMN_KEYS,
    SourceKind.hub: _COLUMN_KEYS | {"subset", "revision", "split", "streaming"},
    SourceKind.tokens: {"path"},
}


@dataclass(frozen=True)
class Document:
    """One text.

    Attributes:
        text: Never empty.
        digest: SHA-256 that decides the split: of the text, or of the file's name (`stdlib`).
    """

    text: str
    digest: bytes

    @property
    def draw(self) -> float:
        """A number in [0, 1), fixed for this document: below the fraction, it is held out."""
        return int.from_bytes(self.digest[:6], "big") / (1 << 48)


@dataclass(frozen=True)
class Source:
    """A source that was found and whose files are digested.

    Attributes:
        key: Configuration key of the source: `data` or `data.sources.<name>`.
        identity: Kind, settings and files: what decides which documents come out. JSON types only.
        size_bytes: Sum over the files.
        documents: Starts an iteration over the non-empty documents, always in the same order.
        notes: What there is to say of the rows, once the documents have been read to the end.
    """

    key: str
    identity: dict[str, object]
    size_bytes: int
    documents: Callable[[], Iterator[Document]]
    notes: list[str] = field(default_factory=list)


def check_keys(key: str, cfg: SourceConfig) -> None:
    """Refuse a missing path, a weight that is not positive, and keys without effect for the kind.

    Raises:
        ConfigError: Naming the key.
    """
    allowed = _KEYS[cfg.kind] | {"kind", "weight"}
    for setting in fields(SourceConfig):
        value = getattr(cfg, setting.name)
        if setting.name not in allowed and value != setting.default:
            rule = f"has no effect with kind={cfg.kind.value}"
            raise ConfigError(f"{key}.{setting.name}", value, rule, "remove it")
    if "path" in allowed and not cfg.path:
        raise ConfigError(f"{key}.path", cfg.path, f"kind={cfg.kind.value} needs it", "set it")


def open_source(
    key: str, cfg: SourceConfig, digests: FileDigests, *, begun_before: bool = False
) -> Source:
    """Find a source's files and digest them; documents are read later.

    Args:
        key: `data` or `data.sources.<name>`.
        cfg: Any kind but `tokens`, checked by `check_keys`.
        digests: Cache of file digests.
        begun_before: Read for a run that was begun when links to folders were not followed and
            byte order marks were part of the text.

    Raises:
        ConfigError: Nothing there, or a text file that is not text.
    """
    column = cfg.column or "text"
    path_key, path = f"{key}.path", cfg.path or ""
    notes: list[str] = []
    if cfg.kind is SourceKind.stdlib:
        library = _stdlib_files()
        files = [digests.file(key, name, file, is_text=True) for name, file in library]
        return _source(key, cfg, {}, files, notes, lambda: _stdlib_documents(library))
    if cfg.kind is SourceKind.text:
        texts = list_files(path_key, path, TEXT_EXTENSIONS, follow_links=not begun_before)
        files = [digests.file(path_key, name, file, is_text=True) for name, file in texts]
        if not any(file.size_bytes for file in files):
            raise ConfigError(path_key, path, "is empty", "give a file with text in it")
        encoding = "utf-8" if begun_before else "utf-8-sig"
        with_bom = any(file.has_bom for file in files) and not begun_before
        settings: dict[str, str | None] = {"bom": "left out"} if with_bom else {}
        return _source(
            key, cfg, settings, files, notes, lambda: _by_text(_pieces_of(texts, encoding))
        )
    if cfg.kind is SourceKind.hub:
        repository = hub_files(key, cfg, digests)
        settings = {"column": column, "subset": cfg.subset, "split": cfg.split or "train"}
        settings["commit"] = repository.commit
        hub_rows = partial(hub_texts, key, cfg, repository.commit, notes)
        return _source(key, cfg, settings, repository.files, notes, lambda: _by_text(hub_rows()))
    extensions = TABLE_EXTENSIONS[cfg.kind]
    tables = list_files(path_key, path, extensions, follow_links=not begun_before)
    files = [digests.file(path_key, name, file, is_text=False) for name, file in tables]
    if not any(file.size_bytes for file in files):
        raise ConfigError(path_key, path, "is empty", "leave it out or fill it")
    paths = [str(at) for file, (_, at) in zip(files, tables, strict=True) if file.size_bytes]
    settings = {"column": column}
    if not begun_before and any(set("*?[") & set(path) for path in paths):
        settings["names"] = "literal"  # they were taken for patterns, and more files were read
    rows = partial(table_texts, key, cfg.kind.value, paths, column, notes)
    return _source(key, cfg, settings, files, notes, lambda: _by_text(rows()))


def _source(
    key: str,
    cfg: SourceConfig,
    settings: dict[str, str | None],
    files: list[SourceFile],
    notes: list[str],
    documents: Callable[[], Iterator[Document]],
) -> Source:
    identity: dict[str, object] = {
        "kind": cfg.kind.value,
        **settings,
        "files": [
            {"path": file.path, "size_bytes": file.size_bytes, "sha256": file.sha256}
            for file in files
        ],
    }
    return Source(key, identity, sum(file.size_bytes for file in files), documents, notes)


def _stdlib_files() -> list[tuple[str, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in STDLIB_EXCLUDED]  # site-packages
        within = Path(folder).relative_to(root)
        names += [(within / name).as_posix() for name in files if name.endswith(".py")]
    return [(name, root / name) for name in sorted(names)]


def _stdlib_documents(library: list[tuple[str, Path]]) -> Iterator[Document]:
    for name, file in library:
        text = file.read_bytes().decode()
        if text.strip():
            yield Document(text, hashlib.sha256(name.encode()).digest())


def _by_text(texts: Iterator[str]) -> Iterator[Document]:
    for text in texts:
        if text.strip():
            yield Document(text, hashlib.sha256(text.encode()).digest())


def _pieces_of(files: list[tuple[str, Path]], encoding: str) -> Iterator[str]:
    for _, file in files:
        if file.stat().st_size <= WHOLE_FILE_BYTES:
            yield file.read_bytes().decode(encoding)
        else:
            yield from _pieces(file, encoding)


def _pieces(file: Path, encoding: str) -> Iterator[str]:
    """Cut at the first blank line after PIECE_CHARS, or where it is twice that long."""
    with file.open(encoding=encoding, newline="") as lines:  # newline="": line ends stay
        piece: list[str] = []
        size = 0
        while line := lines.readline(PIECE_CHARS):
            piece.append(line)
            size += len(line)
            if size >= 2 * PIECE_CHARS or (size >= PIECE_CHARS and not line.strip()):
                yield "".join(piece)
                piece, size = [], 0
        yield "".join(piece)
