"""`python -m compression`: composes the configuration with Hydra, then compresses."""

from __future__ import annotations

import os
import re
import signal
import sys
import tempfile
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from compression.schemas import register_schemas
from core.errors import ConfigError, ExitCode, SpotforgeError
from trainer.cli import CONFIG_DIR, explain, words_and_options
from trainer.schemas import refuse_unknown_keys

_LISTS_KEYS = "python -m compression --cfg job"
_SWEEP = ("--multirun", "-m")
# `model` is a group of the trainer's, too, and Hydra would look for an option of that name.
_PARENT = re.compile(r"(?=(?:run|model)=)")
_HELP = """\
Make a trained model smaller: python -m compression run=DIR | model=DIR [recipe=...] [key=value ...]

  python -m compression run=runs/stdlib recipe=int8_weight_only
  python -m compression model=DIR data=text data.path=notes.txt data.max_seq_len=512 \\
      recipe=int4_gptq recipe.int4_gptq.group_size=64
  python -m compression run=runs/stdlib 'recipe=[prune_wanda,int4_gptq]'     steps in order
  python -m compression run=runs/stdlib recipe=int8_weight_only,int4_awq --multirun   and a plot

Recipes:
{recipes}

Keys (key=value):
  run, model                  what is compressed: a run's export, or a Hugging Face folder
  out                         where to: <out>/<target>; default compressed/<recipe> in the run
  target                      compressed_tensors | torchao | gguf | openvino | huggingface, or a
                              list of them; cpu with recipe=auto
  dtype                       of all that is not quantized, and of scales: bfloat16 | float32
  recipe.NAME.KEY             bits, group_size, symmetric, activation; sparsity, pattern; ...
  layers.include, .exclude    patterns of layers' names, e.g. layers.exclude=['*.down_proj']
  data=..., data.KEY          text to calibrate with and compare on, as for the trainer
  calibration.messages        conversations instead, JSON lines, by the model's chat template
  calibration.num_samples, .min_tokens
  calibration.max_seq_len     of conversations and the model's own text: auto (512, or the model's
                              positions, if they are fewer), or a number
  evaluation.num_samples, .speed, .prompt_tokens, .new_tokens, .rounds
  gate.max_perplexity_ratio, .max_kl, .min_greedy_agreement   else no artifact, and exit code 1
  seed

Options, before words, after them or between:
  --cfg job                   print the whole configuration and stop
  --config-dir DIR            look for options (recipe/mine.yaml, ...) in DIR too
  --multirun                  run every combination of comma-separated values

Exit codes: 0 done; 33 told to stop, start it again and it goes on; 2 refused; 1 failed.
"""


def _run(tree: DictConfig) -> None:
    try:
        config: Any = OmegaConf.to_object(tree)
        refuse_unknown_keys(config)
    except (ConfigError, OmegaConfBaseException) as e:
        _refuse(e)  # here, since Hydra would print its overrides first
    from compression.auto import run_auto
    from compression.report import plot_pareto
    from compression.run import run

    sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    if sweep and config.out is not None:  # each job of a sweep has a folder of its own
        config.out += f"/{config.recipe_name}"
    try:
        out = (run_auto if config.is_auto else run)(config, _stop_requested)
        if sweep and out is not None:
            plot_pareto(out)
    except SpotforgeError as e:
        print(e, file=sys.stderr)
        sys.exit(e.exit_code)
    if not sweep:
        sys.exit(ExitCode.FINISHED)


_stopped = False


def _stop(number: int, frame: FrameType | None) -> None:
    global _stopped
    _stopped = True


def _stop_requested() -> bool:
    return _stopped


def main() -> None:
    """Entry point; ends the process with an exit code."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that one line of ours is all there is
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars; ours are rich's
    if {"-h", "--help"} & set(sys.argv[1:]):
        names = sorted(path.stem for path in (CONFIG_DIR / "recipe").glob("*.yaml"))
        print(_HELP.format(recipes="  " + "\n  ".join(names)))
        return
    register_schemas()
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)
    try:
        words, options = words_and_options(sys.argv[1:], "python -m compression", _SWEEP)
        words = [_PARENT.sub("parent.", word, 1) if _PARENT.match(word) else word for word in words]
        with tempfile.TemporaryDirectory() as folder:  # for the notes of Hydra's own on a sweep
            sys.argv[1:] = [*words, f"hydra.sweep.dir={folder}", *options]
            hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="compression")(
                _run
            )()
    except (ConfigError, HydraException, OmegaConfBaseException) as e:
        _refuse(e)


def _refuse(error: Exception) -> NoReturn:
    print(explain(error, _LISTS_KEYS), file=sys.stderr)
    sys.exit(ExitCode.BAD_CONFIG)


if __name__ == "__main__":
    main()
