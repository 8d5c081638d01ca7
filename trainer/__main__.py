"""`python -m trainer`: composes the configuration with Hydra, then launches it."""

import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from core.errors import ConfigError, ExitCode
from trainer.cli import CONFIG_DIR, as_meant, explain, help_text
from trainer.schemas import refuse_unknown_keys, register_schemas


def _run(tree: DictConfig) -> None:
    try:
        config: Any = OmegaConf.to_object(tree)
        refuse_unknown_keys(config)
    except (ConfigError, OmegaConfBaseException) as e:
        _refuse(e)  # here, since Hydra would print its overrides first
    sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    if sweep:  # each job of a sweep is a run of its own, named by what it changes
        changes = _swept_overrides()
        config.run.name += f"/{changes}"
        config.run.dir += f"/{changes}"
    from trainer.launching import launch

    job = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    code = launch(config, isolated=sweep, given={o.get_key_element().lstrip("+~") for o in job})
    if code != ExitCode.FINISHED or not sweep:
        sys.exit(code)


def _swept_overrides() -> str:
    """What this job of a sweep changes, as a folder name: `optim.lr=0.001,seed=1`."""
    given = [a for a in sys.argv[1:] if "=" in a and not a.startswith("-")]
    parsed = OverridesParser.create().parse_overrides(given)
    swept = {o.get_key_element() for o in parsed if o.is_sweep_override()}
    job = OverridesParser.create().parse_overrides(list(HydraConfig.get().overrides.task))
    changes = [str(o.input_line) for o in job if o.get_key_element() in swept]
    return ",".join(changes).replace("/", "_") or str(HydraConfig.get().job.num)


def main() -> None:
    """Entry point; ends the process with the exit code of the run."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that one line of ours is all there is
    register_schemas()
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            print(help_text(sys.argv[1:]))
            return
        sweeps = not {"-m", "--multirun"}.isdisjoint(sys.argv)
        sys.argv[1:] = as_meant(sys.argv[1:], sweeps)
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="trainer")(_run)()
    except (ConfigError, HydraException, OmegaConfBaseException) as e:
        _refuse(e)


def _refuse(error: Exception) -> NoReturn:
    print(explain(error), file=sys.stderr)
    sys.exit(ExitCode.BAD_CONFIG)


def _stop_at_once(number: int, frame: FrameType | None) -> NoReturn:
    """Ends this process while it has nothing to save; what it does then need not end well."""
    name = signal.Signals(number).name
    said = f"{name} before training began: nothing was saved or lost; the same command starts it\n"
    os.write(2, said.encode())  # in the middle of anything, another write to stderr too
    os._exit(ExitCode.START_AGAIN)


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, _stop_at_once)
    main()
