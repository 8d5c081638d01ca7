"""What `python -m trainer` prints by itself: its help, and Hydra's complaints in one line."""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from core.errors import ConfigError
from trainer.schemas import options_with_key

# A key and its value, which is no list, mapping or quoted text.
_PLAIN_VALUE = re.compile(r"(\+{0,2}[^+~=\s-][^=\s]*)=([^\[{'\"].*)", re.DOTALL)
CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"
_CFG, _CFG_VALUES = ("--cfg", "-c"), ("job", "hydra", "all")
_CONFIG_DIR = ("--config-dir", "-cd")
_SWEEP = ("--multirun", "-m")


def help_text(argv: list[str]) -> str:
    """The help page; reads the folders of options only, so that it comes at once.

    Args:
        argv: Arguments of the command; a `--config-dir` among them is listed too.
    """
    folders = [CONFIG_DIR]
    for i, argument in enumerate(argv):
        if argument in _CONFIG_DIR and i + 1 < len(argv):
            folders.append(Path(argv[i + 1]))
        elif argument.startswith(("--config-dir=", "-cd=")):
            folders.append(Path(argument.split("=", 1)[1]))
    for folder in folders:
        if not folder.is_dir():
            raise ConfigError("--config-dir", folder, "there is no such folder", "check the path")
    groups = sorted({p.name for folder in folders for p in folder.iterdir() if p.is_dir()})
    groups = [group for group in groups if group not in ("launch", "recipe")]  # other programs'
    lines = []
    for group in groups:
        options = sorted({p.stem for folder in folders for p in (folder / group).glob("*.yaml")})
        if options:
            lines.append(f"  {group:<12}{' | '.join(options)}")
    return _HELP.format(groups="\n".join(lines))


def explain(error: Exception, lists_keys: str = "python -m trainer --cfg job") -> str:
    """One line for an error of Hydra or OmegaConf: key, value, rule, fix.

    Args:
        error: What was caught.
        lists_keys: The command that shows which keys there are.
    """
    chain = _chain(error)
    for cause in chain:
        if isinstance(cause, ConfigError):
            return str(cause)
        if isinstance(cause, OverrideParseException):
            word = " ".join(cause.override.split())
            key, _, value = word.partition("=")
            fix = "close its quotes and brackets, quote it for the shell"
            if value[:1] in ("[", "{"):
                fix += f""", or, where that is a name, write '{key}="{value}"'"""
            return f"{word}: is no key=value; {fix}"
    # OmegaConf's innermost error says most, but for those with its own placeholders left in.
    told = (
        c for c in reversed(chain) if isinstance(c, OmegaConfBaseException) and "$" not in str(c)
    )
    inner = next(told, error)
    lines = [line.strip() for line in str(inner).splitlines() if line.strip()]
    text = lines[0] if lines else type(inner).__name__
    key = next((x.removeprefix("full_key:").strip() for x in lines if x.startswith("full_key")), "")
    if isinstance(inner, ConfigKeyError | ConfigAttributeError):
        return f"{_unknown_key(text, key)}; {lists_keys} lists the keys"
    if isinstance(inner, MissingMandatoryValue):
        return f"{key}: has to be given, as {key}=VALUE; {lists_keys} lists the keys"
    if isinstance(inner, OmegaConfBaseException):
        return f"{key}: {text}; {lists_keys} lists the keys"
    # Hydra's own: an unknown option comes with the list of those there are, and where it looked.
    return " ".join(lines).partition(" Config search path:")[0]


def as_meant(words: Sequence[str], sweeps: bool = False) -> list[str]:
    """Quotes values that Hydra's grammar has no place for: names with `~ [ ] ( )`, letters like é.

    Lists, mappings and what is quoted stay as they are, right or wrong, and so does all that Hydra
    can read.

    Args:
        words: key=value, or anything else.
        sweeps: Whether a comma parts the values of a sweep: these are the user's to quote.
    """
    parser = OverridesParser.create()
    meant = []
    for word in words:
        found = _PLAIN_VALUE.fullmatch(word)
        if found is not None and not (sweeps and "," in found[2]):
            try:
                parser.parse_override(word)
            except HydraException:
                word = f"{found[1]}={QuotedString(found[2], Quote.double).with_quotes()}"
        meant.append(word)
    return meant


def words_and_options(
    arguments: list[str], program: str, flags: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """Words (key=value) and options in any order, apart: Hydra takes them one after the other.

    Args:
        arguments: Of the command.
        program: For errors.
        flags: Options without a value that the program has beside `--resolve`.

    Raises:
        ConfigError: An option that there is not, or that lacks its value.
    """
    words, options = [], []
    following = iter(arguments)
    for argument in following:
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            words.append(argument)
        elif argument in ("--resolve", *flags):
            options.append(argument)
        elif name in (*_CFG, *_CONFIG_DIR):
            value = value if equals else next(following, "")
            if not value or (name in _CFG and value not in _CFG_VALUES):
                rule = "is none of job, hydra, all" if name in _CFG else "lacks its folder"
                raise ConfigError(name, value, rule, f"see {program} --help")
            options += [name, value]
        else:
            rule = "there is no such option"
            raise ConfigError("option", argument, rule, f"see {program} --help")
    return as_meant(words, sweeps=not set(_SWEEP).isdisjoint(options)), options


_HELP = """\
Train a causal language model: python -m trainer [group=option ...] [key=value ...]

  python -m trainer experiment=stdlib                       the main job: small, on this machine
  python -m trainer data=text data.path=book.txt nproc=2    your text, two ranks
  python -m trainer model=pretrained model.path=DIR data=jsonl data.path=rows.jsonl parallel=fsdp
  python -m trainer objective=distill objective.teacher=DIR model=pretrained model.path=SMALLER ...
  python -m trainer --multirun optim.lr=1e-4,3e-4,1e-3      a sweep, one run after another

Groups (group=option):
{groups}

Keys (key=value), beside those of the groups:
  run.name, run.dir          which run, and where (runs/<name>)
  stop.steps|tokens|minutes  when it is finished, whichever comes first
  global_batch_size          samples of one optimizer step; accumulation follows from it
  micro_batch_size           samples of one forward on one rank
  nproc                      ranks on this machine: auto (every GPU, else 1) or a number
  resume                     auto (go on where it stopped) | never | a checkpoint folder
  allow_changes              keys that may differ from the checkpoint's, e.g. [optim.lr]
  seed, deterministic, compile, activation_checkpointing, shutdown_timeout_s
  checkpoint.interval        auto (as often as it pays) | steps | 10min | end
  checkpoint.keep_last, checkpoint.keep_every; checkpoint.upload  also to s3://... (any fsspec URL)
  preemption.notice_file, preemption.cloud  stop when told: a file | auto, aws, gcp, azure
  anomaly.action             a loss that is no number, or leaps: stop | skip | rollback
  log.every_steps, evaluation.every_steps, hang_timeout_s
  fake_quant.bits, .group_size  quantization-aware: weights are rounded in forward
  export.at_end, export.dtype

Options:
  --cfg job                  print the whole configuration and stop
  --config-dir DIR           look for options (experiment/mine.yaml, ...) in DIR too
  --multirun                 run every combination of comma-separated values

Exit codes: 0 finished; 33 stopped, with all steps saved, start it again; 2 refused; 1 failed.
"""


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
        chain.append(cause)
    return chain


def _unknown_key(text: str, key: str) -> str:
    elsewhere = ""
    if "." in key:
        group, leaf = key.split(".", 1)
        options = options_with_key(group, leaf)
        if options:
            elsewhere = f"; it is a key of {group}={', '.join(options)}"
    match = re.search(r"Key '(.+?)' (?:is )?not in (?:'(.+?)'|struct)", text)
    if match:
        text = f"{key or match[1]}: no such key" + (f" in {match[2]}" if match[2] else "")
    return f"{text}{elsewhere}"
