"""Artifacts: folders of an export or a compression, checked before an engine loads them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from core import layout
from core.errors import ConfigError, DamagedError
from core.folder import RUNS, digest_of, manifest_of, read_json

KEY = "artifact"
# Files that say where an artifact comes from. They are left out of its digest, so that the same
# weights have the same digest wherever they were made.
_ABOUT_IT = {layout.LINEAGE, layout.COMPRESSION}


class Format(Enum):
    """Format of the weights, which decides which engines can run them."""

    huggingface = "huggingface"
    torchao = "torchao"
    compressed_tensors = "compressed_tensors"
    openvino = "openvino"
    gguf = "gguf"


@dataclass(frozen=True)
class Artifact:
    """A folder that can be served.

    Attributes:
        name: Name or path by which the artifact was asked for.
        folder: Folder of the artifact, without links.
        format: Format of the weights.
        digest: SHA-256 over the names and digests of the files that make up the model.
        lineage: Content of `lineage.json`; None: the folder was not made by spotforge.
    """

    name: str
    folder: Path
    format: Format
    digest: str
    lineage: dict[str, Any] | None

    @property
    def version(self) -> str:
        """First 12 digits of the digest, for people and labels."""
        return self.digest[:12]

    @property
    def known_as(self) -> str:
        """Name of the model for clients where `model_name` is not set.

        The name is the run's, for a run's export and what was compressed from it. Another
        compression has the name of the folder it was made from, unless its own folder was given a
        name other than its target's.
        """
        parent = (self.lineage or {}).get("parent")
        path = parent.get("path") if isinstance(parent, dict) else None
        is_named_by_target = self.folder.name == self.format.value
        origins = [Path(path)] if isinstance(path, str) and is_named_by_target else []
        for folder in (self.folder, *origins):
            for above in folder.parents:
                if above.parent.name == "runs":
                    return above.name
        [folder] = origins or [self.folder]
        return folder.parent.name if folder.name == layout.EXPORT else folder.name

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Fingerprint of the tokenizer that the model was trained with; None: not recorded."""
        return None if self.lineage is None else self.lineage.get("tokenizer_fingerprint")


def resolve(name: str, root: Path | None = None) -> Artifact:
    """Finds an artifact and checks its files; the only place where names become folders.

    Args:
        name: A folder, or a run (`runs/demo`, `demo`) whose export is served.
        root: Folder that the artifact must lie in, for names that come over the network.

    Raises:
        ConfigError: There is no such artifact, or no engine can serve it.
        DamagedError: Files differ from those that the lineage lists, or weights are missing.
    """
    folder = _find(name, root)
    for path in sorted(folder.rglob("*")):
        if not path.is_file() and not path.is_dir():  # opening a pipe would block for ever
            rule = f"{path.relative_to(folder)} is neither a file nor a folder, or a broken link"
            raise DamagedError(KEY, folder, rule, "copy all of it again")
    files = {name: entry["sha256"] for name, entry in manifest_of(folder).items()}
    lineage = read_object(folder / layout.LINEAGE) if layout.LINEAGE in files else None
    if lineage is not None:
        _check_files(folder, files, lineage)
    _check_weights(folder)
    content = {file: digest for file, digest in files.items() if file not in _ABOUT_IT}
    return Artifact(name, folder, _format_of(folder), digest_of(content), lineage)


def _find(name: str, root: Path | None) -> Path:
    if "\0" in name or not name:
        raise ConfigError(KEY, repr(name), "is not the name of a folder", "give a folder")
    given = Path(name).expanduser()
    candidates = [given, RUNS / given]
    if root is not None:
        candidates = [root / path for path in candidates]
    for path in candidates:
        folder = path / layout.EXPORT if (path / layout.EXPORT / "config.json").is_file() else path
        if not (folder / "config.json").is_file():
            continue
        folder = folder.resolve()
        # Compared after links and `..` are resolved, so that a name cannot lead out of the root.
        if root is not None and not folder.is_relative_to(root.resolve()):
            continue
        return folder
    if root is None and (given / layout.CHECKPOINTS).is_dir():
        raise ConfigError(KEY, name, "has no export", f"run python -m trainer.export run={name}")
    where = "" if root is None else " where artifacts may lie"
    fix = "give runs/<name>/export, runs/<name>/compressed/<recipe>/<target> or a model's folder"
    raise ConfigError(KEY, name, f"there is no such folder with a config.json{where}", fix)


def _check_files(folder: Path, files: dict[str, str], lineage: dict[str, Any]) -> None:
    listing, fix = lineage.get("files", {}), "export or compress it again"
    fingerprint = lineage.get("tokenizer_fingerprint")
    is_one = isinstance(listing, dict) and all(isinstance(x, dict) for x in listing.values())
    if not is_one or not isinstance(fingerprint, str | None):
        raise DamagedError(KEY, folder, "lineage.json does not have the expected fields", fix)
    for file, listed in listing.items():
        if files.get(file) != listed.get("sha256"):
            state = "not there" if file not in files else "not as lineage.json lists it"
            raise DamagedError(KEY, folder, f"{file} is {state}", fix)


def _check_weights(folder: Path) -> None:
    """Reads the headers of the weight files, to refuse broken ones before an engine starts."""
    present: set[str] = set()
    shards = {path.name for path in folder.glob("*.safetensors")}
    for path in (folder / name for name in sorted(shards)):
        try:
            with safe_open(path, framework="numpy") as file:
                present.update(file.keys())
        except SafetensorError as e:
            rule = f"{path.name} is cut off or not a safetensors file: {e}"
            raise DamagedError(KEY, folder, rule, "export it again") from e
    for path in folder.glob("*.safetensors.index.json"):
        weight_map = read_object(path).get("weight_map")
        if not isinstance(weight_map, dict):
            raise DamagedError(KEY, folder, f"{path.name} has no weight_map", "export it again")
        if others := sorted(set(map(str, weight_map.values())) - shards):
            rule = f"{path.name} names files that are missing, such as {others[0]}"
            raise DamagedError(KEY, folder, rule, "export it again, or copy all of it")
        if lacks := sorted(weight_map.keys() - present):
            rule = f"{len(lacks)} tensors of {path.name} are missing, such as {lacks[0]}"
            raise DamagedError(KEY, folder, rule, "export it again, or copy all of it")


def _format_of(folder: Path) -> Format:
    if (folder / "openvino_model.xml").is_file():
        return Format.openvino
    has_safetensors = any(folder.glob("*.safetensors"))
    if any(folder.glob("*.gguf")) and not has_safetensors:  # repositories may hold both
        return Format.gguf
    config = read_object(folder / "config.json")
    quantization = config.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise DamagedError(KEY, folder, "quantization_config must be an object", "export it again")
    method = quantization.get("quant_method")
    if method is None:
        if not has_safetensors:
            rule, fix = "has no weights (*.safetensors)", "export it again, or copy all of it"
            if older := sorted(path.name for path in folder.glob("*.bin")):
                rule = f"has weights in a format other than safetensors ({older[0]})"
                fix = "load it with transformers and save it again"
            raise ConfigError(KEY, folder, rule, fix)
        return Format.huggingface
    found = {"torchao": Format.torchao, "compressed-tensors": Format.compressed_tensors}.get(method)
    if found is None:
        rule = f"is quantized by {method}, which no engine here loads"
        fix = "serve the model that it was made from, or load it with transformers, dequantize it "
        raise ConfigError(KEY, folder, rule, f"{fix}and save it")
    return found


def read_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in an artifact's file.

    Raises:
        DamagedError: The file is not JSON, or not an object.
    """
    try:
        content = read_json(KEY, path, "export it again")
    except ConfigError as e:
        raise DamagedError(e.key, path, e.rule, e.fix) from e
    if not isinstance(content, dict):
        raise DamagedError(KEY, path, "is not a JSON object", "export it again")
    return content
