"""A repository of the Hugging Face hub, pinned at a commit; or a local folder laid out like one."""

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
    """What a repository holds.

    Attributes:
        commit: The commit that is read, whatever the branch says later; None for a local folder.
        files: Every file of that commit.
    """

    commit: str | None
    files: list[SourceFile]


def hub_files(key: str, cfg: SourceConfig, digests: FileDigests) -> HubFiles:
    """List a repository's files and the commit they are from.

    Raises:
        ConfigError: It cannot be reached or does not exist.
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
    """The text column of a repository, row by row.

    Args:
        key: Configuration key of the source.
        cfg: With `streaming`, nothing is stored; otherwise `datasets` keeps a copy in its own
            cache.
        commit: The commit that `hub_files` found.
        notes: Is told, at the end, how many rows were left out.

    Raises:
        ConfigError: No such subset, split or column, or files that cannot be parsed.
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
        fix = f"check {key}.subset, {key}.split and the files"
        raise ConfigError(f"{key}.path", cfg.path, one_line(error), fix) from error


def _dataset_info(key: str, path: str, revision: str | None) -> Any:
    from huggingface_hub import HfApi, errors

    # The base of its HTTP errors is httpx's or httpx2's by its version: it knows itself.
    http_error: type[Exception] = vars(errors)["HTTPError"]
    try:
        return HfApi().dataset_info(path, revision=revision, files_metadata=True)
    except (http_error, errors.HFValidationError, OSError) as error:
        rule = f"no such local folder, and the hub says {one_line(error)}"
        fix = f"check the name, {key}.revision, HF_TOKEN and the network"
        raise ConfigError(f"{key}.path", path, rule, fix) from error
