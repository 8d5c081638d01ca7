"""An artifact's tokenizer, as training used it, without transformers in the gateway.

`AutoTokenizer` brings torch with it: two seconds and 300 MB that a gateway has no use for. A
program of its own loads it once per tokenizer, and leaves what the gateway needs in the cache: the
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

    def template(self, has_tools: bool) -> str | None:
        """For a chat, with functions to call or without; None: the model has none."""
        is_other = has_tools and "tool_use" in self.chat_template
        return self.chat_template.get("tool_use" if is_other else "default")

    def tokenizer(self) -> Tokenizer:
        """A tokenizer of its own, without truncation or padding."""
        tokenizer: Tokenizer = Tokenizer.from_str(self.backend)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer


def vocab_size(tokenizer: Tokenizer) -> int:
    """One more than the largest token id; 0 where there is none."""
    return int(max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)) + 1


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
    tokenizer = files.tokenizer()  # parsed once: large ones take a second
    _check_size(artifact.folder, tokenizer)
    _check_templates(artifact.folder, files.chat_template)
    _check_end(artifact.folder, tokenizer, files.special_tokens.get("eos_token"))
    return files


def _check_size(folder: Path, tokenizer: Tokenizer) -> None:
    """Raises ConfigError where texts would become no tokens, or tokens without a row."""
    described = read_object(folder / "config.json")
    rows = (described.get("text_config") or described).get("vocab_size")
    found = vocab_size(tokenizer)
    is_empty = tokenizer.get_vocab_size(with_added_tokens=False) == 0
    if is_empty or (isinstance(rows, int) and found > rows):
        rule = f"its tokenizer has {found} tokens, and its model's embedding {rows} rows"
        raise ConfigError(_KEY, folder, rule, "give the tokenizer that it was trained with")


def _check_templates(folder: Path, templates: dict[str, Any]) -> None:
    """Raises ConfigError for a chat template that no chat could be rendered with."""
    fix, chat = "mend it, or leave it out", [[{"role": "user", "content": "Hello"}]]
    for template in templates.values():
        if not isinstance(template, str):
            rule = f"its chat template is none: {template!r} is no text"
            raise ConfigError(_KEY, folder, rule, fix)
        try:
            render_jinja_template(chat, chat_template=template)
        except TemplateSyntaxError as e:
            rule = f"its chat template is none: {(str(e).splitlines() or [''])[0]}"
            raise ConfigError(_KEY, folder, rule, fix) from e
        except Exception:  # a program of the model's author: it may want another chat than this
            pass


def _check_end(folder: Path, tokenizer: Tokenizer, end: str | None) -> None:
    """Warns of a model that would end its texts at another token than its tokenizer's.

    Raises:
        ConfigError: What ends its texts is no token.
    """
    ends = None
    for name in ("generation_config.json", "config.json"):
        if ends is None and (folder / name).is_file():
            ends = read_object(folder / name).get("eos_token_id")
    if end is None or ends is None:
        return
    ends = ends if isinstance(ends, list) else [ends]
    if not all(isinstance(token, int) and 0 <= token < 1 << 32 for token in ends):
        rule = f"its eos_token_id is no token, nor a list of them: {ends}"
        raise ConfigError(_KEY, folder, rule, "mend its generation_config.json, or config.json")
    if tokenizer.token_to_id(end) not in ends:
        named = ", ".join(repr(tokenizer.id_to_token(token)) for token in ends)
        text = "%s: answers end at %s, but its tokenizer ends texts with %r: is eos_token_id right?"
        _log.warning(text, folder, named, end)


def _key(folder: Path) -> str:
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
    """Entry point of the program."""
    from trainer.data.tokenizer import fingerprint, load_tokenizer

    folder, out = arguments
    try:
        tokenizer = load_tokenizer(folder)
    except ConfigError as e:
        sys.exit(e.rule)  # its key is the trainer's
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
