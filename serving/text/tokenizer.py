"""An artifact's tokenizer, as training used it, without transformers in the gateway.

`AutoTokenizer` brings torch with it: two seconds and 300 MB that a gateway has no use for. A
program of its own loads it once per tokenizer, and leaves what the gateway needs in the cache: the
backend of the `tokenizers` library, the chat template and the fingerprint.

    python -m serving.text.tokenizer FOLDER OUT.json
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from monitoring.errors import ConfigError
from serving.artifact import Artifact, read_json

_log = logging.getLogger("spotforge.serving")
_KEY = "artifact"
# What AutoTokenizer reads, config.json included: it names the model's type.
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
)


@dataclass(frozen=True)
class TokenizerFiles:
    """What the gateway knows of a tokenizer.

    Attributes:
        backend: JSON of the `tokenizers` library.
        chat_template: Jinja, by name (`default`); empty where there is none.
        special_tokens: By name (`bos_token`), for templates.
        fingerprint: As `trainer.data.tokenizer.fingerprint` computes it.
    """

    backend: str
    chat_template: dict[str, str]
    special_tokens: dict[str, str]
    fingerprint: str

    def tokenizer(self) -> Tokenizer:
        """A tokenizer of its own, without truncation or padding."""
        tokenizer: Tokenizer = Tokenizer.from_str(self.backend)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token id."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values())) + 1


def load(artifact: Artifact, cache: Path) -> TokenizerFiles:
    """Of an artifact, out of the cache or made now.

    Args:
        artifact: What is served.
        cache: Folder for what is made.

    Raises:
        ConfigError: It has no tokenizer that loads, or not the one that it was trained with.
    """
    path = cache / "tokenizers" / f"{_key(artifact.folder)}.json"
    if not path.is_file():
        _make(artifact.folder, path)
    files = TokenizerFiles(**json.loads(path.read_text(encoding="utf-8")))
    trained = artifact.tokenizer_fingerprint
    if trained is not None and trained != files.fingerprint:
        rule = (
            f"its tokenizer ({files.fingerprint[:12]}) is not the one that it was trained with"
            f" ({trained[:12]})"
        )
        raise ConfigError(_KEY, artifact.folder, rule, "export it again")
    _warn_of_another_end(artifact.folder, files)
    return files


def _warn_of_another_end(folder: Path, files: TokenizerFiles) -> None:
    """Says so where the model would end its texts at another token than its tokenizer's."""
    end = files.special_tokens.get("eos_token")
    ends = None
    for name in ("generation_config.json", "config.json"):
        if ends is None and (folder / name).is_file():
            ends = read_json(folder / name).get("eos_token_id")
    if end is None or ends is None:
        return
    tokenizer = files.tokenizer()
    ends = [ends] if isinstance(ends, int) else ends
    if tokenizer.token_to_id(end) not in ends:
        named = ", ".join(repr(tokenizer.id_to_token(token)) for token in ends)
        text = "%s: answers end at %s, but its tokenizer ends texts with %r: is eos_token_id right?"
        _log.warning(text, folder, named, end)


def _key(folder: Path) -> str:
    found = {name: version(name) for name in ("tokenizers", "transformers")}
    for name in _FILES:
        if (folder / name).is_file():
            found[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()


def _make(folder: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f"{path.name}.{os.getpid()}")
    command = [sys.executable, "-m", __name__, str(folder), str(staging)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing was said"]
        raise ConfigError(
            _KEY, folder, f"its tokenizer does not load: {said[-1]}", "export it again"
        )
    staging.rename(path)


def main(arguments: list[str]) -> None:
    """Entry point of the program."""
    from trainer.data.tokenizer import fingerprint, load_tokenizer

    folder, out = arguments
    tokenizer = load_tokenizer(folder)
    template: Any = tokenizer.chat_template
    files = {
        "backend": tokenizer.backend_tokenizer.to_str(),
        "chat_template": template
        if isinstance(template, dict)
        else {"default": template}
        if template
        else {},
        "special_tokens": {k: str(v) for k, v in tokenizer.special_tokens_map.items()},
        "fingerprint": fingerprint(tokenizer),
    }
    Path(out).write_text(json.dumps(files), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
