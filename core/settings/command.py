"""The command line of a program: words and options in any order, composed, checked, run.

A word is `key=value` or `group=option` in Hydra's syntax. Hydra composes the settings; errors of
Hydra and OmegaConf become one-line errors (refusals.py). Hydra is imported only where settings are
composed, so that `--help` is instant.
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
_registered: set[tuple[str, type]] = set()  # Hydra's config store is global to the process
_SHOWN = ("job", "hydra", "all")
# Short names of options.
_SHORT = {"-h": "--help", "-c": "--cfg", "-cd": "--config-dir", "-m": "--multirun"}


@dataclass(frozen=True)
class CommandLine:
    """Holds the parsed command line.

    Attributes:
        words: Words of the form `key=value` or `group=option`.
        config_dir: Folder with additional options of groups; None uses only ours.
        show: Part of the configuration to print instead of running it: `job`, `hydra` or `all`.
        flags: Given options among `--help`, `--version`, `--resolve` and `--multirun`.
    """

    words: tuple[str, ...] = ()
    config_dir: Path | None = None
    show: str | None = None
    flags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Job:
    """Describes one job: a run of the program with one set of settings.

    Attributes:
        words: Words of the whole command line, or of one job of a sweep.
        given: Keys that the words set; the others have their defaults.
        change: Words that differ in this job of a sweep, as `optim.lr=0.001,seed=1`; None without a
            sweep.
    """

    words: tuple[str, ...]
    given: frozenset[str]
    change: str | None = None

    @property
    def is_of_sweep(self) -> bool:
        """True if the job is one of a sweep."""
        return self.change is not None


@dataclass(frozen=True)
class Command:
    """Describes a program and its settings.

    Attributes:
        program: Command as a user types it, e.g. `python -m trainer`.
        about: Sentence that opens `--help`.
        schema: Dataclass of the settings.
        root: Name of the file `configs/<root>.yaml` that the settings start from; if it does not
            exist, they start from the dataclass.
        at: Dotted path of the dataclass in the composed tree; empty if it is the root.
        groups: Dataclasses of the options, by group and schema (`configs/<group>/` starts from
            `/schema/<group>/<schema>`). A group `group.NAME` holds several options, by name.
        short: Full keys by their short names.
        sweeps: True if the program has `--multirun`.
        examples: Text of examples for `--help`.
        notes: Text about signals and exit codes that ends `--help`.
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
        """Reads the command line, runs its jobs, and returns the exit code.

        All jobs of a sweep are composed and checked before the first one runs.

        Args:
            run: Function called with the settings and the job; returns an exit code. The first
                failure ends a sweep.
            arguments: Arguments to read; None reads those of the process.

        Returns:
            Exit code of the process.
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
            # A list, not a generator: all jobs are checked before the first one runs.
            for config, job in [(self.compose(j.words, line.config_dir), j) for j in jobs]:
                code = run(config, job)
                if code != ExitCode.FINISHED:
                    return code
            return ExitCode.FINISHED
        except SpotforgeError as e:
            print(e, file=sys.stderr)
            return e.exit_code

    def read(self, arguments: Sequence[str]) -> CommandLine:
        """Parses words and options in any order.

        Raises:
            ConfigError: An option is unknown, is given twice or lacks its value.
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
            raise ConfigError("--cfg", show, f"must be one of {', '.join(_SHOWN)}", "use --cfg job")
        return CommandLine(
            words=tuple(words),
            config_dir=None if folder is None else folder_of_options(folder),
            show=show,
            flags=frozenset(found),
        )

    def compose(self, words: Sequence[str] = (), config_dir: Path | None = None) -> Any:
        """Returns the composed and checked settings, as an instance of the dataclass.

        Args:
            words: Words of the form `key=value` or `group=option`.
            config_dir: Folder with additional options of groups.

        Raises:
            ConfigError: A word or a value is not valid.
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
        """Returns the composed settings as an OmegaConf tree, in which values may be missing."""
        from omegaconf import open_dict

        tree = self._compose(words, config_dir)
        with open_dict(tree):
            del tree["hydra"]
        return tree

    @property
    def has_files(self) -> bool:
        """True if `configs/` has a root file for this program."""
        return (CONFIG_DIR / f"{self.root}.yaml").exists()

    @cached_property
    def keys(self) -> list[Key]:
        """All keys of the program, including those of the options of its groups."""
        groups = [group.partition(".")[0] for group in self.groups]
        keys = list(keys_of(self.schema, self.at, skip=groups))
        for group, schemas in self.groups.items():
            for name, schema in schemas.items():
                keys += [replace(k, group=group, schema=name) for k in keys_of(schema, group)]
        return keys

    @cached_property
    def group_names(self) -> list[str]:
        """Names of the groups that a word may choose an option of, in the root file's order."""
        if not self.has_files:
            return []
        path = CONFIG_DIR / f"{self.root}.yaml"
        listed = yaml.safe_load(path.read_text(encoding="utf-8"))["defaults"]
        names = [next(iter(entry)) for entry in listed if isinstance(entry, dict)]
        return [name for name in names if not name.startswith("override ")]

    def options_with(self, key: Key) -> list[str]:
        """Returns the options in `configs/` that have a given key of a group."""
        group = key.group.partition(".")[0]
        start = f"/schema/{group}/{key.schema}@"
        files = sorted((CONFIG_DIR / group).glob("*.yaml"))
        return [path.stem for path in files if start in path.read_text(encoding="utf-8")]

    def _register(self) -> None:
        """Registers the dataclasses with Hydra, so that it refuses wrong keys and types."""
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
        HydraConfig.instance().set_config(tree)  # so that ${hydra:...} in a file can be resolved
        return tree

    def _sources(self) -> AbstractContextManager[None]:
        """Returns Hydra's search path; a program without files in `configs/` has none.

        With one, Hydra would mistake a key that has the name of a folder in `configs/` for a group.
        """
        from hydra import initialize, initialize_config_dir

        if not self.has_files:
            return initialize(config_path=None, version_base="1.3")
        return initialize_config_dir(config_dir=str(CONFIG_DIR), version_base="1.3")

    def _parse(
        self, words: Sequence[str], config_dir: Path | None, sweeps: bool = False
    ) -> list[Override]:
        """Returns the words as Hydra parses them; refuses a key that is given twice."""
        from hydra.core.override_parser.overrides_parser import OverridesParser
        from hydra.errors import HydraException

        from core.settings.refusals import unreadable

        if config_dir is not None:
            quoted = str(folder_of_options(config_dir).absolute()).replace("'", r"\'")
            words = [*words, f"hydra.searchpath=['file://{quoted}']"]
        parser = OverridesParser.create()
        found: list[Override] = []
        for word in words:
            try:
                override = parser.parse_override(self._spelt_out(word, sweeps))
            except HydraException as e:
                raise unreadable(word, e) from e
            key, _, value = word.lstrip("+~").partition("=")
            if override.is_hydra_override() and key != "hydra.searchpath":
                rule = "only hydra.searchpath has an effect here"
                raise ConfigError(key, value, rule, "leave it out")
            found.append(override)
        refuse_repeated(words, self.short)
        return found

    def _spelt_out(self, word: str, sweeps: bool) -> str:
        """Returns a word in Hydra's syntax: quoted, with its full key, `++` and `[]` where needed.

        Args:
            word: Word as the user typed it.
            sweeps: True if a comma separates the values of a sweep.
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
        """Returns the word for an entry of a dict with free keys, or "" if it is another word."""
        depth = known.path.count(".") + 1
        parts = key.split(".")
        if not matches(known.path, ".".join(parts[:depth])):
            return ""
        names, kind = parts[depth:], get_args(known.type)[1]
        is_sweep = "," in value and value[0] not in "{['\""
        if not names or kind is Any or is_sweep:  # Hydra itself creates the dicts on the path
            return f"++{key}={value}"
        if not is_dataclass(kind):  # one name, which may contain dots
            names = [".".join(names)]
        # Hydra would split a name at its dots, so the names go into a dict literal instead.
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
        """Yields the only job, or those of a sweep."""
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
            # The change names the folder of the job's run, in which a slash would be a path.
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
        """Raises ConfigError for a user's option that starts from none of its group's schemas."""
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
        ConfigError: The folder does not exist.
    """
    if not Path(folder).is_dir():
        raise ConfigError("--config-dir", folder, "there is no such folder", "check the path")
    return Path(folder)


def _print(text: str) -> int:
    """Prints a page and returns the exit code; a reader that stops early (`| head`) is no error."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes standard output once more at exit, which must not fail loudly.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    return ExitCode.FINISHED


def _quoted(value: str, sweeps: bool) -> str:
    """Returns a value, quoted if Hydra's grammar cannot read it: `~ [ ] ( )`, letters like é.

    Lists, mappings and quoted values stay as they are, right or wrong, as do values that Hydra can
    read and values with a comma in a sweep.
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


def refuse_repeated(words: Sequence[str], short: Mapping[str, str] | None = None) -> None:
    """Raises ConfigError if two words set the same key, of which the last would count.

    Args:
        words: Words of the form `key=value`.
        short: Full keys by their short names.
    """
    found: set[tuple[bool, str]] = set()
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        # `~key +key=value` replaces a value, so a key may be deleted and set at once.
        at = (word.startswith("~"), (short or {}).get(key, key))
        if at in found:
            raise ConfigError(key, value, "is given twice", "leave one out")
        found.add(at)


def without(words: Sequence[str], others: Sequence[str]) -> list[str]:
    """Returns the words whose keys are not set by any of the others."""
    set_by_others = {_key(word) for word in others}
    return [word for word in words if _key(word) not in set_by_others]


def _key(word: str) -> str:
    return word.partition("=")[0].lstrip("+~")
