"""A program's command line: words and options in any order, composed, checked, run.

A word is `key=value` or `group=option`, as Hydra reads it. Hydra composes; what it and OmegaConf
refuse leaves here as one line (refusals.py). Hydra is imported where something is composed, so that
`--help` comes at once.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, is_dataclass, replace
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import yaml

from core.errors import ConfigError, ExitCode, SpotforgeError
from core.settings.keys import Key, keys_of, matches
from core.settings.rules import check_settings
from core.version import version

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override
    from omegaconf import DictConfig

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
_registered: set[tuple[str, type]] = set()  # Hydra's store is one for the process, too
_SHOWN = ("job", "hydra", "all")
# Another name of an option, and what there is without a value.
_SHORT = {"-h": "--help", "-c": "--cfg", "-cd": "--config-dir", "-m": "--multirun"}


@dataclass(frozen=True)
class CommandLine:
    """What was asked for.

    Attributes:
        words: `key=value` and `group=option`.
        config_dir: A folder with more options; None: only ours.
        show: `job`, `hydra` or `all`: print that part of the configuration instead of running it.
        flags: Which of `--help`, `--version`, `--resolve` and `--multirun` are given.
    """

    words: tuple[str, ...] = ()
    config_dir: Path | None = None
    show: str | None = None
    flags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Job:
    """What is composed and run.

    Attributes:
        words: The whole command line's, or those of one job of a sweep.
        given: Keys that the words set; the others have their defaults.
        change: What this job of a sweep changes, as `optim.lr=0.001,seed=1`; None: it is no sweep.
    """

    words: tuple[str, ...]
    given: frozenset[str]
    change: str | None = None

    @property
    def is_of_sweep(self) -> bool:
        """Whether there are more jobs."""
        return self.change is not None


@dataclass(frozen=True)
class Command:
    """A program and its settings.

    Attributes:
        program: As it is typed, e.g. `python -m trainer`.
        about: One sentence for `--help`.
        schema: The dataclass of the settings.
        root: `configs/<root>.yaml` is what they start from; without that file, the dataclass is.
        at: Where the dataclass stands in the composed tree; empty: it is the tree.
        groups: Dataclasses of the options, by group and schema (`configs/<group>/` starts from
            `/schema/<group>/<schema>`). In `group.NAME` a group has several options at once, by
            name.
        short: Keys that have a shorter name, by that name.
        sweeps: Whether there is `--multirun`.
        examples: For `--help`.
        notes: For the end of `--help`: signals and exit codes.
    """

    program: str
    about: str
    schema: type
    root: str
    at: str = ""
    groups: Mapping[str, Mapping[str, type]] = field(default_factory=dict)
    short: Mapping[str, str] = field(default_factory=dict)
    sweeps: bool = False
    examples: str = ""
    notes: str = ""

    def main(self, run: Callable[[Any, Job], int], arguments: Sequence[str] | None = None) -> int:
        """Reads the command line and does what it says.

        All jobs of a sweep are composed and checked before the first one runs.

        Args:
            run: Called with the settings and the words that made them; returns an exit code. A
                sweep ends at a failure.
            arguments: Those of the process, unless given.

        Returns:
            The exit code.
        """
        try:
            line = self.read(sys.argv[1:] if arguments is None else arguments)
            if "--help" in line.flags:
                from core.settings.help import help_page

                return _print(help_page(self, line.config_dir))
            if "--version" in line.flags:
                return _print(f"spotforge {version()}")
            jobs = self._jobs(line)
            if line.show is not None:
                return _print("\n".join(self._shown(line, job.words) for job in jobs))
            for config, job in [(self.compose(j.words, line.config_dir), j) for j in jobs]:
                code = run(config, job)
                if code != ExitCode.FINISHED:
                    return code
            return ExitCode.FINISHED
        except SpotforgeError as e:
            print(e, file=sys.stderr)
            return e.exit_code

    def read(self, arguments: Sequence[str]) -> CommandLine:
        """Reads words and options in any order.

        Raises:
            ConfigError: For an option that there is not, is given twice or lacks its value.
        """
        flags = ["--help", "--version", "--resolve", *(["--multirun"] if self.sweeps else [])]
        valued = ["--cfg", *(["--config-dir"] if self.has_files else [])]
        words: list[str] = []
        found: dict[str, str] = {}
        rest = iter(arguments)
        for argument in rest:
            if not argument.startswith("-"):
                words.append(argument)
                continue
            name, equals, value = argument.partition("=")
            name = _SHORT.get(name, name)
            if name in found:
                raise ConfigError("option", argument, "is given twice", "leave one out")
            if name in valued:
                value = value if equals else next(rest, "")
                if not value or value.startswith("-"):
                    rule, fix = "lacks its value", f"see {self.program} --help"
                    raise ConfigError(name, value, rule, fix)
                found[name] = value
            elif name in flags and not equals:
                found[name] = ""
            else:
                near = get_close_matches(name, [*flags, *valued], n=1)
                fix = f"did you mean {near[0]}?" if near else f"see {self.program} --help"
                raise ConfigError("option", argument, "there is no such option", fix)
        show, folder = found.pop("--cfg", None), found.pop("--config-dir", None)
        if show is not None and show not in _SHOWN:
            raise ConfigError("--cfg", show, f"is none of {', '.join(_SHOWN)}", "use --cfg job")
        return CommandLine(
            words=tuple(words),
            config_dir=None if folder is None else folder_of_options(folder),
            show=show,
            flags=frozenset(found),
        )

    def compose(self, words: Sequence[str] = (), config_dir: Path | None = None) -> Any:
        """Composes the settings, as an instance of the dataclass, and checks them.

        Args:
            words: `key=value` and `group=option`.
            config_dir: A folder with more options.

        Raises:
            ConfigError: For whatever is wrong with them.
        """
        from omegaconf import OmegaConf
        from omegaconf.errors import OmegaConfBaseException

        from core.settings.refusals import refusal

        tree = self.compose_tree(words, config_dir)
        try:
            config = OmegaConf.to_object(tree)
        except (OmegaConfBaseException, ConfigError) as e:
            raise refusal(e, self, words, config_dir) from e
        self._check_options(config)
        check_settings(config)
        return config[self.at] if self.at and isinstance(config, dict) else config

    def compose_tree(self, words: Sequence[str] = (), config_dir: Path | None = None) -> DictConfig:
        """Composes the settings as OmegaConf's tree, in which values may be missing."""
        from omegaconf import open_dict

        tree = self._compose(words, config_dir)
        with open_dict(tree):
            del tree["hydra"]
        return tree

    @property
    def has_files(self) -> bool:
        """Whether `configs/` has a file to start from."""
        return (CONFIG_DIR / f"{self.root}.yaml").exists()

    @cached_property
    def keys(self) -> list[Key]:
        """All keys, those of the groups' options among them."""
        groups = [group.partition(".")[0] for group in self.groups]
        keys = list(keys_of(self.schema, self.at, skip=groups))
        for group, schemas in self.groups.items():
            for name, schema in schemas.items():
                keys += [replace(k, group=group, schema=name) for k in keys_of(schema, group)]
        return keys

    @cached_property
    def group_names(self) -> list[str]:
        """The groups that a word may choose an option of, as the root file lists them."""
        if not self.has_files:
            return []
        path = CONFIG_DIR / f"{self.root}.yaml"
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))["defaults"]
        names = [next(iter(entry)) for entry in listed if isinstance(entry, dict)]
        return [name for name in names if not name.startswith("override ")]

    def options_with(self, key: Key) -> list[str]:
        """The options, in `configs/`, that have a key of a group."""
        group = key.group.partition(".")[0]
        start = f"/schema/{group}/{key.schema}@"
        files = sorted((CONFIG_DIR / group).glob("*.yaml"))
        return [path.stem for path in files if start in path.read_text(encoding="utf-8")]

    def _register(self) -> None:
        """Tells Hydra about the dataclasses, so that misspelt keys and wrong types are refused."""
        if (self.root, self.schema) in _registered:
            return
        _registered.add((self.root, self.schema))
        from hydra.core.config_store import ConfigStore

        store = ConfigStore.instance()
        store.store(group="schema", name=self.root, node=self.schema)
        if not self.has_files:
            store.store(name=self.root, node=self.schema)
        for group, schemas in self.groups.items():
            for name, schema in schemas.items():
                store.store(group=f"schema/{group.partition('.')[0]}", name=name, node=schema)

    def _compose(self, words: Sequence[str], config_dir: Path | None) -> DictConfig:
        from hydra import compose
        from hydra.core.hydra_config import HydraConfig
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        from core.settings.refusals import refusal

        self._register()
        overrides = [self._as_hydra_wants(o) for o in self._parse(words, config_dir)]
        try:
            with self._sources():
                tree = compose(self.root, overrides, return_hydra_config=True)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as e:
            raise refusal(e, self, words, config_dir) from e
        HydraConfig.instance().set_config(tree)  # for what a file takes from it: ${hydra:...}
        return tree

    def _sources(self) -> AbstractContextManager[None]:
        """Where Hydra looks for files: nowhere for a program that has none.

        Else it would take a key that is named like a folder of `configs/` for a group.
        """
        from hydra import initialize, initialize_config_dir

        if not self.has_files:
            return initialize(config_path=None, version_base="1.3")
        return initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3")

    def _parse(
        self, words: Sequence[str], config_dir: Path | None, sweeps: bool = False
    ) -> list[Override]:
        """The words as Hydra reads them; a key that is given twice is refused."""
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException

        from core.settings.refusals import unreadable

        if config_dir is not None:
            quoted = str(folder_of_options(config_dir).absolute()).replace("'", r"\'")
            words = [*words, f"hydra.searchpath=['file://{quoted}']"]
        parser = OverridesParser.create()
        found: dict[tuple[bool, str], Override] = {}
        for word in words:
            try:
                override = parser.parse_override(self._spelt_out(word, sweeps))
            except HydraException as e:
                raise unreadable(word, e) from e
            key, _, value = word.lstrip("+~").partition("=")
            if override.is_hydra_override() and key != "hydra.searchpath":
                rule = "only hydra.searchpath has an effect here"
                raise ConfigError(key, value, rule, "leave it out")
            # `~key +key=value` puts a value in the place of another: a key may be in both.
            at = (override.is_delete(), self.short.get(key, key))
            if at in found:
                raise ConfigError(key, value, "is given twice", "leave one out")
            found[at] = override
        return list(found.values())

    def _spelt_out(self, word: str, sweeps: bool) -> str:
        """A word with what Hydra asks for: quotes, whole keys, `++` for new ones, `[]` for a list.

        Args:
            word: As it was typed.
            sweeps: Whether a comma parts the values of a sweep.
        """
        key, equals, value = word.partition("=")
        if not equals or key.startswith("~"):
            return word
        value = _quoted(value, sweeps)
        if key.startswith("+"):
            return f"{key}={value}"
        key = self.short.get(key, key)
        for known in self.keys:
            if known.is_open and (word := self._new_entry(known, key, value)):
                return word
            is_bare = value not in ("", "null") and not value.startswith(("[", "$"))
            if known.is_list and is_bare and matches(known.path, key):
                return f"{key}=[{value}]"
        return f"{key}={value}"

    def _new_entry(self, known: Key, key: str, value: str) -> str:
        """A word for an entry of a dict whose keys are the user's; empty for another word."""
        depth = known.path.count(".") + 1
        parts = key.split(".")
        if not matches(known.path, ".".join(parts[:depth])):
            return ""
        names, kind = parts[depth:], get_args(known.type)[1]
        is_sweep = "," in value and value[0] not in "{['\""
        if not names or kind is Any or is_sweep:  # Hydra itself makes the dicts in between
            return f"++{key}={value}"
        if not is_dataclass(kind):  # one name, which may have dots in it
            names = [".".join(names)]
        entry = "".join(f"{{{name}:" for name in names) + value + "}" * len(names)
        return f"++{'.'.join(parts[:depth])}={entry}"

    def _as_hydra_wants(self, override: Override) -> str:
        if override.is_sweep_override():
            fix = "use [a,b] for a list, quotes for one text"
            if self.sweeps:
                fix += ", --multirun for one run after another"
            value = str(override.input_line).partition("=")[2]
            raise ConfigError(override.key_or_group, value, "is several values", fix)
        return str(override.input_line)

    def _jobs(self, line: CommandLine) -> Iterator[Job]:
        """The job, or those of a sweep."""
        given = frozenset(self.short.get(key, key) for key in map(_key, line.words))
        if "--multirun" not in line.flags:
            yield Job(line.words, given)
            return
        variants = []
        for override in self._parse(line.words, None, sweeps=True):
            texts = [str(override.input_line)]
            if override.is_sweep_override():
                if not override.is_discrete_sweep():
                    key, value = override.key_or_group, texts[0].partition("=")[2]
                    raise ConfigError(key, value, "cannot be listed", "name the values: a,b,c")
                key = override.get_key_element()
                texts = [f"{key}={text}" for text in override.sweep_string_iterator()]
            variants.append([(text, override.is_sweep_override()) for text in texts])
        for number, job in enumerate(itertools.product(*variants)):
            change = ",".join(text for text, is_swept in job if is_swept).replace("/", "_")
            yield Job(tuple(text for text, _ in job), given, change or str(number))

    def _shown(self, line: CommandLine, words: Sequence[str]) -> str:
        from omegaconf import OmegaConf, open_dict
        from omegaconf.errors import OmegaConfBaseException

        from core.settings.refusals import refusal

        tree = self._compose(words, line.config_dir)
        with open_dict(tree):
            if line.show == "job":
                del tree["hydra"]
            elif line.show == "hydra":
                tree = OmegaConf.masked_copy(tree, "hydra")
        try:
            return OmegaConf.to_yaml(tree, resolve="--resolve" in line.flags).rstrip("\n")
        except OmegaConfBaseException as e:
            raise refusal(e, self, words, line.config_dir) from e

    def _check_options(self, config: Any) -> None:
        """Refuses an option, of the user's own, that starts from none of its group's schemas."""
        for group, schemas in self.groups.items():
            name, _, is_named = group.partition(".")
            value = getattr(config, name)
            options = value.items() if is_named and isinstance(value, dict) else [("", value)]
            for option, item in options:
                if item is not None and not isinstance(item, tuple(schemas.values())):
                    key = f"{name}.{option}" if option else name
                    starts = " | ".join(f"/schema/{name}/{schema}@_here_" for schema in schemas)
                    fix = f"begin its file with `defaults: [...]` of one of {starts}"
                    raise ConfigError(key, item, "starts from none of the schemas", fix)


def folder_of_options(folder: Path | str) -> Path:
    """Returns the folder that `--config-dir` names.

    Raises:
        ConfigError: There is none.
    """
    if not Path(folder).is_dir():
        raise ConfigError("--config-dir", folder, "there is no such folder", "check the path")
    return Path(folder)


def _print(text: str) -> int:
    """Prints a page, or quietly as much of it as is read (`| head`); returns the exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more
        return ExitCode.FAILED
    return ExitCode.FINISHED


def _quoted(value: str, sweeps: bool) -> str:
    """A value in quotes where Hydra's grammar has no place for it: `~ [ ] ( )`, letters like é.

    Lists, mappings and what is quoted stay as they are, right or wrong, and so does all that Hydra
    can read, and what a comma may part for a sweep.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.core.override_parser.types import Quote, QuotedString
    from hydra.errors import HydraException

    if value[:1] in ("", *"[{'\"") or (sweeps and "," in value):
        return value
    try:
        OverridesParser.create().parse_override(f"key={value}")
    except HydraException:
        return QuotedString(value, Quote.double).with_quotes()
    return value


def without(words: Sequence[str], others: Sequence[str]) -> list[str]:
    """Returns the words whose keys none of the others sets."""
    set_by_others = {_key(word) for word in others}
    return [word for word in words if _key(word) not in set_by_others]


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")
