"""Reads a Hugging Face hub repository, pinned at a commit, or a local folder with that layout."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from core.errors import ConfigError
from trainer.data.config import SourceConfig
from trainer.data.files import FileDigests, SourceFile, list_files
from trainer.data.tables import column_texts, one_line


@dataclass(frozen=True)
class HubFiles:
    """Lists the content of a repository.

    Attributes:
        commit: Commit that is read, even if the branch moves on; None for a local folder.
        files: All files of that commit.
    """

    commit: str | None
    files: list[SourceFile]


def hub_files(key: str, cfg: SourceConfig, digests: FileDigests) -> HubFiles:
    """Returns a repository's files and their commit.

    Raises:
        ConfigError: The repository cannot be reached or does not exist.
    """
    path = cfg.path or ""
    if Path(path).expanduser().is_dir():
        if cfg.revision is not None:
            rule = f"has no effect, as {path} is a local folder"
            raise ConfigError(f"{key}.revision", cfg.revision, rule, "remove it")
        found = list_files(f"{key}.path", path, None)
        return HubFiles(None, [digests.file(f"{key}.path", *file, is_text=False) for file in found])
    info = _dataset_info(key, path, cfg.revision)
    files = [
        SourceFile(
            sibling.rfilename,
            sibling.size or 0,
            sibling.lfs.sha256 if sibling.lfs else f"git:{sibling.blob_id}",
        )
        for sibling in info.siblings or []
    ]
    return HubFiles(info.sha, sorted(files, key=lambda file: file.path))


def hub_texts(key: str, cfg: SourceConfig, commit: str | None, notes: list[str]) -> Iterator[str]:
    """Yields the text column of a repository, row by row.

    Args:
        key: Configuration key of the source.
        cfg: Settings of the source. With `streaming` nothing is stored; otherwise `datasets` keeps
            a copy in its own cache.
        commit: Commit that `hub_files` found.
        notes: List to which the number of skipped rows is added at the end.

    Raises:
        ConfigError: The subset, split or column does not exist, or a file cannot be parsed.
    """
    import datasets  # type: ignore[import-untyped]

    path = str(Path(cfg.path or "").expanduser()) if commit is None else cfg.path
    try:
        rows = datasets.load_dataset(
            path,
            name=cfg.subset,
            revision=commit,
            split=cfg.split or "train",
            streaming=cfg.streaming,
        )
        yield from column_texts(key, rows, cfg.column or "text", notes)
    except (ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        rule, fix = one_line(error), f"check {key}.subset, {key}.split and the files"
        if _differ_in_columns(error):
            rule = "its files have different columns, which `datasets` does not read together"
            fix = f"name one of the repository's configurations with {key}.subset"
            if commit is None:
                fix = "use data=jsonl or data=parquet, which read only the wanted column of each"
        raise ConfigError(f"{key}.path", cfg.path, rule, fix) from error


def _differ_in_columns(error: BaseException | None) -> bool:
    """Returns whether `datasets` failed since files differ in columns; it may wrap that error."""
    from datasets.table import CastError  # type: ignore[import-untyped]

    while error is not None and not isinstance(error, CastError):
        error = error.__cause__ or error.__context__
    return error is not None


def _dataset_info(key: str, path: str, revision: str | None) -> Any:
    from huggingface_hub import HfApi, errors

    # Its HTTP errors derive from httpx or httpx2, depending on the version; HTTPError covers both.
    http_error: type[Exception] = vars(errors)["HTTPError"]
    try:
        return HfApi().dataset_info(path, revision=revision, files_metadata=True)
    except (http_error, errors.HFValidationError, OSError) as error:
        rule = f"no such local folder, and the hub says {one_line(error)}"
        fix = f"check the name, {key}.revision, HF_TOKEN and the network"
        raise ConfigError(f"{key}.path", path, rule, fix) from error
