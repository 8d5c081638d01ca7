"""The tokenizer of an artifact, as training used it, without torch in the gateway.

`AutoTokenizer` imports torch, which costs two seconds and 300 MB that the gateway does not need. A
separate program loads it once per tokenizer and writes what the gateway needs to the cache: the
backend of the `tokenizers` library, the chat template and the fingerprint.

    python -m serving.text.tokenizer FOLDER OUT.json
"""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import TemplateSyntaxError
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from core.errors import ConfigError
from core.folder import digest_of, sha256_of, staged_file
from core.process.child import run
from core.process.python import environment, python
from serving.artifact import Artifact, read_object

_log = logging.getLogger("spotforge.serving")
_KEY = "artifact"
# Files that AutoTokenizer reads; it takes the model's type from config.json.
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
    """The parts of a tokenizer that the gateway needs.

    Attributes:
        backend: JSON of the `tokenizers` library.
        chat_template: Jinja templates by name (`default`); empty: the model has none.
        special_tokens: Special tokens by name (`bos_token`), for templates.
        fingerprint: Result of `trainer.data.tokenizer.fingerprint`.
    """

    backend: str
    chat_template: dict[str, str]
    special_tokens: dict[str, str]
    fingerprint: str

    def template(self, has_tools: bool) -> str | None:
        """Returns the template for chats with or without tools; None: the model has none."""
        is_other = has_tools and "tool_use" in self.chat_template
        return self.chat_template.get("tool_use" if is_other else "default")

    def tokenizer(self) -> Tokenizer:
        """Returns a new tokenizer without truncation and padding."""
        tokenizer: Tokenizer = Tokenizer.from_str(self.backend)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def vocab_size(tokenizer: Tokenizer) -> int:
    """Returns the largest token id plus one; 0 if there are no tokens."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)) + 1


def load(artifact: Artifact, cache: Path) -> TokenizerFiles:
    """Returns an artifact's tokenizer, from the cache or loaded by the program.

    Args:
        artifact: Artifact that is served.
        cache: Folder in which tokenizers are cached.

    Raises:
        ConfigError: The tokenizer does not load, or is not the one that the model was trained with.
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
    tokenizer = files.tokenizer()  # once for all checks: parsing a large one takes a second
    _check_size(artifact.folder, tokenizer)
    _check_templates(artifact.folder, files.chat_template)
    _check_end(artifact.folder, tokenizer, files.special_tokens.get("eos_token"))
    return files


def _check_size(folder: Path, tokenizer: Tokenizer) -> None:
    """Raises ConfigError for an empty tokenizer, or token ids beyond the model's embedding."""
    described = read_object(folder / "config.json")
    rows = (described.get("text_config") or described).get("vocab_size")
    found = vocab_size(tokenizer)
    is_empty = tokenizer.get_vocab_size(with_added_tokens=False) == 0
    if is_empty or (isinstance(rows, int) and found > rows):
        rule = f"its tokenizer has {found} tokens, but its model's embedding {rows} rows"
        raise ConfigError(_KEY, folder, rule, "give the tokenizer that it was trained with")


def _check_templates(folder: Path, templates: dict[str, Any]) -> None:
    """Raises ConfigError for a chat template that is not valid Jinja."""
    fix, chat = "correct it, or leave it out", [[{"role": "user", "content": "Hello"}]]
    for template in templates.values():
        if not isinstance(template, str):
            rule = f"its chat template must be a text, not {template!r}"
            raise ConfigError(_KEY, folder, rule, fix)
        try:
            render_jinja_template(chat, chat_template=template)
        except TemplateSyntaxError as e:
            rule = f"its chat template is not valid Jinja: {(str(e).splitlines() or [''])[0]}"
            raise ConfigError(_KEY, folder, rule, fix) from e
        except Exception:  # a template may refuse this chat, and is valid all the same
            pass


def _check_end(folder: Path, tokenizer: Tokenizer, end: str | None) -> None:
    """Logs a warning if the model's EOS differs from its tokenizer's.

    Raises:
        ConfigError: `eos_token_id` is neither a token id nor a list of them.
    """
    ends = None
    for name in ("generation_config.json", "config.json"):
        if ends is None and (folder / name).is_file():
            ends = read_object(folder / name).get("eos_token_id")
    if end is None or ends is None:
        return
    ends = ends if isinstance(ends, list) else [ends]
    if not all(isinstance(token, int) and 0 <= token < 1 << 32 for token in ends):
        rule = f"its eos_token_id is neither a token id nor a list of them: {ends}"
        raise ConfigError(_KEY, folder, rule, "correct generation_config.json or config.json")
    if tokenizer.token_to_id(end) not in ends:
        named = ", ".join(repr(tokenizer.id_to_token(token)) for token in ends)
        text = "%s: eos_token_id ends answers at %s, but the tokenizer's EOS is %r: is that right?"
        _log.warning(text, folder, named, end)


def _key(folder: Path) -> str:
    # With the versions, since another one may convert the same files differently.
    found = {name: version(name) for name in ("tokenizers", "transformers")}
    for name in _FILES:
        if (folder / name).is_file():
            found[name] = sha256_of(folder / name)
    return digest_of(found)


def _make(folder: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(path) as staging:
        done = run(python("-m", __name__, str(folder), str(staging)), environment())
        if done.code != 0:
            rule = f"its tokenizer does not load: {done.last_line}"
            raise ConfigError(_KEY, folder, rule, "export it again")


def main(arguments: list[str]) -> None:
    """Writes the parts of a folder's tokenizer that the gateway needs to a file."""
    from trainer.data.tokenizer import fingerprint, load_tokenizer

    folder, out = arguments
    try:
        tokenizer = load_tokenizer(folder)
    except ConfigError as e:
        sys.exit(e.rule)  # only the rule: the error's key is one of the trainer's
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
