"""`python -m trainer`: composes the configuration with Hydra, then launches it."""

import os
import sys
from typing import Any, NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from monitoring.errors import ConfigError, ExitCode
from trainer.cli import CONFIG_DIR, explain, help_text
from trainer.config import register_schemas


def _run(tree: DictConfig) -> None:
    try:
        config: Any = OmegaConf.to_object(tree)
    except (ConfigError, OmegaConfBaseException) as e:
        _refuse(e)  # here, since Hydra would print its overrides first
    sweep = HydraConfig.get().mode is RunMode.MULTIRUN
    if sweep:  # each job of a sweep is a run of its own, named by what it changes
        changes = HydraConfig.get().job.override_dirname
        config.run.name += f"/{changes}"
        config.run.dir += f"/{changes}"
    from trainer.launching import launch

    code = launch(config)
    if code != ExitCode.FINISHED or not sweep:
        sys.exit(code)


def main() -> None:
    """Entry point; ends the process with the exit code of the run."""
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(sys.argv[1:]))
        return
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that one line of ours is all there is
    register_schemas()
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG_DIR), config_name="trainer")(_run)()
    except (ConfigError, HydraException, OmegaConfBaseException) as e:
        _refuse(e)


def _refuse(error: Exception) -> NoReturn:
    print(explain(error), file=sys.stderr)
    sys.exit(ExitCode.BAD_CONFIG)


if __name__ == "__main__":
    main()
